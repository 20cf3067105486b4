"""How likely a trained model finds an image, and how well that tells other data from its own.

The importance-weighted estimate (Burda et al., 2016), with a Gaussian decoder of variance v on pixels in
[0, 1]:

    log p(x) = logsumexp_i [ log p(x | z_i) + log p(z_i) - log q(z_i | x) ] - log S,  z_1 .. z_S from q
    log p(x | z) = -D/2 log(2 pi v) - |x - decode(z)|^2 / (2 v)

is a lower bound in expectation that rises with S. The published out-of-distribution experiments take S = 5,
v = 1 and leave out log S, a constant shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Rows, Stream
from sivae_fast.files import atomic
from sivae_fast.kernels.reference import gaussian_kl

PROPOSALS = ("posterior", "published")

#: Scores of `scores`: all are higher for images that the model finds strange.
SCORES = {
    "log_likelihood": "negative importance-weighted log-likelihood",
    "elbo": "weighted reconstruction error + KL, one posterior draw",
    "kl": "KL of the posterior to the prior",
    "reconstruction": "reconstruction error, one posterior draw",
    "symmetric_kl": "KL between the posteriors of the image and of its reconstruction, both ways",
}


@torch.no_grad()
def log_likelihood(
    model: Model,
    x: Tensor,
    samples: int = 5,
    *,
    variance: float = 1.0,
    proposal: str = "posterior",
    value_range: tuple[float, float] = (0.0, 1.0),
    rows: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimates of log p(x) in nats, [B] float64, of images x [B, ...] in the model's input form.

    samples: S. variance: v, of pixels scaled from `value_range` to [0, 1].
    proposal: "posterior" draws from q(z|x) = N(mean, diag(sigma^2)); "published" from N(mean, diag(sigma)),
        the broader one of the published code. Both are valid proposals.
    rows: latents decoded in one call, at least one draw of the whole batch.
    The model should be in eval mode: batch norm in train mode would let the draws influence each other.
    """
    check_options(samples, variance, proposal)
    posterior = _in_double(model.encode(x))
    draw_logvar = posterior.logvar if proposal == "posterior" else 0.5 * posterior.logvar
    terms, left = [], samples
    while left:
        count = min(left, max(1, rows // len(x)))
        left -= count
        shape = (count, *posterior.mean.shape)
        eps = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)
        z = posterior.mean + (0.5 * draw_logvar).exp() * eps
        images = _decode(model, z.flatten(0, 1).to(x.dtype), generator).unflatten(0, (count, len(x)))
        error = _squared_error(x, images, value_range)
        log_q = -0.5 * (eps.square() + draw_logvar + math.log(2 * math.pi)).sum(-1)
        scaled = z / model.prior_std
        log_prior = -0.5 * (scaled.square() + math.log(2 * math.pi * model.prior_std**2)).sum(-1)
        log_x = -0.5 * (error / variance + x[0].numel() * math.log(2 * math.pi * variance))
        terms.append(log_x + log_prior - log_q)
    return torch.cat(terms).logsumexp(0) - math.log(samples)


@torch.no_grad()
def scores(
    model: Model,
    x: Tensor,
    samples: int = 5,
    *,
    variance: float = 1.0,
    proposal: str = "posterior",
    value_range: tuple[float, float] = (0.0, 1.0),
    weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """All `SCORES` of images x [B, ...], [B] float64 each; options as `log_likelihood`.

    weight: of the reconstruction error in the score `elbo`; published models have 1, the beta_rec / beta_kl
    of their training.
    """
    estimate = log_likelihood(
        model,
        x,
        samples,
        variance=variance,
        proposal=proposal,
        value_range=value_range,
        generator=generator,
    )
    posterior = _in_double(model.encode(x))
    eps = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float64).to(x.device)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * eps
    rec = _decode(model, z.to(x.dtype), generator)
    error = _squared_error(x, rec, value_range)
    kl = gaussian_kl(*posterior, prior_logvar=2 * math.log(model.prior_std))
    again = _in_double(model.encode(rec))
    both = gaussian_kl(*posterior, *again) + gaussian_kl(*again, *posterior)
    values = (-estimate, weight * error + kl, kl, error, both)
    return dict(zip(SCORES, values, strict=True))


def score_batches(model: Model, batches: Iterable[Tensor], seed: int = 0, **options) -> dict[str, Tensor]:
    """`scores` of all batches together, on the CPU. Raises ValueError if there is none."""
    generator = torch.Generator().manual_seed(seed)
    found = [scores(model, x, generator=generator, **options) for x in batches]
    if not found:
        raise ValueError("there are no images to score")
    return {name: torch.cat([part[name].cpu() for part in found]) for name in SCORES}


def auroc(own: Tensor, other: Tensor) -> float:
    """Area under the ROC curve of scores [N] and [M] by scikit-learn, `other` being the positive class.

    1: every other image scores above every own one; 0.5: no better than chance.
    Raises ValueError for scores that are not finite, ImportError naming the extra to install.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("AUROC needs scikit-learn: pip install 'sivae-fast[eval]'") from error
    values = torch.cat([own, other])
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise ValueError(f"{bad} of {len(values)} scores are not finite: the model diverged on these images")
    truth = torch.cat([torch.zeros(len(own)), torch.ones(len(other))])
    return float(roc_auc_score(truth.numpy(), values.cpu().numpy()))


def save_histogram(path, log_likelihoods: Mapping[str, Tensor], title: str, bins: int = 60) -> None:
    """Normalised histograms of log p(x) [N] by name, in one picture with common bins.

    The range holds all but the lowest and highest 0.2 % of each set. Needs matplotlib (extra `eval`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low = min(float(values.quantile(0.002)) for values in log_likelihoods.values())
    high = max(float(values.quantile(0.998)) for values in log_likelihoods.values())
    # In double precision: rounded ends would leave out the very scores that they are.
    edges = torch.linspace(low, max(high, low + 1e-6), bins + 1, dtype=torch.float64).tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ("0.6", "tab:blue", "tab:red", "tab:green", "tab:orange", "tab:purple")
    for i, (name, values) in enumerate(log_likelihoods.items()):
        colour = colours[i % len(colours)]
        axes.hist(
            values.tolist(),
            edges,
            density=True,
            alpha=0.55,
            color=colour,
            label=f"{name} ({len(values):,})",
            edgecolor="black",
            linewidth=0.3,
        )
    axes.set(title=title, xlabel="log p(x) / nat", ylabel="density")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


def check_options(samples: int = 5, variance: float = 1.0, proposal: str = "posterior") -> None:
    """Raises ValueError naming what `log_likelihood` does not take."""
    if samples < 1:
        raise ValueError(f"samples is {samples}, must be at least 1")
    if not 0 < variance < math.inf:
        raise ValueError(f"variance is {variance}, must be positive and finite")
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal is {proposal!r}, must be one of {', '.join(PROPOSALS)}")


def _in_double(posterior: Posterior) -> Posterior:
    return Posterior(*(part.double() for part in posterior))


def _decode(model: Model, z: Tensor, generator: torch.Generator | None) -> Tensor:
    """Images of z [N, Z]; the noise of a stochastic decoder comes from `generator`, too."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return model.decode(z, Stream(seed, Rows.all(len(z)), z.device))


def _squared_error(x: Tensor, images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Sums of squared differences of x [B, ...] and images [S, B, ...] or [B, ...], as pixels in [0, 1]."""
    low, high = value_range
    difference = (images.double() - x.double()) / (high - low)
    return difference.square().flatten(-(x.ndim - 1)).sum(-1)
