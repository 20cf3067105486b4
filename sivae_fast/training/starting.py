"""Whether a run would start: what can be said before its data is read."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from sivae_fast import hub
from sivae_fast.config import Config
from sivae_fast.contract import Model
from sivae_fast.files import check_folder
from sivae_fast.run import check_name, naming_folder
from sivae_fast.systems import check_loader, error_function, make_model, make_schedule
from sivae_fast.training.engine import place
from sivae_fast.training.evaluator import MEASURES
from sivae_fast.training.fitting import check_fitting
from sivae_fast.training.graphs import check_graphs
from sivae_fast.training.initial import resumes, take_over
from sivae_fast.training.iteration import check_batches
from sivae_fast.training.loop import engine_kind
from sivae_fast.training.optim import make_optimizer

log = logging.getLogger(__name__)


def check_start(config: Config) -> None:
    """Raises the error with which `train` would end here before it reads any data.

    Batches are held against the ranks of the launcher, one without a launcher. Data that is not there is
    logged and no error: it may lie on other machines than the one where settings are tried.
    """
    check_settings(config)
    check_name(config.run.name)
    with naming_folder(config.run.folder):
        check_folder(config.run.folder)
    _look_for_data(config)
    if _begins_with(config) and Path(config.train.init_from).exists():
        take_over(_shapes(config), config, make_schedule(config))


def check_settings(config: Config) -> None:
    """What `check_start` says of the settings alone: nothing of folders and data."""
    _, world, device = place()
    kind, _ = engine_kind(config)
    check_graphs(config, kind, world, device)
    check_batches(config, make_schedule(config), world)
    check_fitting(config, _shapes(config), device)
    error_function(config)
    weight = torch.zeros(1, device=device, requires_grad=True)
    make_optimizer([{"params": [weight], "factor": 1.0}], implementation=config.optim.implementation)
    check_loader(config, device)
    if config.evaluate.every:
        MEASURES[config.model.kind].needs(config, device)


def _shapes(config: Config) -> Model:
    """The model without numbers; with them where the class is not ours, which may ask for some."""
    with torch.device("cpu" if config.model.kind == "own" else "meta"):
        return make_model(config)


def _look_for_data(config: Config) -> None:
    path = getattr(config.data, "path", None)
    wanted = {"data.path": None if path == "quickstart" else path}
    wanted |= {"evaluate.data": config.evaluate.data} if config.evaluate.every else {}
    if path is None and config.data.kind == "images":
        log.warning("data.path is missing: a start ends with that")
    wanted |= {"train.init_from": config.train.init_from} if _begins_with(config) else {}
    for option, value in wanted.items():
        if value and not Path(value).exists():
            log.warning("%s=%s does not exist here: a start ends with that", option, value)


def _begins_with(config: Config) -> bool:
    """Whether a start reads the file or folder `train.init_from`."""
    source = config.train.init_from
    return bool(source) and not source.startswith(hub.PREFIX) and not resumes(config, config.identity())
