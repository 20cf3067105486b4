"""Measurements while training, on a copy of the model: training goes on as if there had been none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.config import Config, ConfigError
from sivae_fast.contract import Model
from sivae_fast.evaluation import fid
from sivae_fast.evaluation.features import Features, load_features
from sivae_fast.evaluation.reconstruction import SMALLEST, error_functions, load_lpips
from sivae_fast.evaluation.sharing import ranks
from sivae_fast.growth import Stage
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.measure import RealImages, evaluate
from sivae_fast.measure_clouds import check_packages, evaluate_clouds
from sivae_fast.measure_translation import Swaps, errors_of, evaluate_translation
from sivae_fast.systems import levels, make_model

FEWEST = 6  # images that have a fifth neighbour
#: Metrics of which more is better.
MORE = {"precision", "recall", "density", "coverage", "psnr", "ssim", "log_likelihood", "swap_ssim"}
MORE |= {"coverage_chamfer", "coverage_emd", "class_from_class_code", "content_from_content_code"}


class Evaluator:
    """Measures what `config.evaluate` asks for; every rank has one and does its share.

    Raises ConfigError, before any training, where weights, packages or data are missing or do not fit.
    """

    def __init__(self, config: Config, device: torch.device):
        data = config.evaluate.data
        if data and not Path(data).exists():
            raise ConfigError(
                f"evaluate.data={data} does not exist: a set such as data.path, or null for that"
            )
        self._model = make_model(config).to(device).requires_grad_(False)
        self._model.set_level(levels(config) - 1, 1.0)
        self._measures = MEASURES[config.model.kind](config, self._model)

    @torch.no_grad()
    def measure(self, model: Model, stage: Stage, images: int, weights: str) -> dict[str, dict]:
        """A record a metric of `model` at its level; those that need larger images are left out.

        weights: "averaged" or "raw", what `model` has. A collective call.
        """
        _copy(model.state_dict(), self._model.state_dict())
        self._model.set_level(stage.lod, stage.blend)
        return self._measures.of(self._model, images, weights)


class ImageMeasures:
    """The measures of style and residual models."""

    def __init__(self, config: Config, model: Model):
        settings, run = config.evaluate, Inference(model, config, 0, show=False)
        self._config, self._features = config, self.needs(config, run.device)
        with _refusing(config, "data"):
            reals = RealImages(run, settings.data, settings.images)
        fewest = max(FEWEST, ranks())  # an image for each of them
        if len(reals) < fewest:
            option = "data" if len(reals) < settings.images else "images"
            raise ConfigError(
                f"evaluate.{option}={getattr(settings, option) or 'null'}: {fewest} images are needed, "
                f"{reals.set.path} gives {len(reals)}"
            )

    @staticmethod
    def needs(config: Config, device: torch.device) -> Features | None:
        """The feature network, where one is needed; raises ConfigError where something is missing for it."""
        settings, features = config.evaluate, None
        with _refusing(config, "metrics"):
            if set(config.measured) & set(fid.METRICS):
                features = load_features(settings.features, settings.weights, device)
            if "lpips" in config.measured:
                load_lpips(settings.weights, device)
        _check_sizes(config)
        return features

    def of(self, model: Model, images: int, weights: str) -> dict[str, dict]:
        """A record a metric of `model` after so many images. A collective call."""
        settings = self._config.evaluate
        run = Inference(model, self._config, images, weights=weights, show=False)
        metrics = [name for name in self._config.measured if run.resolution >= _smallest(name)]
        if not metrics:
            return {}
        return evaluate(
            run,
            metrics,
            features=self._features,
            count=settings.images,
            seed=self._config.train.seed,
            data=settings.data,
            weights=settings.weights,
        )


class CloudMeasures:
    """The measures of point cloud models, on its own validation clouds or another set's test clouds."""

    def __init__(self, config: Config, model: Model):
        self._config = config
        self.needs(config)
        with _refusing(config, "data"):
            run = CloudInference(model, config, 0, data=config.evaluate.data, show=False)
            self._split = "test" if config.evaluate.data else "validation"
            self._clouds = run.clouds(self._split)

    @staticmethod
    def needs(config: Config, device: torch.device | None = None) -> None:
        """Raises ConfigError where a package is missing."""
        with _refusing(config, "metrics"):
            check_packages(config.measured)

    def of(self, model: Model, images: int, weights: str) -> dict[str, dict]:
        """A record a metric of `model` after so many images. A collective call."""
        settings, seed = self._config.evaluate, self._config.train.seed
        run = CloudInference(model, self._config, images, weights=weights, data=settings.data, show=False)
        about = {"count": settings.images, "seed": seed, "split": self._split, "clouds": self._clouds}
        return evaluate_clouds(run, self._config.measured, **about)


class TranslationMeasures:
    """The measures of two_encoder models."""

    def __init__(self, config: Config, model: Model):
        self._config, settings = config, config.evaluate
        run = Inference(model, config, 0, data=settings.data, show=False)
        self.needs(config, run.device)
        with _refusing(config, "data"):
            self._factors = run.factors()
            swaps = Swaps(run, self._factors, settings.images, config.train.seed)
            self._metrics = swaps.known(config.measured)
            if not self._metrics:
                raise ValueError(f"the set tells none of {', '.join(config.measured)}")

    @staticmethod
    def needs(config: Config, device: torch.device) -> None:
        """Raises ConfigError where a package or a network's weights are missing."""
        with _refusing(config, "metrics"):
            error_functions(errors_of(config.measured), config.evaluate.weights, device)
        _check_sizes(config)

    def of(self, model: Model, images: int, weights: str) -> dict[str, dict]:
        """A record a metric of `model` after so many images. A collective call."""
        settings = self._config.evaluate
        return evaluate_translation(
            Inference(model, self._config, images, weights=weights, data=settings.data, show=False),
            self._metrics,
            factors=self._factors,
            count=settings.images,
            seed=self._config.train.seed,
            weights=settings.weights,
        )


MEASURES = {
    "style": ImageMeasures,
    "residual": ImageMeasures,
    "own": ImageMeasures,
    "pointnet": CloudMeasures,
    "two_encoder": TranslationMeasures,
}


def is_best(name: str, value: float, others: Iterable[float | None]) -> bool:
    """Whether `value` of the metric `name` is better than all others; what is not finite, None among the
    others, is never the best."""
    others = [other for other in others if other is not None]
    better = (value > other if name in MORE else value < other for other in others)
    return math.isfinite(value) and all(better)


def _smallest(metric: str) -> int:
    """Pixels a side of the smallest images that it measures."""
    return SMALLEST.get(metric.removeprefix("swap_"), 1)


def _check_sizes(config: Config) -> None:
    for name in config.measured:
        if config.model.resolution < _smallest(name):
            raise ConfigError(
                f"evaluate.metrics={', '.join(config.measured)}: {name} needs images of at least "
                f"{_smallest(name)} pixels a side, model.resolution is {config.model.resolution}"
            )


@contextlib.contextmanager
def _refusing(config: Config, option: str) -> Iterator[None]:
    """Makes an error a ConfigError that names the option of `evaluate` and its value."""
    values = {"metrics": ", ".join(config.measured), "data": config.evaluate.data or "null"}
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"evaluate.{option}={values[option]}: {error}") from error


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
