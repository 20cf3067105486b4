"""The point cloud networks."""

import pytest
import torch

from sivae_fast.models.pointnet import PointNetModel, published_state_dict


def count(modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def published_shapes():
    shapes = {}
    widths = (3, 64, 128, 256, 256, 512)
    for layer in range(5):
        shapes[f"encoder.conv.{3 * layer}.weight"] = (widths[layer + 1], widths[layer], 1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"encoder.conv.{3 * layer + 2}.{name}"] = (widths[layer + 1],)
        shapes[f"encoder.conv.{3 * layer + 2}.num_batches_tracked"] = ()
    linear = {"encoder.fc.0": (256, 512), "encoder.mu_layer": (128, 256), "encoder.std_layer": (128, 256)}
    widths = (128, 64, 128, 512, 1024, 6144)
    linear |= {f"decoder.model.{2 * i}": (widths[i + 1], widths[i]) for i in range(5)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_published_sizes():
    model = PointNetModel()
    assert count(model.encoder_modules()) == 437_312
    assert count(model.decoder_modules()) == 6_905_536
    assert model.prior_std == 0.2 and model.uses_batch_statistics


def test_published_checkpoint_loads():
    shapes = published_shapes()
    assert len(shapes) == 46
    checkpoint = {
        name: torch.randn(shape) if shape else torch.zeros((), dtype=torch.long)
        for name, shape in shapes.items()
    }
    PointNetModel().load_state_dict(published_state_dict(checkpoint))


def test_order_of_layers_and_of_outputs():
    torch.manual_seed(0)
    model = PointNetModel(points=5, latent_size=4).eval()
    x = torch.randn(2, 9, 3)
    features = x.transpose(1, 2)
    for layer in range(5):
        linear, norm = model.encoder.conv[3 * layer], model.encoder.conv[3 * layer + 2]
        features = norm(torch.relu(torch.nn.functional.conv1d(features, linear.weight[:, :, None])))
    hidden = torch.relu(model.encoder.fc[0](features.amax(2)))
    posterior = model.encode(x)
    torch.testing.assert_close(posterior.mean, model.encoder.mu_layer(hidden))
    torch.testing.assert_close(posterior.logvar, model.encoder.std_layer(hidden))
    z = torch.randn(2, 4)
    flat = model.decoder["model"](z)
    assert torch.equal(model.decode(z)[:, :, 1], flat[:, 5:10])
    *hidden, last = model.decoder["model"][::2]
    for linear in hidden:
        z = torch.relu(linear(z))
    torch.testing.assert_close(flat, last(z))


def test_order_of_points_does_not_matter():
    model = PointNetModel(points=8, latent_size=4).eval()
    x = torch.randn(2, 30, 3)
    torch.testing.assert_close(model.encode(x).mean, model.encode(x[:, torch.randperm(30)]).mean)


def test_no_clouds_have_no_posteriors():
    model = PointNetModel(points=8, latent_size=4).eval()
    assert model.encode(torch.zeros(0, 8, 3)).mean.shape == (0, 4)
    assert model.reconstruct(torch.zeros(0, 8, 3)).shape == (0, 8, 3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[2, 0, 3\], must be .* \[B, points, 3\]"):
        PointNetModel(latent_size=2).encode(torch.zeros(2, 0, 3))
    with pytest.raises(ValueError, match="prior_std = 0"):
        PointNetModel(prior_std=0)
    with pytest.raises(ValueError, match=r"\[2, 3, 2048\], must be .* \[B, points, 3\]"):
        PointNetModel(latent_size=2).encode(torch.zeros(2, 3, 2048))
