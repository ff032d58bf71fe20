"""Load exports of FLUX by mflux's own loader into its own transformer, and compare its velocity with ours.

    .venv-clients/bin/python tests/clients/in_mflux.py /tmp/clients/f1 /tmp/clients/d1

Every parameter of mflux's transformer must come from the file, in its shape. mflux computes in MLX, here on a CPU; its
Metal back end was not tried. The reference is ours, computed from the same packed codes in float32.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.weights.loading.loaded_weights import LoadedWeights, MetaData
from mflux.models.common.weights.loading.weight_applier import WeightApplier
from mflux.models.common.weights.loading.weight_loader import WeightLoader
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
from mlx.utils import tree_flatten


def main() -> None:
    """Print a row for each folder; end with 1 where a parameter lacks, or the velocity is another."""
    mx.set_default_device(mx.cpu)
    (component,) = [each for each in FluxWeightDefinition.get_components() if each.name == "transformer"]
    failed = False
    for folder in map(Path, sys.argv[1:]):
        arrays, level, version = WeightLoader._load_component(folder / "mflux", component)
        config = ModelConfig.dev() if folder.name.startswith("d") else ModelConfig.schnell()
        model = Transformer(config, num_transformer_blocks=1, num_single_transformer_blocks=1)
        weights = LoadedWeights({"transformer": arrays}, MetaData(quantization_level=level, mflux_version=version))
        WeightApplier.apply_and_quantize_single(
            weights, model, component, None, FluxWeightDefinition.quantization_predicate
        )
        own, given = (dict(tree_flatten(each)) for each in (model.parameters(), arrays))
        own = {name: array for name, array in own.items() if not name.startswith("pos_embed")}
        wrong = sorted(name for name in own if name not in given or own[name].shape != given[name].shape)
        unknown = sorted(given.keys() - own.keys())
        model.set_dtype(mx.float32)
        with np.load(folder / "ours.npz") as ours:
            found, expected = velocity(model, ours), ours["mflux"].astype(np.float64)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        packed = sum(name.endswith(".scales") for name in given)
        print(f"mflux {version}, {folder.name}: {level} bits, {packed} packed layers, {len(wrong)} parameters lack, "
              f"{len(unknown)} unknown, velocity {error:.6f}", *wrong[:3], *unknown[:3])  # fmt: skip
        failed |= bool(wrong or unknown or error > 1e-2)
    sys.exit(failed)


def velocity(model: Transformer, ours: np.lib.npyio.NpzFile) -> np.ndarray:
    """Return mflux's velocity (1, h, w, 16) at the inputs of ours.npz."""
    _, height, width, _ = ours["latent"].shape
    rows, columns = height // 2, width // 2
    patches = ours["latent"].reshape(1, rows, 2, columns, 2, 16).transpose(0, 1, 3, 5, 2, 4)
    sigmas = mx.array([float(ours["timestep"]) / 1000])
    run = SimpleNamespace(
        height=8 * height, width=8 * width, scheduler=SimpleNamespace(sigmas=sigmas), num_train_steps=1000,
        guidance=float(ours["guidance"]), precision=mx.float32,
    )  # fmt: skip
    tokens = mx.array(patches.reshape(1, rows * columns, 64))
    found = model(
        t=0,
        config=run,
        hidden_states=tokens,
        prompt_embeds=mx.array(ours["text"]),
        pooled_prompt_embeds=mx.array(ours["pooled"]),
    )
    found = np.array(found.astype(mx.float32), np.float64).reshape(1, rows, columns, 16, 2, 2)
    return found.transpose(0, 1, 4, 2, 5, 3).reshape(1, height, width, 16)


if __name__ == "__main__":
    main()
