"""report_calibration.py: the page holds what the folder holds, and works in a browser (headless Chromium, where there is one)."""

import html
import json
import re
import shutil

import numpy as np
import pytest
from conftest import invoke
from devtools import running
from finished_run import finished_run, one_line
from PIL import Image

from calibration_store.layout import ReportPaths
from calibration_store.safetensors_header import weight_sizes
from calibration_store.sensitivity import write_sensitivity
from calibration_store.sizes import format_bytes
from tools.browser import find_browser
from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.report.comparison import PICTURE_BYTES
from w4a8.report.page import describe_folder, write_page
from w4a8.report.page_values import picture
from w4a8.report.variant_words import verdict_on, what_it_is

CHROMIUM = find_browser()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: python tools/browser.py fetches one")


@pytest.fixture(scope="module")
def browser():
    with running(*CHROMIUM) as started:
        yield started


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Return a run with every stage, and its report."""
    folder = shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp("report") / "run")
    for stage, *options in (
        ("export_quantized_model", "--activations", "a8"),
        ("evaluate_quantization", "--num-images", 3, "--num-steps", 2, "--variants", "w4-rtn,native"),
        ("report_calibration",),
    ):
        done = invoke(stage, "--calib-dir", folder, *options)
        assert done.exit_code == 0, done.output
    return folder, done.output


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def test_the_page_holds_what_the_folder_holds(reported):
    folder, output = reported
    page = folder / "report/index.html"
    assert (
        "the page holds: the run, its prompts and pictures, ranges of the activations, learned rounding, the model"
        in output
    )
    text, data = page.read_text(), data_of(page)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "url(" not in text  # nothing is fetched
    config = json.loads((folder / "activations/quant_config.json").read_bytes())
    layers = {layer["name"]: layer for layer in data["activations"]["layers"]}
    for position, step in enumerate(map(str, data["activations"]["steps"])):
        for name, entry in config["per_timestep"][step].items():
            assert layers[name]["range"][position] == pytest.approx(entry["clipping_range"], rel=1e-3)
    metrics = json.loads((folder / "evaluation/metrics.json").read_bytes())["variants"]
    assert [row["name"] for row in data["comparison"]["rows"]] == list(metrics) == ["w4-rtn", "native"]
    for name, pairs in data["comparison"]["pairs"].items():
        damage = [metrics[name]["images"][pair["image"]]["psnr"] for pair in pairs]
        assert len(damage) == 3 and damage == sorted(damage)
    units = data["weights"]["units"]
    stages = json.loads((folder / "adaround_weights/metadata.json").read_bytes())["losses"]
    for name, unit in units.items():
        stage = stages[name]["stages"][0]
        assert unit["end"] == pytest.approx(stage["end"] / stage["nearest"], rel=1e-3)
    assert len(units) == 8 and all(len(unit["curve"]) == 10 for unit in units.values())
    assert all(np.isfinite(unit["curve"]).all() for unit in units.values())
    assert "mmdit.safetensors" in text and data["next"] == []
    found = re.search(r"The model on the disk \(native\): ([0-9.]+) dB on average .* Rounding to nearest alone gives ([0-9.]+) dB", text)  # fmt: skip
    means = (metrics[name]["psnr"]["mean"] for name in ("native", "w4-rtn"))
    assert found and found.groups() == tuple(f"{mean:.1f}" for mean in means)
    original = sum(2 * elements for _, elements in weight_sizes(BUNDLED_FOLDER / "mmdit.safetensors").values())
    assert f"0.57 × its float16 ({format_bytes(original)})" in text  # as stage 5 says it
    assert f'draw_images.py --model {folder}/quantized_model "your prompt"' in html.unescape(text)


def test_a_folder_with_less_says_how_to_go_on(reported, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(reported[0] / "manifest.json", folder)
    one_line(invoke("report_calibration", "--calib-dir", folder), "images/0000.png: not found")
    shutil.copytree(reported[0] / "images", folder / "images")
    done = invoke("report_calibration", "--calib-dir", folder)
    assert done.exit_code == 0 and "not there yet: learned rounding" in done.output, done.output
    text = (folder / "report/index.html").read_text()
    assert "How to go on" in text and "optimize_adaround.py" in text and 'id="activations"' not in text
    one_line(invoke("report_calibration", "--calib-dir", tmp_path / "nothing"), "no such folder; there are")
    assert not (tmp_path / "nothing").exists()


def test_prompts_are_text_and_nothing_else(reported, tmp_path):
    page = describe_folder(reported[0])
    page["drawn"]["pictures"][0]["prompt"] = bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    page["comparison"]["prompts"][0] = bad
    write_page(ReportPaths(tmp_path), page)
    text = (tmp_path / "index.html").read_text()
    assert (
        bad not in text
        and html.escape(bad) in text
        and data_of(tmp_path / "index.html")["comparison"]["prompts"][0] == bad
    )


def test_what_another_run_left_is_left_out(reported, tmp_path):
    """Give the run another seed, as stage 1 --force does: the report shows no result of the old run."""
    folder = shutil.copytree(reported[0], tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["seed_base"] += 1
    for image in manifest["images"]:
        image["seed"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = invoke("report_calibration", "--calib-dir", folder)
    assert done.exit_code == 0, done.output
    assert "the page holds: the run, its prompts and pictures\n" in done.stdout
    for what in (
        "learned rounding",
        "ranges of the activations",
        "the model on the disk",
        "original against quantized",
    ):
        assert f"left out: of another run: {what} (" in done.stdout, done.stdout
    assert "images/0000.png: of another image or another calibration run, left out" in done.stderr
    data = data_of(folder / "report/index.html")
    assert {"activations", "weights", "export", "comparison"}.isdisjoint(data) and len(data["next"]) == 4


def test_other_evaluations_and_the_way_on(reported, tmp_path):
    """An evaluation of --config has a table of its own; commands have the folder, and stages that are missing come first."""
    folder = shutil.copytree(reported[0], tmp_path / "run")
    shutil.copytree(folder / "evaluation", folder / "evaluation_mine")
    shutil.rmtree(folder / "quantized_model")
    done = invoke("report_calibration", "--calib-dir", folder)
    assert "more evaluations" in done.stdout and f"export_quantized_model.py --calib-dir {folder})" in done.stdout
    page = folder / "report/index.html"
    data, text = data_of(page), page.read_text()
    assert [(other["folder"], other["images"]) for other in data["others"]] == [("evaluation_mine", 3)]
    assert data["others"][0]["rows"] == data["comparison"]["rows"] and "evaluation_mine: 3 images, 2 steps" in text
    assert "--num-images 6 --resume --calib-dir" in text and "Draw with it" not in text
    metrics = json.loads((folder / "evaluation_mine/metrics.json").read_bytes())
    (folder / "evaluation_mine/metrics.json").write_text(json.dumps({**metrics, "calibration_run": "0" * 64}))
    done = invoke("report_calibration", "--calib-dir", folder)
    assert "evaluation_mine/metrics.json: made from another calibration run, left out" in done.stderr


def test_a_foreign_page_and_damaged_files_are_one_line(reported, tmp_path):
    folder = shutil.copytree(reported[0], tmp_path / "run")
    (folder / "report/index.html").write_text("<html>mine</html>")
    one_line(invoke("report_calibration", "--calib-dir", folder), "not written by this script")
    assert invoke("report_calibration", "--calib-dir", folder, "--force", "--dry-run").exit_code == 0
    assert (folder / "report/index.html").read_text() == "<html>mine</html>"
    metrics = folder / "evaluation/metrics.json"
    metrics.write_text(metrics.read_text().replace('"psnr"', '"snr"', 1))
    one_line(invoke("report_calibration", "--calib-dir", folder, "--force"), "metrics.json")
    content = json.loads((reported[0] / "evaluation/metrics.json").read_bytes())
    content["variants"]["native"]["psnr"]["worst"] = None
    metrics.write_text(json.dumps(content))
    one_line(
        invoke("report_calibration", "--calib-dir", folder, "--force"),
        "native: psnr has some of mean, median and worst",
    )
    run = next((reported[0] / "evaluation/runs").glob("native_*.npz"))
    metrics.write_bytes((reported[0] / "evaluation/metrics.json").read_bytes())
    (folder / "evaluation/runs" / run.name).write_bytes(run.read_bytes()[:-400])
    one_line(invoke("report_calibration", "--calib-dir", folder, "--force"), run.name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w4-rtn", "weights rounded to the nearest 4-bit code"),
        ("w4-rtn-g0", "weights rounded to the nearest 4-bit code, a scale per channel"),
        ("w6-adaround-r8", "learned 6-bit rounding, the rest at 8"),
        ("native+a8-token", "the model on the disk, inputs at 8 bits, a range for each token"),
        ("a6", "inputs at 6 bits, the config's ranges"),
        ("w4-adaround+multitier", "learned 4-bit rounding, inputs at 4, 6 or 8 bits (experimental)"),
    ],
)
def test_variants_in_words(name, words):
    assert what_it_is(name) == words


def test_the_verdict_is_beside_the_same_bits():
    found = {name: {"psnr": {"mean": mean, "worst": mean - 5}} for name, mean in (("w8-rtn", 55.0), ("w4-rtn", 30.0), ("w4-adaround", 39.96))}  # fmt: skip
    said = verdict_on("w4-adaround", found, None)
    assert said == "Learned 4-bit rounding (w4-adaround): 40.0 dB on average (nobody sees a difference), the worst image 35.0 dB. Rounding to nearest alone gives 30.0 dB."  # fmt: skip
    assert "55.0 dB" in verdict_on("native", found | {"native": found["w4-adaround"]}, 8)
    assert verdict_on("native", {"native": {"psnr": {"mean": None}}}, 4) is None and verdict_on(None, {}, None) is None


def test_which_layers_matter(reported, tmp_path):
    """sensitivity.json, where stage 3W measured it: most first, and not that of another run."""
    folder = shutil.copytree(reported[0], tmp_path / "run")
    layers = {name: {"weights": {"4": error, "8": error / 300}, "size": 4096} for name, error in (("mm0.img.mlp.fc1", 1e-6), ("mm1.txt.mlp.fc2", 4e-6))}  # fmt: skip
    metadata = json.loads((folder / "adaround_weights/metadata.json").read_bytes())
    content = {key: metadata[key] for key in ("calibration_run", "weights_fingerprint")} | {
        "selected_image_ids": metadata["selected_image_ids"], "key_timesteps": [0, 1], "group_size": 64, "num_samples": 7, "sigmas": [1.0, 0.5],
        "layers": layers, "inputs": {name: [1e-3, 2e-3] for name in layers},
    }  # fmt: skip
    write_sensitivity(folder, content)
    done = invoke("report_calibration", "--calib-dir", folder)
    assert done.exit_code == 0, done.output
    found = data_of(folder / "report/index.html")["sensitivity"]["layers"]
    assert [(layer["name"], layer["share"]) for layer in found] == [("mm1.txt.mlp.fc2", 1), ("mm0.img.mlp.fc1", 0.5)]
    assert (
        found[0]["sqnr"] == {"4": 54.0, "8": 78.8} and 'id="sensitivity"' in (folder / "report/index.html").read_text()
    )
    write_sensitivity(folder, content | {"calibration_run": "0" * 64})
    done = invoke("report_calibration", "--calib-dir", folder)
    assert done.exit_code == 0 and "sensitivity.json: made from another calibration run, left out" in done.stderr
    assert "sensitivity" not in data_of(folder / "report/index.html")


@pytest.fixture(scope="module")
def without_figures(reported, tmp_path_factory):
    """Return a page with equal images, whose PSNR is null in metrics.json, as FLIP is where it is not installed."""
    folder = shutil.copytree(reported[0], tmp_path_factory.mktemp("equal") / "run")
    path = folder / "evaluation/metrics.json"
    metrics = json.loads(path.read_bytes())
    row = metrics["variants"]["native"]
    row["psnr"] |= {"mean": None, "median": None, "worst": None, "interval": [None, None]}
    row["flip"] |= {"mean": None, "median": None, "worst": None, "interval": [None, None]}
    for image in row["images"]:
        image |= {"psnr": None, "flip": None}
    metrics["variants"]["w4-rtn"]["images"][1]["psnr"] = None
    path.write_text(json.dumps(metrics))
    done = invoke("report_calibration", "--calib-dir", folder)
    assert done.exit_code == 0, done.output
    return folder / "report/index.html"


def test_equal_images_and_what_was_not_measured_have_no_figure(without_figures):
    pairs = data_of(without_figures)["comparison"]["pairs"]
    assert pairs["w4-rtn"][-1]["image"] == 1 and "<b>equal</b>" in without_figures.read_text()


def test_damaged_pictures_and_a_config_with_gaps(reported, tmp_path):
    folder = shutil.copytree(reported[0], tmp_path / "run")
    path = folder / "activations/quant_config.json"
    config = json.loads(path.read_bytes())
    last = config["per_timestep"][list(config["per_timestep"])[-1]]
    del last["mm0.img.mlp.fc1"]
    path.write_text(json.dumps(config | {"outlier_config": None}))
    assert invoke("report_calibration", "--calib-dir", folder).exit_code == 0
    assert "mm0.img.mlp.fc1" not in {
        layer["name"] for layer in data_of(folder / "report/index.html")["activations"]["layers"]
    }
    before = (folder / "report/index.html").read_bytes()
    picture_path = folder / "images/0001.png"
    picture_path.write_bytes(picture_path.read_bytes()[:300])
    one_line(invoke("report_calibration", "--calib-dir", folder), "images/0001.png: damaged")
    assert (folder / "report/index.html").read_bytes() == before


# --- in a browser -------------------------------------------------------------------------------------------


@needs_browser
def test_filter_and_slider_work(reported, browser):
    page = browser.open(reported[0] / "report/index.html")
    found = page.run(
        """
        const count = () => document.getElementById("count").textContent;
        const choose = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("change")); };
        const before = count(); choose("kind", "img.mlp.fc2"); const kind = count(); choose("block", "mm1"); const both = count();
        const two = document.querySelector(".pair .two"), slider = two.querySelector("input");
        slider.value = 20; slider.dispatchEvent(new Event("input"));
        const clip = getComputedStyle(two.querySelector(".original")).clipPath;
        const first = document.querySelectorAll(".pair").length; choose("variant", "native");
        const curve = document.querySelector("canvas.curve");
        const inked = curve.getContext("2d").getImageData(0, 0, curve.width, curve.height).data.some((value) => value > 0);
        document.getElementById("fold").open = true;
        const heat = document.getElementById("heat");
        heat.dispatchEvent(new PointerEvent("pointermove", { clientX: heat.getBoundingClientRect().x + 200, clientY: heat.getBoundingClientRect().y + 4 }));
        return { before, kind, both, clip, first, second: document.querySelectorAll(".pair").length, inked, hover: document.getElementById("hover").textContent };
        """
    )
    assert page.faults == []
    assert (found["before"], found["kind"], found["both"]) == ("93 of 93 layers", "8 of 93 layers", "1 of 93 layers")
    assert "80%" in found["clip"] and found["first"] == found["second"] == 3 and found["inked"]
    assert found["hover"].startswith("mm1.img.mlp.fc2 · step 0, sigma 1: range ")


@needs_browser
@pytest.mark.parametrize("width", [390, 820, 1280, 1440])
def test_no_page_is_wider_than_its_window(reported, browser, width):
    page = browser.open(reported[0] / "report/index.html", width, 844)
    inner, scrolled = page.run(
        "const e = document.documentElement; return [innerWidth, e.scrollWidth - e.clientWidth];"
    )
    assert (inner, scrolled) == (width, 0)
    cut = page.run(
        """
        document.getElementById("fold").open = true;
        const window_ = document.documentElement.clientWidth;
        return [...document.querySelectorAll("table.cards th, table.cards td")].filter((e) => e.getBoundingClientRect().right > window_).length;
        """
    )
    hidden = page.run(
        """
        const header = document.querySelector("header"), found = [];
        for (const link of document.querySelectorAll("nav a")) {
          link.click();
          const stuck = getComputedStyle(header).position === "sticky" ? header.getBoundingClientRect().bottom : 0;
          const top = document.querySelector(link.getAttribute("href") + " h2").getBoundingClientRect().top;
          if (top < stuck - 1) found.push([link.textContent, top, stuck]);
        }
        return found;
        """
    )
    assert (cut, hidden) == (0, [])
    assert page.faults == []


@needs_browser
def test_cells_answer_taps_and_keys_and_pairs_have_buttons(reported, browser):
    page = browser.open(reported[0] / "report/index.html")
    found = page.run(
        """
        document.getElementById("fold").open = true;
        const heat = document.getElementById("heat"), hover = () => document.getElementById("hover").textContent;
        const at = heat.getBoundingClientRect();
        heat.dispatchEvent(new PointerEvent("pointerdown", { clientX: at.x + 195, clientY: at.y + 20 }));
        const tapped = hover();
        for (const key of ["ArrowUp", "ArrowRight"]) heat.dispatchEvent(new KeyboardEvent("keydown", { key }));
        const keyed = hover(), two = document.querySelector(".pair .two"), original = two.querySelector(".original");
        document.getElementById("difference").click();
        const mixed = [getComputedStyle(original).mixBlendMode, getComputedStyle(two).filter];
        document.getElementById("flip").click();
        const flipped = [getComputedStyle(original).animationName, getComputedStyle(original).mixBlendMode];
        document.getElementById("flip").click();
        return { tapped, keyed, mixed, flipped, plain: getComputedStyle(original).animationName };
        """
    )
    assert page.faults == []
    assert "step 0" in found["tapped"] and "step 2" in found["keyed"]
    assert found["tapped"].split(" · ")[0] != found["keyed"].split(" · ")[0]
    assert found["mixed"] == ["difference", "brightness(4)"] and found["flipped"] == ["flip", "normal"]
    assert found["plain"] == "none"


@needs_browser
def test_faults_are_seen(browser, tmp_path):
    """A page with an exception and a picture that is not there: the tests above would notice."""
    (tmp_path / "page.html").write_text("<img src=none.png><script>nothing.here()</script>")
    assert len(browser.open(tmp_path / "page.html").faults) == 2


@needs_browser
def test_equal_images_can_be_chosen(without_figures, browser):
    page = browser.open(without_figures)
    page.run('const e = document.getElementById("variant"); e.value = "native"; e.dispatchEvent(new Event("change"));')
    assert page.faults == []


@pytest.fixture(scope="module")
def large_page(reported, tmp_path_factory):
    """285 layers, 25 steps, and more pictures than fit."""
    page, random = describe_folder(reported[0]), np.random.default_rng(0)
    layer = page["activations"]["layers"][0]
    layers = [
        layer | {"name": f"mm{i}.img.attn.q_proj", "range": random.uniform(1, 9, 25).round(3).tolist()}
        for i in range(285)
    ]
    page["activations"] |= {"layers": layers, "steps": list(range(25)), "sigmas": [i / 25 for i in range(25)]}
    noise = picture(Image.fromarray(random.integers(0, 256, (512, 512, 3), np.uint8)))
    many = [
        {"image": i, "source": noise, "psnr": 30.0, "ssim": 0.9, "flip": 0.1}
        for i in range(int(PICTURE_BYTES / len(noise)))
    ]
    page["comparison"] |= {"pairs": {"native": many}, "prompts": ["a"] * len(many), "originals": {str(i): page["drawn"]["pictures"][0]["source"] for i in range(len(many))}}  # fmt: skip
    folder = tmp_path_factory.mktemp("large")
    write_page(ReportPaths(folder), page)
    return folder / "index.html"


def test_a_large_page_stays_small(large_page):
    assert 5e6 < large_page.stat().st_size < 20e6


@needs_browser
def test_a_large_page_opens_in_two_seconds(large_page, browser):
    page = browser.open(large_page)
    assert page.run("return performance.now();") < 2000 and page.faults == []
