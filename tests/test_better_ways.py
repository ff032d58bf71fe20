"""The commands at the end of the report: the options that the run's stages had, but for those that make it better."""

from pathlib import Path

from calibration_store.history import HistoryLine
from w4a8.report.run_facts import better_ways, without

RAN = {"began": "2026-11-30T00:00:00+00:00", "seconds": 1.0, "device": "CPU", "w4a8_version": "0.9.0"}
MANIFEST = {"num_images": 8, "model_version": "sd3-emoji"}


def line(script, *arguments, ended="done"):
    return HistoryLine(script=f"{script}.py", arguments=["--calib-dir", "old", *arguments], ended=ended, **RAN)


def test_options_of_the_run_are_kept():
    history = [
        line("generate_calibration_data", "--model", "sd3-emoji", "--effort", "fast", "--num-steps", "20", "--resume"),
        line("cache_adaround_data", "--effort=fast", "--steps", "10,14"),
        line("optimize_adaround", "--iters", "80", "--group-size", "32", "--no-alpha", "--force"),
        line("export_quantized_model", "--format", "gguf", "--force"),
        line("evaluate_quantization", "--num-images", "32", "--variants", "w4-rtn,native"),
        line("evaluate_quantization", "--num-images", "1", ended="interrupted"),
        line("evaluate_quantization", "--num-images", "2", "--variants", "a8", "--output=runs/demo/evaluation_default"),
        line("evaluate_quantization", "--config", "runs/demo/p999.json", "--variants", "a8"),
        line("export_quantized_model", "--output", "elsewhere"),
    ]
    (whole, recipe), (more, lines), (_, longer) = better_ways(MANIFEST, Path("runs/demo"), history)
    assert recipe == ["EFFORT=good runs/emoji.sh runs/demo-good"] and "whole road" in whole and "images" in more
    assert [each.split(maxsplit=1)[1] for each in lines] == [
        "generate_calibration_data.py --model sd3-emoji --num-steps 20 --num-images 16 --resume --calib-dir runs/demo",
        "cache_adaround_data.py --steps 10,14 --force --calib-dir runs/demo",
        "optimize_adaround.py --group-size 32 --no-alpha --effort good --force --calib-dir runs/demo",
        "export_quantized_model.py --format gguf --force --calib-dir runs/demo",
        "evaluate_quantization.py --num-images 32 --variants w4-rtn,native --force --calib-dir runs/demo",
        "report_calibration.py --calib-dir runs/demo",
    ]
    assert [each.split(maxsplit=1)[1] for each in longer[1:]] == [each.split(maxsplit=1)[1] for each in lines[3:]]
    assert "--effort best" in longer[0]


def test_a_run_without_a_history_and_of_another_model():
    ways = better_ways({**MANIFEST, "model_version": "argmaxinc/mlx-FLUX.1-schnell"}, Path("x"), [])
    assert len(ways) == 2 and ways[0][1][0].endswith(
        "generate_calibration_data.py --num-images 16 --resume --calib-dir x"
    )
    assert without(["--a", "1", "--b", "--c=2", "d"], {"--a", "--c"}, {"--b"}) == ["d"]
