"""The minimal schedule computes the update of the published one, with fewer passes."""

import copy
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sivae_fast.config import make_config
from sivae_fast.draws import Draws, Rows
from sivae_fast.growth import Stage
from sivae_fast.models.mlp import MLPModel
from sivae_fast.models.style import StyleModel
from sivae_fast.models.two_encoder import TwoEncoderModel
from sivae_fast.objectives import VAE, IntroVAE, LinearIntroVAE, SoftIntroVAE
from sivae_fast.training.iteration import Iteration
from sivae_fast.training.step import Step, posterior_surrogate

BATCH = 4


def style_model() -> StyleModel:
    torch.manual_seed(3)
    model = StyleModel(16, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2).double()
    for name, parameter in model.named_parameters():
        if "noise_weight" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def mlp_model() -> MLPModel:
    torch.manual_seed(3)
    return MLPModel(width=16).double()


def swapping_model(**sizes) -> TwoEncoderModel:
    torch.manual_seed(3)
    sizes = {"resolution": 8, "class_size": 4, "content_size": 2, "width": 2, **sizes}
    return TwoEncoderModel(**sizes, swapped_fakes=True)


def soft(gamma_r: float = 0.0, **options) -> SoftIntroVAE:
    return SoftIntroVAE(beta_rec=0.7, beta_kl=0.4, beta_neg=2.0, scale=0.02, gamma_r=gamma_r, **options)


def soft_with_swaps(gamma_r: float = 0.0) -> SoftIntroVAE:
    return soft(gamma_r, fakes={"rec": 0.25, "fake": 0.25, "swap": 0.5})


def updated(model, objective, x, micro_batches: int = 1, **options) -> dict[str, torch.Tensor]:
    """Parameters after one iteration with two plain gradient-descent optimizers."""
    model = copy.deepcopy(model)
    step = Step(model, objective, **options)
    rows = Rows.all(len(x))
    parts = [
        (part, Draws(5, 640, rows.part(i, micro_batches))) for i, part in enumerate(x.chunk(micro_batches))
    ]
    kept = []
    for part, draws in parts:
        loss, shared = step.encoder_phase(part, draws)
        (loss.loss / micro_batches).backward()
        kept.append(shared)
    assert all(p.grad is None for p in step.decoder_parameters), "the encoder phase reached the decoder"
    torch.optim.SGD(step.encoder_parameters, lr=0.1).step()
    before = [None if p.grad is None else p.grad.clone() for p in step.encoder_parameters]
    for (part, draws), shared in zip(parts, kept, strict=True):
        (step.decoder_phase(part, draws, shared).loss / micro_batches).backward()
    for parameter, gradient in zip(step.encoder_parameters, before, strict=True):
        assert parameter.grad is gradient or torch.equal(parameter.grad, gradient)
    torch.optim.SGD(step.decoder_parameters, lr=0.1).step()
    return dict(model.named_parameters())


def assert_same_update(start, a, b, tolerance=1e-10):
    first = dict(start.named_parameters())
    for name, value in a.items():
        size = (value - first[name]).norm()
        assert (value - b[name]).norm() <= tolerance * size + 1e-15, name


@pytest.mark.parametrize("lod, blend", [(2, 1.0), (2, 0.3), (1, 0.6), (0, 1.0)])
def test_schedules_agree_on_the_style_model(lod, blend):
    model = style_model()
    model.set_level(lod, blend)
    x = torch.randn(BATCH, 3, 4 << lod, 4 << lod, dtype=torch.float64)
    plain = updated(model, soft(), x, schedule="published")
    assert_same_update(model, plain, updated(model, soft(), x, schedule="minimal"))
    assert_same_update(model, plain, updated(model, soft(), x, schedule="minimal", share_forward=False))


@pytest.mark.parametrize(
    "objective",
    [
        soft(),
        soft(0.5),
        IntroVAE(beta_rec=0.5, beta_kl=1, beta_neg=0.5, margin=5.0),
        IntroVAE(beta_rec=0.5, beta_kl=1, beta_neg=0.5, margin=5.0, hinge="batch"),
        LinearIntroVAE(beta_rec=0.5, beta_kl=1, beta_neg=0.1),
    ],
    ids=["soft", "soft with gamma_r", "introvae", "introvae, batch hinge", "linear"],
)
def test_schedules_agree_on_the_mlp(objective):
    model, x = mlp_model(), torch.randn(BATCH, 2, dtype=torch.float64)
    plain = updated(model, objective, x, schedule="published")
    assert_same_update(model, plain, updated(model, objective, x, schedule="minimal"))


@pytest.mark.parametrize("gamma_r", [0.0, 0.5])
def test_schedules_agree_with_a_third_kind_of_fake(gamma_r):
    model, x = swapping_model().double(), torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
    objective = soft_with_swaps(gamma_r)
    plain = updated(model, objective, x, schedule="published")
    assert_same_update(model, plain, updated(model, objective, x))
    assert_same_update(model, plain, updated(model, objective, x, share_forward=False))
    pairs = updated(model, objective, x, micro_batches=2, share_forward=False)
    assert_same_update(model, plain, pairs)
    without = SoftIntroVAE(
        beta_rec=0.7, beta_kl=0.4, beta_neg=2.0, scale=0.02, fakes={"rec": 0.5, "fake": 0.5, "swap": 0}
    )
    other = updated(model, without, x)
    assert any(not torch.equal(value, other[name]) for name, value in plain.items())


@pytest.mark.parametrize("gamma_r, lagged", [(0.0, False), (0.5, False), (0.5, True)])
def test_swaps_are_written_out(gamma_r, lagged):
    """Both phases against the formulas of the module `objectives`, one plain pass after the other."""
    model, x = swapping_model().double(), torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
    model.prior_std, cut = 0.5, torch.Tensor.detach
    if lagged:  # the copy is another network, and nothing is detached
        model.lagged_decoder, cut = True, lambda tensor: tensor
        model.decode_fake = swapping_model(width=4).double().requires_grad_(False).decode
    draws, step = Draws(5, 640, Rows.all(BATCH)), Step(model, soft_with_swaps(gamma_r))
    normal = lambda name: draws.stream(name).normal(BATCH, 6, dtype=torch.float64)
    sampled = lambda posterior, name: posterior.mean + (posterior.logvar / 2).exp() * normal(name)
    sse = lambda a, b: (a - b).square().flatten(1).sum(1)
    kl = lambda p: 0.5 * (p.mean.square() + p.logvar.exp() - 1 - p.logvar).sum(1)
    real = model.encode(x)
    z = sampled(real, "posterior")
    swapped = model.swap(z, z[[1, 0, 3, 2]]).detach()
    latents = {"rec": z, "fake": 0.5 * normal("prior"), "swap": swapped}
    fakes = {name: model.decode(latent) for name, latent in latents.items()}
    weights = {"rec": 0.25, "fake": 0.25, "swap": 0.5}
    encoder = 0.02 * (0.7 * sse(x, fakes["rec"]) + 0.4 * kl(real))
    decoder = 0.02 * 0.7 * sse(x, fakes["rec"])
    for name, fake in fakes.items():
        seen = model.encode(fake.detach())
        again = model.decode_fake(sampled(seen, f"rec_{name}/z"))
        encoder = encoder + weights[name] / 2 * (-0.04 * (0.7 * sse(fake, again) + 2 * kl(seen))).exp()
        seen = model.encode(fake)
        again = model.decode_fake(cut(sampled(seen, f"rec_{name}/z/decoder")))
        part = 0.4 * kl(seen) + gamma_r * 0.7 * sse(cut(fake), again)
        decoder = decoder + 0.02 * weights[name] * part
    (loss, statistics), shared = step.encoder_phase(x, draws)
    decoder_loss = step.decoder_phase(x, draws, shared).loss
    for got, want, trained in (
        (loss, encoder.mean(), step.encoder_parameters),
        (decoder_loss, decoder.mean(), step.decoder_parameters),
    ):
        torch.testing.assert_close(got, want)
        gradients = (torch.autograd.grad(value, trained, retain_graph=True) for value in (got, want))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-14)
    assert {"rec_swap", "kl_swap", "exp_elbo_swap"} <= set(statistics)


def test_micro_batches_accumulate_to_the_whole_batch():
    model, x = style_model(), torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    whole = updated(model, soft(), x)
    assert_same_update(model, whole, updated(model, soft(), x, micro_batches=2, share_forward=False))


def test_rows_of_two_ranks_average_to_one():
    """Each rank's draws are its rows of the global batch's draws, block 0's shared noise map included."""
    x = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)

    def gradient(rows):
        model = style_model()
        loss, _ = Step(model, soft()).encoder_phase(x[rows.start : rows.stop], Draws(1, 0, rows))
        loss.loss.backward()
        return torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None])

    halves = [gradient(Rows(0, 2, 4)), gradient(Rows(2, 4, 4))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, gradient(Rows.all(4)), rtol=1e-10, atol=1e-13)


def test_vae_phase_equals_one_backward_through_both():
    model, x = style_model(), torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
    step = Step(model, soft())
    loss, posterior, cut = step.vae_phase(x, Draws(1, 0, Rows.all(BATCH)))
    loss.loss.backward()
    posterior_surrogate(posterior, cut).backward()
    split = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    draws = Draws(1, 0, Rows.all(BATCH))
    mean, logvar = model.encode(x)
    eps = draws.stream("posterior").normal(*mean.shape, dtype=mean.dtype)
    rec = model.decode(mean + (logvar / 2).exp() * eps, draws.stream("rec"))
    error = (rec - x).square().flatten(1).sum(1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)
    (0.7 * error + 0.4 * kl).mean().backward()
    for name, gradient in split.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-9, atol=1e-12)


def test_given_errors_are_those_of_a_target_and_its_prediction():
    """An error need not be symmetric: this one tells which is which."""
    model, x = mlp_model(), torch.randn(BATCH, 2, dtype=torch.float64)
    error = lambda target, prediction: target.square().sum(1) + 0 * prediction.sum(1)
    step, draws = Step(model, soft(0.5), error=error), Draws(0, 0, Rows.all(BATCH))
    encoder, shared = step.encoder_phase(x, draws)
    decoder, (vae, _, _) = step.decoder_phase(x, draws, shared), step.vae_phase(x, draws)
    for loss in (encoder, decoder, vae):
        torch.testing.assert_close(loss.statistics["rec_real"], error(x, x))
    for name, fake in zip(step.sources, shared.decoded, strict=True):
        for loss in (encoder, decoder):
            torch.testing.assert_close(loss.statistics[f"rec_{name}"], error(fake, fake).detach())


def forward_equivalents(schedule: str, objective) -> float:
    """Multiply-adds of one iteration over those of one pass of one network (encoder and decoder alike)."""
    torch.manual_seed(0)
    model = StyleModel(64, start_channels=16, max_channels=64, latent_size=32, mapping_layers=2)
    x = torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as one_pass, torch.no_grad():
        model.decode(model.encode(x).mean)
    step = Step(model, objective, schedule=schedule, fresh_draws=schedule == "published")
    draws = Draws(0, 0, Rows.all(2))
    with FlopCounterMode(display=False) as iteration:
        loss, shared = step.encoder_phase(x, draws)
        loss.loss.backward()
        step.decoder_phase(x, draws, shared).loss.backward()
    return iteration.get_total_flops() / (one_pass.get_total_flops() / 2)


def test_passes_of_an_iteration():
    published, minimal = forward_equivalents("published", soft(1e-8)), forward_equivalents("minimal", soft())
    assert published == pytest.approx(33, rel=0.03)
    assert minimal <= 24
    assert minimal == pytest.approx(24, rel=0.03)
    hinge = IntroVAE(beta_rec=0.5, beta_kl=1, beta_neg=0.5, margin=5.0)
    assert forward_equivalents("minimal", hinge) == pytest.approx(20, rel=0.03)


@pytest.mark.parametrize("schedule, encodes, decodes", [("published", 19, 28), ("minimal", 18, 16)])
def test_passes_of_an_iteration_with_a_third_kind_of_fake(schedule, encodes, decodes):
    """47 after 33 and 34 after 24, told apart: a pass of this encoder costs less than one of the decoder."""
    model, x = swapping_model(resolution=32, width=16), torch.rand(2, 3, 32, 32)
    draws, gamma_r = Draws(0, 0, Rows.all(2)), 1e-8 * (schedule == "published")
    step = Step(model, soft_with_swaps(gamma_r), schedule=schedule, fresh_draws=schedule == "published")
    with FlopCounterMode(display=False) as encode, torch.no_grad():
        z = model.encode(x).mean
    with FlopCounterMode(display=False) as decode, torch.no_grad():
        model.decode(z)
    with FlopCounterMode(display=False) as iteration:
        loss, shared = step.encoder_phase(x, draws)
        loss.loss.backward()
        step.decoder_phase(x, draws, shared).loss.backward()
    want = encodes * encode.get_total_flops() + decodes * decode.get_total_flops()
    assert iteration.get_total_flops() == pytest.approx(want, rel=0.05)


def test_fresh_draws_change_the_decoder_phase_only():
    model, x = mlp_model(), torch.randn(BATCH, 2, dtype=torch.float64)
    same = updated(model, soft(), x, schedule="published")
    fresh = updated(model, soft(), x, schedule="published", fresh_draws=True)
    for name in same:
        assert torch.equal(same[name], fresh[name]) == name.startswith("encoder"), name


class Recorded(Draws):
    """Draws that know the names of their streams."""

    def __init__(self, *args):
        super().__init__(*args)
        self.names = []

    def stream(self, name):
        self.names.append(name)
        return super().stream(name)


@pytest.mark.parametrize("options", [{"schedule": "published", "fresh_draws": True}, {}], ids=str)
def test_what_the_decoder_phase_draws_is_drawn_anew(options):
    model, x = swapping_model(), torch.rand(BATCH, 3, 8, 8)
    model.random_encoder = True
    model.encode = lambda x, stream, encode=model.encode: encode(x)
    step = Step(model, soft_with_swaps(0.5), **options)
    draws = Recorded(5, 640, Rows.all(BATCH))
    _, shared = step.encoder_phase(x, draws)
    first, draws.names = draws.names, []
    step.decoder_phase(x, draws, shared)
    assert len(set(first)) == len(first) and len(set(draws.names)) == len(draws.names)
    assert draws.names and not set(draws.names) & set(first)
    if options:
        assert {name.removesuffix("/decoder") for name in draws.names} == set(first)


@pytest.mark.parametrize("draws", [False, True])
def test_half_precision_posteriors_and_frozen_parameters_stay_what_they_are(draws):
    """Latents and divergences are float32 under autocast; a parameter the user froze is not thawed."""
    model, x = swapping_model(), torch.rand(BATCH, 3, 8, 8)
    if draws:
        model.random_encoder, encode = True, model.encode
        model.encode = lambda x, stream: encode(x)
    frozen = next(model.decoder.parameters()).requires_grad_(False)
    step = Step(model, soft_with_swaps(), share_forward=False, autocast=torch.bfloat16)
    loss, shared = step.encoder_phase(x, Draws(0, 0, Rows.all(BATCH)))
    assert shared.decoded is None and shared.z.dtype == torch.float32
    assert all(values.dtype == torch.float32 for values in loss.statistics.values())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]


def test_a_phase_that_fails_leaves_no_parameter_frozen():
    """Where memory runs out, a smaller batch is tried with the same networks."""
    model, x = mlp_model(), torch.randn(BATCH, 2, dtype=torch.float64)
    step, draws = Step(model, soft(), share_forward=False), Draws(0, 0, Rows.all(BATCH))
    for network, phase in (("decode", step.encoder_phase), ("encode", step.decoder_phase)):
        given = [step.encoder_phase(x, draws)[1]] if network == "encode" else []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(model, network, Mock(side_effect=MemoryError))
            phase(x, draws, *given)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_keeps_gradients_on_their_side(dtype):
    model, x = style_model().float(), torch.randn(BATCH, 3, 16, 16)
    step = Step(model, soft(), autocast=dtype)
    loss, shared = step.encoder_phase(x, Draws(0, 0, Rows.all(BATCH)))
    assert shared.decoded[0].dtype == (dtype or torch.float32)
    loss.loss.backward()
    assert all(p.grad is None for p in step.decoder_parameters)
    for p in step.encoder_parameters:
        p.grad = None
    step.decoder_phase(x, Draws(0, 0, Rows.all(BATCH)), shared).loss.backward()
    assert all(p.grad is None for p in step.encoder_parameters)
    assert all(torch.isfinite(p.grad).all() for p in step.decoder_parameters if p.grad is not None)


def test_bad_options_name_what_is_accepted():
    with pytest.raises(ValueError, match=r"schedule is 'fast', must be one of minimal, published"):
        Step(mlp_model(), soft(), schedule="fast")
    with pytest.raises(ValueError, match="fresh_draws=True needs schedule='published'"):
        Step(mlp_model(), soft(), fresh_draws=True)
    with pytest.raises(ValueError, match="weighs the fakes rec, fake, the model makes rec, fake, swap"):
        Step(swapping_model(), soft())
    with pytest.raises(ValueError, match="weighs the fakes rec, fake, swap, the model makes rec, fake"):
        Step(mlp_model(), soft_with_swaps())
    assert Step(swapping_model(), VAE(beta_rec=1, beta_kl=1)).sources  # a VAE makes none of them


def iteration(**sections) -> Iteration:
    """Of a network for points in the plane."""
    config = {
        "model": {"kind": "mlp", "width": 16, "hidden_layers": 2},
        "data": {"kind": "density", "name": "rings"},
        "objective": {"beta_rec": 0.2, "beta_kl": 0.3, "beta_neg": 0.9},
        "train": {"batch": 12, "images": 1000, "warmup_images": 12, **sections.pop("train", {})},
        **sections,
    }
    return Iteration(make_config(config), (2,), 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("images", [0, 12])
def test_pieces_of_an_iteration_are_its_batch(images):
    """Warming up and after; gradients before they are taken, and the statistics of all images."""
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for micro_batch in (None, 4):
        made = iteration()
        made.images, steps = images, []
        for name, engine in made.engines.items():
            engine.step = partial(steps.append, name)
        made.iterate(x, Stage(0, 1.0, 12, 1e-3, 0.9, micro_batch))
        assert sorted(steps) == ["decoder", "encoder"]
        assert made.step.shares_forward == (micro_batch is None)
        found.append(([p.grad for p in made.model.parameters()], made.meter.totals()))
    (gradients, totals), (in_pieces, totals_of_pieces) = found
    assert ("loss_vae" in totals) == (images == 0) and ("loss_decoder" in totals) == ("kl_fake" in totals)
    assert {count for _, count in totals.values()} == {12}
    assert totals_of_pieces == {name: pytest.approx(total, rel=1e-4) for name, total in totals.items()}
    for whole, pieces in zip(gradients, in_pieces, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-6)


def test_an_iteration_takes_its_options_from_the_configuration():
    made = iteration(
        train={"schedule": "published", "fresh_draws": True},
        optim={"betas": [0.1, 0.5], "eps": 1e-3, "published_eps": True},
        average={"half_life": None},
    )
    assert made.step.fresh_draws and not made.step.may_share and made.average is None
    made.iterate(torch.randn(12, 2), Stage(0, 1.0, 12, 1e-3, 0.9))
    for engine in made.engines.values():
        group = engine.optimizer.param_groups[0]
        assert group["betas"] == (0.1, 0.5) and group["eps"] == pytest.approx(1e-3 / 0.5**0.5)
    assert iteration(average={"half_life": 7}).average.half_life == 7
