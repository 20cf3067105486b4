"""A trained model from its path, in the form that fits its kind."""

from __future__ import annotations

import os

from sivae_fast.checkpoint import load
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.trained import check_kind, pick_device


def open_run(
    path: str | os.PathLike, *, averaged: bool = True, device: str = "auto", **options
) -> Inference | CloudInference:
    """The image or point cloud model of a run folder, checkpoint or snapshot; options as of `Trained.load`.

    Raises ValueError for a model of another kind, otherwise as `Trained.load` does.
    """
    model = load(path, averaged, pick_device(device))
    check_kind(model.config, (*Inference.kinds, *CloudInference.kinds))
    use = CloudInference if model.config.model.kind in CloudInference.kinds else Inference
    return use(model, model.config, model.images, weights=model.facts["weights"], **options)
