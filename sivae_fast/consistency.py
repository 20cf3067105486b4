"""Which settings of a configuration fit together. Every error names the keys, values and what is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sivae_fast.config import Config

#: The kinds of data that a model of that kind can be trained on.
DATA = {
    "style": ("images", "factors"), "residual": ("images", "factors"), "two_encoder": ("images", "factors"),
    "own": ("images", "factors"), "mlp": ("density",), "pointnet": ("pointclouds",),
}  # fmt: skip
_OF_IMAGES = ("fid", "kid", "precision", "recall", "density", "coverage")
_OF_IMAGES += ("mse", "psnr", "ssim", "lpips", "log_likelihood")
_OF_CLOUDS = ("jsd", "mmd_chamfer", "coverage_chamfer", "mmd_emd", "coverage_emd")
_OF_SWAPS = ("swap_mse", "swap_ssim", "swap_lpips", "mse", "ssim", "lpips")
_OF_SWAPS += ("class_from_class_code", "content_from_class_code")
_OF_SWAPS += ("class_from_content_code", "content_from_content_code")
#: What can be measured while a model of that kind trains.
METRICS = {
    "style": _OF_IMAGES, "residual": _OF_IMAGES, "own": _OF_IMAGES,
    "pointnet": _OF_CLOUDS, "two_encoder": _OF_SWAPS,
}  # fmt: skip
#: What is measured where evaluate.metrics does not say.
USUAL_METRICS = {
    "style": ("mse", "ssim"), "residual": ("mse", "ssim"), "own": ("mse", "ssim"),
    "pointnet": ("jsd",), "two_encoder": ("swap_mse", "mse"),
}  # fmt: skip


def check_together(config: Config) -> None:
    """Raises ValueError for the first two settings that exclude each other."""
    _check_kinds(config)
    _check_objective(config)
    _check_training(config)
    _check_measures(config)


def _check_kinds(config: Config) -> None:
    model, data = config.model, config.data
    if data.kind not in DATA[model.kind]:
        raise ValueError(
            f"data.kind={data.kind} does not fit model.kind={model.kind}: "
            f"accepted with it is {' or '.join(DATA[model.kind])}"
        )
    if data.kind == "pointclouds" and data.points != model.points:
        raise ValueError(f"data.points={data.points} and model.points={model.points} must be the same")
    if config.growth.images_per_level and (model.kind, data.kind) != ("style", "images"):
        raise ValueError(
            f"growth.images_per_level={config.growth.images_per_level} needs model.kind=style and "
            f"data.kind=images, model.kind={model.kind} with data.kind={data.kind} has one size"
        )
    if model.kind == "two_encoder" and data.kind == "images" and data.value_range != "unit":
        raise ValueError(
            f"model.kind=two_encoder needs data.value_range=unit, got {data.value_range}: its decoder ends "
            "with a sigmoid"
        )


def _check_objective(config: Config) -> None:
    objective, kind = config.objective, config.model.kind
    error = objective.reconstruction
    if objective.kind == "introvae" and objective.margin is None:
        raise ValueError("objective.margin is missing, objective.kind=introvae needs a positive number")
    if getattr(config.model, "lagged_decoder", False) and objective.kind != "soft_introvae":
        raise ValueError(
            "model.lagged_decoder=true needs objective.kind=soft_introvae, "
            f"objective.kind={objective.kind} reconstructs no fakes"
        )
    for name, owner in (("margin", "introvae"), ("gamma_r", "soft_introvae")):
        value = getattr(objective, name)
        if value is not None and objective.kind != owner:
            raise ValueError(
                f"objective.{name}={value:g} needs objective.kind={owner}, got {objective.kind}: "
                "null leaves it out"
            )
    if (bounds := objective.logvar_clamp) and not bounds[0] < bounds[1]:
        raise ValueError(
            f"objective.logvar_clamp=[{bounds[0]:g},{bounds[1]:g}]: the first must be below the second"
        )
    if (error == "perceptual") != (objective.perceptual_weights is not None):
        raise ValueError(
            f"objective.reconstruction={error} and "
            f"objective.perceptual_weights={objective.perceptual_weights}: perceptual needs "
            "the file of VGG16's weights, the others have none"
        )
    if (error == "chamfer") != (kind == "pointnet"):
        raise ValueError(
            f"objective.reconstruction={error} does not fit model.kind={kind}: pointnet needs "
            "chamfer, which does not depend on the order of points, and no other kind has it"
        )
    if error == "perceptual" and getattr(config.data, "value_range", "unit") != "unit":
        raise ValueError(
            f"objective.reconstruction={error} needs data.value_range=unit, got {config.data.value_range}"
        )


def _check_training(config: Config) -> None:
    train, kind = config.train, config.model.kind
    if train.fresh_draws and train.schedule != "published":
        raise ValueError("train.fresh_draws=true needs train.schedule=published")
    if train.batch == "auto" and train.micro_batch not in (None, "auto"):
        raise ValueError(
            f"train.batch=auto and train.micro_batch={train.micro_batch} exclude each other: "
            "the batch is what fits in one pass. Give one of them as a number, not both"
        )
    for name in ("recompute", "compile"):
        if getattr(train, name) and kind != "style":
            raise ValueError(f"train.{name}=true needs model.kind=style, got model.kind={kind}")
    if train.recompute and train.compile:
        raise ValueError("train.recompute=true and train.compile=true exclude each other: choose one")


def _check_measures(config: Config) -> None:
    kind, settings = config.model.kind, config.evaluate
    if settings.every and kind not in METRICS:
        raise ValueError(
            f"evaluate.every={settings.every} needs model.kind to be one of {', '.join(METRICS)}, "
            f"got {kind}: null leaves it out"
        )
    known = METRICS.get(kind, ())
    unknown = [name for name in settings.metrics or () if name not in known]
    if unknown:
        accepted = ", ".join(known) or "none"
        raise ValueError(f"evaluate.metrics={', '.join(unknown)}: model.kind={kind} accepts {accepted}")
    if not settings.every:
        return
    with_networks = [name for name in METRICS if "lpips" in METRICS[name]]
    with_features = [name for name in METRICS if "fid" in METRICS[name]]
    for option, kinds in (("features", with_features), ("weights", with_networks)):
        value = getattr(settings, option)
        if kind not in kinds and value != type(settings).model_fields[option].default:
            raise ValueError(
                f"evaluate.{option}={value} needs model.kind to be one of {', '.join(kinds)}, "
                f"got {kind}: leave it out"
            )
