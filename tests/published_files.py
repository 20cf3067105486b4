"""Writes checkpoints in the layouts of the published ones."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_names import published_name, swap_layout, to_published

NETWORKS = {
    "encoder": "discriminator",
    "decoder": "generator",
    "mapping_tl": "mapping_tl",
    "mapping_fl": "mapping_fl",
}


@contextlib.contextmanager
def tracker_module():
    """The published trainer's module `tracker`, as long as a file is written."""
    module = types.ModuleType("tracker")

    class RunningMeanTorch:
        def __init__(self):
            self.values = [torch.tensor(0.5), torch.tensor(1.5)]

    RunningMeanTorch.__module__, RunningMeanTorch.__qualname__ = "tracker", "RunningMeanTorch"
    module.RunningMeanTorch = RunningMeanTorch
    with mock.patch.dict(sys.modules, tracker=module):
        yield module


def style_content(
    model: StyleModel,
    averaged: dict[str, Tensor] | None = None,
    optimizers: dict | None = None,
    epochs: int = 270,
) -> dict:
    """`models` and `auxiliary` without the tracker; `averaged`: weights by our names; `epochs`: finished."""
    networks = to_published(model.state_dict())
    models = {NETWORKS[name]: networks[name] for name in NETWORKS}
    models["dlatent_avg"] = networks["dlatent_avg"]
    if averaged is not None:
        copies = to_published({**averaged, "dlatent_avg": model.dlatent_avg})
        models |= {f"{NETWORKS[name]}_s": copies[name] for name in NETWORKS}
    scheduler = {f"{side}_optimizer": {"last_epoch": epochs + 1} for side in ("encoder", "decoder")}
    auxiliary = {"scheduler": scheduler}
    for side, state in (optimizers or {}).items():
        auxiliary[f"{side}_optimizer"] = state
    return {"models": models, "auxiliary": auxiliary}


def half(model: torch.nn.Module) -> dict[str, Tensor]:
    """Averaged weights that tell themselves from the others."""
    return {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}


@torch.no_grad()
def trained_to(level: int, **sizes) -> StyleModel:
    """A style model in which no level above `level` has left its initial weights."""
    model = StyleModel(**sizes)
    for i in range(level + 1):
        for parameter in [*model.decoder.blocks[i].parameters(), *model.decoder.to_rgb[i].parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def style_optimizer(model: StyleModel, side: str, second_moments: dict[str, Tensor], steps: int) -> dict:
    """The published optimizer's state dict: by index, two groups, no first moment."""
    networks = ("encoder", "mapping_tl") if side == "encoder" else ("decoder", "mapping_fl")
    state, groups, index = {}, [], 0
    for network in networks:
        names = [name for name, _ in model.named_parameters() if name.startswith(network + ".")]
        settings = {"lr": 0.0015, "beta_2": 0.99, "eps": 1e-8, "weight_decay": 0, "initial_lr": 0.0015}
        groups.append({**settings, "params": list(range(index, index + len(names)))})
        for name in names:
            assert published_name(name)[0] == network
            if name in second_moments:
                value = swap_layout(name, second_moments[name]).contiguous()
                state[index] = {"step": steps, "exp_avg_sq": value}
            index += 1
    return {"state": state, "param_groups": groups}


def write(
    path: Path, content: dict, *, zipped: bool = True, cuda: bool = False, tracked: bool = True
) -> Path:
    """zipped: the container of PyTorch 1.6 and later. cuda: tensors are marked as saved on a GPU."""
    with contextlib.ExitStack() as stack:
        if tracked and "auxiliary" in content:
            tracker = stack.enter_context(tracker_module())
            tracks = {"loss_e": tracker.RunningMeanTorch()}
            track = {"tracks": tracks, "epochs": [0], "means_over_epochs": {"loss_e": [0.5]}}
            content = {**content, "auxiliary": {**content["auxiliary"], "tracker": track}}
        if cuda:
            stack.enter_context(mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"))
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path
