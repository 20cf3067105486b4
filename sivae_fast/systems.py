"""From a configuration to a model, an objective and data: the one place that knows every system by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sivae_fast.config import Config, ConfigError
from sivae_fast.contract import Model, TrainingData
from sivae_fast.draws import Draws, Rows
from sivae_fast.evaluation.batchnorm import batch_statistics
from sivae_fast.figures import save_grid
from sivae_fast.growth import Schedule


def make_model(config: Config) -> Model:
    """The untrained model on the CPU, in float32; the same weights for the same `train.seed`.

    Raises ConfigError for sizes that do not fit.
    """
    # A class of one's own gets its settings as every file of the run has them.
    mode = "json" if config.model.kind == "own" else "python"
    settings = config.model.model_dump(mode=mode, exclude={"kind"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        try:
            return _model_maker(config.model.kind)(**settings)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from None


def make_objective(config: Config, input_shape: tuple[int, ...]):
    """The objective; its `scale` is 1 / (numbers in one input) unless set."""
    from sivae_fast import objectives

    settings = config.objective
    scale = settings.scale or 1 / math.prod(input_shape)
    common = {
        "beta_rec": settings.beta_rec,
        "beta_kl": settings.beta_kl,
        "huber_delta": settings.huber_delta,
        "logvar_clamp": settings.logvar_clamp,
        "prior_std": getattr(config.model, "prior_std", 1.0),
    }
    if getattr(config.model, "swapped_fakes", False):
        common["fakes"] = dict.fromkeys(("rec", "fake", "swap"), 1 / 3)
    if settings.reconstruction not in ("chamfer", "perceptual"):
        common["reconstruction"] = settings.reconstruction
    beta_neg = settings.beta_neg if isinstance(settings.beta_neg, (int, float)) else settings.beta_neg[0]
    if settings.kind == "vae":
        return objectives.VAE(**common)
    if settings.kind == "introvae":
        return objectives.IntroVAE(**common, beta_neg=beta_neg, margin=settings.margin, hinge=settings.hinge)
    return objectives.SoftIntroVAE(
        **common, beta_neg=beta_neg, scale=scale, alpha=settings.alpha, gamma_r=_gamma_r(config)
    )


def _gamma_r(config: Config) -> float:
    """The decoder's weight for reconstructions of fakes; by default that of the published variant."""
    if config.objective.gamma_r is not None:
        return config.objective.gamma_r
    if getattr(config.model, "lagged_decoder", False):
        return 1.0  # the bootstrap variant lives on this term
    return 1e-8 if config.train.schedule == "published" else 0.0


def error_function(config: Config):
    """Per-sample error of (target, prediction) for reconstructions that the fused objective does not have."""
    kind = config.objective.reconstruction
    if kind == "chamfer":
        return _chamfer
    if kind == "perceptual":
        from sivae_fast.models.perceptual import PerceptualError

        try:
            return PerceptualError(config.objective.perceptual_weights)
        except ValueError as error:
            raise ConfigError(f"objective.perceptual_weights={error}") from error
    return None


def _chamfer(target: Tensor, prediction: Tensor) -> Tensor:
    from sivae_fast.kernels.chamfer import chamfer

    wide = torch.promote_types(target.dtype, prediction.dtype)  # networks under autocast give bf16
    return chamfer(target.to(wide), prediction.to(wide))


def make_data(config: Config, device: torch.device, *, show: bool = True) -> TrainingData:
    """The training data; `show`: this process may print progress."""
    settings = config.data
    if settings.kind == "density":
        return _density(settings.name)
    if settings.kind == "images":
        return _images(config, device, show)
    if settings.kind == "pointclouds":
        return _pointclouds(config, device)
    return _factors(config, device)


def check_batch(config: Config, batch: int) -> None:
    """Raises ConfigError for a global batch that the data cannot fill."""
    if config.data.kind != "density":
        return
    density = _density(config.data.name)
    try:
        density.sample(batch)
    except ValueError as error:
        raise ConfigError(f"train.batch={batch}: {error}") from None


def _density(name: str):
    from sivae_fast.data.densities import Density

    try:
        return Density(name)
    except ValueError as error:
        raise ConfigError(f"data.name={name}: {error}") from None


def _factors(config: Config, device: torch.device):
    from sivae_fast.data.factors import FactorImages, load_factors

    data = FactorImages(
        load_factors(config.data.path, config.model.resolution), seed=config.train.seed, device=device
    )
    if data.input_shape[0] != config.model.channels:
        raise ConfigError(
            f"model.channels={config.model.channels}: the images at data.path={config.data.path} have "
            f"{data.input_shape[0]}"
        )
    return data


def _pointclouds(config: Config, device: torch.device):
    from sivae_fast.data.pointclouds import PointClouds, load_clouds

    settings = config.data
    clouds = load_clouds(
        settings.path, classes=settings.classes, points=settings.points, resample=settings.resample
    )
    return PointClouds(clouds, seed=config.train.seed, device=device, rotate=settings.rotate)


def _images(config: Config, device: torch.device, show: bool):
    from sivae_fast.data.loader import ImageLoader

    settings, model = config.data, config.model
    path = image_path(config, show)
    check_loader(config, device)
    try:
        data = ImageLoader(
            path,
            seed=config.train.seed,
            loader=settings.loader,
            workers=settings.workers,
            cache_gib=settings.cache_gib,
            flip=settings.flip,
            shift=settings.shift,
            hue=settings.hue,
            signed=settings.value_range == "symmetric",
            grows=model.kind == "style",
            device=device,
        )
    except ValueError as error:
        raise ConfigError(f"data.path={path}: {error}") from None
    wanted = (model.channels, model.resolution, model.resolution)
    if tuple(data.input_shape) != wanted:
        raise ConfigError(
            f"data.path={path}: images are {_size(data.input_shape)}, model.channels={model.channels} and "
            f"model.resolution={model.resolution} ask for {_size(wanted)}. "
            f"Run `sivae-fast prepare SOURCE DEST --resolution {model.resolution}` or change the model"
        )
    return data


def check_loader(config: Config, device: torch.device) -> None:
    """Raises ConfigError for a loader of images that does not work on `device`."""
    if config.data.kind == "images" and config.data.loader == "dali":
        from sivae_fast.data.loader import choose_loader

        try:
            choose_loader("dali", device)
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None


def image_path(config: Config, show: bool = True) -> Path:
    """Where the training images are; those of the quickstart are made if need be."""
    if config.data.path is None:
        raise ConfigError(
            "data.path is missing: the path of an image set made by `sivae-fast prepare`, or quickstart"
        )
    if config.data.path == "quickstart":
        from sivae_fast.data.quickstart import ensure_quickstart

        return ensure_quickstart(Path("datasets"), config.model.resolution, progress=show)
    return Path(config.data.path)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channels"


@torch.no_grad()
def save_picture(config: Config, path: Path, model: Model, data) -> None:
    """What to look at while training, the same every time: real, reconstruction (of the mean), sample.

    For densities: data, samples and the learned density. Batch norm takes the statistics of the pictures, as
    in training: with its running ones the pictures of introspective models look broken (see
    `evaluation.batchnorm`).
    """
    training = model.training
    model.eval()
    if config.data.kind == "density":
        from sivae_fast.evaluation.density_figures import draw_model, look_at

        draw_model(path, data.sample, data.half_range, look_at(model, data.half_range, points=256))
    elif config.data.kind == "pointclouds":
        from sivae_fast.evaluation.pointcloud_figures import draw_clouds

        draw_clouds(path, _fixed_rows(model, data))
    else:
        with batch_statistics(model):
            real, rec, fake = _fixed_rows(model, data)
        low = 0.0 if getattr(config.data, "value_range", "unit") == "unit" else -1.0
        save_grid(path, [real, rec, fake], (low, 1.0))
    model.train(training)


def _fixed_rows(model: Model, data):
    real = data.fixed(8)
    draws = Draws(0, 0, Rows.all(len(real)), real.device)
    if real.ndim == 4 and hasattr(model, "resolution"):
        real = F.avg_pool2d(real, real.shape[-1] // model.resolution)
    rec = model.decode(model.encode(real).mean, draws.stream("picture/rec"))
    prior = draws.stream("picture/prior").normal(len(real), model.latent_size) * model.prior_std
    return real, rec, model.generate(prior, draws.stream("picture/fake"))


def make_schedule(config: Config) -> Schedule:
    """Level, fade, batch, learning rate and beta_neg as functions of images seen."""
    beta_neg = config.objective.beta_neg if config.objective.kind != "vae" else None
    return Schedule(
        levels=levels(config),
        images_per_level=config.growth.images_per_level,
        fade=config.growth.fade,
        batch=config.train.batch,
        learning_rate=config.optim.learning_rate,
        beta_neg=beta_neg,
        drops=config.optim.drops,
        drop_factor=config.optim.drop_factor,
        micro_batch=config.train.micro_batch,
    )


def levels(config: Config) -> int:
    """Number of levels of detail: 4x4 is the first; 1 for models of one size."""
    return int(math.log2(config.model.resolution)) - 1 if config.model.kind == "style" else 1


def _model_maker(kind: str) -> Callable[..., Model]:
    if kind == "style":
        from sivae_fast.models.style import StyleModel

        return StyleModel
    if kind == "mlp":
        from sivae_fast.models.mlp import MLPModel

        return MLPModel
    if kind == "residual":
        from sivae_fast.models.residual import ResidualModel

        return ResidualModel
    if kind == "pointnet":
        from sivae_fast.models.pointnet import PointNetModel

        return PointNetModel
    if kind == "two_encoder":
        from sivae_fast.models.two_encoder import TwoEncoderModel

        return TwoEncoderModel
    from sivae_fast.models.own import own_model

    return own_model
