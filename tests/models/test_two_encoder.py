"""The class and content model."""

import pytest
import torch

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
    [({"resolution": 48}, "resolution=48"), ({"width": 3}, "even"), ({"class_size": 0}, "class_size=0")],
)
def test_bad_sizes(options, words):
    with pytest.raises(ValueError, match=words):
        TwoEncoderModel(**options)
