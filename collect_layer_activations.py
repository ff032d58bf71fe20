"""Stage 2A: statistics of the input of every linear layer in the blocks, per denoising step.

Reads   manifest.json and samples/ of stage 1 (--calib-dir); the model and its precision come from the manifest.
Writes  activations/layer_statistics.json and activations/timestep_stats/step_{key}.npz, step_{key}_index.json;
        activations/partial/ keeps the results per image and step, which is what --resume goes on from.

    python collect_layer_activations.py --calib-dir calibration_data
"""

from contextlib import closing

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from w4a8.options import CollectionOptions

STEP_FILE_SIZES = 4  # of a partial result, that a step's files take: an array a layer, where partials have one an input


@cli.stage(CollectionOptions)
@cli.calib_dir_option
@cli.model_location_options
@click.option("--num-images", type=cli.IMAGES, help="Images to use, evenly over the whole calibration run.")
@click.option("--stride", type=cli.STEPS, help="Use every Nth saved step.")
@cli.text_group_option
@cli.max_bytes_option
@cli.resume_options
def main(options: CollectionOptions) -> None:
    """Stage 2A: statistics of the input of every linear layer, per denoising step."""
    run(options)


def run(options: CollectionOptions) -> None:
    """Plan, load, probe, collect what is left, merge it step by step."""
    import mlx.core as mx

    from calibration_store.files import BackgroundWriter, require_space
    from calibration_store.layout import ActivationPaths
    from calibration_store.manifest import read_manifest
    from calibration_store.npz import npz_bytes
    from calibration_store.partials import COLLECTION, PARTIAL_FORMAT, is_partial_complete
    from calibration_store.schema import of_run
    from calibration_store.stage_folder import StageFolder
    from w4a8.backend.estimates import Estimate
    from w4a8.backend.launched import join
    from w4a8.model.layers import model_layers
    from w4a8.model.parts import TEXT, TRANSFORMER
    from w4a8.model.runs import load_run_pipeline, run_schedule
    from w4a8.passes import StoredPasses, sample_ids_of, select_passes
    from w4a8.statistics.kernels import choose_statistics
    from w4a8.statistics.merge import write_merged_statistics
    from w4a8.statistics.recorders import collect_pass, partial_arrays, write_pass

    manifest, paths = read_manifest(options.calib_dir), ActivationPaths(options.calib_dir)
    ranks = join(options.calib_dir)
    flags = cli.flags(main, num_images="num_images", stride="stride")
    folder = StageFolder(
        paths, paths.collection, COLLECTION, COLLECTION.read, flags, options.resume, options.force, ranks
    )
    images, selection = select_passes(
        manifest, options.num_images, options.stride, folder.before(num_images=options.num_images)
    )
    plan = {"format": PARTIAL_FORMAT, **selection}
    sample_ids, dtype = sample_ids_of(plan), manifest["activation_dtype"]
    click.echo(
        f"{manifest['model_version']}: images {cli.shortened(plan['selected_image_ids'])}, {len(plan['key_timesteps'])} steps each, "
        f"{len(sample_ids)} passes, {dtype}"
    )
    with folder.held(options.dry_run):
        folder.check(plan)
        pipeline = load_run_pipeline(manifest, {TRANSFORMER: dtype, TEXT: dtype}, options.location)
        passes = StoredPasses.open(
            pipeline, options.calib_dir, manifest, images, 1 if options.dry_run else options.text_group
        )
        way = choose_statistics()
        widths = {name: layer.shape[1] for name, layer in model_layers(pipeline.mmdit).items()}
        todo = folder.todo(
            sample_ids, lambda sample_id: is_partial_complete(paths, plan["calibration_run"], *sample_id, widths)
        )
        seconds, found = passes.probe(plan["key_timesteps"][0], lambda one: collect_pass(one, way))
        size = npz_bytes(partial_arrays(found, *sample_ids[0], dtype) | of_run(plan["calibration_run"]))
        done, mine = len(sample_ids) - len(todo), ranks.owned_items(todo, sample_ids)
        total = size * (len(todo) + STEP_FILE_SIZES * len(plan["key_timesteps"]))
        left = Estimate(
            work=f"{len(todo)} of {len(sample_ids)} passes", seconds=seconds * len(todo) / ranks.size, bytes_written=total,
            folder=paths.root, peak_bytes=mx.get_peak_memory(),
        )  # fmt: skip
        click.echo(left)
        require_space(paths.root, total, budget=options.max_bytes)
        if options.dry_run:
            ranks.print_shares([len(one.owned_items(todo, sample_ids)) for one in ranks.every_rank()], "passes")
            return
        if folder.discards():
            passes.check(sample_ids)
        folder.begin(plan)
        with cli.interruptible(lambda: f"finished passes are kept in {paths.partials}"):
            with (
                cli.progress_bar(len(sample_ids), "passes", "pass", initial=done) as bar,
                BackgroundWriter(pending=1) as writer,
                closing(passes.over(mine)) as taken,
            ):
                for one in taken:
                    found = collect_pass(one, way)
                    writer.submit(write_pass, paths, plan["calibration_run"], found, one.image_id, one.step, dtype)
                    ranks.advance(bar)
                writer.drain()
                ranks.complete(bar)
            folder.finish(lambda: write_merged_statistics(paths, manifest, plan, run_schedule(manifest)[0]))
    click.echo(f"wrote {paths.statistics} and {paths.timestep_stats}/")


if __name__ == "__main__":
    main()
