"""The class and content model."""

import pytest
import torch
from published_fill import filled, sequence

from sivae_fast.models.two_encoder import TwoEncoderModel


def small():
    torch.manual_seed(0)
    return TwoEncoderModel(resolution=16, class_size=6, content_size=3, width=4)


def test_sizes_of_the_published_layout():
    model = TwoEncoderModel()
    assert model.latent_size == 384
    shapes = [tuple(m.weight.shape) for m in model.class_encoder if hasattr(m, "weight")]
    assert shapes == [
        (64, 3, 7, 7), (128, 64, 4, 4), (256, 128, 4, 4), (256, 256, 4, 4), (256, 256, 4, 4),
        (256, 4096), (256, 256), (512, 256),
    ]  # fmt: skip
    assert [tuple(m.weight.shape) for m in model.decoder.content[::2]] == [
        (512, 128),
        (1024, 512),
        (4096, 1024),
    ]
    assert [tuple(m.weight.shape) for m in model.decoder.styles] == [(512, 256)] * 4
    assert [tuple(m.weight.shape) for m in model.decoder.to_image[::2]] == [(64, 256, 5, 5), (3, 64, 7, 7)]
    model.to(torch.bfloat16)
    x = torch.rand(1, 3, 64, 64, dtype=torch.bfloat16)
    assert model.decode(model.encode(x).mean).shape == x.shape


def test_codes_are_independent_of_the_other_encoder():
    model, x = small(), torch.rand(2, 3, 16, 16)
    before = model.encode(x)
    for parameter in model.content_encoder.parameters():
        parameter.data.zero_()
    after = model.encode(x)
    for old, new in zip(before, after, strict=True):
        assert old.shape == (2, 9)
        assert torch.equal(old[:, :6], new[:, :6]) and not torch.equal(old[:, 6:], new[:, 6:])


def test_class_reaches_the_picture_through_scale_and_offset_alone():
    model = small()
    for style in model.decoder.styles:
        torch.nn.init.zeros_(style.weight)
        torch.nn.init.zeros_(style.bias)
    z = torch.randn(2, 9)
    swapped = model.swap(torch.randn(2, 9), z)
    assert torch.equal(model.decode(swapped), model.decode(z))
    assert not torch.equal(model.decode(model.swap(z, torch.randn(2, 9))), model.decode(z))


def test_trained_weights_keep_their_meaning():
    """Numbers of this network itself: where they change, checkpoints of earlier versions are others."""
    model = small().double()
    model.load_state_dict(filled(model.state_dict()))
    mean, logvar = model.encode(0.5 + 0.5 * sequence(1, 2, 3, 16, 16))
    images = model.decode(sequence(2, 2, 9))
    found = [*mean[1, [0, 5, 6, 8]], *logvar[1, [0, 8]], images.mean(), images[1, 2, 5, 7]]
    kept = [
        *(-0.173908456417, 0.0374233762523, -0.242624681882, 0.322263349374),
        *(0.423637162371, -0.102676105706, 0.516679179214, 0.109241195976),
    ]
    assert [value.item() for value in found] == pytest.approx(kept, rel=1e-9)


def test_swap():
    model = small()
    a, b = torch.zeros(1, 9), torch.ones(1, 9)
    assert model.swap(a, b).tolist() == [[0] * 6 + [1] * 3]
    assert [part.shape[1] for part in model.split(a)] == [6, 3]


def test_every_parameter_is_trained_by_one_phase():
    model = small()
    encoder = [p for m in model.encoder_modules() for p in m.parameters()]
    decoder = [p for m in model.decoder_modules() for p in m.parameters()]
    assert len(encoder) + len(decoder) == len(list(model.parameters()))
    assert not {id(p) for p in encoder} & {id(p) for p in decoder}
    rec = model.decode(model.encode(torch.rand(2, 3, 16, 16)).mean)
    assert rec.min() > 0 and rec.max() < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resolution": 4}, "resolution=4"),
        ({"resolution": 48}, "resolution=48"),
        ({"width": 3}, "even"),
        ({"class_size": 0}, "class_size=0"),
    ],
)
def test_bad_sizes(options, words):
    with pytest.raises(ValueError, match=words):
        TwoEncoderModel(**options)
