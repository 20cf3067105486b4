"""Measurements while training, on a copy of the model: training goes on as if there had been none."""

from __future__ import annotations

import torch
from torch import Tensor

from sivae_fast.config import Config, ConfigError
from sivae_fast.contract import Model
from sivae_fast.evaluation import fid, reconstruction
from sivae_fast.evaluation.features import load_features
from sivae_fast.growth import Stage
from sivae_fast.inference import Inference
from sivae_fast.measure import RealImages, evaluate
from sivae_fast.systems import levels, make_model

SMALLEST_SSIM = 11  # pixels of its window
FEWEST = 6  # images that have a fifth neighbour


class Evaluator:
    """Measures what `config.evaluate` asks for; every rank has one and does its share.

    Raises ConfigError, before any training, where weights, packages or images are missing or do not fit.
    """

    def __init__(self, config: Config, device: torch.device):
        self._config, self._features = config, None
        settings = config.evaluate
        self._model = make_model(config).to(device).requires_grad_(False)
        self._model.set_level(levels(config) - 1, 1.0)
        try:
            if set(settings.metrics) & set(fid.METRICS):
                self._features = load_features(settings.features, settings.weights, device)
            if "lpips" in settings.metrics:
                reconstruction.load_lpips(settings.weights, device)
            reals = RealImages(self._inference(0, "raw"), settings.data, settings.images)
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(f"evaluate.metrics={', '.join(settings.metrics)}: {error}") from error
        if len(reals) < FEWEST:
            raise ConfigError(f"evaluate.data: {reals.set.path} has {len(reals)} images, {FEWEST} are needed")
        if "ssim" in settings.metrics and config.model.resolution < SMALLEST_SSIM:
            raise ConfigError(
                f"evaluate.metrics: ssim needs images of at least {SMALLEST_SSIM} pixels a side, "
                f"model.resolution is {config.model.resolution}"
            )

    @torch.no_grad()
    def measure(self, model: Model, stage: Stage, images: int, weights: str) -> dict[str, dict]:
        """A record a metric of `model` at its level; SSIM is left out while images are too small for it.

        weights: "averaged" or "raw", what `model` has. A collective call.
        """
        settings = self._config.evaluate
        _copy(model.state_dict(), self._model.state_dict())
        self._model.set_level(stage.lod, stage.blend)
        run = self._inference(images, weights)
        metrics = [name for name in settings.metrics if name != "ssim" or run.resolution >= SMALLEST_SSIM]
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

    def _inference(self, images: int, weights: str) -> Inference:
        return Inference(self._model, self._config, images, weights=weights, show=False)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
