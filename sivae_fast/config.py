"""The configuration of a run: YAML file, then `key=value` overrides, checked as a whole.

Every error names the key, the value and what is accepted; an unknown key is answered with the nearest one.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sivae_fast.consistency import USUAL_METRICS, check_together
from sivae_fast.explaining import explain, explain_yaml

PositiveInt = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Half = Annotated[float, Field(ge=0, le=0.5)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what is accepted."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StyleModelConfig(Section):
    """The style-based image model with progressive growing."""

    kind: Literal["style"] = "style"
    resolution: Literal[8, 16, 32, 64, 128, 256, 512, 1024] = 256
    channels: Literal[1, 3] = 3
    start_channels: PositiveInt = 64
    max_channels: PositiveInt = 512
    latent_size: PositiveInt = 512
    mapping_layers: PositiveInt = 8
    style_mixing: Annotated[float, Field(ge=0, le=1)] = 0.9


class ResidualModelConfig(Section):
    """The residual convolutional image model."""

    kind: Literal["residual"] = "residual"
    resolution: PositiveInt = 32
    channels: Literal[1, 3] = 3
    widths: tuple[PositiveInt, ...] = (64, 128, 256)
    latent_size: PositiveInt = 128
    norm: Literal["batch", "group"] = "batch"
    lagged_decoder: bool = Field(False, description="the bootstrap variant")
    lag_epochs: PositiveInt = Field(1, description="epochs from one copy of the decoder to the next")
    augment: bool = False


class MLPModelConfig(Section):
    """Fully connected networks for points in the plane."""

    kind: Literal["mlp"] = "mlp"
    latent_size: PositiveInt = 2
    width: PositiveInt = 256
    hidden_layers: PositiveInt = 4


class PointNetModelConfig(Section):
    """Encoder and decoder for point clouds."""

    kind: Literal["pointnet"] = "pointnet"
    points: PositiveInt = 2048
    latent_size: PositiveInt = 128
    prior_std: Positive = 0.2


class TwoEncoderModelConfig(Section):
    """Class and content encoders for image translation."""

    kind: Literal["two_encoder"] = "two_encoder"
    resolution: PositiveInt = 64
    channels: Literal[1, 3] = 3
    class_size: PositiveInt = 256
    content_size: PositiveInt = 128
    width: PositiveInt = 64
    swapped_fakes: bool = Field(False, description="swapped pairs as a third kind of fake; even batches")


class OwnModelConfig(Section):
    """An image model that is no part of the package, see docs/plug-in.md."""

    kind: Literal["own"] = "own"
    source: str = Field(description="FILE.py:CLASS, a subclass of sivae_fast.Model")
    resolution: PositiveInt
    channels: Literal[1, 3] = 3
    settings: dict[str, Any] = Field(default_factory=dict, description="further arguments of the class")


ModelConfig = Annotated[
    StyleModelConfig
    | ResidualModelConfig
    | MLPModelConfig
    | PointNetModelConfig
    | TwoEncoderModelConfig
    | OwnModelConfig,
    Field(discriminator="kind"),
]


class ObjectiveConfig(Section):
    """What encoder and decoder minimise; see docs/losses.md."""

    kind: Literal["vae", "introvae", "soft_introvae"] = "soft_introvae"
    reconstruction: Literal["sse", "l1", "huber", "chamfer", "perceptual"] = "sse"
    huber_delta: Positive = Field(1.0, description="where the Huber error turns from quadratic to linear")
    perceptual_weights: str | None = Field(None, description="file with the weights of torchvision's VGG16")
    beta_rec: NotNegative = 1.0
    beta_kl: NotNegative = 1.0
    beta_neg: NotNegative | Annotated[tuple[NotNegative, ...], Field(min_length=1)] = 256.0
    scale: Positive | None = Field(None, description="null: 1 / (numbers in one input)")
    alpha: Positive = 2.0
    gamma_r: NotNegative | None = Field(
        None, description="null: 1 with model.lagged_decoder, else 1e-8 in the published schedule, else 0"
    )
    margin: Positive | None = None
    hinge: Literal["sample", "batch"] = "batch"
    logvar_clamp: tuple[Finite, Finite] | None = Field(
        None, description="bounds on the encoder's log-variances; null: none"
    )


class ImageDataConfig(Section):
    """A folder or zip of square images, as `sivae-fast prepare` makes them."""

    kind: Literal["images"] = "images"
    path: str | None = Field(None, description='an image set, or "quickstart": pictures made on the spot')
    loader: Literal["auto", "dali", "torch"] = "auto"
    workers: PositiveInt | None = Field(None, description="decoding threads; null: this rank's cores")
    flip: bool = True
    shift: Half = Field(0.0, description="largest random displacement, of the side; white borders")
    hue: Half = Field(0.0, description="largest random turn of the hue, of the full circle; colour images")
    value_range: Literal["symmetric", "unit"] = Field("symmetric", description="[-1, 1] or [0, 1]")
    cache_gib: NotNegative | None = Field(None, description="most memory for decoded images; 0: none")


class DensityDataConfig(Section):
    """Points in the plane, drawn anew for every batch."""

    kind: Literal["density"] = "density"
    name: str = "8gaussians"


class PointCloudDataConfig(Section):
    """Point clouds; null path: the made set of solids."""

    kind: Literal["pointclouds"] = "pointclouds"
    path: str | None = None
    classes: tuple[str, ...] = ()
    points: PositiveInt = 2048
    resample: bool = Field(False, description="draw points from clouds of another size")
    rotate: bool = Field(False, description="turn clouds about the z axis at random")


class FactorDataConfig(Section):
    """Images with known class and content; null path: the made set."""

    kind: Literal["factors"] = "factors"
    path: str | None = None


DataConfig = Annotated[
    ImageDataConfig | DensityDataConfig | PointCloudDataConfig | FactorDataConfig,
    Field(discriminator="kind"),
]


class GrowthConfig(Section):
    """Progressive growing; the clock is images seen."""

    images_per_level: Annotated[int, Field(ge=0)] = Field(0, description="0: no growing")
    fade: Annotated[float, Field(ge=0, le=1)] = 0.5


class TrainConfig(Section):
    """The length of the run and the shape of one iteration."""

    images: PositiveInt = 1_000_000
    init_from: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a run, snapshot or hub:owner/name whose weights a new run begins with"
    )
    batch: PositiveInt | tuple[PositiveInt, ...] | Literal["auto"] = Field(
        32, description="global batch, or one a level; auto: the largest that fits the GPUs in one pass"
    )
    micro_batch: PositiveInt | tuple[PositiveInt, ...] | Literal["auto"] | None = Field(
        None, description="most images of one pass on one rank, or one a level; auto: as many as fit the GPU"
    )
    warmup_images: Annotated[int, Field(ge=0)] = Field(0, description="images trained as a plain VAE first")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="auto: bf16 where it is faster and as good, see docs/training.md"
    )
    recompute: bool = Field(False, description="style model: less memory, more time")
    compile: bool = Field(False, description="style model: networks through torch.compile, level by level")
    graphs: bool = Field(False, description="each iteration as one CUDA graph; one GPU, engine.kind=torch")
    schedule: Literal["minimal", "published"] = "minimal"
    fresh_draws: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0  # what torch's generators take, with room to count up


class OptimConfig(Section):
    """Adam; the same settings for both optimizers."""

    implementation: Literal["torch", "deepspeed", "apex"] = "torch"
    learning_rate: Positive | tuple[Positive, ...] = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    published_eps: bool = Field(False, description="eps is added to the uncorrected root")
    clear_after_warmup: bool = Field(
        True, description="forget moments where the warm-up ends, see docs/training.md; false: as published"
    )
    drops: tuple[PositiveInt, ...] = Field((), description="images at which the rate is multiplied")
    drop_factor: Positive = 0.1


class EngineConfig(Section):
    kind: Literal["auto", "deepspeed", "torch"] = "auto"
    zero: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="null: 1 under deepspeed, else 0"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="more DeepSpeed settings")
    timeout_seconds: PositiveInt = Field(
        600, description="longest wait for another rank; above the time of a checkpoint"
    )


class GuardConfig(Section):
    """What happens when training diverges; see docs/faults.md."""

    rollbacks: Annotated[int, Field(ge=0)] = Field(0, description="most returns to one checkpoint; 0: stop")
    spike: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None, description="times the usual error or KL that count as divergence; null: only NaN and infinity"
    )


class AverageConfig(Section):
    half_life: Positive | None = Field(10_000, description="images; null: no averaged copy")


class EvaluateConfig(Section):
    """Measurements while training, by the kind of model; see docs/evaluation.md."""

    every: PositiveInt | None = Field(None, description="images, at the next tick; null: none")
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="null: quick ones of the kind of model"
    )
    images: Annotated[int, Field(ge=6)] = Field(
        5_000, description="at most so many real images or clouds; for fid and its kin, so many generated"
    )
    data: str | None = Field(None, description="another set; null: the data of the run")
    features: Literal["inception", "random"] = "inception"
    weights: str | None = Field(None, description="file or folder of the networks' weights")


class RunConfig(Section):
    """Where and how often things are written; all intervals in images."""

    folder: str = "runs"
    name: str = "run"
    tick: PositiveInt = 4_000
    samples: PositiveInt = 20_000
    checkpoint: PositiveInt = 100_000
    keep: PositiveInt = Field(3, description="checkpoints that stay")
    snapshot: PositiveInt = Field(1_000_000, description="snapshots all stay; the last is always written")
    new: bool = Field(False, description="start a new run even where one could be resumed")


class Config(Section):
    model: ModelConfig = StyleModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = ImageDataConfig()
    growth: GrowthConfig = GrowthConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    average: AverageConfig = AverageConfig()
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _fits_together(self):
        check_together(self)
        return self

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics of `evaluate.every`, one time each."""
        return tuple(dict.fromkeys(self.evaluate.metrics or USUAL_METRICS[self.model.kind]))

    def to_dict(self) -> dict:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def portable(self) -> Config:
        """For files that leave this machine: none of its paths.

        `data.path` of images becomes null, which has to be answered before they are read. For other data null
        means the made set, so theirs keeps its last part, as do the weights of the perceptual error.
        """
        data, weights = self.data, self.objective.perceptual_weights
        path = getattr(data, "path", None)
        if path and path != "quickstart":
            data = data.model_copy(update={"path": None if data.kind == "images" else _last_part(path)})
        objective = {"perceptual_weights": weights and _last_part(weights)}
        source = self.train.init_from
        if source and not source.startswith("hub:"):
            source = _last_part(source)
        model = self.model
        if model.kind == "own":
            model = model.model_copy(update={"source": _last_part(model.source)})
        return self.model_copy(
            update={
                "model": model,
                "data": data,
                "objective": self.objective.model_copy(update=objective),
                "train": self.train.model_copy(update={"init_from": source}),
                "engine": self.engine.model_copy(update={"deepspeed": {}}),
                "evaluate": self.evaluate.model_copy(update={"data": None, "weights": None}),
                "run": self.run.model_copy(update={"folder": RunConfig().folder}),
            }
        )

    def identity(self) -> str:
        """Digest of what must not change on resume: all but names, intervals, length, guard, hardware."""
        kept = self.to_dict()
        for free in ("run", "engine", "evaluate", "guard"):
            kept.pop(free)
        for name in ("images", "micro_batch", "recompute", "compile", "graphs"):
            kept["train"].pop(name)
        # Keys that came later: runs from before are found, too, where they were trained the same.
        if kept["train"]["init_from"] is None:
            kept["train"].pop("init_from")
        if not (kept["optim"]["clear_after_warmup"] and kept["train"]["warmup_images"]):
            kept["optim"].pop("clear_after_warmup")
        for name in ("loader", "workers", "cache_gib"):
            kept["data"].pop(name, None)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Config from a YAML file and `section.key=value` overrides. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}. Give the path of a YAML file") from error
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not a text. Give the path of a YAML file") from None
    try:
        values = yaml.load(text, Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {explain_yaml(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: must hold sections such as `train:`, got {type(values).__name__}"
        )
    for override in overrides:
        _apply(values, override)
    return make_config(values)


def make_config(values: dict) -> Config:
    """Config from nested dictionaries. Raises ConfigError."""
    try:
        return Config.model_validate(_tuples(_with_kinds(values)))
    except ValidationError as error:
        raise ConfigError(explain(error, make_kinds(), known_keys())) from None


def _last_part(path: str) -> str:
    return Path(path).resolve().name


def _with_kinds(values: dict) -> dict:
    """A section that does not say its kind has the kind of the defaults."""
    values = dict(values)
    for section in make_kinds():
        if isinstance(values.get(section), dict):
            values[section] = {"kind": getattr(Config(), section).kind, **values[section]}
    return values


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"argument {override!r}: overrides are written section.key=value")
    *sections, last = key.split(".")
    place = values
    for section in sections:
        if place.get(section) is None:  # a section of a file whose keys are all commented out
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
    try:
        place[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: not a valid value: {explain_yaml(error)}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as a string; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def make_kinds() -> dict[str, tuple[str, ...]]:
    """The accepted `kind`s of the sections that have several forms."""
    return {
        name: tuple(
            get_args(option.model_fields["kind"].annotation)[0] for option in get_args(field.annotation)
        )
        for name, field in Config.model_fields.items()
        if field.discriminator
    }


def known_keys() -> list[str]:
    """Every accepted key, as `section.key`."""
    keys = []
    for name, field in Config.model_fields.items():
        options = get_args(field.annotation) or (field.annotation,)
        for option in options:
            keys += [f"{name}.{inner}" for inner in getattr(option, "model_fields", {})]
    return list(dict.fromkeys([*Config.model_fields, *keys]))
