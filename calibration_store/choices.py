"""Every choice that a stage offers and a file notes, declared once for command lines, formats, registries and tests.

Each type is for annotations and for msgspec's checks of files; the tuple of the same name holds its values.
"""

from typing import Literal, get_args

WeightBits = Literal[2, 3, 4, 5, 6, 8]  # widths of a code that MLX multiplies natively
WEIGHT_BITS: tuple[int, ...] = get_args(WeightBits)
ActivationBits = Literal[0, 2, 3, 4, 5, 6, 7, 8]  # 0: inputs are not quantized; a symmetric grid needs 2 bits
ACTIVATION_BITS: tuple[int, ...] = get_args(ActivationBits)
GroupSize = Literal[0, 32, 64, 128]  # inputs that share a scale; 0: one scale per output channel
GROUP_SIZES: tuple[int, ...] = get_args(GroupSize)
PackedGroup = Literal[32, 64, 128]  # groups that MLX's kernels know
PACKED_GROUPS: tuple[int, ...] = get_args(PackedGroup)
RestBits = Literal[8, 16]  # bits of adaLN and embedders in an export
REST_BITS: tuple[int, ...] = get_args(RestBits)
RestKind = Literal[
    "all", "vectors", "none"
]  # 16-bit parameters that stage 3W trains: vectors leaves matrices of blocks
REST_KINDS: tuple[RestKind, ...] = get_args(RestKind)
TierBits = Literal[4, 6, 8]  # bits of a layer's input in a multi-tier config
TIER_BITS: tuple[int, ...] = get_args(TierBits)

EffortName = Literal["fast", "good", "best"]  # how much a run takes where no option says so
EFFORTS: tuple[EffortName, ...] = get_args(EffortName)
ProductPrecision = Literal["float32", "bfloat16"]  # of the products of stage 3W
PRODUCT_PRECISIONS: tuple[ProductPrecision, ...] = get_args(ProductPrecision)
UnitName = Literal["model", "block"]  # the part of a model that stage 3W trains for that part's output
UNIT_NAMES: tuple[str, ...] = get_args(UnitName)
KnownUnit = Literal["model", "block", "sublayer", "layer"]  # files of 0.8.0 also have the last two
RoundingMethodName = Literal["ste", "sigmoid"]
ROUNDING_METHODS: tuple[str, ...] = get_args(RoundingMethodName)
InputRule = Literal[
    "token", "block", "static"
]  # an input's range in training: of a token, of 32 of its inputs, or learned
INPUT_RULES: tuple[str, ...] = get_args(InputRule)

Boundaries = Literal["all", "ends"]  # tokens that stage 2W stores: between all blocks, or at the ends of the stack
BOUNDARIES: tuple[str, ...] = get_args(Boundaries)
ScaleMeaning = Literal["range", "step"]  # meaning of `scale` in a quantization config
SCALE_MEANINGS: tuple[str, ...] = get_args(ScaleMeaning)
Precision = Literal["float16", "bfloat16", "float32"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
TierPolicy = Literal["threshold", "sqnr", "sensitivity"]
TIER_POLICIES: tuple[str, ...] = get_args(TierPolicy)
NativeWay = Literal["auto", "quantized", "dequantize", "dense"]  # how packed weights are multiplied
NATIVE_WAYS: tuple[str, ...] = get_args(NativeWay)
ExportFormat = Literal["mlx", "gguf", "mflux"]
TextBits = Literal[4, 8, 16]  # of T5's linear layers
TEXT_BITS: tuple[int, ...] = get_args(TextBits)
EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)
GridMap = Literal["difference", "flip"]  # map that stage 4's grid shows beside each image
GRID_MAPS: tuple[str, ...] = get_args(GridMap)
GGUF_GROUP = 32  # the size of the groups of ggml's Q4_1 and Q5_1
