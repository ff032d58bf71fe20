"""Options and files have one set of limits: a file that notes an option takes the least and the largest number that click takes."""

import importlib
import json

import click
import pytest
from conftest import ROOT

from calibration_store.cache_plan import CACHE_PLAN
from calibration_store.configs import MULTITIER_CONFIG, W4A8_CONFIG
from calibration_store.evaluation import METRICS
from calibration_store.manifest import MANIFEST, prompts_digest
from calibration_store.partials import COLLECTION
from calibration_store.weights import WEIGHTS_METADATA, WEIGHTS_PLAN

DIGEST = "0" * 64
MANIFEST_PLAN = {
    "format": "calibration_manifest_v1", "model_version": "m", "num_steps": 1, "cfg_scale": 1.0, "negative_prompt": "",
    "latent_size": [2, 2], "use_t5": False, "sampler_shift": 3.0, "seed_base": 0, "activation_dtype": "float16", "stride": 1,
    "batch_size": 1, "batch_option": 1, "save_images": True, "num_images": 1, "n_completed": 0, "images": [],
    "prompts_sha256": prompts_digest(["a"]), "package_versions": {}, "weights_fingerprint": DIGEST,
}  # fmt: skip
PASSES = {"calibration_run": DIGEST, "num_images": 1, "stride": 1, "selected_image_ids": [0], "key_timesteps": [0]}
TRAINING = {
    "format": "adaround_weights_v1", "model_version": "m", "calibration_run": DIGEST, "weights_fingerprint": DIGEST,
    "unit": "block", "block_names": ["mm0"], "iters": 10, "batch_size": 1, "weight_bits": 4, "activation_bits": 8,
    "group_size": 64, "rounding": "ste", "qdrop": 0.5, "lr_alpha": 0.004, "lr_activation_scale": 0.005,
    "regularizer_weight": 0.01, "seed": 0, "micro_batch": 1, "activation_rule": "token", "end_to_end": 0, "average_bits": None,
    "num_samples": 1, "selected_image_ids": [0], "key_timesteps": [0],
}  # fmt: skip
CONFIG = {"sigma_map": {"0": 1.0}, "per_timestep": {"0": {"mm0.img.attn.q_proj": {"bits": 8, "scale": 1.0}}}}
FIGURES = {
    "format": "evaluation_v1", "prompts": ["a"], "overlap_with_calibration": 0, "num_steps": 1, "cfg_weight": 1.0,
    "negative_prompt": "", "seed": 0, "model_version": "m", "weights_fingerprint": DIGEST, "dtype": "float32",
    "low_psnr": 30.0, "variants": {},
}  # fmt: skip


def at(key, content):
    """Return a function that puts a value at a key of a file's content; a dot leads into an object."""

    def noted(value):
        outer, _, inner = key.rpartition(".")
        return content | ({outer: content.get(outer, {}) | {inner: value}} if outer else {key: value})

    return noted


def side(value):
    return MANIFEST_PLAN | {"latent_size": [value, value]}


def threshold(name):
    return MULTITIER_CONFIG, at(f"thresholds.{name}", CONFIG | {"format": MULTITIER_CONFIG.name})


GENERATED = {name: (MANIFEST, at(key, MANIFEST_PLAN)) for name, key in {
    "num_images": "num_images", "num_steps": "num_steps", "cfg_weight": "cfg_scale", "seed": "seed_base", "stride": "stride",
    "batch_size": "batch_option", "guidance": "guidance", "shift": "shift",
}.items()}  # fmt: skip
TRAINED = ("iters", "unrolled", "batch_size", "micro_batch", "activation_bits", "average_bits", "end_to_end", "qdrop", "lr_alpha",
           "lr_activation_scale", "regularizer_weight", "seed")  # fmt: skip
NOTED = {  # script -> option -> (the format, content with a value) of the file that keeps it
    "generate_calibration_data": GENERATED | {"latent_size": (MANIFEST, side)},
    "cache_adaround_data": {
        name: (CACHE_PLAN, at(name, PASSES | {"format": CACHE_PLAN.name, "boundaries": "ends", "blocks": None}))
        for name in ("num_images", "stride")
    },
    "collect_layer_activations": {
        name: (COLLECTION, at(name, PASSES | {"format": COLLECTION.name})) for name in ("num_images", "stride")
    },
    "optimize_adaround": {name: (WEIGHTS_PLAN, at(name, TRAINING)) for name in TRAINED},
    "analyze_activations": {
        "outlier_threshold": (W4A8_CONFIG, at("summary.outlier_threshold", CONFIG | {"format": W4A8_CONFIG.name}))
    },
    "analyze_activations_multitier": {
        name: threshold(name)
        for name in (
            "a4_threshold",
            "a6_threshold",
            "shifted_a4_threshold",
            "shifted_a6_threshold",
            "average_bits",
            "min_sqnr",
        )
    },
    "evaluate_quantization": {name: (METRICS, at(name, FIGURES)) for name in ("num_steps", "cfg_weight", "seed")},
}
NOWHERE = {  # options that no file keeps: they say how the work is done, or are in a picture's text
    "text_group", "checkpoint_seconds", "min_psnr", "max_step_error", "min_gain", "step_effects",
    ("evaluate_quantization", "num_images"), ("evaluate_quantization", "batch_size"),
    *(("draw_images", name) for name in ("seed", "num_steps", "cfg_weight", "latent_size", "width", "height", "guidance", "shift", "batch_size")),
}  # fmt: skip
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "hooks")


def numbers(script):
    """Return the options of a script that take numbers."""
    kinds = (click.types.IntParamType, click.types.FloatParamType)
    return [option for option in importlib.import_module(script).main.params if isinstance(option.type, kinds)]


CASES = [(script, option) for script in SCRIPTS for option in numbers(script)]


@pytest.mark.parametrize(("script", "option"), CASES, ids=[f"{script} {option.name}" for script, option in CASES])
def test_what_an_option_takes_is_read_back(tmp_path, script, option):
    assert option.type.min is not None and option.type.max is not None, "an option without limits"
    if option.name in NOWHERE or (script, option.name) in NOWHERE:
        return
    kind, noted = NOTED[script][option.name]
    for value in {option.type.min, option.type.max} - {-1 if script == "draw_images" else None}:
        content = noted(value)
        (tmp_path / "file.json").write_bytes(kind.encode(content))
        read = json.loads(json.dumps(kind.read(tmp_path / "file.json")))
        assert all(read[key] == json.loads(json.dumps(content[key])) for key in read)
        if kind is WEIGHTS_PLAN:  # what is noted at the end
            WEIGHTS_METADATA.encode(content)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_seeds_of_64_bits_draw(tmp_path, seed):
    from w4a8.model.sampling import initial_noise

    noise = initial_noise(seed, (4, 4))
    assert noise.shape == (1, 4, 4, 16) and bool((noise != initial_noise(seed - 2**32, (4, 4))).any())
