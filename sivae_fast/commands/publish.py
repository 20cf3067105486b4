"""push: one folder with all that somebody needs to use a model, uploaded to the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from sivae_fast import hub
from sivae_fast.checkpoint import load, save_snapshot
from sivae_fast.commands import pictures
from sivae_fast.commands.card import describe, metrics_of
from sivae_fast.commands.opening import run_of
from sivae_fast.evaluation.pointcloud_figures import draw_clouds
from sivae_fast.files import write_text
from sivae_fast.inference import IMAGE_MODELS
from sivae_fast.systems import make_data, save_picture


def push(
    source: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    averaged: bool = True,
) -> str:
    """Uploads a snapshot, checkpoint or run as the repository `repo_id`, "owner/name"; returns its address.

    private: of a repository that is made. token: None takes the one that `hf auth login` left, or HF_TOKEN.
    Raises CheckpointError for what is no model, otherwise as `hub.pull` does; nothing is then uploaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_publication(source, folder, repo_id, averaged=averaged)
        return hub.upload(folder, repo_id, private=private, token=token)


def write_publication(
    source: str | os.PathLike, folder: str | os.PathLike, repo_id: str, *, averaged: bool = True
) -> None:
    """The files of a repository: snapshot, configuration, card and samples. Nothing in them names a path.

    A converted density model has no samples beside it: it does not say which density it has learned.
    """
    folder = Path(folder)
    model = load(source, averaged=averaged)
    save_snapshot(folder / hub.MODEL, model, model.config, model.images, **model.facts)
    about = {"library": "sivae-fast", "images": model.images, **model.facts}
    text = json.dumps({**about, **model.config.portable().to_dict()}, indent=1)
    write_text(folder / hub.CONFIG, text + "\n")
    picture = None
    if model.config.model.kind != "mlp" or "source" not in model.facts:
        picture = hub.PICTURE
        draw_samples(folder / hub.MODEL, folder / picture)
    card = describe(model, metrics_of(source), f'"{hub.PREFIX}{repo_id}"', picture)
    write_text(folder / hub.CARD, card)


def draw_samples(snapshot: Path, path: Path) -> None:
    """A grid of prior samples; for densities data, samples and the learned density."""
    model = load(snapshot)
    config = model.config
    if config.model.kind in IMAGE_MODELS:
        pictures.sample(run_of(model, show=False), path, count=16)
    elif config.model.kind == "pointnet":
        draw_clouds(path, model.sample(8).split(4))
    else:
        save_picture(config, path, model, make_data(config, torch.device("cpu")))
