import torch

from sivae_fast.evaluation.batchnorm import (
    batch_norms,
    batch_statistics,
    prior_batches,
    recalibrate_decoder,
    recalibrate_encoder,
)
from sivae_fast.models.residual import ResidualModel

SMALL = {"resolution": 8, "channels": 1, "widths": (8, 16), "latent_size": 4}


def make(**options):
    torch.manual_seed(0)
    return ResidualModel(**SMALL, **options).eval()


def test_recalibrated_statistics_are_the_mean_over_the_batches():
    model = make()
    first = model.encoder.main[1]
    images = torch.rand(3, 16, 1, 8, 8)
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    assert recalibrate_encoder(model, iter(images)) == 3
    inputs = [model.encoder.main[0](batch) for batch in images]
    mean = torch.stack([value.mean(dim=(0, 2, 3)) for value in inputs]).mean(0)
    variance = torch.stack([value.var(dim=(0, 2, 3)) for value in inputs]).mean(0)
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, variance)
    assert first.momentum == 0.1 and not first.training
    assert all(torch.equal(before[name], value) for name, value in model.decoder.state_dict().items())


def test_eval_mode_after_recalibration_is_close_to_batch_statistics():
    model = make()
    z = torch.randn(512, 4)
    with torch.no_grad():
        with batch_statistics(model):
            wanted = model.decode(z)
        assert (model.decode(z) - wanted).norm() > 0.3 * wanted.norm()  # fresh statistics: mean 0, variance 1
        recalibrate_decoder(model, prior_batches(model, 8, 256))
        assert (model.decode(z) - wanted).norm() < 0.1 * wanted.norm()


def test_batch_statistics_leaves_the_model_as_it_was():
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(16, 1, 8, 8)
    alone = model.encode(x).mean
    with batch_statistics(model):
        inside = model.encode(x).mean
    assert not torch.allclose(alone, inside)
    assert torch.equal(model.encode(x).mean, alone)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_no_batches_and_no_batch_norm_change_nothing():
    model = make()
    recalibrate_decoder(model, prior_batches(model, 4, 32))
    before = [layer.running_mean.clone() for layer in batch_norms(model)]
    assert recalibrate_decoder(model, iter(())) == 0
    assert all(torch.equal(a, b.running_mean) for a, b in zip(before, batch_norms(model), strict=True))
    assert recalibrate_decoder(make(norm="group"), prior_batches(model, 4, 32)) == 0


def test_prior_batches_repeat_for_a_seed():
    model = make()
    first, again, other = (torch.cat(list(prior_batches(model, 2, 8, seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (16, 4)
