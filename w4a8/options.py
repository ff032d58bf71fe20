"""The options of every stage and their defaults, as a script's command line gives them to the code that computes.

Each default stands only here; `cli.stage` puts it into the click declaration of the same name. The module imports
neither MLX nor NumPy, since `--help` needs it.
"""

from dataclasses import dataclass
from pathlib import Path

from calibration_store.choices import EffortName, ProductPrecision
from calibration_store.errors import OptionError
from w4a8.model.location import UNCHANGED_LOCATION, Lora, ModelLocation

DEFAULT_FOLDER = Path("calibration_data")


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The folder that all stages share."""

    calib_dir: Path = DEFAULT_FOLDER


@dataclass(frozen=True, kw_only=True)
class WritingOptions(FolderOptions):
    """Options of a stage that works for long: going on, starting over, and a limit on the bytes that it writes."""

    max_bytes: int | None = None
    resume: bool = False
    force: bool = False
    dry_run: bool = False
    given: frozenset[str] = frozenset()  # the fields that the command line names; `cli.stage` fills it in

    def __post_init__(self) -> None:
        """Raise OptionError for options that exclude each other."""
        if self.resume and self.force:
            raise OptionError("--resume goes on with a run and --force starts over: give one of them")

    def is_given(self, name: str) -> bool:
        """Return whether an option was given, so that --resume must not take the run's value in its place."""
        return name in self.given or getattr(self, name) != type(self).__dataclass_fields__[name].default


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of drawing with a model, in stage 1 and in draw_images.py. None: the model's own default."""

    num_steps: int | None = None
    cfg_weight: float | None = None
    guidance: float | None = None
    shift: float | None = None
    negative_prompt: str = ""
    latent_size: tuple[int, int] | None = None
    batch_size: int | None = None
    use_t5: bool | None = None
    text_bits: str = "16"
    dtype: str | None = None
    loras: tuple[Lora, ...] = ()
    prompt_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions, WritingOptions):
    """Options of stage 1, generate_calibration_data.py. No num_images: the run's under --resume, else the effort's."""

    model: str | None = None
    local_checkpoint: Path | None = None
    num_images: int | None = None
    effort: EffortName = "good"
    seed: int = 42
    stride: int = 1
    text_group: int | None = None
    save_images: bool = True


@dataclass(frozen=True, kw_only=True)
class CacheOptions(WritingOptions):
    """Options of stage 2W, cache_adaround_data.py. None: all images and the effort's steps, or what --max-bytes allows."""

    location: ModelLocation = UNCHANGED_LOCATION
    effort: EffortName = "good"
    num_images: int | None = None
    stride: int | None = None
    steps: str | None = None
    blocks: str | None = None
    boundaries: str | None = None
    text_group: int | None = None


@dataclass(frozen=True, kw_only=True)
class CollectionOptions(WritingOptions):
    """Options of stage 2A, collect_layer_activations.py."""

    location: ModelLocation = UNCHANGED_LOCATION
    num_images: int = 5
    stride: int = 2
    text_group: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(FolderOptions):
    """Options that stages 3A and 3A' share."""

    stats: Path | None = None
    output: Path | None = None
    with_plot: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class W4A8Options(AnalysisOptions):
    """Options of stage 3A, analyze_activations.py."""

    use_hist_p999: bool = False
    outlier_threshold: float = 2.5


@dataclass(frozen=True, kw_only=True)
class TierOptions(AnalysisOptions):
    """Options of stage 3A', analyze_activations_multitier.py."""

    policy: str = "threshold"
    a4_threshold: float = 6.0
    a6_threshold: float = 10.0
    shifted_a4_threshold: float = 5.0
    shifted_a6_threshold: float = 8.0
    min_sqnr: float | None = None
    average_bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoundingOptions(WritingOptions):
    """Options of stage 3W, optimize_adaround.py. None: chosen by effort, the model's size, memory, or the method."""

    location: ModelLocation = UNCHANGED_LOCATION
    blocks: str | None = None
    unit: str | None = None
    effort: EffortName = "good"
    iters: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    weight_bits: int = 4
    activation_bits: int = 8
    activation_rule: str = "token"
    average_bits: str | None = None
    bits: tuple[str, ...] = ()
    sensitivity_only: bool = False
    group_size: int = 64
    end_to_end: int | None = None
    unrolled: int | None = None
    tune_rest: bool = True
    rest_bits: int = 16
    precision: ProductPrecision | None = None
    max_memory: int | None = None
    migrate: bool = False
    rounding: str = "ste"
    qdrop: float = 0.5
    lr_alpha: float | None = None
    lr_activation_scale: float = 5e-3
    seed: int = 0
    checkpoint_seconds: float | None = None
    alpha: bool = False

    def __post_init__(self) -> None:
        """Raise OptionError for options that exclude each other."""
        super().__post_init__()
        if self.activation_rule == "block" and self.activation_bits not in (0, 8):
            raise OptionError(
                f"--activation-rule block has 8 bits, as ggml has them; leave --activation-bits {self.activation_bits} out"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(FolderOptions):
    """Options of stage 4, evaluate_quantization.py. None: the calibration run's."""

    location: ModelLocation = UNCHANGED_LOCATION
    scale_is: str | None = None
    config: Path | None = None
    prompt_file: Path | None = None
    num_images: int = 16
    num_steps: int | None = None
    cfg_weight: float | None = None
    seed: int = 10_000
    batch_size: int = 8
    variants: str | None = None
    min_psnr: float | None = None
    max_step_error: float | None = None
    min_gain: float | None = None
    step_effects: int = 0
    reference: Path | None = None
    output: Path | None = None
    grid_map: str = "difference"
    native: str = "auto"
    text_group: int | None = None
    dry_run: bool = False
    resume: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions(FolderOptions):
    """Options of stage 5, export_quantized_model.py. None: the files that stages 3W and 3A wrote."""

    location: ModelLocation = UNCHANGED_LOCATION
    weights: str | None = None
    activations: str | None = None
    scale_is: str | None = None
    layout: str = "mlx"
    rest_bits: int = 16
    all_linears: bool = False
    complete: bool = False
    text_bits: str | None = None
    output: Path | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(SamplingOptions):
    """Options of draw_images.py."""

    prompts: tuple[str, ...] = ()
    model: str = "sd3-emoji"
    compare: str | None = None
    seed: int | None = None
    seeds: tuple[int, ...] = ()
    width: int | None = None
    height: int | None = None
    activations: bool = False
    native: str = "auto"
    output: Path = Path("drawn")

    def __post_init__(self) -> None:
        """Raise OptionError for options that exclude each other."""
        if self.seeds and self.seed is not None:
            raise OptionError("--seeds and --seed exclude each other: give one of them")
        if self.latent_size and (self.width or self.height):
            raise OptionError("--latent-size and --width or --height exclude each other: the first counts latents")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(FolderOptions):
    """Options of report_calibration.py."""

    output: Path | None = None
    force: bool = False
    dry_run: bool = False
