"""Choose the multipliers of migrated inputs (`--migrate`), and note them beside the learned weights."""

import os
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.errors import StoreError
from calibration_store.rest_weights import MIGRATION_REMEDY, read_migration, read_rest, write_migration, write_rest
from calibration_store.weights import BlockLosses, read_losses, write_weights_metadata
from w4a8.backend.progress import progress_bar
from w4a8.model.hooks import substituted_layers
from w4a8.model.layers import model_blocks
from w4a8.model.migration import migrated_together
from w4a8.quantized.activation_rules import Quantize
from w4a8.quantized.dynamic_rules import DynamicPerTensor
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.rest import EVERYTHING, FINAL_LAYER, nearest_dense, rest_places
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.settings import STATIC_RULE, Indices
from w4a8.rounding.training_samples import Samples, TrainingSamples, spread_over
from w4a8.rounding.units import input_rule

WATCHED, TOKENS = 16, 1024  # samples whose inputs are seen, and tokens of them that multipliers are judged on
POWERS = tuple(power / 10 for power in range(11))  # of a channel's reach; 0 leaves it as it is
LARGEST_MULTIPLIER = 256.0  # a multiplier and its inverse are no larger
LEARNED_SHARE = 0.1  # of the error that rounding to nearest makes, learned rounding leaves about a tenth
ReadInput = tuple[str, mx.array, mx.array, int]  # a layer, its weight (out, in), inputs (tokens, in), and bits


def note_migration(run: RoundingRun) -> None:
    """Choose multipliers and write migration.npz, unless an earlier part of this run did; rank 0 does, the others wait.

    Raises StoreError where the file is damaged, or gone although blocks were trained with it.
    """
    if run.ranks.rank == 0 and run.settings.migrate:
        if os.path.lexists(run.paths.migration):
            read_migration(run.paths, run.plan_on_disk)
        elif any(run.paths.block(block).exists() for block in run.blocks):
            raise StoreError(f"{run.paths.migration}: missing; {MIGRATION_REMEDY}")
        else:
            write_migration(run.paths, chosen_multipliers(run), run.plan)
    run.ranks.barrier()


def finish_weights(run: RoundingRun) -> dict[str, BlockLosses]:
    """Write metadata.json, and before it all of adaLN that was migrated into rest.npz; return the losses by unit."""
    if run.settings.migrate:
        trained = {}
        if run.settings.end_to_end and read_losses(run.paths.end_to_end_losses, run.plan)["stages"][0].get("rest"):
            trained = read_rest(run.paths, run.plan)
        write_rest(run.paths, migrated_rest(run.open()) | trained, run.plan)
    return write_weights_metadata(run.paths, run.plan)


def migrated_rest(mmdit: nn.Module) -> dict[str, np.ndarray]:
    """Return adaLN of all blocks of a migrated model, {path: float16 array}."""
    return {
        path: np.array(place.owner[place.key].astype(mx.float16))
        for block, places in rest_places(mmdit, EVERYTHING).items()
        for path, place in places.items()
        if block != FINAL_LAYER and "adaLN" in path
    }


def chosen_multipliers(run: RoundingRun) -> dict[str, np.ndarray]:
    """Return the multipliers (inputs,) of every layer whose input is migrated. Raises StoreError for a damaged cache."""
    mmdit = run.open()
    samples = Samples.of_cache(run.paths.calib_dir, run.cache, mmdit, run.blocks)
    parts = run.settings.micro_batches(spread_over(samples.training, WATCHED))
    found: dict[str, np.ndarray] = {}
    with progress_bar(len(run.blocks), "migration", "block", leave=False) as bar:
        for name, seen in watched_inputs(mmdit, run.blocks, samples, parts):
            block = model_blocks(mmdit)[name]
            layers = {layer.name: layer for layer in block.layers}
            for names in migrated_together(block, [layer for layer in layers if layer not in run.layers]):
                readers = [
                    (each, layers[each].weight, seen[layers[each].input_owner], run.settings.bits(each))
                    for each in names
                ]
                best = least_costly(readers, run.settings.group_size, _rule(run))
                found |= {} if best is None else dict.fromkeys(names, np.array(best))
            bar.update()
    return found


def _rule(run: RoundingRun) -> Quantize | None:
    """Return the rule that multipliers are chosen for; ranges that will be learned are those of the tensor here."""
    settings = run.settings
    if not settings.activation_bits:
        return None
    static = settings.activation_rule == STATIC_RULE
    rule = DynamicPerTensor(settings.activation_bits) if static else input_rule(settings, {}, {})
    return rule.at(0.0, 1)


def watched_inputs(
    mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, parts: Sequence[Indices]
) -> Iterator[tuple[str, Mapping[str, mx.array]]]:
    """Yield each block, and the inputs (TOKENS, channels) of its layers in the unquantized model, by their owners.

    parts: the samples, as many as are run at once.
    """
    batches = [samples.batch(part) for part in parts]
    tokens = [batch.tokens for batch in batches]
    for name in blocks:
        block, seen = model_blocks(mmdit)[name], list[dict[str, mx.array]]()
        owners = list(dict.fromkeys(layer.input_owner for layer in block.layers))
        for index, batch in enumerate(batches):
            watching = QuantizedForward({}, {}, watched=owners)
            with substituted_layers(mmdit, watching.compute, [layer.name for layer in block.layers]):
                tokens[index] = block.run(tokens[index], batch.modulation)
            seen.append({owner: some_rows(x, TOKENS // len(parts)) for owner, x in watching.inputs.items()})
            mx.eval(tokens[index], seen[-1])
        yield name, {owner: mx.concatenate([each[owner] for each in seen]) for owner in owners}


def some_rows(x: mx.array, count: int) -> mx.array:
    """Return `count` rows of x (tokens, channels), evenly spaced; all where there are fewer."""
    return x[mx.array(np.linspace(0, len(x) - 1, min(max(1, count), len(x))).astype(np.int32))]


def least_costly(readers: Sequence[ReadInput], group_size: int, quantize: Quantize | None) -> mx.array | None:
    """Return the multipliers (inputs,) with which the outputs of these layers err least; None where none help.

    Multipliers are a power of the channels' reach, over a power of the weights' reach (SmoothQuant) or not (AWQ), with a
    geometric mean of 1. The error is that of quantized inputs, and a tenth of that of weights rounded to nearest.
    """
    reach = mx.stack([mx.abs(x).max(axis=0) for _, _, x, _ in readers]).max(axis=0)
    size = mx.stack([mx.abs(weight).max(axis=0) for _, weight, _, _ in readers]).max(axis=0)
    best, least = None, np.inf
    for power in POWERS:
        for of_size in (0.0, 1.0 - power) if 0 < power < 1 else (0.0,):
            m = mx.maximum(reach, 1e-6) ** power / mx.maximum(size, 1e-6) ** of_size
            m = mx.clip(m / mx.exp(mx.mean(mx.log(m))), 1 / LARGEST_MULTIPLIER, LARGEST_MULTIPLIER)
            cost = float(sum((error(reader, m, group_size, quantize) for reader in readers), mx.array(0.0)))
            if cost < least:
                best, least = (m if power else None), cost
    return best


def error(reader: ReadInput, m: mx.array, group_size: int, quantize: Quantize | None) -> mx.array:
    """Return the error that a layer's output is expected to have with multipliers m (inputs,), as a share of its power."""
    layer, weight, x, bits = reader
    exact, narrow, wide = x @ weight.T, x / m, weight * m
    power = mx.maximum(mx.mean(mx.square(exact)), 1e-20)
    of_weights = mx.mean(mx.square(narrow @ nearest_dense(wide, bits, group_size).T - exact)) / power
    if quantize is None:
        return LEARNED_SHARE * of_weights
    inputs = quantize(layer, narrow[None, :, None])[0, :, 0]
    return LEARNED_SHARE * of_weights + mx.mean(mx.square(inputs @ wide.T - exact)) / power
