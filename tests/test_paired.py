"""The gain over round-to-nearest, image by image."""

import numpy as np
import pytest

from calibration_store.errors import OptionError
from w4a8.evaluation.gate import GateFailure, check_gate, refuse_gain_without_nearest
from w4a8.evaluation.metrics import add_gains
from w4a8.evaluation.paired import gain_words, nearest_of
from w4a8.report.variant_words import verdict_on


@pytest.mark.parametrize("variant, over", [
    ("w4-adaround", "w4-rtn"), ("w4-adaround-g32+a8-block", "w4-rtn-g32"), ("w4-adaround-r8", "w4-rtn"),
    ("w3-adaround", "w3-rtn"), ("native+a8-token", "w4-rtn"), ("w4-rtn+a8", "w4-rtn"), ("w4-rtn", None), ("a8", None),
    ("no-lora", None), ("w8-adaround", None),
])  # fmt: skip
def test_the_variant_that_is_compared_with(variant, over):
    assert nearest_of(variant, ["w4-rtn", "w4-rtn-g32", "w3-rtn", "a8", variant]) == over
    assert nearest_of(variant, ["a8", "no-lora", "w4-adaround"]) is None


def measured(values):
    found = [value for value in values if value is not None]
    psnr = {"mean": float(np.mean(found)), "worst": min(found), "interval": [0, 1]}
    return {"psnr": psnr, "images": [{"psnr": value} for value in values], "max_step_error": 0.1}


def test_gains_are_differences_of_pairs():
    """Both variants swing by 10 dB over the images, and their difference is known within 0.2 dB."""
    random = np.random.default_rng(0)
    base = random.uniform(25, 45, 40)
    better = base + 1.3 + random.normal(0, 0.4, 40)
    better[7] = base[7] - 2
    results = {"w4-rtn": measured([*base, None]), "w4-adaround": measured([*better, 50.0]), "a8": measured([*base, 1])}
    add_gains(results)
    gain = results["w4-adaround"]["gain"]
    difference = (better - base).astype(np.float64)
    assert gain["over"] == "w4-rtn" and gain["images"] == 40  # the image that equals the original's is left out
    assert gain["mean"] == pytest.approx(difference.mean()) and gain["gained"] == int((difference > 0).sum()) < 40
    half = 1.96 * difference.std(ddof=1) / np.sqrt(40)
    assert gain["interval"] == pytest.approx([difference.mean() - half, difference.mean() + half], abs=0.1)
    assert "gain" not in results["w4-rtn"] and "gain" not in results["a8"]
    assert gain_words(gain) in verdict_on("w4-adaround", results, None)

    check_gate(results, None, None, min_gain=1.0)
    with pytest.raises(GateFailure, match=r"w4-adaround: \+1\.\d dB over w4-rtn.*below --min-gain 2"):
        check_gate(results, None, None, min_gain=2.0)


def test_a_gain_needs_something_to_compare_with():
    refuse_gain_without_nearest(["w4-rtn", "native"], 1.0)
    refuse_gain_without_nearest(["a8"], None)
    with pytest.raises(OptionError, match="--min-gain 1: a gain needs"):
        refuse_gain_without_nearest(["w4-adaround", "a8"], 1.0)
