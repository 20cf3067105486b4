"""The blur and the layers between images and features where no kernel runs them: formulas and errors."""

import pytest
import torch
import torch.nn.functional as F

from sivae_fast.kernels.blur import blur, blur_weight
from sivae_fast.kernels.rgb import from_rgb, to_rgb


def test_blur_is_the_published_one():
    impulse = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    impulse[0, 1, 2, 2] = 16
    row = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    assert torch.equal(blur(impulse, 3.0)[0, 1, 1:4, 1:4], 3 * torch.outer(row, row))
    assert blur(impulse)[0, 0].abs().max() == 0
    assert blur(torch.ones(1, 1, 3, 3))[0, 0].tolist() == [
        [0.5625, 0.75, 0.5625],
        [0.75, 1, 0.75],
        [0.5625, 0.75, 0.5625],
    ]
    assert blur_weight(4).shape == (4, 1, 3, 3)


@pytest.mark.parametrize(("run", "shape"), [(from_rgb, (5, 3)), (to_rgb, (3, 5))])
def test_layers_are_linear_maps_of_pixels(run, shape):
    x, weight, bias = torch.randn(2, shape[1], 4, 6), torch.randn(*shape, 1, 1), torch.randn(shape[0])
    want = torch.einsum("bihw,oi->bohw", x, weight[:, :, 0, 0]) + bias[:, None, None]
    want = F.leaky_relu(want, 0.1) if run is from_rgb else want
    found = run(x, weight, bias, 0.1) if run is from_rgb else run(x, weight, bias)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("run", [from_rgb, to_rgb])
def test_shapes_that_do_not_fit_are_named(run):
    given = [torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 1, 1), torch.zeros(5)]
    for i, wrong in enumerate([(2, 4, 4, 4), (5, 3, 3, 3), (3,)]):
        tensors = [torch.zeros(wrong) if i == j else t for j, t in enumerate(given)]
        with pytest.raises(ValueError, match=str(list(wrong)).replace("[", r"\[").replace("]", r"\]")):
            run(*tensors)


def test_what_cannot_be_blurred_is_named():
    with pytest.raises(ValueError, match=r"x has shape \[3, 4, 4\]"):
        blur(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        blur(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
