"""Stage 2W: what the blocks saw and gave at the stored latents, for adaptive rounding.

Reads   manifest.json and samples/ of stage 1 (--calib-dir); the model and its precision come from the manifest.
Writes  adaround_cache/metadata.json and adaround_cache/samples/{image:04d}_{step:03d}.npz (float16, uncompressed).

    python cache_adaround_data.py --calib-dir calibration_data --max-bytes 20GB

By default only what enters the first block and what the model gives (--boundaries ends): stage 3W makes the boundaries in
between. 25 x more prompts fit in the same bytes that way at SD3-Medium's size, and prompts are what counts.
"""

from contextlib import closing

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import BOUNDARIES
from w4a8.options import CacheOptions


@cli.stage(CacheOptions)
@cli.calib_dir_option
@cli.model_location_options
@cli.effort_option("late steps of each image")
@click.option(
    "--num-images",
    type=cli.IMAGES,
    help="Images to use, evenly over the whole calibration run.  [default: all that fit --max-bytes, or a quarter of the free disk, 16 GB at most]",
)
@click.option(
    "--stride",
    type=cli.STEPS,
    help="Use every Nth saved step.  [default: by --effort; with --max-bytes what it allows, images first]",
)
@click.option("--steps", help="Saved steps to use instead of every Nth, such as 8,12,16-19: late ones make the image.")
@click.option("--blocks", help="Blocks to cache, such as mm0,mm5.  [default: all]")
@click.option(
    "--boundaries",
    type=click.Choice(BOUNDARIES),
    help="ends: the first block's inputs and the model's output; all: between all blocks, too.  [default: ends, with --blocks all]",
)
@cli.text_group_option
@cli.max_bytes_option
@cli.resume_options
def main(options: CacheOptions) -> None:
    """Stage 2W: cache the inputs and outputs of the blocks."""
    if options.steps is not None and options.stride is not None:
        raise click.UsageError("--steps and --stride exclude each other")
    run(options)


def run(options: CacheOptions) -> None:
    """Plan, load, probe, record what is left, describe the cache."""
    import mlx.core as mx

    from calibration_store.block_cache import (
        ENDS,
        cached_sample_arrays,
        is_cached,
        write_cache_metadata,
        write_cached_sample,
    )
    from calibration_store.cache_plan import CACHE_PLAN, choose_boundaries, plan_cache, read_plan
    from calibration_store.files import BackgroundWriter, require_space
    from calibration_store.layout import BlockCachePaths
    from calibration_store.manifest import read_manifest
    from calibration_store.npz import npz_bytes
    from calibration_store.stage_folder import StageFolder
    from w4a8.backend.estimates import Estimate
    from w4a8.backend.launched import join
    from w4a8.block_recording import Recording
    from w4a8.effort import effort_of
    from w4a8.model.layers import model_layers, num_weights
    from w4a8.model.parts import TEXT, TRANSFORMER
    from w4a8.model.runs import load_run_pipeline
    from w4a8.passes import StoredPasses, choose_amount, sample_ids_of, say_how_few, select_passes

    manifest, paths = read_manifest(options.calib_dir), BlockCachePaths(options.calib_dir)
    ranks = join(options.calib_dir)
    flags = cli.flags(
        main, num_images="num_images", stride="stride", blocks="blocks", boundaries="boundaries", key_timesteps="steps"
    )
    folder = StageFolder(paths, paths.plan, CACHE_PLAN, read_plan, flags, options.resume, options.force, ranks)
    before = folder.before()
    boundaries = choose_boundaries(options.boundaries, options.blocks, before)
    with folder.held(options.dry_run):
        dtype = manifest["activation_dtype"]
        pipeline = load_run_pipeline(manifest, {TRANSFORMER: dtype, TEXT: dtype}, options.location)
        recording = Recording(pipeline.mmdit, options.blocks, boundaries == ENDS)
        sample_bytes = recording.bytes_of_sample(pipeline, manifest["latent_size"], manifest["cfg_scale"] > 0)
        effort = effort_of(options.effort, num_weights(model_layers(pipeline.mmdit).values()))
        num_images, stride, steps = choose_amount(options, effort, manifest, before, sample_bytes)
        num_images = ranks.from_rank_0(num_images)  # by the free disk, which each of them finds at another moment
        images, selection = select_passes(manifest, num_images, stride, folder.before(num_images=num_images), steps)
        plan = plan_cache(selection, options.blocks, boundaries)
        sample_ids, run_id = sample_ids_of(plan), plan["calibration_run"]
        click.echo(
            f"{manifest['model_version']}: images {cli.shortened(plan['selected_image_ids'])}, {len(plan['key_timesteps'])} steps each, "
            f"{len(sample_ids)} samples, {boundaries} of the boundaries"
        )
        if options.num_images is None and num_images < len(manifest["images"]):
            click.echo(say_how_few(num_images, len(manifest["images"]), before is not None))
        folder.check(plan)
        passes = StoredPasses.open(
            pipeline, options.calib_dir, manifest, images, 1 if options.dry_run else options.text_group
        )
        seconds, arrays = recording.probe(passes, sample_ids)
        kept = {key: array.shape for key, array in arrays.items()}
        todo = folder.todo(sample_ids, lambda sample_id: is_cached(paths, run_id, *sample_id, kept))
        size = npz_bytes(cached_sample_arrays(0, 0, arrays, run_id))
        left = Estimate(
            work=f"{len(todo)} of {len(sample_ids)} samples ({cli.format_bytes(size)} each)",
            seconds=seconds * len(todo) / ranks.size, bytes_written=size * len(todo), folder=paths.root, peak_bytes=mx.get_peak_memory(),
        )  # fmt: skip
        click.echo(left)
        require_space(paths.root, left.bytes_written, budget=options.max_bytes)
        if options.dry_run:
            ranks.print_shares([len(one.owned_items(todo, sample_ids)) for one in ranks.every_rank()], "samples")
            return
        if folder.discards():
            passes.check(sample_ids)
        folder.begin(plan)
        with cli.interruptible(lambda: f"finished samples are kept in {paths.samples}"):
            with (
                cli.progress_bar(len(sample_ids), "samples", "sample", initial=len(sample_ids) - len(todo)) as bar,
                BackgroundWriter(pending=0) as writer,  # one sample being written, one being made
                closing(recording.record_all(passes, ranks.owned_items(todo, sample_ids))) as samples,
            ):
                for sample_id, arrays in samples:
                    writer.submit(write_cached_sample, paths, run_id, *sample_id, arrays)
                    ranks.advance(bar)
                writer.drain()
                ranks.complete(bar)
            shapes = recording.shapes(kept)
            folder.finish(lambda: write_cache_metadata(paths, manifest, plan, recording.blocks, recording.keys, shapes))
    click.echo(f"wrote {paths.metadata} and {paths.samples}/")


if __name__ == "__main__":
    main()
