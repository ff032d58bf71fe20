"""Compare the effects of single steps with sampling whose weights are exchanged for one step."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import generate, invoke
from finished_run import one_line

from w4a8.evaluation.step_effects import num_passes, variant_of_steps
from w4a8.evaluation.variants import make_variant
from w4a8.model.catalog import describe_model
from w4a8.model.loading import load_pipeline, whole_model
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.sampling import euler_steps, initial_noise
from w4a8.report.run_facts import effects_of

STEPS, IMAGES = 4, 1


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the folder of a run whose evaluation has measured single steps."""
    folder = tmp_path_factory.mktemp("steps") / "run"
    assert generate("--num-images", 1, "--num-steps", STEPS, "--no-images", "--calib-dir", folder).exit_code == 0
    options = ("--num-images", 3, "--variants", "a8-token,w4-rtn", "--step-effects", IMAGES)
    done = invoke("evaluate_quantization", "--calib-dir", folder, *options)
    assert done.exit_code == 0, done.output
    assert f"w4-rtn at one step alone ({IMAGES} image)" in done.stdout and "step   3" in done.stdout
    return folder


@pytest.mark.slow
def test_single_steps_are_those_of_a_sampling_with_exchanged_weights(measured):
    metrics = json.loads((measured / "evaluation/metrics.json").read_bytes())
    effects = metrics["step_effects"]
    assert effects["variant"] == "w4-rtn" and [row["step"] for row in effects["steps"]] == list(range(STEPS))
    pipeline = load_pipeline(describe_model("sd3-emoji"), whole_model("float32"))
    variant = make_variant("w4-rtn", measured, None, "auto")
    sigmas = np.array([row["sigma"] for row in effects["steps"]] + [0.0])

    def sampled(quantized_step):
        """Sample one image; the weights of one step are exchanged by a run of its own from the latent before it."""
        text = encode_prompts(pipeline, metrics["prompts"][:1], metrics["cfg_weight"])
        noise = initial_noise(metrics["seed"], (16, 16))

        def states():
            return [np.array(state.x) for state in euler_steps(pipeline, text, noise, STEPS, metrics["cfg_weight"])]

        original = states()
        if quantized_step is None:
            return original
        x = original[quantized_step]
        for step in range(quantized_step, STEPS):

            def one(step=step, x=x):
                timestep = mx.full((2,), 1000 * sigmas[step])
                modulation = pipeline.mmdit.y_embedder(text.pooled)[:, None, None, :] + pipeline.mmdit.t_embedder(
                    timestep
                )
                streams = [s for b in pipeline.mmdit.multimodal_transformer_blocks for s in
                           (b.image_transformer_block, b.text_transformer_block)]  # fmt: skip
                for module in [*streams, pipeline.mmdit.final_layer]:
                    module["_modulation_params"] = {0.0: module.adaLN_modulation(modulation)}
                rows = mx.concatenate([mx.array(x)] * 2)
                c, u = mx.split(pipeline.mmdit(rows, mx.expand_dims(text.tokens, 2), mx.zeros((1,))), 2)
                return np.array(u + metrics["cfg_weight"] * (c - u))

            if step == quantized_step:
                with variant.in_place(pipeline):
                    slope = one()
            else:
                slope = one()
            x = x + (sigmas[step + 1] - sigmas[step]) * slope
            if step == quantized_step:
                put_in = np.linalg.norm(x - original[step + 1]), np.linalg.norm(original[step + 1] - original[step])
        moved = np.linalg.norm(x - original[-1])
        return put_in[0] / put_in[1], moved / np.linalg.norm(original[-1]), moved / put_in[0]

    with np.load(next((measured / "evaluation").rglob("fp*.npz"))) as stored:
        np.testing.assert_allclose(np.stack(sampled(None))[:, 0], stored["latents"][0], atol=2e-4)
    for step in (0, 2, 3):
        alone = json.loads((measured / "evaluation/metrics.json").read_bytes())["step_effects"]["steps"][step]
        found = sampled(step)
        for key, value in zip(("velocity_error", "moves", "left"), found, strict=True):
            assert value == pytest.approx(alone[key], rel=0.02), (step, key)
    last = effects["steps"][-1]
    assert last["left"] == pytest.approx(1, abs=1e-6)  # nothing comes after it


def test_the_report_names_the_steps_that_make_the_image(measured):
    effects = effects_of({"variant": "w4-rtn", "images": 2, "steps": [
        {"step": step, "sigma": 0.5, "velocity_error": 0.1, "moves": moves, "left": 0.5}
        for step, moves in enumerate((0.01, 0.02, 0.5, 0.07))
    ]})  # fmt: skip
    assert effects["sentence"].startswith("Step 2 of 4 (counted from 0) causes 80% of") and effects_of(None) is None
    done = invoke("report_calibration", "--calib-dir", measured)
    assert done.exit_code == 0, done.output
    page = (measured / "report/index.html").read_text()
    assert "What an error at each step does to the image" in page and page.count("<meter") == STEPS


def test_weights_are_needed(measured):
    assert num_passes(4, 2) == 2 * (4 + 6) and variant_of_steps([]) is None
    options = ("--variants", "a8-token", "--step-effects", 1)
    one_line(invoke("evaluate_quantization", "--calib-dir", measured, *options), "--step-effects 1: needs a variant")
