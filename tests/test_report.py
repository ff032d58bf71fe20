"""report_calibration.py: the page holds what the folder holds, and works in a browser (headless Chromium, where there is one)."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import invoke
from finished_run import finished_run, one_line
from PIL import Image

from calibration_store.layout import ReportPaths
from calibration_store.model_folder import weight_sizes
from calibration_store.sensitivity import write_sensitivity
from w4a8.cli.words import format_bytes
from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.report.page import PICTURE_BYTES, describe_folder, picture, verdict_on, what_it_is, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run with every stage, and its report."""
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
    assert f'draw_images.py "your prompt" --model {folder}/quantized_model' in html.unescape(text)


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
    one_line(invoke("report_calibration", "--calib-dir", tmp_path / "nothing"), "manifest.json: not found")
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


def test_a_foreign_page_and_damaged_files_are_one_line(reported, tmp_path):
    folder = shutil.copytree(reported[0], tmp_path / "run")
    (folder / "report/index.html").write_text("<html>mine</html>")
    one_line(invoke("report_calibration", "--calib-dir", folder), "not written by this script")
    assert invoke("report_calibration", "--calib-dir", folder, "--force", "--dry-run").exit_code == 0
    assert (folder / "report/index.html").read_text() == "<html>mine</html>"
    metrics = folder / "evaluation/metrics.json"
    metrics.write_text(metrics.read_text().replace('"psnr"', '"snr"', 1))
    one_line(invoke("report_calibration", "--calib-dir", folder, "--force"), "metrics.json")
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
        ("a8-dynamic-unshifted", "inputs at 8 bits, a range for each input, no shift"),
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


def test_equal_images_and_what_was_not_measured_have_no_figure(reported, tmp_path):
    """PSNR of an equal image is null in metrics.json, and FLIP where it is not installed."""
    folder = shutil.copytree(reported[0], tmp_path / "run")
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
    page = folder / "report/index.html"
    assert data_of(page)["comparison"]["pairs"]["w4-rtn"][-1]["image"] == 1 and "<b>equal</b>" in page.read_text()
    if CHROMIUM:
        assert (
            visit(
                page,
                'const e = document.getElementById("variant"); e.value = "native"; e.dispatchEvent(new Event("change")); return {};',
                tmp_path,
            )["faults"]
            == []
        )


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

WATCH = (
    '<script>window.faults = []; addEventListener("error", (e) => faults.push(e.message || "resource"), true);</script>'
)


def visit(page, script, tmp_path, *options):
    """Open a copy of the page, run a script that gives an object, and what it gave; faults of the page included."""
    copy = tmp_path / "visited.html"
    tail = f'<pre id="found"></pre><script>{{ const found = (() => {{ {script} }})(); document.getElementById("found").textContent = JSON.stringify({{ ...found, faults: window.faults }}); }}</script></body>'
    copy.write_text(page.read_text().replace("<head>", f"<head>{WATCH}", 1).replace("</body>", tail))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", *options, "--dump-dom", copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))


@browser
def test_filter_and_slider_work(reported, tmp_path):
    found = visit(
        reported[0] / "report/index.html",
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
        const heat = document.getElementById("heat");
        heat.dispatchEvent(new PointerEvent("pointermove", { clientX: heat.getBoundingClientRect().x + 200, clientY: heat.getBoundingClientRect().y + 20 }));
        return { before, kind, both, clip, first, second: document.querySelectorAll(".pair").length, inked, hover: document.getElementById("hover").textContent };
        """,
        tmp_path,
    )
    assert found["faults"] == []
    assert (found["before"], found["kind"], found["both"]) == ("93 of 93 layers", "8 of 93 layers", "1 of 93 layers")
    assert "80%" in found["clip"] and found["first"] == found["second"] == 3 and found["inked"]
    assert found["hover"].startswith("mm1.img.mlp.fc2 · step 0, sigma 1: range ")


@browser
def test_no_page_is_wider_than_a_phone(reported, tmp_path):
    """400 pixels; Chromium has no window that narrow, a frame can be."""
    page = tmp_path / "page.html"
    page.write_text("<html><head></head><body></body></html>")
    watched = (reported[0] / "report/index.html").read_text().replace("<head>", f"<head>{WATCH}", 1)
    (tmp_path / "index.html").write_text(watched)
    script = """
        const frame = Object.assign(document.createElement("iframe"), { src: "index.html", width: 400, height: 800 });
        frame.addEventListener("load", () => {
          const inner = frame.contentDocument.documentElement, found = document.getElementById("found");
          found.textContent = JSON.stringify({ page: inner.scrollWidth, window: inner.clientWidth, faults: frame.contentWindow.faults });
        });
        document.body.append(frame);
        return {};
    """
    found = visit(page, script, tmp_path, "--allow-file-access-from-files", "--virtual-time-budget=3000")
    assert found["page"] <= found["window"] <= 400 and found["faults"] == []


def test_a_large_run_stays_small(reported, tmp_path):
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
    assert write_page(ReportPaths(tmp_path), page) < 20e6
    if CHROMIUM:
        found = visit(tmp_path / "index.html", "return { seconds: performance.now() / 1000 };", tmp_path)
        assert found["faults"] == [] and found["seconds"] < 2
