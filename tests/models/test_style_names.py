"""Names, shapes, order and layout of the style model's weights in published checkpoints."""

from __future__ import annotations

from itertools import pairwise

import torch

from sivae_fast.models.style import StyleModel
from sivae_fast.models.style_names import from_published, our_name, to_published


def published_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys and shapes of the published 256x256 checkpoints, in their order."""
    encoder, decoder, tl, fl = {}, {"const": (1, 512, 4, 4)}, {}, {}
    widths = [64, 128, 256, 512, 512, 512, 512, 512]
    for i, width in enumerate(widths[:-1]):
        encoder[f"from_rgb.{i}.from_rgb.weight"] = (width, 3, 1, 1)
        encoder[f"from_rgb.{i}.from_rgb.bias"] = (width,)
    for i, (a, b) in enumerate(pairwise(widths)):
        block = {"bias_1": (1, a, 1, 1), "bias_2": (1, b, 1, 1), "conv_1.weight": (a, a, 3, 3)}
        block |= {"blur.weight": (a, 1, 3, 3), "conv_2.weight": (b, a, 3, 3)}
        block |= {"style_1.weight": (512, 2 * a), "style_1.bias": (512,)}
        block |= {"style_2.weight": (512, 2 * b), "style_2.bias": (512,)}
        encoder |= {f"encode_block.{i}.{key}": shape for key, shape in block.items()}
    for i, c in enumerate([512, 512, 512, 512, 256, 128, 64]):
        parts = ("noise_weight_1", "bias_1", "noise_weight_2", "bias_2")
        block = dict.fromkeys(parts, (1, c, 1, 1)) | {"blur.weight": (c, 1, 3, 3)}
        if i > 0:
            above = min(512, 2 * c) if i > 3 else 512
            block["conv_1.weight"] = (above, c, 3, 3) if i >= 5 else (c, above, 3, 3)
        block |= {"style_1.weight": (2 * c, 512), "style_1.bias": (2 * c,), "conv_2.weight": (c, c, 3, 3)}
        block |= {"style_2.weight": (2 * c, 512), "style_2.bias": (2 * c,)}
        decoder |= {f"decode_block.{i}.{key}": shape for key, shape in block.items()}
    for i, c in enumerate([512, 512, 512, 512, 256, 128, 64]):
        decoder |= {f"to_rgb.{i}.to_rgb.weight": (3, c, 1, 1), f"to_rgb.{i}.to_rgb.bias": (3,)}
    for i, width in enumerate([512, 512, 1024]):
        tl |= {f"map_blocks.{i}.fc.weight": (width, 512), f"map_blocks.{i}.fc.bias": (width,)}
    for i in range(8):
        fl |= {f"map_blocks.{i}.fc.weight": (512, 512), f"map_blocks.{i}.fc.bias": (512,)}
    networks = {"encoder": encoder, "decoder": decoder, "mapping_tl": tl, "mapping_fl": fl}
    return networks | {"dlatent_avg": {"buff": (14, 512)}}


def test_published_names_shapes_and_order():
    with torch.device("meta"):
        model = StyleModel()
        networks = to_published(model.state_dict())
    expected = published_shapes()
    shapes = {name: {k: tuple(v.shape) for k, v in state.items()} for name, state in networks.items()}
    assert shapes == expected
    assert [len(state) for state in shapes.values()] == [77, 91, 6, 16, 1]
    # An optimizer's state is numbered in the order of the parameters.
    for network in ("encoder", "decoder", "mapping_tl", "mapping_fl"):
        names = [name for key in expected[network] if (name := our_name(network, key))]
        assert names == [name for name, _ in model.named_parameters() if name.startswith(network + ".")]


def test_published_layout_round_trip():
    state = StyleModel(128, start_channels=8, max_channels=16, latent_size=16).state_dict()
    back = from_published(to_published(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
