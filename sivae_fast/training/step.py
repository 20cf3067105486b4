"""The two phases of an introspective VAE, written once against the model and objective contracts.

Words: `rec` is the reconstruction of the real batch, `fake` a decoded prior sample, `rec_rec` and `rec_fake`
are the reconstructions of those two. A model may make `further_fakes`, treated as `fake` is.

Two schedules compute the same update:

- "published" runs every pass of the published iteration: the decoder phase decodes and encodes anew.
- "minimal" computes nothing twice. The encoder phase records the decoder's graph of rec and fake once, takes
  only the data gradient through it (`_Through`), and the decoder phase uses the retained graph for its own
  backward pass: 24 instead of 33 forward-equivalents; a further fake costs 10 instead of 14. For an objective
  that knows fakes by their KL alone (IntroVAE) they are not reconstructed: 20 forward-equivalents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sivae_fast.contract import Model, Posterior
from sivae_fast.draws import Draws, Joined
from sivae_fast.objectives import Loss, Term

SCHEDULES = ("minimal", "published")


class _Through(torch.autograd.Function):
    """`out`, whose graph starts at the leaf `source`, seen as a function of `z` with data gradient only.

    The graph of `out` is kept for a later backward pass and no parameter in it receives a gradient.
    """

    @staticmethod
    def forward(ctx, z: Tensor, source_and_out: tuple[Tensor, Tensor]) -> Tensor:
        # In a tuple autograd does not see the two: as arguments they would join the graph of z.
        ctx.source, ctx.out = source_and_out
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (to_source,) = torch.autograd.grad(ctx.out, ctx.source, gradient, retain_graph=True)
        return to_source, None


@dataclass
class Shared:
    """What the encoder phase leaves for the decoder phase of the same micro-batch."""

    z: Tensor  # posterior draw of the real batch, detached
    #: rec and the fakes with the decoder's graph; None where the decoder phase computes them again
    decoded: list[Tensor] | None = None


class Step:
    """Losses of the encoder phase, the decoder phase and the VAE phase of one micro-batch.

    model: see `sivae_fast.contract.Model`; objective: see `sivae_fast.objectives`.
    schedule: "minimal" or "published".
    fresh_draws: the decoder phase draws new noise, prior samples and posterior samples (from the updated
        encoder), as the published style trainer does; possible with the published schedule only.
    share_forward: keep the decoder's graph from the encoder phase to the decoder phase (minimal schedule).
        Off, the decoder phase decodes again with the same draws: two more forward-equivalents, less memory
        over accumulated micro-batches.
    error: per-sample errors [B] of (target, prediction), where they are not one of the objective's own.
    autocast: dtype of the networks' arithmetic, e.g. torch.bfloat16; None keeps that of the weights.
    """

    def __init__(
        self,
        model: Model,
        objective,
        *,
        schedule: str = "minimal",
        fresh_draws: bool = False,
        share_forward: bool = True,
        autocast: torch.dtype | None = None,
        error: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, must be one of {', '.join(SCHEDULES)}")
        if fresh_draws and schedule != "published":
            raise ValueError("fresh_draws=True needs schedule='published'")
        self.model, self.objective = model, objective
        self.fresh_draws = fresh_draws
        self.may_share = schedule == "minimal"
        self.shares_forward = share_forward and self.may_share
        self.reconstructs_fakes = objective.reconstructs_fakes or schedule == "published"
        self.joins = schedule == "minimal" and not model.uses_batch_statistics
        self.sources = ("rec", "fake", *model.further_fakes)
        if objective.introspective and set(objective.fakes) != set(self.sources):
            raise ValueError(
                f"the objective weighs the fakes {', '.join(objective.fakes)}, the model makes "
                f"{', '.join(self.sources)}"
            )
        self.autocast_dtype, self.error = autocast, error
        self.encoder_parameters = _parameters(model.encoder_modules())
        self.decoder_parameters = _parameters(model.decoder_modules())

    def encoder_phase(self, x: Tensor, draws: Draws) -> tuple[Loss, Shared]:
        """Loss that the encoder minimises. x [B, ...]; backward reaches the encoder's parameters only."""
        model, objective = self.model, self.objective
        with self._autocast(x):
            posterior = self._encode(x, draws, "real")
            z = self._sample(posterior, draws, "posterior")
            shared = Shared(z.detach())
            if self.shares_forward:
                source = shared.z.clone().requires_grad_()
                shared.decoded = self._decode(source, x, draws)
                rec = _Through.apply(z, (source, shared.decoded[0]))
                fakes = [fake.detach() for fake in shared.decoded[1:]]
            else:
                with _frozen(self.decoder_parameters):
                    rec = model.decode(z, draws.stream("rec"))
                    with torch.no_grad():
                        fakes = self._make_fakes(shared.z, x, draws)
            seen = self._encode_fakes([rec.detach(), *fakes], draws)
            if self.reconstructs_fakes:
                latents = self._sample_fakes(seen, draws)
                with _frozen(self.decoder_parameters):
                    again = self._decode_fakes(latents, draws)
        if self.reconstructs_fakes:
            terms = map(self._term, (rec, *fakes), again, seen)
        else:
            terms = [Term(None, None, posterior) for posterior in seen]
        loss = objective.encoder(self._term(x, rec, posterior), **dict(zip(self.sources, terms, strict=True)))
        return loss, shared

    def decoder_phase(self, x: Tensor, draws: Draws, shared: Shared) -> Loss:
        """Loss that the decoder minimises, after the encoder's update; reaches the decoder's parameters."""
        objective = self.objective
        suffix = "/decoder" if self.fresh_draws else ""
        with self._autocast(x):
            decoded = shared.decoded
            if decoded is None:
                z = self._fresh_latent(x, draws) if self.fresh_draws else shared.z
                decoded = self._decode(z, x, draws, suffix)
            with _frozen(self.encoder_parameters):
                seen = self._encode_fakes(decoded, draws, "/decoder")
            if objective.gamma_r:
                terms = self._reconstruct_fakes(decoded, seen, draws, suffix)
            else:
                terms = [Term(None, None, posterior) for posterior in seen]
        return objective.decoder(self._term(x, decoded[0]), **dict(zip(self.sources, terms, strict=True)))

    def vae_phase(self, x: Tensor, draws: Draws) -> tuple[Loss, Posterior, Posterior]:
        """Loss of a plain VAE as a function of a cut posterior.

        Returns (loss, posterior, cut): backward on the loss reaches the decoder and leaves its gradient at
        the leaves `cut`; `posterior_surrogate(posterior, cut)` then carries it into the encoder. One backward
        pass for each optimizer, and nothing is computed twice.
        """
        with self._autocast(x):
            posterior = self._encode(x, draws, "real")
            cut = Posterior(*(part.detach().requires_grad_() for part in posterior))
            z = self._sample(cut, draws, "posterior")
            rec = self.model.decode(z, draws.stream("rec"))
        return self.objective.vae(self._term(x, rec, cut)), posterior, cut

    def _term(self, target: Tensor, prediction: Tensor, posterior: Posterior | None = None) -> Term:
        if self.error is None:
            return Term(target, prediction, posterior)
        return Term(None, None, posterior, self.error(target, prediction))

    def _sample(self, posterior: Posterior, draws: Draws, name: str) -> Tensor:
        noise = draws.stream(name).normal(*posterior.mean.shape, dtype=posterior.mean.dtype)
        return self.objective.reparameterize(posterior, noise)

    def _fresh_latent(self, x: Tensor, draws: Draws) -> Tensor:
        with torch.no_grad():
            return self._sample(self._encode(x, draws, "real/decoder"), draws, "posterior/decoder")

    def _decode(self, z: Tensor, x: Tensor, draws: Draws, suffix: str = "") -> list[Tensor]:
        """rec and all other fakes, in the order of `sources`."""
        rec = self.model.decode(z, draws.stream("rec" + suffix))
        return [rec, *self._make_fakes(z.detach(), x, draws, suffix)]

    def _make_fakes(self, z: Tensor, x: Tensor, draws: Draws, suffix: str = "") -> list[Tensor]:
        model = self.model
        prior = draws.stream("prior" + suffix).normal(len(x), model.latent_size, dtype=_float_of(x))
        fakes = [model.generate(prior * model.prior_std, draws.stream("fake" + suffix))]
        for name, latent in zip(model.further_fakes, model.further_latents(z), strict=True):
            fakes.append(model.decode(latent, draws.stream(name + suffix)))
        return fakes

    def _encode(self, x: Tensor, draws: Draws, *names: str) -> Posterior:
        """Posterior of x, the rows of one batch or of several joined ones, one name each."""
        if not self.model.random_encoder:
            return _in_float(self.model.encode(x))
        streams = [draws.stream(f"encode/{name}") for name in names]
        return _in_float(self.model.encode(x, Joined(*streams) if len(streams) > 1 else streams[0]))

    def _encode_fakes(self, fakes: list[Tensor], draws: Draws, suffix: str = "") -> list[Posterior]:
        names = [name + suffix for name in self.sources]
        if not self.joins:
            return [self._encode(x, draws, name) for x, name in zip(fakes, names, strict=True)]
        joined = self._encode(torch.cat(fakes), draws, *names)
        return [Posterior(*parts) for parts in zip(*(p.chunk(len(names)) for p in joined), strict=True)]

    def _sample_fakes(self, seen: list[Posterior], draws: Draws, suffix: str = "") -> list[Tensor]:
        return [
            self._sample(posterior, draws, f"rec_{name}/z{suffix}")
            for name, posterior in zip(self.sources, seen, strict=True)
        ]

    def _decode_fakes(self, latents: list[Tensor], draws: Draws, suffix: str = "") -> list[Tensor]:
        streams = [draws.stream(f"rec_{name}{suffix}") for name in self.sources]
        decode = self.model.decode_fake
        if not self.joins:
            return [decode(z, stream) for z, stream in zip(latents, streams, strict=True)]
        return list(decode(torch.cat(latents), Joined(*streams)).chunk(len(latents)))

    def _reconstruct_fakes(self, fakes, seen, draws: Draws, suffix: str) -> list[Term]:
        """The gamma_r terms, e.g. sse(rec, rec_rec), as the decoder sees them."""
        latents = self._sample_fakes(seen, draws, "/decoder")
        if not self.model.lagged_decoder:
            latents, fakes = [z.detach() for z in latents], [fake.detach() for fake in fakes]
        again = self._decode_fakes(latents, draws, suffix or "/decoder")
        return list(map(self._term, fakes, again, seen))

    def _autocast(self, x: Tensor):
        enabled = self.autocast_dtype is not None
        return torch.autocast(x.device.type, dtype=self.autocast_dtype, enabled=enabled)


def posterior_surrogate(posterior: Posterior, cut: Posterior) -> Tensor:
    """Scalar whose gradient at the posterior is the one left at the leaves `cut`."""
    return sum((part * leaf.grad).sum() for part, leaf in zip(posterior, cut, strict=True))


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients pass through the parameters' network without reaching the parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _float_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in_float(posterior: Posterior) -> Posterior:
    """Posterior in at least float32: latents and divergences are never computed in half precision."""
    return Posterior(*(part.to(_float_of(part)) for part in posterior))
