"""The style model against numbers of the published networks, a literal implementation, and itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from layouts import LAST, Layouts
from published_fill import filled, sequence
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

from bench.plain_style import PlainStyle, kernel4
from sivae_fast.draws import Draws, Joined, Rows, Stream
from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_layers import MeanOfShifts, double, halve
from sivae_fast.models.style_names import from_published, to_published


def tiny(**options) -> StyleModel:
    """Six levels (128 pixels, so that both published forms of up and down occur), float64."""
    sizes = {"resolution": 128, "start_channels": 8, "max_channels": 16, "latent_size": 16}
    return StyleModel(**{**sizes, **options}).double()


def lively(**options) -> StyleModel:
    """`tiny` with biases and noise weights that are not zero."""
    model = tiny(**options)
    for name, parameter in model.named_parameters():
        if "bias" in name or "noise" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(model: StyleModel, count: int = 2) -> torch.Tensor:
    size = (count, model.channels, model.resolution, model.resolution)
    return torch.rand(size, dtype=model.dlatent_avg.dtype) * 2 - 1


def stream(rows: int = 2, seed: int = 5) -> Stream:
    return Draws(seed, 0, Rows.all(rows)).stream("test")


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden() -> StyleModel:
    model = tiny().eval()
    networks = to_published(model.state_dict())
    model.load_state_dict(from_published({name: filled(state) for name, state in networks.items()}))
    return model


# w[0, 0:2]; sum of means, mean[1, 3]; sum of logvars; styles[0, 0:2]; image sum, sum of squares, [1, 2, 3, 1]
GOLDEN = {
    (2, 1.0): (
        (-0.534768691447, 0.116801173313),
        (4.21236832035, 0.303779704142),
        3.83204120235,
        (-0.0425547622996, 0.403397398787),
        (-184.701274372, 3164.16758934, 2.79578296339),
    ),
    (2, 0.25): (
        (-0.360107739095, -0.107178021245),
        (3.53453581447, 0.217948001441),
        2.54829039092,
        (-0.0519343084176, 0.404424701059),
        (-237.192358858, 2291.12216079, -0.644051896657),
    ),
    (5, 1.0): (
        (-0.272400578673, 0.865124982069),
        (9.82309600203, 1.06581119533),
        7.83589386557,
        (-0.0337044444513, 0.383313343639),
        (-54986.8291183, 136716.185046, -0.813766821661),
    ),
    (5, 0.25): (
        (-0.544114210727, 0.887132666124),
        (9.91185392096, 0.772309539214),
        8.24930454606,
        (-0.023331697653, 0.330110609281),
        (9588.98762452, 138935.100992, 0.694098391698),
    ),
}


def equal_as_printed(actual: torch.Tensor, expected) -> None:
    """Twelve digits were printed."""
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize(("lod", "blend"), GOLDEN)
@torch.no_grad()
def test_outputs_are_those_of_the_published_networks(golden, lod, blend):
    w_, mean_, logvar_, styles_, image_ = GOLDEN[lod, blend]
    golden.set_level(lod, blend)
    x = sequence(1, 2, 3, golden.resolution, golden.resolution)
    w = golden.encoder(x, lod, None if blend == 1 else torch.tensor(blend).double())
    mean, logvar = golden.encode(x)
    image = golden.decode(mean, noise="bump")
    equal_as_printed(w[0, :2], w_)
    equal_as_printed(torch.stack([mean.sum(), mean[1, 3]]), mean_)
    equal_as_printed(logvar.sum(), logvar_)
    equal_as_printed(golden.styles(mean)[0, 0, :2], styles_)
    equal_as_printed(torch.stack([image.sum(), image.square().sum(), image[1, 2, 3, 1]]), image_)


@torch.no_grad()
def test_decoder_takes_a_style_a_layer(golden):
    image = golden.decoder(sequence(2, 2, 12, 16), ["bump"] * 12, 5, None)
    expected = (-20896.7411416, 289229.824378, 0.0788614162213)
    equal_as_printed(torch.stack([image.sum(), image.square().sum(), image[0, 1, 100, 17]]), expected)


def test_default_size_has_the_published_parameters():
    with torch.device("meta"):
        model = StyleModel()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    expected = {
        "encoder": 26_789_952,
        "decoder": 23_984_981,
        "mapping_tl": 1_050_624,
        "mapping_fl": 2_101_248,
    }
    assert counts == expected and sum(counts.values()) == 53_926_805 and model.style_mixing == 0.9
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.encoder.blocks]
    assert blocks == [308_416, 836_992, 2_557_696] + [5_769_216] * 4
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.decoder.blocks]
    assert blocks == [3_411_968, 5_771_264, 5_771_264, 5_771_264, 2_295_808, 705_536, 242_176]


def test_learning_rate_factors_and_initial_weights():
    model = StyleModel()
    factors = model.learning_rate_factors()
    expected = {
        "encoder.blocks.0.conv_1.weight": 0.0589256,
        "encoder.blocks.3.conv_1.weight": 0.0208333,
        "encoder.blocks.3.style_1.weight": 0.0441942,
        "encoder.blocks.3.style_1.bias": 1.0,
        "encoder.from_rgb.0.weight": math.sqrt(2 / 3),
        "decoder.blocks.4.conv_1.weight": 0.0208333,
        "decoder.blocks.2.style_2.weight": 0.0441942,
        "decoder.to_rgb.6.weight": 0.00375,
        "mapping_tl.layers.2.weight": 0.00625,
        "mapping_fl.layers.7.bias": 0.1,
    }
    assert {name: factors[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    parameters = dict(model.named_parameters())
    plain = {name for name in parameters if name not in factors}
    assert plain == {
        n for n in parameters if n.endswith(("bias_1", "bias_2", "weight_1", "weight_2", "const"))
    }
    for name, parameter in parameters.items():
        if name.endswith(".weight"):
            slower = 0.1 if name.startswith("mapping") else 1.0
            noise = 5 / math.sqrt(parameter.numel())
            assert parameter.std().item() == pytest.approx(factors[name] / slower, rel=noise), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, name == "decoder.const")), name


LEVELS = [(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.7), (5, 1.0), (5, 0.4)]


@pytest.mark.parametrize(("lod", "blend"), LEVELS)
def test_outputs_and_gradients_are_those_of_the_literal_networks(lod, blend):
    model = lively(style_mixing=1.0)
    model.set_level(lod, blend)
    plain = PlainStyle(model)
    x, z = images(model), torch.randn(2, 16, dtype=torch.float64)
    results = []
    for each in (model, plain):
        y, leaf = x.clone().requires_grad_(), z.clone().requires_grad_()
        mean, logvar = each.encode(y)
        rec, fake = each.decode(leaf, stream()), each.generate(leaf, stream())
        weight = sequence(7, *rec.shape)
        (
            mean.square().sum() + logvar.sum() + (rec * weight).sum() + (fake.square() * weight).sum()
        ).backward()
        results.append([mean, logvar, rec, fake, y.grad, leaf.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    ours = to_published({n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in named(model)})
    for network, state in ours.items():
        theirs = dict(getattr(plain, network).named_parameters())
        for key in state.keys() & theirs.keys():
            gradient = theirs[key].grad if theirs[key].grad is not None else torch.zeros_like(theirs[key])
            error = (state[key] - gradient).norm()
            assert error <= 1e-9 * gradient.norm() + 1e-12, (network, key)
    torch.testing.assert_close(plain.dlatent_avg.buff[0], model.dlatent_avg, rtol=1e-12, atol=0)


def named(model: StyleModel):
    return [*model.named_parameters(), ("dlatent_avg", model.dlatent_avg)]


@pytest.mark.parametrize("noise", ["sample", "batch", "bump", "none"])
def test_noise_modes_are_those_of_the_literal_decoder(noise):
    model = lively().eval()
    model.set_level(3, 0.5)
    z = torch.randn(2, 16, dtype=torch.float64)
    ours, theirs = model.decode(z, stream(), noise=noise), PlainStyle(model).decode(z, stream(), noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_who_shares_noise():
    model = lively().eval()
    model.set_level(2, 1.0)
    z = torch.randn(1, 16, dtype=torch.float64).repeat(2, 1)
    first, second = model.decode(z, stream())
    assert (first - second).abs().max() > 0.01
    for noise in ("batch", "bump", "none"):
        first, second = model.decode(z, stream(), noise=noise)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    maps = model._noise(model.styles(z), stream(), "sample")
    assert [len(noise) for noise in maps] == [1, 2, 2, 2, 2, 2]


def test_draws_do_not_depend_on_how_the_batch_is_cut():
    model = lively(style_mixing=1.0)
    model.set_level(2, 0.5)
    z = torch.randn(4, 16, dtype=torch.float64)
    whole = model.generate(z, stream(4))
    halves = [Draws(5, 0, Rows(a, a + 2, 4)).stream("test") for a in (0, 2)]
    parts = [model.generate(part, half) for part, half in zip(z.chunk(2), halves, strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-10, atol=1e-10)
    joined = model.decode(z, Joined(stream(2, 1), stream(2, 2)))
    alone = [model.decode(part, stream(2, i)) for i, part in enumerate(z.chunk(2), start=1)]
    torch.testing.assert_close(torch.cat(alone), joined, rtol=1e-10, atol=1e-10)


def test_without_a_stream_torch_seeds_the_draws():
    model = tiny()
    model.set_level(1, 1.0)
    z = torch.randn(2, 16, dtype=torch.float64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model.generate(z))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class FixedCut(Stream):
    """A stream whose coin always falls and whose cutoff is given."""

    def __init__(self, cutoff: int):
        super().__init__(3, Rows.all(2))
        self.cutoff = cutoff

    def coin(self, probability: float) -> bool:
        return True

    def integer(self, low: int, high: int) -> int:
        assert low <= self.cutoff <= high
        return self.cutoff


def test_style_mixing_takes_layers_from_the_cutoff_on():
    model = lively()
    model.set_level(2, 1.0)
    z = torch.randn(2, 16, dtype=torch.float64)
    pure = model.decode(z, noise="none")
    torch.testing.assert_close(model.generate(z, FixedCut(6), noise="none"), pure, rtol=1e-12, atol=0)
    styles = model.styles(z)
    styles[:, 2:] = model.styles(FixedCut(2).normal(2, 16, dtype=z.dtype))[:, 2:]
    mixed = model.generate(z, FixedCut(2), noise="none")
    torch.testing.assert_close(mixed, model.synthesize(styles, noise="none"), rtol=1e-12, atol=0)
    assert (mixed - pure).abs().max() > 0.01
    model.eval()
    torch.testing.assert_close(model.generate(z, FixedCut(2), noise="none"), pure, rtol=1e-12, atol=0)
    forced = model.generate(z, FixedCut(2), noise="none", mixing=True)
    torch.testing.assert_close(forced, mixed, rtol=1e-12, atol=0)


def test_style_mixing_happens_as_often_as_asked():
    model = tiny(style_mixing=0.3)
    model.set_level(0, 1.0)
    z = torch.randn(2, 16, dtype=torch.float64)
    pure = model.decode(z, noise="none")
    seeds = range(300)
    mixed = sum(not torch.equal(model.generate(z, stream(seed=s), noise="none"), pure) for s in seeds)
    # A cutoff of 2 at level 0 changes nothing: half of 0.3.
    assert mixed / 300 == pytest.approx(0.15, abs=0.06)


def test_average_style_is_tracked_in_training_alone():
    model = lively(style_mixing=1.0)
    z = torch.randn(4, 16, dtype=torch.float64)
    model.set_level(0, 1.0)
    w = model.styles(z)[:, 0].mean(0)
    model.decode(z)
    torch.testing.assert_close(model.dlatent_avg, 0.005 * w, rtol=1e-12, atol=0)
    model.generate(z)  # before mixing
    torch.testing.assert_close(model.dlatent_avg, (0.995 * 0.005 + 0.005) * w, rtol=1e-12, atol=0)
    average = model.dlatent_avg.clone()
    model.eval().generate(z)
    model.train().styles(z)
    assert torch.equal(average, model.dlatent_avg) and not average.requires_grad


def test_no_rows_leave_the_average_style_as_it_is():
    model = lively()
    with pytest.raises(ValueError, match="no dimension of 0"):
        model.decode(torch.zeros(0, 16, dtype=torch.float64))
    assert torch.equal(model.dlatent_avg, torch.zeros(16, dtype=torch.float64))


def test_truncation_pulls_coarse_layers_to_the_average():
    model = lively().eval()
    model.set_level(4, 1.0)
    model.dlatent_avg.copy_(torch.randn(16))
    z = torch.randn(2, 16, dtype=torch.float64)
    styles = model.styles(z)
    styles[:, :8] = model.dlatent_avg + 0.7 * (styles[:, :8] - model.dlatent_avg)
    expected = model.synthesize(styles, noise="none")
    for images_of in (model.decode, model.generate):
        cut = images_of(z, noise="none", truncation=0.7)
        torch.testing.assert_close(cut, expected, rtol=1e-9, atol=1e-9)
    model.set_level(3, 1.0)
    first, second = model.decode(z, noise="none", truncation=0.0)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [2, 4, 6, 10])
def test_stride_two_forms_equal_pooling_and_up_sampling(size):
    x, small = sequence(1, 2, 3, size, size), sequence(2, 2, 3, size // 2, size // 2)
    weight, bias = sequence(3, 5, 3, 3, 3), sequence(4, 1, 5, 1, 1)
    expected = F.avg_pool2d(F.conv2d(x, weight, padding=1), 2) + bias
    torch.testing.assert_close(halve(x, weight, bias), expected, rtol=1e-12, atol=1e-13)
    expected = F.conv2d(F.interpolate(small, scale_factor=2), weight, padding=1)
    flipped = weight.flip(2, 3).transpose(0, 1)
    torch.testing.assert_close(4 * double(small, flipped), expected, rtol=1e-12, atol=1e-13)
    expected = F.conv_transpose2d(small, kernel4(flipped), stride=2, padding=1)
    torch.testing.assert_close(4 * double(small, flipped), expected, rtol=1e-12, atol=1e-13)


def test_finite_differences_through_the_whole_model():
    model = StyleModel(8, 1, 2, 3, 3, 2).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.set_level(1, 0.3)
    parameters = [p for p in model.parameters() if p.numel() < 40]

    def loss(x, *_):
        mean, logvar = model.encode(x)
        return (model.decode(mean, stream()).square().mean() + logvar.exp().mean()).view(1)

    x = images(model).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channels_give_finite_gradients(dtype):
    model = tiny().to(dtype)
    model.encode(torch.full((2, 3, 128, 128), 0.3, dtype=dtype).requires_grad_()).mean.sum().backward()
    torch.nn.init.zeros_(model.encoder.blocks[0].conv_1.weight)
    x = images(model).requires_grad_()
    model.encode(x).mean.sum().backward()
    gradients = [x.grad, *(p.grad for p in model.encoder.parameters() if p.grad is not None)]
    assert all(g.isfinite().all() for g in gradients)


def test_compiles_whole_and_not_again_when_blend_changes():
    model = StyleModel(8, start_channels=4, latent_size=8, mapping_layers=1)
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    networks = [
        torch.compile(network.forward, fullgraph=True, dynamic=False, backend=count)
        for network in (model.encoder, model.decoder)
    ]
    x, styles = sequence(1, 2, 3, 8, 8).float(), sequence(2, 2, 4, 8).float()
    noise = model._noise(styles, stream(), "sample")

    def gradient(networks, blend):
        parameters = [*model.encoder.blocks.parameters(), *model.decoder.blocks.parameters()]
        encoder, decoder = networks
        loss = encoder(x, 1, blend).sum() + decoder(styles, noise, 1, blend).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    for blend, graphs in [(0.25, 2), (0.5, 2), (0.0, 2), (None, 4), (0.75, 4)]:
        blend = None if blend is None else torch.tensor(blend)
        eager = gradient([model.encoder, model.decoder], blend)
        torch.testing.assert_close(gradient(networks, blend), eager, rtol=1e-4, atol=1e-5)
        assert len(compiled) == graphs, f"graphs at blend {blend}"


def test_bfloat16_autocast_stays_near_float32():
    model = lively(resolution=32).float()
    x, z = images(model), torch.randn(2, 16)
    plain, plain_image = model.encode(x), model.decode(z, stream())
    with torch.autocast("cpu", torch.bfloat16):
        posterior, image = model.encode(x), model.decode(z, stream())
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    for low, full in [(posterior.mean, plain.mean), (posterior.logvar, plain.logvar), (image, plain_image)]:
        assert (low.float() - full).norm() < 0.02 * full.norm()
    (posterior.mean.sum() + image.float().square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("low", [False, True])
def test_maps_and_weights_stay_channels_last(low):
    model = lively(resolution=32).float()
    model.set_level(3, 0.5)
    x = images(model).contiguous(memory_format=LAST)
    with Layouts() as seen, torch.autocast("cpu", torch.bfloat16, enabled=low):
        image = model.generate(model.encode(x).mean, stream())
        image.backward(torch.ones_like(image))
    assert not seen.wrong
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 1:
            assert parameter.is_contiguous(memory_format=LAST), name


def test_multiplications_at_full_size():
    """22.88 and 22.84 G multiply-adds in the published form; 4.47 and 4.45 less in the stride-2 form."""
    model = StyleModel()
    for expected, run in [
        (22.882 - 4.467, lambda: model.encoder(torch.zeros(1, 3, 256, 256), 6, None)),
        (22.844 - 4.446, lambda: model.decoder(torch.zeros(1, 14, 512), [None] * 14, 6, None)),
    ]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 48}, "resolution is 48: .*power of two"),
        ({"resolution": 4}, "resolution is 4"),
        ({"latent_size": 0}, "latent_size is 0"),
        ({"style_mixing": 1.5}, "style_mixing is 1.5"),
    ],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        StyleModel(**options)


def test_wrong_inputs_are_named():
    model = tiny()
    for lod, blend, message in [(6, 1.0, "lod is 6"), (3, 1.2, "blend is 1.2"), (0, 0.5, "1 at level 0")]:
        with pytest.raises(ValueError, match=message):
            model.set_level(lod, blend)
    with pytest.raises(ValueError, match=r"at level 5 is .*, must be .* \[B, 3, 128, 128\]"):
        model.encode(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="noise is 'off'"):
        model.decode(torch.zeros(2, 16).double(), noise="off")


def test_the_mean_of_shifts_has_the_gradient_of_pooling():
    """In channels-last, too, where PyTorch's own is wrong on CUDA (tests/kernels holds the model on one)."""
    weight = sequence(1, 5, 3, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = sequence(2, 5, 3, 4, 4)
    (found,) = torch.autograd.grad(MeanOfShifts.apply(weight), weight, upstream)
    (expected,) = torch.autograd.grad(F.avg_pool2d(weight, 2, 1, 1), weight, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(MeanOfShifts.apply, (weight,))
    assert torch.autograd.gradgradcheck(MeanOfShifts.apply, (weight,))
