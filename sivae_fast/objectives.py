"""What an introspective VAE minimises: `VAE`, `IntroVAE`, `LinearIntroVAE` and `SoftIntroVAE`.

    objective = SoftIntroVAE(beta_rec=1.0, beta_kl=1.0, beta_neg=512.0, scale=1 / (3 * 256 * 256))
    real = Term(x, rec, posterior)
    rec_term, fake_term = Term(rec, rec_rec, posterior_rec), Term(fake, rec_fake, posterior_fake)
    loss, statistics = objective.encoder(real, rec_term, fake_term)
    loss.backward()

With r the reconstruction error and k the KL of one sample, each summed over its elements, and the fake
sources j = rec, fake of weights w_j (1/2 each):

    encoder phase   mean c (beta_rec r + beta_kl k)  +  sum_j w_j mean Phi(r_j, k_j)
    decoder phase   c ( beta_rec mean r + sum_j w_j (beta_kl mean k_j + gamma_r beta_rec mean r_j) )
    VAE phase       mean beta_rec r + beta_kl k

An objective decides c and Phi. Its weights may be changed whenever no backward pass is pending,
`objective.beta_neg = 1024.0`: they live in buffers on the device, so that neither a compiled step nor a
captured CUDA graph has to be made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sivae_fast.contract import Posterior
from sivae_fast.kernels import gaussian, reference
from sivae_fast.kernels._checks import bounds, finite, positive
from sivae_fast.kernels.introspective import phase
from sivae_fast.kernels.reference import Member, Source


class Term(NamedTuple):
    """One batch as an objective sees it; every part may be None where the phase does not need it.

    target, prediction: float tensors [B, ...] of one shape; dtypes may differ.
    posterior: mean and logvar [B, ...].
    error: reconstruction errors [B] that were computed elsewhere, in place of target and prediction. Not
        negative for the fakes of `SoftIntroVAE.encoder`, where an exponent above 0 counts as 0: subtract its
        lower bound from an error that can be negative, as that of a decoder that learns its variance.
    """

    target: Tensor | None = None
    prediction: Tensor | None = None
    posterior: Posterior | None = None
    error: Tensor | None = None


class Loss(NamedTuple):
    """loss: 0-dim, float32 (float64 for float64 inputs). statistics: [B] each, detached, on the device."""

    loss: Tensor
    statistics: dict[str, Tensor]


def check_statistics(statistics: Mapping[str, Tensor]) -> None:
    """Raises FloatingPointError that names batch, part and sample of the first statistic that is not finite.

    statistics: as in `Loss`, [B] each. Waits for the device.
    """
    causes = {
        "rec": "its target or prediction holds NaN or Inf, or a target outside [0, 1] under a cross-entropy",
        "kl": "its mean or log-variance holds NaN or Inf, or a log-variance above 88",
    }
    for name, values in statistics.items():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            part, _, batch = name.rpartition("_")
            cause = causes.get(part, "see its rec and kl")
            raise FloatingPointError(
                f"{name} is {values[bad[0]].item()} for sample {bad[0]} of the batch {batch!r} "
                f"({len(bad)} of {len(values)} samples): {cause}"
            )


class Objective(nn.Module):
    """What all objectives share; use one of the classes below.

    beta_rec, beta_kl, beta_neg, gamma_r: weights, finite and not negative; see the module's formulas.
    prior_std: standard deviation of the prior N(0, prior_std^2 I), positive.
    reconstruction: "sse", "l1", "huber", "bce" (predictions are probabilities) or "bce_logits".
    huber_delta: where the Huber error turns from quadratic to linear, positive.
    logvar_clamp: (low, high) bounds on the log-variance, also in `reparameterize`, or None.
    fakes: weight of each fake source by name, in the order in which the phases take them; they sum to 1.
    single_launch: on NVIDIA GPUs, read every input once and write the gradients in the forward pass, where
        that is possible; see `kernels.introspective.phase`. Gains only where nothing scales the loss before
        backward.
    check: look at every phase's statistics and raise FloatingPointError where one is NaN or infinite. Waits
        for the device in every phase, and does nothing inside torch.compile: for debugging.

    Every option but `fakes` and `hinge` may be changed later, as an attribute; a changed weight takes effect
    without recompilation. A name that is no option is refused, here with a TypeError and as an attribute with
    an AttributeError; a value that does not fit with a ValueError.

    Gradients flow to every tensor of a term that requires them: the caller detaches what is to be detached.
    A term without a part that its phase adds up is refused with a ValueError.
    Statistics: `rec_<source>` and `kl_<source>` for the source "real" and every fake source of a phase,
    where the term has that part, and in the encoder phase `exp_elbo_<source>` or `hinge_<source>`.
    """

    #: False: the VAE phase is all there is, no fake passes needed.
    introspective = True
    #: False: the encoder's loss knows fakes by their KL alone, no reconstructions of them needed.
    reconstructs_fakes = True
    _statistic: str | None = None
    _weights = ("beta_rec", "beta_kl", "beta_neg", "gamma_r")
    _options = (
        "prior_std",
        "reconstruction",
        "huber_delta",
        "logvar_clamp",
        "fakes",
        "single_launch",
        "check",
    )

    beta_rec: float
    beta_kl: float
    beta_neg = 0.0
    gamma_r = 0.0

    def __init__(
        self,
        *,
        prior_std: float = 1.0,
        reconstruction: str = "sse",
        huber_delta: float = 1.0,
        logvar_clamp: tuple[float, float] | None = None,
        fakes: Mapping[str, float] | None = None,
        single_launch: bool = False,
        check: bool = False,
        **weights: float,
    ):
        for name in weights:
            if name not in self._weights:
                raise TypeError(f"{name} is no option of {self._accepted()}")
        super().__init__()
        self.prior_std = prior_std
        self.huber_delta = huber_delta
        self.reconstruction = reconstruction
        self.logvar_clamp = logvar_clamp
        self.single_launch, self.check = single_launch, check
        shares = _shares("fakes", {"rec": 0.5, "fake": 0.5} if fakes is None else fakes)
        super().__setattr__("fakes", shares)
        for name, value in weights.items():
            super().__setattr__(name, self._checked(name, value))
        for name, rows in self._tables().items():
            self.register_buffer(f"_{name}_table", _columns(rows, torch.float64), persistent=False)

    def vae(self, real: Term) -> Loss:
        """Both networks' loss while the model is an ordinary VAE. Not multiplied by `scale`."""
        _require("vae phase", "real", real, error=True, posterior=True)
        return self._phase("vae", {"real": real}, (Member.LINEAR,))

    def encoder(self, real: Term, *fakes: Term, **named_fakes: Term) -> Loss:
        """The encoder's loss. Terms of the fake sources by position (rec, fake) or by name."""
        terms = self._terms(real, fakes, named_fakes)
        for name, term in terms.items():
            error = name == "real" or self.reconstructs_fakes
            _require("encoder phase", name, term, error=error, posterior=True)
        members = (Member.LINEAR, *[self._member] * len(self.fakes))
        return self._phase("encoder", terms, members, self._statistic)

    def decoder(self, real: Term, *fakes: Term, **named_fakes: Term) -> Loss:
        """The decoder's loss. A fake term that carries a posterior alone has no gamma_r part."""
        terms = self._terms(real, fakes, named_fakes)
        for name, term in terms.items():
            _require("decoder phase", name, term, error=name == "real", posterior=name != "real")
        return self._phase("decoder", terms, (Member.LINEAR,) * len(terms))

    def reparameterize(self, posterior: Posterior, eps: Tensor) -> Tensor:
        """z = mean + exp(logvar / 2) eps, in the dtype of the mean; eps: standard normal numbers [B, ...]."""
        return gaussian.reparameterize(posterior.mean, posterior.logvar, eps, logvar_clamp=self.logvar_clamp)

    def _tables(self) -> dict[str, list[list[float]]]:
        """Rows a, b, p, q of `kernels.reference.Member` for each phase, one row a source."""
        raise NotImplementedError

    def _decoder_rows(self, c: float) -> list[list[float]]:
        real = [c * self.beta_rec, 0.0, 0.0, 0.0]
        part = c * self.gamma_r * self.beta_rec
        return [real, *[[w * part, w * c * self.beta_kl, 0.0, 0.0] for w in self.fakes.values()]]

    def _terms(self, real: Term, fakes: Sequence[Term], named: Mapping[str, Term]) -> dict[str, Term]:
        if not named and len(fakes) == len(self.fakes):
            return {"real": real, **dict(zip(self.fakes, fakes, strict=True))}
        terms = {"real": real, **dict(zip(self.fakes, fakes, strict=False)), **named}
        if len(fakes) + len(named) != len(self.fakes) or set(terms) != {"real", *self.fakes}:
            given = [f"{len(fakes)} by position", *named]
            raise TypeError(f"fake sources are {', '.join(given)}, must be {', '.join(self.fakes)}")
        return {name: terms[name] for name in ("real", *self.fakes)}

    def _phase(self, name: str, terms: dict[str, Term], members, statistic: str | None = None) -> Loss:
        sources = [
            Source(t.target, t.prediction, *(t.posterior or (None, None)), t.error) for t in terms.values()
        ]
        table = self._table(name, next(tensor.device for tensor in sources[0] if tensor is not None))
        loss, columns = phase(
            sources,
            members,
            table,
            self.reconstruction,
            self.huber_delta,
            self.prior_std,
            self.logvar_clamp,
            [*terms],
            self.single_launch,
        )
        statistics, columns, count = {}, columns.flatten(0, 1).unbind(), len(terms)
        for i, (name, term) in enumerate(terms.items()):
            if term.error is not None or term.target is not None:
                statistics[f"rec_{name}"] = columns[i]
            if term.posterior is not None:
                statistics[f"kl_{name}"] = columns[count + i]
            if statistic and i:
                statistics[f"{statistic}_{name}"] = columns[2 * count + i]
        if self.check and not torch.compiler.is_compiling():
            check_statistics(statistics)
            given = [name for name, term in terms.items() if term.error is not None]
            _check_exponents(statistics, [name for name in given if f"exp_elbo_{name}" in statistics])
        return Loss(loss, statistics)

    def _table(self, name: str, device: torch.device) -> Tensor:
        table = self._buffers[f"_{name}_table"]
        if device.type == "meta":
            return table.to(device)  # shapes alone are asked for: the weights stay
        if table.device != device:
            self.to(device)  # once, where the user did not
            table = self._buffers[f"_{name}_table"]
        return table

    def _accepted(self) -> str:
        return f"{type(self).__name__}, accepted are {', '.join([*self._weights, *self._options])}"

    def _checked(self, name: str, value):
        """`value` of the weight or option `name` as it is kept, or a ValueError."""
        if name in ("scale", "alpha", "prior_std", "huber_delta"):
            return positive(name, value)
        if name == "reconstruction":
            return _one_of(name, value, reference.RECONSTRUCTIONS)
        if name == "logvar_clamp":
            return bounds(name, value)
        return bool(value) if name in self._options else _not_negative(name, value)

    def __setattr__(self, name: str, value) -> None:
        if name not in self._weights:
            if name in ("fakes", "hinge"):
                raise AttributeError(f"{name} of an objective cannot be changed: make a new one")
            if name in self._options:
                value = self._checked(name, value)
            elif not (name.startswith("_") or name in self.__dict__ or callable(getattr(self, name, None))):
                raise AttributeError(f"{name} is no option of {self._accepted()}")
            return super().__setattr__(name, value)
        super().__setattr__(name, self._checked(name, value))
        for phase_name, rows in self._tables().items():
            table = getattr(self, f"_{phase_name}_table")
            for i, row in enumerate(rows):
                for j, entry in enumerate(row):
                    table[j, i].fill_(entry)  # one small launch an entry, no transfer, no sync

    def _apply(self, fn, recurse: bool = True):
        """Tables follow the module's device but never its dtype: float64 on the CPU, float32 elsewhere."""
        super()._apply(fn, recurse)
        for name, rows in self._tables().items():
            device = getattr(self, f"_{name}_table").device
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            setattr(self, f"_{name}_table", _columns(rows, dtype).to(device))
        return self


class VAE(Objective):
    """Plain (beta-)VAE: mean of beta_rec r + beta_kl k.

    `encoder` and `decoder` do not exist for it: a VAE has one phase. Further options: see `Objective`.
    """

    introspective = False
    _weights = ("beta_rec", "beta_kl")

    def __init__(self, *, beta_rec: float = 1.0, beta_kl: float = 1.0, **options):
        super().__init__(beta_rec=beta_rec, beta_kl=beta_kl, **options)

    def encoder(self, real: Term, *fakes: Term, **named_fakes: Term) -> Loss:
        raise TypeError(
            "a VAE has one phase, vae(real); encoder and decoder phases need SoftIntroVAE or IntroVAE"
        )

    decoder = encoder

    def _tables(self):
        return {"vae": [[self.beta_rec, self.beta_kl, 0.0, 0.0]]}


class SoftIntroVAE(Objective):
    """Soft-IntroVAE (Daniel and Tamar, CVPR 2021): c = scale,
    Phi = 1/alpha exp( -alpha scale (beta_rec r_j + beta_neg k_j) ).

    scale: positive, 1 / (number of values of one input) in the paper; the style-based model uses 5e-6.
    alpha: positive, 2 in the paper.
    gamma_r: weight of the decoder's reconstruction of fakes; 1e-8 in the published code. The bootstrap
        variant takes up to 1 and detaches nothing in its terms.
    Raising beta_neg weakens the push against fakes; it is the first thing to raise when a run diverges.
    Further options: see `Objective`.
    """

    _statistic = "exp_elbo"
    _member = Member.EXPONENTIAL
    _weights = (*Objective._weights, "scale", "alpha")

    def __init__(
        self,
        *,
        beta_rec: float,
        beta_kl: float,
        beta_neg: float,
        scale: float,
        alpha: float = 2.0,
        gamma_r: float = 1e-8,
        **options,
    ):
        weights = {"beta_rec": beta_rec, "beta_kl": beta_kl, "beta_neg": beta_neg, "gamma_r": gamma_r}
        super().__init__(**weights, scale=scale, alpha=alpha, **options)

    def _tables(self):
        c, alpha = self.scale, self.alpha
        real = [c * self.beta_rec, c * self.beta_kl, 0.0, 0.0]
        fakes = [[self.beta_rec, self.beta_neg, w / alpha, alpha * c] for w in self.fakes.values()]
        return {
            "vae": [[self.beta_rec, self.beta_kl, 0.0, 0.0]],
            "encoder": [real, *fakes],
            "decoder": self._decoder_rows(c),
        }


class IntroVAE(Objective):
    """IntroVAE (Huang et al., NeurIPS 2018): c = 1, Phi = beta_kl beta_neg max(margin - k_j, 0).

    margin: not negative, in nats.
    hinge: "sample" takes the hinge of each sample's KL; "batch" that of the batch mean of the KL, as the
        released code of the paper does.
    The paper's alpha is beta_neg / 2 and its beta is beta_rec, at beta_kl = 1. Further options: see
    `Objective`.
    """

    reconstructs_fakes = False
    _statistic = "hinge"
    _weights = (*Objective._weights, "margin")
    _options = (*Objective._options, "hinge")

    def __init__(
        self,
        *,
        beta_rec: float,
        beta_kl: float,
        beta_neg: float,
        margin: float,
        hinge: str = "sample",
        **options,
    ):
        self._member = {"sample": Member.HINGE, "batch": Member.BATCH_HINGE}[
            _one_of("hinge", hinge, ("sample", "batch"))
        ]
        super().__init__(beta_rec=beta_rec, beta_kl=beta_kl, beta_neg=beta_neg, margin=margin, **options)

    def _tables(self):
        real = [self.beta_rec, self.beta_kl, 0.0, 0.0]
        push = self.beta_kl * self.beta_neg
        fakes = [[0.0, 1.0, w * push, self.margin] for w in self.fakes.values()]
        return {"vae": [real], "encoder": [real, *fakes], "decoder": self._decoder_rows(1.0)}


class LinearIntroVAE(Objective):
    """The hinge with an infinite margin: c = 1, Phi = -beta_neg k_j. Unbounded below; for ablations.

    Further options: see `Objective`.
    """

    reconstructs_fakes = False
    _member = Member.LINEAR

    def __init__(self, *, beta_rec: float, beta_kl: float, beta_neg: float, **options):
        super().__init__(beta_rec=beta_rec, beta_kl=beta_kl, beta_neg=beta_neg, **options)

    def _tables(self):
        real = [self.beta_rec, self.beta_kl, 0.0, 0.0]
        fakes = [[0.0, -w * self.beta_neg, 0.0, 0.0] for w in self.fakes.values()]
        return {"vae": [real], "encoder": [real, *fakes], "decoder": self._decoder_rows(1.0)}


def _columns(rows: list[list[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).t().contiguous()


def _not_negative(name: str, value: float) -> float:
    if finite(name, value) < 0:
        raise ValueError(f"{name} is {value!r}, must not be negative")
    return float(value)


def _check_exponents(statistics: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raises ValueError where an error that a term of `names` came with is negative."""
    for name in names:
        least = statistics[f"rec_{name}"].min().item()
        if least < 0:
            raise ValueError(
                f"error of {name} holds {least}: must not be negative under an exponential, whose exponents "
                "above 0 count as 0; subtract the lower bound of the error"
            )


def _require(phase: str, name: str, term: Term, *, error: bool, posterior: bool) -> None:
    """Raises where a term lacks what its phase adds up: left out, that would train something else."""
    if not isinstance(term, Term):
        raise TypeError(f"{name} is a {type(term).__name__}, must be a Term")
    if term.posterior is not None and not (
        isinstance(term.posterior, (tuple, list)) and len(term.posterior) == 2
    ):
        kind = type(term.posterior).__name__
        raise TypeError(f"posterior of {name} is a {kind}, must be Posterior(mean, logvar)")
    if error and term.target is None and term.error is None:
        raise ValueError(f"{name} has no target and prediction: the {phase} needs its reconstruction error")
    if posterior and term.posterior is None:
        raise ValueError(f"{name} has no posterior: the {phase} needs its KL")


def _one_of(name: str, value: str, accepted: Sequence[str]) -> str:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(accepted)}")
    return value


def _shares(name: str, value: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(value, Mapping) or not all(isinstance(source, str) for source in value):
        raise ValueError(f"{name} is {value!r}, must be weights by name, as {{'rec': 0.5, 'fake': 0.5}}")
    shares = {source: _not_negative(f"{name}[{source!r}]", share) for source, share in value.items()}
    if "real" in shares or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"{name} is {dict(value)!r}, must hold weights that sum to 1 and no source 'real'")
    return shares
