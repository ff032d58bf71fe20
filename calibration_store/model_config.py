"""The formats of a model folder's config.json: of a whole model, and of a hub model's transformer alone."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from calibration_store.choices import PACKED_GROUPS, WEIGHT_BITS, GroupSize, Precision, WeightBits
from calibration_store.names import LayerName
from calibration_store.schema import Count, Digest, Guidance, Index, JsonFormat, Name, Positive, Shift, Side

HEAD_WIDTH = 64  # channels of a head in SD3's transformers and in CLIP, at every size
TEXT_WIDTH = 4096  # channels to which DiffusionKit pads the features of both text encoders
LatentShift = Annotated[float, Meta(ge=-1e6, le=1e6)]  # shift_factor of a VAE
MOST_POSITIONS = 4096  # rows, and columns, of the table of positions
Depth = Annotated[int, Meta(ge=1, le=256)]


class _TransformerConfig(TypedDict):
    depth_multimodal: Depth
    num_heads: Depth
    hidden_size: Side
    max_latent_resolution: Annotated[int, Meta(ge=1, le=MOST_POSITIONS)]
    pooled_text_embed_dim: Side
    token_level_text_embed_dim: Literal[4096]
    patch_size: Annotated[int, Meta(ge=1, le=16)]
    vae_latent_dim: Literal[16]


class TransformerConfig(_TransformerConfig, total=False):
    """The section of SD3's MMDiT. Absent entries have the defaults of DiffusionKit's MMDiTConfig."""

    use_qk_norm: bool  # SD3.5
    dual_attention_blocks: Annotated[int, Meta(ge=0, le=256)]  # first blocks with a second attention (SD3.5-Medium)
    mlp_ratio: Annotated[int, Meta(ge=1, le=64)]
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)]
    frequency_embed_dim: Side
    max_period: Count
    timestep_dtype: Precision  # dtype in which timesteps are embedded; absent: the run's


class ClipConfig(TypedDict):
    num_layers: Depth
    model_dims: Side
    num_heads: Depth
    max_length: Annotated[int, Meta(ge=3, le=1024)]
    vocab_size: Annotated[int, Meta(ge=3, le=10**7)]
    projection_dim: Side
    hidden_act: Literal["quick_gelu", "gelu"]


class TokenizerConfig(TypedDict):
    pad_with_eos: bool


class _T5Config(TypedDict):
    d_model: Literal[4096]  # the transformer's width of a text token
    d_kv: Side
    d_ff: Side
    num_heads: Depth
    num_layers: Depth
    vocab_size: Annotated[int, Meta(ge=3, le=10**7)]
    feed_forward_proj: Literal["gated-gelu", "gated-relu", "gated-silu", "gelu", "relu", "silu"]
    max_length: Annotated[int, Meta(ge=3, le=1024)]


class T5Section(_T5Config, total=False):
    """The section of T5's encoder. Absent entries have the defaults of T5's published config."""

    layer_norm_epsilon: Annotated[float, Meta(gt=0, le=1)]
    relative_attention_num_buckets: Annotated[int, Meta(ge=4, le=1024)]
    relative_attention_max_distance: Annotated[int, Meta(ge=8, le=10**6)]
    quantization: dict[str, Any]  # of its packed layers, as the transformer's


class VaeConfig(TypedDict):
    block_out_channels: Annotated[list[Side], Meta(min_length=1, max_length=8)]
    resnet_groups: Count
    decoder_layers_per_block: Depth
    downscale: Count


class LatentFormat(TypedDict):
    """The scale and the shift between the latents of the transformer and of the VAE."""

    scale_factor: Positive
    shift_factor: LatentShift


class _ModelConfig(TypedDict):
    mmdit: TransformerConfig
    clip_l: ClipConfig
    clip_g: ClipConfig
    vae: VaeConfig
    latent_format: LatentFormat
    latent_size: tuple[Side, Side]
    sampler_shift: Shift
    default_cfg_weight: Guidance


class _Export(TypedDict):
    format: Literal["quantized_model_v1"]
    weights: Name  # a name of stage 4's variants: w4-adaround, w4-rtn-g64
    weight_bits: WeightBits
    group_size: GroupSize
    activations: Name | None
    model_version: Name
    weights_fingerprint: Digest  # of the original model
    calibration_run: Digest | None
    selected_image_ids: list[Index]
    adaround_weights: Digest | None  # SHA-256 of the metadata.json that the codes belong to
    files: dict[str, Digest]  # role (`role_of`) -> fingerprint of the file


class Export(_Export, total=False):
    """The `export` entry of config.json: the way of quantization, the original model, the run, digests of the files."""

    config: Digest  # of config.json without this entry; exports of 0.8.0 have none
    w4a8_version: Name  # of the toolkit that exported; absent before 0.9.0
    layer_bits: dict[LayerName, Annotated[int, Meta(ge=2, le=8)]]
    excluded: list[LayerName]
    migrated: bool  # stage 3W divided inputs (migration.npz); absent: it did not


class ModelConfig(_ModelConfig, total=False):
    """The entries of config.json of a folder that holds a whole model."""

    name: Name
    export: Export
    tokenizer_l: TokenizerConfig  # absent: pad_with_eos is true, as DiffusionKit pads
    tokenizer_g: TokenizerConfig  # absent: pad_with_eos is false
    t5: T5Section
    use_t5: bool  # whether there is a section t5; absent: false
    quantization: dict[str, Any]  # groups and bits of packed weights, as MLX's own tools write them
    default_num_steps: Count


class _BasedConfig(TypedDict):
    base_model: Name  # hub id of the text encoders and the VAE
    quantization: dict[str, Any]


class BasedConfig(_BasedConfig, total=False):
    """The entries of config.json of a folder that holds a hub model's transformer alone."""

    name: Name
    sampler_shift: Shift  # absent: the base model's
    use_t5: bool  # false where the calibration ran without T5; absent: as the base model
    export: Export


def config_fault(config: ModelConfig) -> str | None:
    """Return the first contradiction between sections of a config, or None."""
    mmdit, vae, (height, width) = config["mmdit"], config["vae"], config["latent_size"]
    clip_l, clip_g = config["clip_l"], config["clip_g"]
    widths = [("mmdit", mmdit["hidden_size"], mmdit["num_heads"])]
    widths += [(name, clip["model_dims"], clip["num_heads"]) for name, clip in (("clip_l", clip_l), ("clip_g", clip_g))]
    for name, hidden, heads in widths:
        if hidden != HEAD_WIDTH * heads:
            return f"{name}: {heads} heads of {HEAD_WIDTH} are not {hidden} wide"
    if clip_l["model_dims"] + clip_g["model_dims"] > TEXT_WIDTH:
        return f"the text encoders are wider than {TEXT_WIDTH} together"
    if clip_l["max_length"] != clip_g["max_length"]:
        return "clip_l and clip_g have another max_length"
    pooled = clip_l["projection_dim"] + clip_g["projection_dim"]
    if mmdit["pooled_text_embed_dim"] != pooled:
        return f"mmdit: pooled_text_embed_dim {mmdit['pooled_text_embed_dim']} is not the encoders' {pooled}"
    for side in (height, width):
        if side % mmdit["patch_size"] or side > mmdit["max_latent_resolution"]:
            return f"latent_size: {side} is not a multiple of patch_size up to max_latent_resolution"
    if any(channels % vae["resnet_groups"] for channels in vae["block_out_channels"]):
        return f"vae: block_out_channels are not multiples of resnet_groups {vae['resnet_groups']}"
    if config.get("use_t5", "t5" in config) != ("t5" in config):
        return f"use_t5 is {str(config['use_t5']).lower()}, and there is {'a' if 't5' in config else 'no'} section t5"
    for section in (config, config.get("t5", {})):
        fault = quantization_fault(section["quantization"]) if "quantization" in section else None
        if fault:
            return fault
    if vae["downscale"] != 2 ** (len(vae["block_out_channels"]) - 1):
        return f"vae: downscale {vae['downscale']} is not that of {len(vae['block_out_channels'])} stages"
    return None


def quantization_fault(quantization: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a `quantization` entry: group_size and bits, and both, or false, for layers by path."""
    for name, value in quantization.items():
        if "." in name and value is not False and not isinstance(value, dict):
            return f"quantization: {name}: {value!r} is neither an object nor false"
    for name, value in [("", quantization), *((n, v) for n, v in quantization.items() if isinstance(v, dict))]:
        if value.get("bits") not in WEIGHT_BITS or value.get("group_size") not in PACKED_GROUPS:
            return f"quantization{name and f': {name}'}: bits {value.get('bits')}, group_size {value.get('group_size')}"
    return None


MODEL_CONFIG = JsonFormat(None, ModelConfig, "", config_fault)
BASED_CONFIG = JsonFormat(None, BasedConfig, "", lambda config: quantization_fault(config["quantization"]))
