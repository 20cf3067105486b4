"""The style model against numbers of the published networks, a literal implementation, and itself."""

from __future__ import annotations

import pytest
import torch
from published_fill import filled, sequence

from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_names import from_published, to_published

torch.set_num_threads(1)


def tiny(**options) -> StyleModel:
    """Six levels (128 pixels, so that both published forms of up and down occur), float64."""
    sizes = dict(resolution=128, start_channels=8, max_channels=16, latent_size=16)
    return StyleModel(**{**sizes, **options}).double()


@pytest.fixture(scope="module")
def golden() -> StyleModel:
    model = tiny().eval()
    networks = to_published(model.state_dict())
    model.load_state_dict(from_published({name: filled(state) for name, state in networks.items()}))
    return model


# W[0, 0:2]; sum of the means, mean[1, 3]; sum of the logvars; styles[0, 0:2]; image sum, sum of squares, [1, 2, 3, 1]
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
    w = golden.encoder(x, lod, golden._blend if golden.fading else None)
    mean, logvar = golden.encode(x)
    image = golden.decode(mean, noise="bump")
    equal_as_printed(w[0, :2], w_)
    equal_as_printed(torch.stack([mean.sum(), mean[1, 3]]), mean_)
    equal_as_printed(logvar.sum(), logvar_)
    equal_as_printed(golden._map(mean)[0, :2], styles_)
    equal_as_printed(torch.stack([image.sum(), image.square().sum(), image[1, 2, 3, 1]]), image_)


@torch.no_grad()
def test_decoder_takes_a_style_a_layer(golden):
    image = golden.decoder(sequence(2, 2, 12, 16), ["bump"] * 12, 5, None)
    expected = (-20896.7411416, 289229.824378, 0.0788614162213)
    equal_as_printed(torch.stack([image.sum(), image.square().sum(), image[0, 1, 100, 17]]), expected)
