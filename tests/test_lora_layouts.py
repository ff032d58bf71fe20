"""LoRA files in the layouts of every trainer, on tiny models: fused, each equals its own sum in float64."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from test_checkpoints import PREFIX, numbers_of
from test_checkpoints import bits as bits_of
from tiny_hub import MEDIUM, SCHNELL, run, tiny_hub

from calibration_store.errors import UserError
from w4a8.model.catalog import describe_model
from w4a8.model.diffusionkit import SD3T5Encoder
from w4a8.model.families import FAMILIES
from w4a8.model.location import Lora
from w4a8.model.lora import fuse_text_encoder
from w4a8.model.t5 import T5Config

SD3, FLUX = FAMILIES["sd3-medium"], FAMILIES["flux.1"]

pytestmark = pytest.mark.slow

H, R, SCALE = 128, 4, 0.5
PROJ, QKV, LINEAR2 = "double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"
SD3_QKV = "joint_blocks.0.x_block.attn.qkv"


def flat(module):
    return module.replace(".", "_")


class Layouts:
    """Every file, written to a folder with its sums: rows of the table in docs/what-you-bring.md."""

    def __init__(self, base, sd3, flux):
        self.files, self.expected, self.rows = base / "files", base / "expected", []
        self.weights = {"sd3": sd3, "flux": flux}
        self.random = np.random.default_rng(3)
        a, b = self.draw(R, H), self.draw(H, R)
        ba = self.wide(b) @ self.wide(a)
        down, up = "lora_down.weight", "lora_up.weight"
        proj = {f"{PROJ}.weight": (0, ba)}
        half = {f"{PROJ}.weight": (0, ba * (2 / R))}
        self.add(
            "kohya, with alpha",
            "flux-kohya",
            {
                f"lora_unet_{flat(PROJ)}.{down}": a,
                f"lora_unet_{flat(PROJ)}.{up}": b,
                f"lora_unet_{flat(PROJ)}.alpha": np.float16(2),
            },
            half,
        )
        self.add(
            "kohya, without alpha",
            "flux-kohya-no-alpha",
            {f"lora_unet_{flat(PROJ)}.{down}": a, f"lora_unet_{flat(PROJ)}.{up}": b},
            proj,
        )
        self.add(
            "diffusers",
            "flux-diffusers",
            {
                "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": a,
                "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": b,
            },
            proj,
        )
        self.add(
            "old diffusers (`lora.down`)",
            "flux-old-diffusers",
            {
                "transformer.transformer_blocks.0.attn.to_out.0.lora.down.weight": a,
                "transformer.transformer_blocks.0.attn.to_out.0.lora.up.weight": b,
            },
            proj,
        )
        self.add(
            "PEFT (`base_model.model.`)",
            "flux-peft",
            {f"base_model.model.{PROJ}.lora_A.weight": a, f"base_model.model.{PROJ}.lora_B.weight": b},
            proj,
        )
        self.add(
            "OneTrainer (`lora_transformer_`)",
            "flux-onetrainer",
            {
                f"lora_transformer_transformer_blocks_0_attn_to_out_0.{down}": a,
                f"lora_transformer_transformer_blocks_0_attn_to_out_0.{up}": b,
            },
            proj,
        )
        self.add(
            "ComfyUI (`diffusion_model.`)",
            "flux-comfy",
            {f"diffusion_model.{PROJ}.{down}": a, f"diffusion_model.{PROJ}.{up}": b},
            proj,
        )
        self.add(
            "x-flux (`processor.proj_lora1`)",
            "flux-xflux",
            {
                "double_blocks.0.processor.proj_lora1.down.weight": a,
                "double_blocks.0.processor.proj_lora1.up.weight": b,
            },
            proj,
        )
        self.add("q, k and v apart, of other ranks", "flux-qkv", *self.apart(a, b))
        c, d = self.draw(R, 5 * H), self.draw(H, R)
        self.add(
            "FLUX's single blocks (`proj_out`)",
            "flux-proj-out",
            {
                "transformer.single_transformer_blocks.1.proj_out.lora_A.weight": c,
                "transformer.single_transformer_blocks.1.proj_out.lora_B.weight": d,
            },
            {f"{LINEAR2}.weight": (0, self.wide(d) @ self.wide(c))},
        )
        diff, diff_b, norm = self.draw(H, H), self.draw(H), self.draw(64)
        scale = "double_blocks.0.img_attn.norm.query_norm.scale"
        self.add(
            "extracted differences (`.diff`, `.diff_b`), of norms, too",
            "flux-diff",
            {
                f"diffusion_model.{PROJ}.diff": diff,
                f"diffusion_model.{PROJ}.diff_b": diff_b,
                f"diffusion_model.{scale}.diff": norm,
            },
            {
                f"{PROJ}.weight": (0, self.wide(diff)),
                f"{PROJ}.bias": (0, self.wide(diff_b)),
                scale: (0, self.wide(norm)),
            },
        )
        self.add(
            "a bias of B (`lora_B.bias`)",
            "flux-bias",
            {f"{PROJ}.lora_A.weight": a, f"{PROJ}.lora_B.weight": b, f"{PROJ}.lora_B.bias": diff_b},
            proj | {f"{PROJ}.bias": (0, self.wide(diff_b))},
        )
        w1, w2 = self.draw(4, 4), self.draw(H // 4, H // 4)
        self.add(
            "LoKr (LyCORIS)",
            "flux-lokr",
            {
                f"lycoris_{flat(PROJ)}.lokr_w1": w1,
                f"lycoris_{flat(PROJ)}.lokr_w2": w2,
                f"lycoris_{flat(PROJ)}.alpha": np.float32(1e9),
            },
            {f"{PROJ}.weight": (0, np.kron(self.wide(w1), self.wide(w2)))},
        )
        e, f = self.draw(H, R), self.draw(R, H)
        self.add(
            "LoHa (LyCORIS)",
            "flux-loha",
            {
                f"lycoris_{flat(PROJ)}.{name}": array
                for name, array in (("hada_w1_a", b), ("hada_w1_b", a), ("hada_w2_a", e), ("hada_w2_b", f))
            }
            | {f"lycoris_{flat(PROJ)}.alpha": np.float16(2)},
            {f"{PROJ}.weight": (0, 2 / R * ba * (self.wide(e) @ self.wide(f)))},
        )
        self.dora(a, b, ba)
        conv_a, conv_b = self.draw(R, 16, 2, 2), self.draw(H, R, 1, 1)
        conv = np.einsum("or,rihw->oihw", self.wide(conv_b)[:, :, 0, 0], self.wide(conv_a))
        self.add(
            "a convolution (SD3's `x_embedder`)",
            "sd3-convolution",
            {f"lora_unet_x_embedder_proj.{down}": conv_a, f"lora_unet_x_embedder_proj.{up}": conv_b},
            {PREFIX + "x_embedder.proj.weight": (0, conv)},
        )
        self.add(
            "one module twice: both are added",
            "flux-twice",
            {
                f"diffusion_model.{PROJ}.{down}": a,
                f"diffusion_model.{PROJ}.{up}": b,
                f"lora_unet_{flat(PROJ)}.{down}": a,
                f"lora_unet_{flat(PROJ)}.{up}": b,
            },
            {f"{PROJ}.weight": (0, 2 * ba)},
        )
        self.folder(
            "A folder of PEFT, its alpha in `adapter_config.json`",
            "flux-peft-folder",
            "adapter_model.safetensors",
            a,
            b,
            ba * (6 / R),
            {"lora_alpha": 6, "r": R},
        )
        self.folder(
            "A folder of PEFT with `use_rslora` and `alpha_pattern`",
            "flux-peft-pattern",
            "adapter_model.safetensors",
            a,
            b,
            ba * (3 / R**0.5),
            {"lora_alpha": 6, "r": R, "use_rslora": True, "alpha_pattern": {"img_attn.proj": 3}},
        )
        self.folder(
            "A folder of diffusers", "flux-diffusers-folder", "pytorch_lora_weights.safetensors", a, b, ba, None
        )
        for words, name, arrays, message in (
            ("SD3.5-Medium's second attention", "sd3-attn2", {f"diffusion_model.joint_blocks.0.x_block.attn2.proj.{down}": a}, "SD3.5-Medium's second attention is not in this model"),
            ("SD3's under FLUX", "flux-of-sd3", {f"lora_unet_joint_blocks_0_x_block_attn_proj.{down}": a, f"lora_unet_joint_blocks_0_x_block_attn_proj.{up}": b}, "probably SD3's LoRA"),
            ("SDXL's", "flux-of-sdxl", {f"lora_unet_down_blocks_0_attentions_0.{down}": a, f"lora_unet_down_blocks_0_attentions_0.{up}": b}, "probably SDXL's or SD1.5's LoRA"),
            ("OFT", "flux-oft", {f"lora_unet_{flat(PROJ)}.oft_blocks": self.draw(4, 32, 32)}, "OFT, which is not read"),
            ("A model of another width", "flux-wide", {f"lora_unet_{flat(PROJ)}.{down}": self.draw(R, 64), f"lora_unet_{flat(PROJ)}.{up}": b}, "it was made for another model"),
            ("Half a pair", "flux-half", {f"lora_unet_{flat(PROJ)}.{down}": a}, "has no A and B of two dimensions each"),
            ("NaN", "flux-nan", {f"lora_unet_{flat(PROJ)}.{down}": a, f"lora_unet_{flat(PROJ)}.{up}": b * np.float16("nan")}, "it holds NaN, infinity, or is damaged"),
        ):  # fmt: skip
            save_file(arrays, self.files / f"{name}.safetensors")
            self.rows.append((words, f"{name}.safetensors", message))

    def draw(self, *shape):
        return (0.1 * self.random.standard_normal(shape)).astype(np.float16)

    def wide(self, array):
        return array.astype(np.float64)

    def add(self, words, name, arrays, changes):
        """Write a LoRA, and the checkpoint with its sums. changes: {key: (first row, what it gains at scale 1)}."""
        save_file(
            {key: np.ascontiguousarray(array) for key, array in arrays.items()}, self.files / f"{name}.safetensors"
        )
        self.sums(name, changes)
        self.rows.append((words, f"{name}.safetensors", len(changes)))

    def sums(self, name, changes):
        found = {key: np.array(numbers_of(*each), np.float32) for key, each in self.weights[name.split("-")[0]].items()}
        for key, (row, change) in changes.items():
            whole = found[key].astype(np.float64)
            whole[row : row + len(change)] += SCALE * change
            found[key] = whole.astype(np.float32)
        save_file(found, self.expected / f"{name}.safetensors")

    def apart(self, a, b):
        """Return q, k and v of rank 4, 2 and 1, and the sum of each in its rows of the joined weight."""
        arrays, whole = {}, np.zeros((3 * H, H))
        for index, (part, rank) in enumerate((("q", 4), ("k", 2), ("v", 1))):
            name = f"transformer.transformer_blocks.0.attn.to_{part}"
            arrays |= {f"{name}.lora_A.weight": a[:rank], f"{name}.lora_B.weight": b[:, :rank]}
            whole[index * H : (index + 1) * H] = self.wide(b[:, :rank]) @ self.wide(a[:rank])
        return arrays, {f"{QKV}.weight": (0, whole)}

    def dora(self, a, b, ba):
        """Write DoRA in kohya's spelling: m (W + BA) / |W + BA| − W at scale 1, which the scale multiplies."""
        weight = np.array(numbers_of(*self.weights["flux"][f"{PROJ}.weight"]), np.float64)
        magnitude = (1 + 0.1 * self.random.standard_normal((H, 1))).astype(np.float16)
        moved = weight + ba
        change = self.wide(magnitude) * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight
        name = f"lora_unet_{flat(PROJ)}"
        arrays = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.dora_scale": magnitude}
        self.add("DoRA", "flux-dora", arrays, {f"{PROJ}.weight": (0, change)})

    def folder(self, words, name, file, a, b, change, config):
        """Write a folder with a LoRA, and with PEFT's config where there is one."""
        (self.files / name).mkdir()
        save_file(
            {f"base_model.model.{PROJ}.lora_A.weight": a, f"base_model.model.{PROJ}.lora_B.weight": b},
            self.files / name / file,
        )
        if config is not None:
            (self.files / name / "adapter_config.json").write_text(json.dumps(config))
        self.sums(name, {f"{PROJ}.weight": (0, change)})
        self.rows.append((words, name, 1))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    home = tiny_hub(tmp_path_factory.getbasetemp())
    base = tmp_path_factory.mktemp("loras")
    (base / "files").mkdir()
    (base / "expected").mkdir()
    files = [next(home.rglob(name)) for name in ("sd3_medium.safetensors", "flux-schnell.safetensors")]
    made = Layouts(base, *({name: bits_of(array) for name, array in mx.load(str(file)).items()} for file in files))
    done = run(home, "open_loras", made.files, base / "found.json")
    assert done.returncode == 0, done.stderr
    return made, json.loads((base / "found.json").read_text())


def test_every_layout(layouts):
    made, found = layouts
    for words, name, outcome in made.rows:
        if isinstance(outcome, str):
            assert outcome in str(found[name]), (words, found[name])
        else:
            worst, changed = found[name]
            assert worst < 1e-5 and changed >= outcome, (words, found[name])


def test_the_page_lists_them(layouts):
    def result(outcome):
        return f"refused: {outcome}" if isinstance(outcome, str) else "fused"

    rows = [f"| {words} | {result(outcome)} |" for words, _, outcome in layouts[0].rows]
    page = (ROOT / "docs/what-you-bring.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "the table should be:\n" + "\n".join(rows)


@pytest.mark.parametrize("family, prefix", [(SD3, "lora_te3_"), (FLUX, "lora_te2_"), (FLUX, "text_encoder_2.")])
def test_the_part_of_t5(tmp_path, family, prefix):
    config = T5Config(
        d_model=32, d_kv=8, num_heads=2, d_ff=24, num_layers=1, vocab_size=40, feed_forward_proj="gated-gelu"
    )
    model = SD3T5Encoder(config, low_memory_mode=False)
    before = {name: np.array(array, np.float64) for name, array in tree_flatten(model.parameters())}
    dotted = "encoder.block.0.layer.0.SelfAttention.q"
    module, ends = (
        (f"{prefix}{dotted}", ("lora_A", "lora_B"))
        if prefix.endswith(".")
        else (f"{prefix}{flat(dotted)}", ("lora_down", "lora_up"))
    )
    random = np.random.default_rng(0)
    down, up = random.standard_normal((R, 32)).astype(np.float32), random.standard_normal((16, R)).astype(np.float32)
    save_file({f"{module}.{ends[0]}.weight": down, f"{module}.{ends[1]}.weight": up}, tmp_path / "a.safetensors")
    fuse_text_encoder(model, "t5", family, [Lora(tmp_path / "a.safetensors", SCALE)])
    changed = []
    for name, array in tree_flatten(model.parameters()):
        change = np.array(array, np.float64) - before[name]
        if np.abs(change).max() > 0:
            changed.append(name)
            np.testing.assert_allclose(change, SCALE * up.astype(np.float64) @ down, rtol=1e-4, atol=1e-5)
    assert changed == ["encoder.layers.0.attention.query_proj.weight"]


def test_a_folder_of_several_and_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("a", "b"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds a.safetensors, b.safetensors"):
        describe_model(SCHNELL, [Lora(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds none"):
        describe_model(SCHNELL, [Lora(tmp_path / "empty")])


def test_an_export_has_the_text_encoder_that_a_lora_changed(tmp_path, tmp_path_factory):
    """clip_l is in the folder, fused; clip_g, which the LoRA leaves, is the hub's; draw_images.py reads the folder's."""
    home = tiny_hub(tmp_path_factory.getbasetemp())
    module = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    random = np.random.default_rng(0)
    down, up = (random.standard_normal(shape).astype(np.float16) for shape in ((R, 768), (768, R)))
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, tmp_path / "te.safetensors")
    where, size = ("--calib-dir", tmp_path / "run"), ("--latent-size", 8, 8, "--no-t5")
    lora = ("--lora", f"{tmp_path / 'te.safetensors'}:0.01")
    export = ("export_quantized_model", *where, "--activations", "none", "--weights")
    done = run(
        home, "generate_calibration_data", "--model", MEDIUM, *lora, "--num-images", 1, "--num-steps", 1, *size, "--no-images",
        *where, "then", *export, "w4-rtn", "then", *export, "w4-rtn-g32", "--format", "gguf", "--dry-run", "then", "draw_images", "a", "--model",
        tmp_path / "run/quantized_model", "--num-steps", 1, *size, "--output", tmp_path / "one.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not in the export: clip_l, which the checkpoint or a LoRA changes" in done.stdout
    folder = tmp_path / "run/quantized_model"
    assert not (folder / "clip_g.safetensors").exists()
    found = mx.load(str(folder / "clip_l.safetensors"))["layers.0.attention.query_proj.weight"]
    base = mx.load(str(next(home.rglob("clip_l/model.fp16.safetensors"))))[
        "text_model.encoder.layers.0.self_attn.q_proj.weight"
    ]
    expected = np.array(base, np.float64) + 0.01 * up.astype(np.float64) @ down.astype(np.float64)
    np.testing.assert_allclose(np.array(found, np.float64), expected, atol=2e-3)
    assert np.abs(np.array(found, np.float64) - np.array(base, np.float64)).max() > 0.02
