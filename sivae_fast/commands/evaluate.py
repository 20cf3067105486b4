"""evaluate: the measures that a kind of model has, from the options of the command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sivae_fast.checkpoint import load
from sivae_fast.commands.opening import run_of
from sivae_fast.contract import Model
from sivae_fast.evaluation.fid import METRICS as COMPARED
from sivae_fast.inference_clouds import CloudInference
from sivae_fast.trained import pick_device

COUNT = 50_000  # images of published FIDs


def evaluate(
    model: str,
    *,
    raw: bool = False,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    features: str | None = None,
    weights: str | None = None,
    count: int | None = None,
    ood: Sequence[str] | None = None,
    own: str | None = None,
    out: str | None = None,
    protocol: dict | None = None,
    estimate: dict | None = None,
    device: str = "auto",
    **options,
) -> dict:
    """Measures the model at the path `model`. The records also go into a run folder, if it is one; those of a
    checkpoint or snapshot in it do not, since the last record of a run is taken for that of its last state.

    count: at most so many images or clouds; None is `COUNT`.
    protocol: mirror and round_down, of fid and its kin. estimate: options of log p(x). options: those of
    `Trained`, without `weights`.
    Raises ValueError for options that do not fit the kind of the model or each other, PermissionError, before
    anything is measured, for a run folder that cannot keep the results.
    """
    estimate, protocol = estimate or {}, protocol or {}
    if estimate and not ood and "log_likelihood" not in (metrics or ()):
        raise ValueError(f"--{next(iter(estimate))} is for --ood and for --metrics log_likelihood")
    if ood and metrics:
        raise ValueError("--ood and --metrics are two evaluations: give one of them")
    folder = Path(model) if Path(model).is_dir() else None
    if folder and not (ood and out):
        _check_keeps(folder)
    loaded = load(model, not raw, pick_device(device))
    kind = loaded.config.model.kind
    _check_fit(kind, metrics, ood, weights, {"features": features, "own": own, "out": out, **protocol})
    if kind == "mlp":
        return _density(loaded, seed, folder, count=count, **options)
    count = COUNT if count is None else count
    run = run_of(loaded, **options)
    if isinstance(run, CloudInference):
        from sivae_fast.measure_clouds import evaluate_clouds

        return evaluate_clouds(run, metrics, count=count, seed=seed, folder=folder)
    if kind == "two_encoder":
        from sivae_fast.measure_translation import evaluate_translation

        return evaluate_translation(run, metrics, count=count, seed=seed, weights=weights, folder=folder)
    if ood:
        from sivae_fast.measure import detect_others

        where = out or folder or "."
        return detect_others(run, _named(ood), where, own=own, count=count, seed=seed, **estimate)
    return _images(run, metrics or ["fid"], features, weights, count, seed, folder, protocol | estimate)


def _check_keeps(folder: Path) -> None:
    for path in (folder, *folder.glob("metric-*.jsonl")):
        if not os.access(path, os.W_OK):
            raise PermissionError(
                f"{path} cannot be written, and a run folder keeps the results: give a snapshot or "
                "checkpoint in it, which only prints them"
            )


def _check_fit(kind: str, metrics, ood, weights, of_images: dict) -> None:
    """Raises ValueError for options that are of no use for this kind of model and these metrics."""
    if kind in ("style", "residual", "own"):
        return _check_use(metrics or ["fid"], ood, weights=weights, **of_images)
    _refuse(kind, ood=ood, **of_images)
    if kind in ("mlp", "pointnet"):
        _refuse(kind, weights=weights)
    elif weights and metrics and not any(name.endswith("lpips") for name in metrics):
        raise ValueError(f"{_given('weights', weights)}: this option is for --metrics lpips swap_lpips")
    if kind == "mlp":
        _refuse(kind, metrics=metrics)


def _refuse(kind: str, **options) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{_given(name, value)}: model.kind is {kind}, this option is for other models")


def _check_use(metrics: Sequence[str], ood: Sequence[str] | None, **options) -> None:
    """Raises ValueError for the first option that an evaluation of an image model has no use for."""
    for name, value in options.items():
        users = COMPARED
        if name == "weights":
            users = ("lpips",) if options["features"] == "random" else (*COMPARED, "lpips")
        of_ood = name in ("own", "out")
        if value is not None and not (ood if of_ood else not ood and set(metrics) & set(users)):
            use = "--ood" if of_ood else f"--metrics {' '.join(users)}"
            raise ValueError(f"{_given(name, value)}: this option is for {use}")


def _given(name: str, value: object) -> str:
    """The option as it was typed."""
    shown = " ".join(value) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}")


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Sets by their file names, or by their paths where two have one name."""
    names = [Path(path).stem for path in paths]
    return {path if names.count(name) > 1 else name: path for name, path in zip(names, paths, strict=True)}


def _images(run, metrics, features, weights, count, seed, folder, further) -> dict:
    from sivae_fast.evaluation.features import load_features
    from sivae_fast.measure import evaluate

    compared = set(metrics) & set(COMPARED)
    network = load_features(features or "inception", weights, run.device) if compared else None
    about = {"count": count, "seed": seed, "data": run.data_path, "weights": weights, "folder": folder}
    return evaluate(run, metrics, features=network, **about, **further)


def _density(
    model: Model,
    seed: int,
    folder: Path | None,
    precision: str = "fp32",
    data: str | None = None,
    **others,
) -> dict:
    from sivae_fast.commands.densities import check_unused, density_of
    from sivae_fast.evaluation.density import evaluate_density
    from sivae_fast.run import append_metric

    check_unused(precision=precision, **others)
    density = density_of(model, data)
    scores = evaluate_density(model, density.sample, density.half_range, seed)
    about = {"images": model.images, "weights": model.facts["weights"], "precision": precision, "seed": seed}
    about["density"] = density.name
    records = {name: {"value": value, **about} for name, value in scores.items()}
    if folder:
        for name, record in records.items():
            append_metric(folder, name, record)
    return records
