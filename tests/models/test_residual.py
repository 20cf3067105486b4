import pytest
import torch
from published_fill import filled, sequence

from sivae_fast.draws import Draws, Joined, Rows
from sivae_fast.models.residual import SIZES, ResidualModel, augmented, published_state_dict

# dataset: encoder parameters, decoder parameters, tensors in the state dict (published models)
PUBLISHED = {
    "cifar10": (3_382_848, 2_382_531, 100),
    "svhn": (3_382_848, 2_382_531, 100),
    "mnist": (928_512, 697_025, 74),
    "fmnist": (928_512, 697_025, 74),
    "monsters128": (16_364_096, 13_073_091, 150),
    "celeb128": (18_461_504, 14_121_667, 150),
    "celeb256": (23_182_144, 18_842_307, 174),
    "celeb1024": (23_250_512, 18_806_707, 226),
}
# dataset: {block: (in, out)} of the encoder and of the decoder, shapes of the two linear layers
BLOCKS = {
    "cifar10": (
        {16: (64, 128), 8: (128, 256), 4: (256, 256)},
        {4: (256, 256), 8: (256, 128), 16: (128, 64), 32: (64, 64)},
        ((256, 4096), (4096, 128)),
    ),
    "mnist": (
        {14: (64, 128), 7: (128, 128)},
        {4: (128, 128), 8: (128, 64), 16: (64, 64)},
        ((64, 6272), (6272, 32)),
    ),
    "monsters128": (
        {64: (64, 128), 32: (128, 256), 16: (256, 512), 8: (512, 512), 4: (512, 512)},
        {4: (512, 512), 8: (512, 512), 16: (512, 256), 32: (256, 128), 64: (128, 64), 128: (64, 64)},
        ((256, 8192), (8192, 128)),
    ),
    "celeb256": (
        {128: (64, 128), 64: (128, 256), 32: (256, 512), 16: (512, 512), 8: (512, 512), 4: (512, 512)},
        {4: (512,) * 2, 8: (512,) * 2, 16: (512,) * 2, 32: (512, 256), 64: (256, 128),
         128: (128, 64), 256: (64, 64)},
        ((512, 8192), (8192, 256)),
    ),
}  # fmt: skip


def on_meta(name, **options):
    with torch.device("meta"):
        return ResidualModel(**SIZES[name], **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_tensors_as_published(name):
    model = on_meta(name)
    encoder, decoder, tensors = PUBLISHED[name]
    assert (count(model.encoder), count(model.decoder), len(model.state_dict())) == (
        encoder,
        decoder,
        tensors,
    )


@pytest.mark.parametrize(("name", "tensors"), [("cifar10", 154), ("monsters128", 229), ("celeb256", 265)])
def test_bootstrap_has_a_second_decoder_that_nothing_trains(name, tensors):
    model = on_meta(name, lagged_decoder=True)
    assert len(model.state_dict()) == tensors
    trained = sum(
        count(module) for side in (model.encoder_modules(), model.decoder_modules()) for module in side
    )
    assert (
        trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(PUBLISHED[name][:2])
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_names_and_shapes_of_the_state_dict(name):
    encoder, decoder, (encoder_fc, decoder_fc) = BLOCKS[name]
    size = SIZES[name]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    first = size["widths"][0]
    expected = {
        "encoder.main.0.weight": (first, size["channels"], 5, 5),
        "encoder.fc.weight": encoder_fc,
        "encoder.fc.bias": encoder_fc[:1],
        "decoder.fc.0.weight": decoder_fc,
        "decoder.fc.0.bias": decoder_fc[:1],
        "decoder.main.predict.weight": (size["channels"], first, 5, 5),
        "decoder.main.predict.bias": (size["channels"],),
    }
    norms = {"encoder.main.1": first}
    for side, blocks in (("encoder", encoder), ("decoder", decoder)):
        for number, (inputs, outputs) in blocks.items():
            block = f"{side}.main.res_in_{number}"
            expected[f"{block}.conv1.weight"] = (outputs, inputs, 3, 3)
            expected[f"{block}.conv2.weight"] = (outputs, outputs, 3, 3)
            norms |= {f"{block}.bn1": outputs, f"{block}.bn2": outputs}
            if inputs != outputs:
                expected[f"{block}.conv_expand.weight"] = (outputs, inputs, 1, 1)
    for name_, width in norms.items():
        expected |= {f"{name_}.{key}": () if key == norm[-1] else (width,) for key in norm}
    assert {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()} == expected


def fill(model):
    model.load_state_dict(filled(model.state_dict()))
    return model


# Computed once in float64 by the published implementation.
GOLDEN = {
    "eval": (
        [-0.0015612739326, -0.121576866213, -0.253519154913, -0.156327732855],
        0.529429233859,
        (-53.7078656494, 178.895530156, -0.153603857043),
    ),
    "train": (
        [0.0121287869326, 0.71715529139, -0.682336264267, -0.420405285358],
        0.134960418378,
        (-92.0767039604, 879.275879427, -0.58660068769),
    ),
}
SMALL = {"resolution": 16, "channels": 3, "widths": (8, 16), "latent_size": 4}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", GOLDEN)
def test_golden_values(mode, layout):
    model = fill(ResidualModel(**SMALL).double()).train(mode == "train").to(memory_format=layout)
    mean, logvar, (total, squares, pixel) = GOLDEN[mode]
    x = (0.5 + 0.5 * sequence(1, 2, 3, 16, 16)).contiguous(memory_format=layout)
    posterior = model.encode(x)
    image = model.decode(sequence(2, 2, 4))
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(
        posterior.mean[0], torch.tensor(mean, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )
    for value, golden in [
        (posterior.logvar[1, 0], logvar),
        (image.sum(), total),
        (image.square().sum(), squares),
        (image[1, 2, 5, 7], pixel),
    ]:
        torch.testing.assert_close(value.item(), golden, **close)


def test_published_weights_load_by_name():
    source, model = ResidualModel(**SMALL), ResidualModel(**SMALL)
    model.load_state_dict(published_state_dict({"epoch": 3, "model": source.state_dict()}))
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.eval().encode(x).mean, source.eval().encode(x).mean)


def test_group_norm_rows_do_not_see_each_other_and_batch_norm_rows_do():
    x, z = torch.rand(4, 3, 16, 16), torch.randn(4, 4)
    for norm, alone in (("group", True), ("batch", False)):
        model = ResidualModel(**SMALL, norm=norm)
        assert model.uses_batch_statistics is not alone
        together = model.encode(x).mean[:2], model.decode(z)[:2]
        apart = model.encode(x[:2]).mean, model.decode(z[:2])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, apart, strict=True)) is alone


def test_condition_reaches_both_nets_and_must_fit():
    model = ResidualModel(**SMALL, condition_size=3).eval()
    assert model.encoder.fc.in_features == 16 * 4 * 4 + 3
    x, z, zero, one = torch.rand(2, 3, 16, 16), torch.randn(2, 4), torch.zeros(2, 3), torch.ones(2, 3)
    assert not torch.allclose(model.encode(x, condition=zero).mean, model.encode(x, condition=one).mean)
    assert not torch.allclose(model.decode(z, condition=zero), model.decode(z, condition=one))
    with pytest.raises(ValueError, match="condition has 0 numbers a row, this model takes 3"):
        model.encode(x)
    with pytest.raises(ValueError, match="condition has 3 numbers a row, this model takes 0"):
        ResidualModel(**SMALL).decode(z, condition=one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer"}, "norm is 'layer', must be one of batch, group"),
        ({"resolution": 18}, "resolution is 18, must be a multiple of 4"),
        ({"resolution": 2}, "resolution is 2, must be a multiple of 4"),
        ({"widths": ()}, "widths is"),
        ({"latent_size": 0}, "latent_size is 0"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ResidualModel(**{**SMALL, **change})


def test_bootstrap_reconstructs_fakes_by_a_copy_that_lags():
    model = ResidualModel(**SMALL, lagged_decoder=True)
    z = torch.randn(3, 4)
    assert model.lagged_decoder
    assert torch.equal(model.decode(z), model.decode_fake(z))
    model.decode(z).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.target_decoder.parameters())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.1)
    lagged = model.decode_fake(z)
    assert not torch.allclose(model.decode(z), lagged)
    model.end_of_epoch(1)
    assert torch.equal(model.eval().decode(z), model.decode_fake(z))


def test_the_copy_is_taken_every_so_many_epochs():
    model = ResidualModel(**SMALL, lagged_decoder=True, lag_epochs=2)
    for epoch, same in ((1, True), (2, False), (3, True)):
        with torch.no_grad():
            model.decoder.fc[0].bias.add_(1)
        model.end_of_epoch(epoch)
        assert torch.equal(model.decoder.fc[0].bias, model.target_decoder.fc[0].bias) is same


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_runs_under_bfloat16_autocast_and_channels_last(norm):
    torch.manual_seed(0)
    model = ResidualModel(**SMALL, norm=norm).to(memory_format=torch.channels_last)
    x = torch.rand(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    plain = model.decode(model.encode(x).mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.decode(model.encode(x).mean)
    assert half.dtype == torch.bfloat16
    assert (half - plain).norm() < 0.1 * plain.norm()
    half.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles_in_one_graph():
    model = ResidualModel(**SMALL, augment=True)

    def there_and_back(x):
        return model.decode(model.encode(x).mean)

    x = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert compiled(x).shape == x.shape
    model.eval()
    torch.testing.assert_close(compiled(x), there_and_back(x))


def draws(rows):
    return Draws(0, 0, rows)


def test_augmentation_is_a_function_of_the_stream_row_by_row():
    x = torch.rand(6, 3, 16, 16)
    whole = augmented(x, draws(Rows.all(6)).stream("a"))
    parts = [augmented(x[i : i + 3], draws(Rows(i, i + 3, 6)).stream("a")) for i in (0, 3)]
    assert torch.equal(whole, torch.cat(parts))
    two = [draws(Rows.all(6)).stream(name) for name in "ab"]
    joined = augmented(torch.cat([x, x]), Joined(*two))
    assert torch.equal(joined[:6], whole)


def test_augmentation_moves_and_cuts_by_at_most_what_is_stated():
    x = torch.ones(2000, 1, 16, 16)
    out = augmented(x, draws(Rows.all(2000)).stream("a"))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    untouched = (out == 1).all(dim=(1, 2, 3)).float().mean()
    assert 0.23 < untouched < 0.42  # a quarter, and moves and cutouts that round to nothing
    removed = 256 - out.sum(dim=(1, 2, 3))
    assert removed.max() <= 64 + 256 - 14 * 14


def test_augmentation_moves_every_way_and_cuts_squares_anywhere():
    x = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(600, 1, 16, 16)  # a pixel knows its place
    moves, cuts = set(), []
    for row in augmented(x, draws(Rows.all(600)).stream("a")).squeeze(1):
        i, j = row.nonzero(as_tuple=True)
        places = row[i, j].long() - 1
        ((down, right),) = torch.stack([i - places // 16, j - places % 16]).unique(dim=1).T.tolist()
        moves.add((down, right))
        left = row[max(0, down) : 16 + min(0, down), max(0, right) : 16 + min(0, right)] == 0
        if left.any():
            low, high = left.nonzero().aminmax(dim=0)
            sides = high - low + 1
            assert left.sum() == sides.prod()
            inside = (low > 0).all() and (high < torch.tensor(left.shape) - 1).all()
            assert not inside or abs(sides[0] - sides[1]) <= 1
            cuts.append((low + high) / 2)
    assert moves == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert 200 < len(cuts) < 330 and abs(torch.stack(cuts, 1).corrcoef()[0, 1]) < 0.4


def test_augmentation_carries_gradients_and_is_off_in_eval_mode():
    x = torch.rand(16, 3, 16, 16, requires_grad=True)
    out = augmented(x, draws(Rows.all(16)).stream("a"))
    out.sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    assert x.grad.sum() == sum((row != 0).sum() for row in out)
    model = ResidualModel(**SMALL, norm="group", augment=True)
    plain = ResidualModel(**SMALL, norm="group")
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.encode(x).mean, plain.encode(x).mean)
    assert torch.equal(model.eval().encode(x).mean, plain.encode(x).mean)
