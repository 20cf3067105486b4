"""FID and its kin, reconstruction errors, likelihoods, and how well a model tells other data from its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.data.archive import ImageSet
from sivae_fast.data.loader import PillowDecoder, default_workers
from sivae_fast.evaluation import fid, likelihood, reconstruction
from sivae_fast.evaluation.features import Features
from sivae_fast.evaluation.likelihood import SCORES
from sivae_fast.evaluation.reconstruction import ImageError
from sivae_fast.evaluation.sharing import gather, rank, share, summed
from sivae_fast.files import check_folder, filling, write_text
from sivae_fast.inference import Inference
from sivae_fast.progress import progress_bar
from sivae_fast.run import append_metric
from sivae_fast.trained import named_set

#: How log p(x) is estimated unless told otherwise; see `evaluation.likelihood`.
ESTIMATE = {"samples": 5, "variance": 1.0, "proposal": "posterior"}
RECONSTRUCTION = (*reconstruction.METRICS, "lpips")
LIKELIHOOD = "log_likelihood"
METRICS = (*fid.METRICS, *RECONSTRUCTION, LIKELIHOOD)


def evaluate(
    run: Inference,
    metrics: Sequence[str] = ("fid", "kid", "precision", "recall"),
    *,
    features: Features | None = None,
    count: int = 50_000,
    seed: int = 0,
    data: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    mirror: bool = False,
    round_down: bool = False,
    **estimate: object,
) -> dict[str, dict]:
    """Measures the model against a set of images, by default the one it was trained on.

    metrics: some of `METRICS`. The first six compare `count` samples of the prior with as many real images in
    the space of `features`; mse to lpips compare images with their reconstructions; log_likelihood is the
    mean of log p(x) in nats, by `evaluation.likelihood` with its options samples, variance and proposal.
    mirror, round_down: for the first six, mirror each real image with probability 1/2, by `seed`, and round
    samples down to 8 bits, not to the nearest; the records say so.
    weights: folder of LPIPS's network. folder: a run folder, to whose metric files the records are added.
    Called in every process of a process group, each does its share and all get the result.
    Returns a record a metric: the value and all that has to be said beside it. What cannot be measured is
    refused before anything is: ValueError, or as `reconstruction.load_lpips`.
    """
    check_metrics(metrics)
    if count < 2:
        raise ValueError(f"count is {count}, must be at least 2")
    estimate = {**ESTIMATE, **estimate}
    likelihood.check_options(**estimate)
    if LIKELIHOOD in metrics:
        _check_draws(run)
    reals = _opened(run, "data", data, count)
    generation = [name for name in metrics if name in fid.METRICS]
    if set(generation) - {"fid", "kid"}:
        fid.check_neighbours(min(count, len(reals)))
    functions = error_functions(run, [name for name in metrics if name in RECONSTRUCTION], weights)
    facts = {**run.described, **named_set(data), "real_images": len(reals), "seed": seed}
    records: dict[str, dict] = {}
    if generation:
        if features is None:
            raise ValueError(f"{', '.join(generation)} need features: give the network that compares images")
        about = {"generated_images": count, "features": features.name, "comparable": features.comparable}
        about |= _protocol(run, features, mirror, round_down)
        real = reals.pixels(mirror_seed=seed if mirror else None)
        values = fid.compare(features, real, generated(run, count, seed, round_down), generation)
        records |= {name: {"value": value, **facts, **about} for name, value in values.items()}
    if functions:
        values = reconstruction_errors(run, reals, functions, seed)
        records |= {name: {"value": value, **facts} for name, value in values.items()}
    if LIKELIHOOD in metrics:
        value = mean_log_likelihood(run, reals, seed, **estimate)
        records[LIKELIHOOD] = {"value": value, **facts, **estimate}
    if folder is not None and rank() == 0:
        for name, record in records.items():
            append_metric(folder, name, record)
    return records


def _protocol(run: Inference, features: Features, mirror: bool, round_down: bool) -> dict[str, object]:
    """What sets a measurement apart from the usual one."""
    found = {"mirrored": True} if mirror else {}
    found |= {"rounded": "down"} if round_down else {}
    return found | ({"batch": run.batch} if features.network.training else {})


def detect_others(
    run: Inference,
    others: Mapping[str, str | os.PathLike],
    out: str | os.PathLike,
    *,
    own: str | os.PathLike | None = None,
    count: int = 10_000,
    seed: int = 0,
    **estimate: object,
) -> dict:
    """How well the model tells `others` (image sets by name) from its own kind of images.

    own: a set of the same kind that it was not trained on; the training images where there is none, and the
    result says so. At most `count` images of each set are scored; the options samples, variance and proposal
    are those of `evaluation.likelihood`, the weight of errors in the score `elbo` is that of training.
    Writes `ood.json` (areas under the ROC curve of every score) and `ood.png` (histograms of log p(x)) into
    the folder `out`, which is looked at before anything is scored; returns what is in the file.
    """
    check_folder(out)
    if not others:
        raise ValueError("no other image sets are given")
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    _check_draws(run)
    trained = run.config.objective
    low, high = run.value_range
    weight = trained.beta_rec / (trained.beta_kl or 1.0) * (high - low) ** 2  # of errors of pixels in [0, 1]
    options = {**ESTIMATE, **estimate, "weight": weight}
    likelihood.check_options(**{**ESTIMATE, **estimate})
    sets = {"own": own, **others} if own else {"training set": None, **others}
    if len(sets) <= len(others):
        raise ValueError(f"{', '.join(others)}: 'own' and 'training set' name the model's own images")
    reals = {name: _opened(run, "own" if path == own else "ood", path, count) for name, path in sets.items()}
    scored = {}
    for name, images in reals.items():
        with run.casting():
            found = likelihood.score_batches(
                run.model, images.inputs(), seed + rank(), value_range=run.value_range, **options
            )
        table = gather(torch.stack(list(found.values()), 1).to(run.device)).cpu()
        scored[name] = dict(zip(found, table.unbind(1), strict=True))
    first, *names = sets
    result = {
        **run.described,
        **options,
        "seed": seed,
        "own_images": first,
        "counts": {name: len(scores["kl"]) for name, scores in scored.items()},
        "auroc": {
            name: {score: likelihood.auroc(scored[first][score], scored[name][score]) for score in SCORES}
            for name in names
        },
    }
    if rank() == 0:
        _write(Path(out), result, scored)
    return result


def _write(folder: Path, result: dict, scored: Mapping[str, Mapping[str, Tensor]]) -> None:
    values = {name: -scores["log_likelihood"] for name, scores in scored.items()}
    title = f"log-likelihood of {result['images']:,} images' training, S = {result['samples']}"
    with filling(folder) as place:
        write_text(place / "ood.json", json.dumps(result, indent=1) + "\n")
        likelihood.save_histogram(place / "ood.png", values, title)


class RealImages:
    """This rank's share of at most `count` images of a set, in batches of the model's size."""

    def __init__(self, run: Inference, path: str | os.PathLike | None, count: int):
        self.run = run
        self.set = ImageSet(path or run.training_set(), any_size=True)
        model = run.config.model
        if (self.set.resolution, self.set.channels) != (model.resolution, model.channels):
            side = self.set.resolution
            raise ValueError(
                f"{self.set.path} holds {side}x{side} images of {self.set.channels} channels, the model "
                f"takes {model.resolution}x{model.resolution} of {model.channels}: run `sivae-fast prepare`"
            )
        self.count = min(count, len(self.set))

    def __len__(self) -> int:
        return self.count

    def inputs(self) -> Iterator[Tensor]:
        """As the model takes them, on its device. The encoder is ready for them after the first."""
        self.run.prepare()
        for images in self._decoded():
            yield self.run.to_input(images)

    def pixels(self, mirror_seed: int | None = None) -> Iterator[Tensor]:
        """uint8 [B, C, r, r] at the model's level, on its device.

        mirror_seed: draws which half of the images is mirrored; the same ones for any number of ranks.
        """
        mirrored = torch.zeros(self.count, dtype=torch.bool)
        if mirror_seed is not None:
            mirrored = torch.rand(self.count, generator=torch.Generator().manual_seed(mirror_seed)) < 0.5
        place, _ = share(self.count)
        for images in self._decoded():
            chosen = mirrored[place : place + len(images)].view(-1, 1, 1, 1)
            place += len(images)
            images = torch.where(chosen, images.flip(3), images)
            if images.shape[-1] != self.run.resolution:
                images = self.run.to_pixels(self.run.to_input(images))
            yield images.to(self.run.device)

    def _decoded(self) -> Iterator[Tensor]:
        start, stop = share(self.count)
        parts = torch.arange(start, stop).split(self.run.batch)
        decoder = PillowDecoder(self.set, default_workers())
        with progress_bar(stop - start, self.set.path.name, self.run.show) as bar:
            try:
                for images in decoder.stream(part.numpy() for part in parts):
                    yield images.permute(0, 3, 1, 2)
                    bar.update(len(images))
            finally:
                decoder.close()


def _opened(run: Inference, option: str, path: str | os.PathLike | None, count: int) -> RealImages:
    """The images of a set; what is wrong with it names the option that gave its path."""
    try:
        return RealImages(run, path, count)
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{option}={path}: {error}") from None


def generated(run: Inference, count: int, seed: int, round_down: bool = False) -> Iterator[Tensor]:
    """This rank's share of `count` samples, uint8 on the model's device; the latents are the same for any
    number of ranks."""
    start, stop = share(count)
    latents = run.prior(count, seed)[start:stop]
    for images in run.decoded(latents, seed + 1_000_003 * rank(), round_down=round_down):
        yield images.to(run.device)


def error_functions(
    run: Inference, names: Sequence[str], weights: str | os.PathLike | None = None
) -> dict[str, ImageError]:
    """Those of `RECONSTRUCTION`, tried on a blank image of the model's size: for SSIM it can be too small."""
    found = reconstruction.error_functions(names, weights, run.device)
    side = run.resolution
    blank = torch.zeros(1, run.config.model.channels, side, side, device=run.device)
    for function in found.values():
        function(blank, blank)
    return found


def reconstruction_errors(
    run: Inference, reals: RealImages, functions: Mapping[str, ImageError], seed: int = 0
) -> dict[str, float]:
    """Means of the functions, by their names, over all images of all ranks."""
    total = torch.zeros(len(functions) + 1, dtype=torch.float64, device=run.device)
    for images in reals.pixels():
        rec = run.reconstruct(images, seed).to(run.device)
        x, y = images.float() / 255, rec.float() / 255
        sums = [function(x, y).double().sum() for function in functions.values()]
        total += torch.stack([*sums, total.new_tensor(len(images))])
    *sums, number = summed(total)
    return {name: (value / number).item() for name, value in zip(functions, sums, strict=True)}


def mean_log_likelihood(run: Inference, reals: RealImages, seed: int = 0, **estimate: object) -> float:
    """Mean of log p(x) in nats over all images of all ranks; the draws differ with the number of ranks."""
    _check_draws(run)
    generator = torch.Generator().manual_seed(seed + rank())
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for x in reals.inputs():
        with run.casting():
            found = likelihood.log_likelihood(
                run.model, x, value_range=run.value_range, generator=generator, **estimate
            )
        total += torch.stack([found.sum(), total.new_tensor(len(found))])
    found, number = summed(total)
    return (found / number).item()


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises ValueError for names that are no `METRICS`, and for none at all."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {', '.join(metrics)}, must be some of {', '.join(METRICS)}")


def _check_draws(run: Inference) -> None:
    if run.batch_norm == "batch":
        raise ValueError("batch_norm is 'batch': the draws of an estimate would then influence each other")
