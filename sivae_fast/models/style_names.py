"""The style model's parameters under the names and in the layouts of the published checkpoints.

Published weights are kept in one state dict a network. They differ from `StyleModel.state_dict()` in names,
in the blur kernels (kept there, constants here), in the repeated average style, and in the up-sampling
convolutions below 128 pixels, kept there as [out, in, 3, 3] of a plain convolution and here as
[in, out, 3, 3] of the transposed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

NETWORKS = ("encoder", "decoder", "mapping_tl", "mapping_fl", "dlatent_avg")

#: (published, ours) stems of the numbered modules of each network.
_STEMS = {
    "encoder": [("encode_block.{}.", "blocks.{}."), ("from_rgb.{}.from_rgb.", "from_rgb.{}.")],
    "decoder": [("decode_block.{}.", "blocks.{}."), ("to_rgb.{}.to_rgb.", "to_rgb.{}.")],
    "mapping_tl": [("map_blocks.{}.fc.", "layers.{}.")],
    "mapping_fl": [("map_blocks.{}.fc.", "layers.{}.")],
}
_PLAIN_UP = re.compile(r"decoder\.blocks\.[1-4]\.conv_1\.weight")  # up to 64 pixels


def our_name(network: str, key: str) -> str | None:
    """Name in `StyleModel` of a published key; None for the blur kernels, which have none."""
    if key.endswith("blur.weight"):
        return None
    return f"{network}.{_renamed(key, _STEMS[network])}"


def published_name(name: str) -> tuple[str, str]:
    """Network and key of a parameter of `StyleModel`."""
    network, key = name.split(".", 1)
    return network, _renamed(key, [(ours, published) for published, ours in _STEMS[network]])


def swap_layout(name: str, value: Tensor) -> Tensor:
    """A published tensor (of parameter `name`, or its optimizer state) in our layout, or the reverse."""
    return value.flip(2, 3).transpose(0, 1) if _PLAIN_UP.fullmatch(name) else value


def from_published(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Published state dicts by network to (part of) a state dict of `StyleModel`."""
    state = {}
    for network, tensors in networks.items():
        if network == "dlatent_avg":
            state["dlatent_avg"] = tensors["buff"][0]
            continue
        for key, value in tensors.items():
            if (name := our_name(network, key)) is not None:
                state[name] = swap_layout(name, value)
    return state


def to_published(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A state dict of `StyleModel` to published state dicts by network, blur kernels included."""
    networks: dict[str, dict[str, Tensor]] = {network: {} for network in NETWORKS}
    for name, value in state.items():
        if name == "dlatent_avg":
            continue
        network, key = published_name(name)
        networks[network][key] = swap_layout(name, value)
        if network in ("encoder", "decoder") and key.endswith("bias_1"):
            row = torch.tensor([1.0, 2.0, 1.0], dtype=value.dtype)
            kernel = (torch.outer(row, row) / 16).expand(value.shape[1], 1, 3, 3)
            networks[network][key.replace("bias_1", "blur.weight")] = kernel.clone()
    layers = 2 * sum(key.startswith("to_rgb") and key.endswith("bias") for key in networks["decoder"])
    networks["dlatent_avg"]["buff"] = state["dlatent_avg"].repeat(layers, 1)
    return networks


def relevelled(state: Mapping[str, Tensor], added: int) -> dict[str, Tensor]:
    """A state dict of `StyleModel` under the names that it has in a model with `added` more levels, whose own
    tensors are not in it; where negative, without those of the highest levels.

    The highest levels are the encoder's first modules and the decoder's last.
    """
    last, kept = last_level(state) + added, {}
    for name, value in state.items():
        found = re.fullmatch(r"(encoder|decoder)\.(\w+)\.(\d+)\.(.+)", name)
        if found:
            index = int(found[3]) + (added if found[1] == "encoder" else 0)
            name = f"{found[1]}.{found[2]}.{index}.{found[4]}"
            if index < 0 or (found[1] == "decoder" and index > last):
                continue
        kept[name] = value
    return kept


def last_level(state: Mapping[str, Tensor]) -> int:
    """The highest level of detail in a state dict of `StyleModel`."""
    return sum(re.fullmatch(r"decoder\.to_rgb\.\d+\.weight", name) is not None for name in state) - 1


def _renamed(key: str, stems: list[tuple[str, str]]) -> str:
    for old, new in stems:
        if found := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), key):
            return new.format(found.group(1)) + key[found.end() :]
    return key
