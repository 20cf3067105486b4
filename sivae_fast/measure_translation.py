"""Swaps of class and content against the images that really have both, reconstructions, and linear probes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sivae_fast.data.factors import Factors
from sivae_fast.evaluation import translation
from sivae_fast.evaluation.reconstruction import SMALLEST, ImageError, error_functions
from sivae_fast.evaluation.sharing import gather, rank, share, summed
from sivae_fast.inference import Inference
from sivae_fast.run import append_metric
from sivae_fast.trained import named_set

logger = logging.getLogger("sivae_fast")

ERRORS = ("mse", "ssim", "lpips")
SWAPS = tuple(f"swap_{name}" for name in ERRORS)
CODES = ("class", "content")
PROBES = tuple(f"{factor}_from_{code}_code" for code in CODES for factor in CODES)
METRICS = (*SWAPS, *ERRORS, *PROBES)

Functions = Mapping[str, ImageError]


def evaluate_translation(
    run: Inference,
    metrics: Sequence[str] | None = None,
    *,
    count: int = 50_000,
    seed: int = 0,
    factors: Factors | None = None,
    weights: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
) -> dict[str, dict]:
    """Measures a two_encoder model on the test images of its data (or of `run.data_path`).

    metrics: some of `METRICS`; None takes all that can be had, LPIPS where `weights`, the folder of its
    network, is given. swap_mse to swap_lpips are means over pairs whose class and content differ, with those
    of the baselines beside them; mse to lpips are of reconstructions; class_from_content_code and its kin are
    accuracies of linear classifiers, with that of the most frequent answer beside them. At most `count` test
    images, and as many training images for the classifiers, are used, drawn from `seed` as the pairs are.
    factors: the set, where it has been read before. folder: a run folder, to whose metric files the records
    are added.
    Called in every process of a process group, each does its share and all get the result.

    What the set cannot tell (swaps and content without labels of content, class where the test images are of
    other classes than the training images) is left out, and a line of the log says why.
    Raises ValueError for other metrics, and as `Inference.factors`, `Swaps` and `load_lpips` do.
    """
    metrics = _chosen(run, metrics, weights)
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    functions = error_functions(errors_of(metrics), weights, run.device)
    swaps = Swaps(run, run.factors() if factors is None else factors, count, seed)
    metrics = swaps.known(metrics)
    facts = {**run.described, **named_set(run.data_path), "test_images": len(swaps.test), "seed": seed}
    records: dict[str, dict] = {}
    if asked := [name for name in metrics if name in SWAPS]:
        chosen = {name: functions[name.removeprefix("swap_")] for name in asked}
        values = swaps.errors(chosen)
        beside = {answer.replace(" ", "_"): found for answer, found in swaps.baselines(chosen).items()}
        for name in asked:
            others = {answer: found[name] for answer, found in beside.items()}
            records[name] = {"value": values[name], **others, **facts, "pairs": len(swaps.givers)}
    if asked := [name for name in metrics if name in ERRORS]:
        values = swaps.reconstruction_errors({name: functions[name] for name in asked})
        records |= {name: {"value": values[name], **facts} for name in asked}
    for name, value in swaps.probes([name for name in metrics if name in PROBES]).items():
        about = {"chance": swaps.chance(_parts(name)[0]), **facts, "training_images": len(swaps.training)}
        records[name] = {"value": value, **about}
    if folder is not None and rank() == 0:
        for name, record in records.items():
            append_metric(folder, name, record)
    return {name: records[name] for name in metrics}


def errors_of(metrics: Iterable[str]) -> list[str]:
    """Those of `ERRORS` that the metrics are made of."""
    names = {name.removeprefix("swap_") for name in metrics}
    return [name for name in ERRORS if name in names]


class Swaps:
    """A two_encoder model's codes of a set, and the pairs of test images whose contents change hands.

    count: at most so many test images, and as many training images; None takes all.
    Numbers of images are int64 [n] into the set; codes z are the posterior means, on the CPU.
    What uses the model is collective: each rank of a process group does its share, and all get the result.
    Raises ValueError for a set without test images.
    """

    def __init__(self, run: Inference, factors: Factors, count: int | None = None, seed: int = 0):
        self.run, self.factors, self.seed = run, factors, seed
        self.test, self.training = (_some(which, count, seed) for which in (factors.test, ~factors.test))
        self.numbers = torch.cat([self.test, self.training]).sort().values
        if not len(self.test):
            raise ValueError("the set has no test images: docs/translation.md says which those are")

    @functools.cached_property
    def z(self) -> Tensor:
        """Codes [k, Z] of the images `numbers` [k]."""
        encode = lambda rows, _: self.run.model.encode(self.images(rows)).mean
        # Whole batches: the codes, and so the classifiers, are the same to the bit on any number of ranks.
        start, stop = share(len(self.numbers), self.run.batch)
        own = torch.empty(0, self.run.model.latent_size)
        if start < stop:
            own = self.run.map(encode, self.numbers[start:stop], "encode")
        return gather(own.to(self.run.device)).cpu()

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(class givers, content givers, images that hold both), numbers [n]; none where a set has none."""
        factors = self.factors
        among = torch.zeros_like(factors.test).index_fill(0, self.test, True)
        givers, others = translation.swap_pairs(factors.classes, factors.contents, among, self.seed)
        truth = factors.find(factors.classes[givers], factors.contents[others])
        known = truth >= 0
        return givers[known], others[known], truth[known]

    @property
    def givers(self) -> Tensor:
        return self.pairs[0]

    def images(self, numbers: Tensor) -> Tensor:
        """Images [n, C, R, R] in [0, 1], on the model's device."""
        return to_float(self.factors.images[numbers.cpu()]).to(self.run.device)

    def codes(self, numbers: Tensor) -> Tensor:
        """Codes [n, Z] of images that are among `numbers`."""
        return self.z[torch.searchsorted(self.numbers, numbers)]

    def errors(self, functions: Functions) -> dict[str, float]:
        """Means of the errors of swapped images."""
        givers, others, truth = self.pairs
        return self._decoded_errors(
            functions, self.run.model.swap(self.codes(givers), self.codes(others)), truth
        )

    def reconstruction_errors(self, functions: Functions) -> dict[str, float]:
        """Means of the errors of the reconstructed test images."""
        return self._decoded_errors(functions, self.codes(self.test), self.test)

    def baselines(self, functions: Functions) -> dict[str, dict[str, float]]:
        """Means of the errors of answers that no model is needed for."""
        givers, others, truth = self.pairs
        mean = mean_image(self.factors).to(self.run.device)
        answers: dict[str, Callable[[slice], Tensor]] = {
            "image that gives the class": lambda part: self.images(givers[part]),
            "image that gives the content": lambda part: self.images(others[part]),
            "mean image": lambda part: mean.expand(len(truth[part]), -1, -1, -1),
        }
        if len(truth) > 1:
            wrong = translation.shuffled(truth, self.seed)
            answers = {"truth of another pair": lambda part: self.images(wrong[part]), **answers}
        return {name: self._errors(functions, answer, truth) for name, answer in answers.items()}

    def probe(self, factor: str, code: str) -> float:
        """Accuracy, on test images, of a linear classifier from a code to a factor, each of `CODES`."""
        values = self.run.model.split(self.z)[CODES.index(code)]
        return translation.probe_accuracy(values, *self._labels(factor))

    def probes(self, names: Sequence[str]) -> dict[str, float]:
        """What `probe` gives for each of some `PROBES`."""
        if not names:
            return {}
        _ = self.z  # collective, and a rank may have no probe to train
        values = torch.zeros(len(names), dtype=torch.float64, device=self.run.device)
        for i in range(*share(len(names))):
            values[i] = self.probe(*_parts(names[i]))
        return dict(zip(names, summed(values).tolist(), strict=True))

    def chance(self, factor: str) -> float:
        """Accuracy of the most frequent answer."""
        return translation.chance(*self._labels(factor))

    def tells(self, factor: str) -> bool:
        """Whether a classifier of that factor can be trained on the training and tried on the test images."""
        labels, test = self._labels(factor)
        return bool((labels >= 0).all()) and bool(torch.isin(labels[test], labels[~test]).any())

    def known(self, metrics: Sequence[str]) -> list[str]:
        """The metrics that the set can tell; a line of the log says which it cannot."""
        missing = {}
        for name in metrics:
            if name in SWAPS and not len(self.givers):
                missing[name] = (
                    "no image is known to hold the class of one test image and the content of another"
                )
            elif name in PROBES and not self.tells(factor := _parts(name)[0]):
                missing[name] = f"the training images do not tell the {factor} of the test images"
        if missing:
            why = "; ".join(dict.fromkeys(missing.values()))
            logger.warning("left out: %s (%s)", ", ".join(missing), why)
        return [name for name in metrics if name not in missing]

    def _labels(self, factor: str) -> tuple[Tensor, Tensor]:
        labels = self.factors.classes if factor == "class" else self.factors.contents
        return labels[self.numbers], self.factors.test[self.numbers]

    def _decoded_errors(self, functions: Functions, z: Tensor, truth: Tensor) -> dict[str, float]:
        def answer(part: slice) -> Tensor:
            with self.run.casting():
                return self.run.model.decode(z[part].to(self.run.device)).float()

        return self._errors(functions, answer, truth)

    @torch.no_grad()
    def _errors(
        self, functions: Functions, answer: Callable[[slice], Tensor], truth: Tensor
    ) -> dict[str, float]:
        start, stop = share(len(truth), self.run.batch)
        rows = [torch.empty(0, len(functions), device=self.run.device)]
        for first in range(start, stop, self.run.batch):
            part = slice(first, first + self.run.batch)
            made, right = answer(part), self.images(truth[part])
            rows.append(torch.stack([function(made, right) for function in functions.values()], 1))
        means = gather(torch.cat(rows)).double().mean(0)
        return dict(zip(functions, means.tolist(), strict=True))


def to_float(stored: Tensor) -> Tensor:
    """Stored images uint8 [n, R, R, C] as a two_encoder model takes them, [n, C, R, R] in [0, 1]."""
    return stored.permute(0, 3, 1, 2).float() / 255


def mean_image(factors: Factors) -> Tensor:
    """The mean of all images, [C, R, R] in [0, 1]."""
    total = sum(part.sum(0, dtype=torch.int64) for part in factors.images.split(4096))
    return (total.double() / (255 * len(factors.images))).permute(2, 0, 1).float()


def _some(which: Tensor, count: int | None, seed: int) -> Tensor:
    """The numbers of at most `count` images of a mask, in order."""
    numbers = which.nonzero().flatten()
    if count is None or len(numbers) <= count:
        return numbers
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return numbers[order[:count]].sort().values


def _chosen(run: Inference, metrics: Sequence[str] | None, weights) -> list[str]:
    if run.config.model.kind != "two_encoder":
        raise ValueError(f"model.kind is {run.config.model.kind}: swaps need two_encoder")
    if metrics is None:
        wanted = {"mse": True, "ssim": run.resolution >= SMALLEST["ssim"], "lpips": weights is not None}
        return [name for name in METRICS if wanted.get(name.removeprefix("swap_"), True)]
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics are {', '.join(metrics)}, must be some of {', '.join(METRICS)}")
    return list(dict.fromkeys(metrics))


def _parts(probe: str) -> tuple[str, str]:
    """(factor, code) of one of `PROBES`."""
    factor, _, code = probe.removesuffix("_code").split("_")
    return factor, code
