"""Maps are channels-last from the images to the images, so that no convolution has to turn them around."""

from __future__ import annotations

import pytest
import torch
from layouts import LAST, Layouts

from sivae_fast.draws import Rows, Stream
from sivae_fast.models.residual import ResidualModel
from sivae_fast.models.style import StyleModel
from sivae_fast.models.two_encoder import TwoEncoderModel

ROWS = 5  # as no weight has
MODELS = {
    "style": lambda: StyleModel(32, start_channels=8, max_channels=16, latent_size=16, mapping_layers=2),
    "residual": lambda: ResidualModel(32, widths=(8, 16), latent_size=16),
    "residual, augmented": lambda: ResidualModel(32, widths=(8, 16), latent_size=16, augment=True),
    "two encoders": lambda: TwoEncoderModel(32, class_size=8, content_size=8, width=4),
}


@pytest.mark.parametrize("flattened", [False, True], ids=["own weights", "weights as DeepSpeed has them"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_stay_channels_last(name, flattened):
    model = MODELS[name]()
    if flattened:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    x = torch.rand(ROWS, 3, 32, 32).contiguous(memory_format=LAST)
    with Layouts(ROWS) as seen:
        image = model.decode(model.encode(x).mean, Stream(0, Rows.all(ROWS)))
        image.backward(torch.ones_like(image))
    assert image.is_contiguous(memory_format=LAST)
    # Augmentation moves images, and the smallest maps are turned around to meet the fully connected layers.
    assert not [shape for _, shape in seen.wrong if shape[1] > 3 and shape[2] > 8]
