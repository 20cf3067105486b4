"""card: what a model is, how far it was trained, what was measured and how to load it, in Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sivae_fast import hub
from sivae_fast.checkpoint import load, run_folder
from sivae_fast.commands.report import digits, texts
from sivae_fast.config import Config
from sivae_fast.contract import Model
from sivae_fast.run import read_metrics
from sivae_fast.trained import batch_norm_is_measured_anew

OBJECTIVES = {"vae": "VAE", "introvae": "IntroVAE", "soft_introvae": "Soft-IntroVAE"}
SYSTEMS = {
    "style": "style-based image model",
    "residual": "residual convolutional image model",
    "mlp": "fully connected model of points in the plane",
    "pointnet": "point cloud model",
    "two_encoder": "class and content model of images",
    "own": "image model of its own class",
}
_HEADER = """---
library_name: sivae-fast
tags: [variational-autoencoder, introspective-vae, {objective}]
---
"""
_USE = """## Load it

```python
import sivae_fast
model = sivae_fast.load({where})
x_hat = model.sample(4)
```

`model.encode(x)` gives `.mean` and `.logvar`, `model.decode(z)` and `model.reconstruct(x)` the way back.
"""
_OWN = """Its class is not part of sivae-fast: `{source}` has to be in the folder from which it is loaded.
"""
_BATCH_NORM = """
Its batch norm then has the running statistics of training, which can give worse pictures.
`sivae_fast.Inference.load({where})` measures them anew, as for the figures.
"""
_LAST = """## Intended use

Research on generative models, representations and compression; generation, reconstruction and interpolation
of data like those it was trained on. Its outputs are made up: they are no evidence about anything or anyone,
and they carry the biases of the training data. It is not meant for decisions about people.

## Licence

The code that makes and loads this model, sivae-fast, is under Apache-2.0. {weights}
"""


def card(source: str | os.PathLike, *, averaged: bool = True) -> str:
    """The card of a snapshot, checkpoint or run folder, with the metrics that lie in the run folder.

    Raises CheckpointError, naming the file, for what is no model.
    """
    where = f'"{_where(os.fspath(source))}"' + ", averaged=False" * (not averaged)
    return describe(load(source, averaged=averaged), metrics_of(source), where)


def _where(name: str) -> str:
    """What loads the model from here; of one elsewhere the name alone, without the paths of this machine."""
    if name.startswith(hub.PREFIX):
        return name
    path, here = Path(name).resolve(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def metrics_of(source: str | os.PathLike) -> dict[str, list[dict]]:
    """The records of every metric of the run that `source` belongs to."""
    folder = run_folder(Path(source))
    return read_metrics(folder) if folder else {}


def describe(model: Model, metrics: dict[str, list[dict]], where: str, picture: str | None = None) -> str:
    """The card of a model of `load`. where: the arguments that load it; picture: a file beside the card."""
    config, facts = model.config, model.facts
    title = f"# {SYSTEMS[config.model.kind].capitalize()}, {_size(config)}\n"
    published = facts.get("source")
    origin = (
        f"Converted from the published checkpoint `{published}`; how it was trained is not in that file."
        if published
        else f"Trained as a {OBJECTIVES[config.objective.kind]} with sivae-fast."
    )
    parts = [
        _HEADER.format(objective=config.objective.kind.replace("_", "-")),
        title,
        origin + "\n",
        f"![Samples of the prior]({picture})\n" if picture else "",
        "## The model\n",
        _table(("", ""), _model_rows(model)),
        "" if published else "## Training\n",
        "" if published else _table(("setting", "value"), _training_rows(config)),
        _metrics(metrics, model.images),
        _USE.format(where=where),
        _OWN.format(source=config.portable().model.source) if config.model.kind == "own" else "",
        _BATCH_NORM.format(where=where) if batch_norm_is_measured_anew(model) else "",
        _LAST.format(weights=_terms(published)),
    ]
    return "\n".join(part for part in parts if part)


def _size(config: Config) -> str:
    model = config.model
    if hasattr(model, "resolution"):
        return f"{model.resolution}x{model.resolution}, {'grey' if model.channels == 1 else 'colour'}"
    return f"{model.points} points" if model.kind == "pointnet" else f"{model.hidden_layers} layers"


def _model_rows(model: Model) -> Iterable[tuple[str, str]]:
    def count(modules) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()):,}"

    yield "system", f"`{model.config.model.kind}`: {SYSTEMS[model.config.model.kind]}"
    for name, value in model.config.portable().model:
        if name != "kind":
            yield name.replace("_", " "), str(value)
    yield "parameters", count([model])
    yield "parameters of the encoder phase", count(model.encoder_modules())
    yield "parameters of the decoder phase", count(model.decoder_modules())
    if model.images:
        yield "images seen", f"{model.images:,}"
    for name in ("weights", "epoch"):
        if name in model.facts:
            yield name, model.facts[name]


def _training_rows(config: Config) -> Iterable[tuple[str, str]]:
    chosen = {
        "data": ("kind", "path", "name", "classes", "flip", "value_range"),
        "objective": (
            "kind",
            "reconstruction",
            "beta_rec",
            "beta_kl",
            "beta_neg",
            "scale",
            "alpha",
            "margin",
        ),
        "growth": ("images_per_level", "fade"),
        "train": ("init_from", "batch", "warmup_images", "precision", "schedule", "seed"),
        "optim": ("learning_rate", "betas", "drops"),
        "average": ("half_life",),
    }
    for section, names in chosen.items():
        values = getattr(config.portable(), section)
        for name in names:
            value = getattr(values, name, None)
            if value not in (None, (), False):
                yield f"`{section}.{name}`", str(value)


def _metrics(metrics: dict[str, list[dict]], images: int) -> str:
    """The newest record of each metric that was taken no later than this model."""
    rows = []
    for name, records in metrics.items():
        known = [record for record in records if record["images"] <= images]
        if known:
            record = known[-1]
            about = texts(record).items()
            beside = ", ".join(f"{k} {v}" for k, v in about if k not in ("images", "value"))
            rows.append((name, digits(record["value"]), f"{record['images']:,}", beside))
    if not rows:
        return ""
    return "## Measured\n\n" + _table(("metric", "value", "after images", "with"), rows)


def _terms(published: str | None) -> str:
    if published:
        return "The weights are their authors' and under the terms they were published with."
    return (
        "Terms of the weights: to be filled in by who publishes them, within what the licence of the "
        "training data allows."
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
