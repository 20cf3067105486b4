import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sivae_fast
from sivae_fast.checkpoint import CheckpointError
from sivae_fast.draws import Rows, Stream
from sivae_fast.evaluation.batchnorm import batch_norms
from sivae_fast.inference import Inference
from sivae_fast.trained import batch_norm_is_measured_anew, named_set, pick_device
from tests.commands.conftest import RESIDUAL, write_run


def load(path, **options):
    return Inference.load(path, device="cpu", show=False, **options)


def test_batches_do_not_change_what_is_encoded_or_drawn(runs):
    one, many = load(runs.residual, batch=3), load(runs.residual, batch=64)
    images = one.read([runs.grey], 10)
    assert images.shape == (10, 1, 16, 16) and images.dtype == torch.uint8
    one._encoder_is_ready = many._encoder_is_ready = True  # the same statistics for both
    torch.testing.assert_close(one.encode(images), many.encode(images))
    assert torch.equal(one.prior(10, 3), many.prior(10, 3))
    assert not torch.equal(one.prior(10, 3), one.prior(10, 4))


def test_the_three_uses_repeat_for_a_seed(runs):
    run = load(runs.style)
    images = run.read([runs.colour], 5)
    assert torch.equal(run.sample(5, 1), run.sample(5, 1))
    assert not torch.equal(run.sample(5, 1), run.sample(5, 2))
    assert torch.equal(run.reconstruct(images), run.decode(run.encode(images)))
    assert run.sample(5).shape == (5, 3, 16, 16)
    assert not run.encode(images).requires_grad  # a graph would keep every batch in memory


def test_a_growing_model_works_at_the_level_it_was_saved_at(runs):
    run = load(runs.growing)
    assert (run.resolution, run.model.lod) == (8, 1)
    assert run.sample(2).shape == (2, 3, 8, 8)
    assert run.reconstruct(run.read([runs.colour], 2)).shape == (2, 3, 8, 8)
    assert run.described["resolution"] == 8


def test_pixels_survive_the_way_into_the_model_and_back(runs):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for path, low in ((runs.style, -1.0), (runs.residual, 0.0)):
        run = load(path)
        x = run.to_input(pixels)
        assert (x.min().item(), x.max().item()) == (low, 1.0)
        assert torch.equal(run.to_pixels(x), pixels)


def test_batch_norm_modes_give_what_they_promise(runs):
    images = load(runs.residual).read([runs.grey], 20)
    running, own, again = (load(runs.residual, batch_norm=mode) for mode in ("running", "batch", None))
    assert again.described["batch_norm"] == "recalibrated" and "batch_norm" not in load(runs.style).described
    before = [layer.running_mean.clone() for layer in batch_norms(running.model)]
    found = [run.encode(images) for run in (running, own, again)]
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert (found[1] - found[2]).norm() < 0.2 * found[1].norm()  # many batches are close to one large one
    for run, same in ((running, True), (own, True), (again, False)):
        run.sample(4)
        after = [layer.running_mean for layer in batch_norms(run.model)]
        assert all(map(torch.equal, before, after)) is same


def test_half_precision_is_close(runs):
    whole, half = load(runs.style), load(runs.style, precision="bf16")
    images = whole.read([runs.colour], 4)
    z = whole.encode(images)
    assert (half.encode(images) - z).norm() < 0.05 * z.norm()
    assert half.described["precision"] == "bf16"
    grey = load(runs.residual, precision="bf16", batch_norm="running")
    assert grey.encode(grey.read([runs.grey], 2)).dtype == torch.float32


def test_files_are_read_in_any_mode_and_sizes_that_differ_are_an_error_or_resized(runs, tmp_path):
    run, grey = load(runs.style), load(runs.residual)
    wide = tmp_path / "wide.png"
    Image.fromarray(np.full((16, 32, 4), 200, np.uint8)).save(wide)
    with pytest.raises(ValueError, match=r"wide.png has 32x16 pixels, the model takes 16x16: give resize"):
        run.read([wide])
    assert run.read([wide], resize=True).shape == (1, 3, 16, 16)
    assert grey.read([wide], resize=True).shape == (1, 1, 16, 16)
    assert torch.equal(run.read([runs.grey], 1)[:, :1], grey.read([runs.grey], 1))
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(tmp_path / "dark.jpg")
    (tmp_path / "note.txt").touch()
    photographs = run.read([tmp_path], resize=True)
    assert torch.equal(photographs, run.read([tmp_path / "dark.jpg", wide], resize=True))
    assert torch.equal(run.read([tmp_path], 1, resize=True), photographs[:1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        run.read([tmp_path / "empty"], resize=True)
    with pytest.raises(ValueError, match=rf"000.png of {runs.colour} is in colour, the model takes grey"):
        grey.read([runs.colour], 1)


def test_what_cannot_be_read_is_named(runs, tmp_path):
    run = load(runs.style)
    (tmp_path / "torn.png").write_bytes(next(runs.colour.glob("*.png")).read_bytes()[:60])
    for name, reason in [("torn.png", "no readable picture"), ("missing.png", "does not exist")]:
        with pytest.raises(ValueError, match=f"{name} cannot be used: it.*{reason}"):
            run.read([tmp_path / name])
    with pytest.raises(ValueError, match="no pictures are given"):
        run.read([])
    with pytest.raises(CheckpointError, match="holds no checkpoint and no snapshot"):
        load(tmp_path)
    with pytest.raises(
        ValueError, match=r"model.kind is mlp: this takes style, residual, two_encoder and own models"
    ):
        load(runs.density)


def test_training_images_that_are_gone_are_asked_for(runs, tmp_path):
    gone = load(runs.residual, data=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"training images are needed.*give data=PATH"):
        gone.reconstruct(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
    assert gone.sample(2).shape == (2, 1, 16, 16)  # needs no images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision is 'fp16', must be one of fp32, bf16"),
        ({"batch": 0}, "batch is 0"),
        ({"batch_norm": "eval"}, "batch_norm is 'eval', must be one of running, batch, recalibrated"),
    ],
)
def test_bad_options_are_named(runs, options, message):
    with pytest.raises(ValueError, match=message):
        load(runs.residual, **options)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(runs, device):
    with pytest.raises(ValueError, match=f"device is '{device}', this machine has auto, cpu"):
        Inference.load(runs.style, device=device)


@pytest.mark.parametrize("guide", ["README.md", "docs/evaluation.md"])
def test_the_examples_of_the_guides_run(runs, tmp_path, monkeypatch, guide):
    text = (Path(__file__).parents[2] / guide).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (example,) = [block for block in blocks if "runs/00000-quickstart" in block]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "00000-quickstart").symlink_to(runs.style)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(example, guide, "exec"), scope)
    assert scope["images"].shape == scope["again"].shape
    assert scope["again"].dtype == (torch.float32 if guide == "README.md" else torch.uint8)


def test_a_decoder_is_calibrated_for_what_it_decodes(runs):
    """Reconstructions with the statistics of encoded images, samples with those of the prior."""
    run, own = load(runs.residual, batch=24), load(runs.residual, batch=24, batch_norm="batch")
    images = run.read([runs.grey], 24)
    sample, rec = run.sample(24, 1), run.reconstruct(images)
    assert torch.equal(run.sample(24, 1), sample) and torch.equal(run.reconstruct(images), rec)
    other = load(runs.residual, batch=24)
    assert torch.equal(other.reconstruct(images), rec) and torch.equal(other.sample(24, 1), sample)
    z = run.encode(images)
    assert torch.equal(run.decode(z, encoded=True), rec)
    as_samples, wanted = run.decode(z).int(), own.reconstruct(images).int()
    assert (rec.int() - wanted).abs().sum() < 0.2 * (as_samples - wanted).abs().sum()


def test_batches_of_one_recalibrate_too(runs, tmp_path):
    encoded = []
    for options in ({"batch": 1}, {"batch": 2}, {"batch": 1, "batch_norm": "running"}):
        run = load(runs.residual, **options)
        encoded.append(run.encode(run.read([runs.grey], 5)))
    torch.testing.assert_close(encoded[0], encoded[1])
    assert not torch.allclose(encoded[0], encoded[2])
    (tmp_path / "one").mkdir()
    shutil.copy(runs.grey / "000.png", tmp_path / "one")
    run = load(runs.residual, data=tmp_path / "one")
    for _ in range(2):  # also when asked again
        with pytest.raises(ValueError, match="batch_norm is 'recalibrated', which needs 2 items of tr"):
            run.encode(run.read([runs.grey], 1))


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws(runs):
    cpu, gpu = (Inference.load(runs.residual, device=device, show=False) for device in ("cpu", "cuda"))
    images = cpu.read([runs.grey], 10)
    torch.testing.assert_close(gpu.encode(images), cpu.encode(images), rtol=1e-2, atol=1e-2)
    apart = gpu.sample(10, 1).int() - cpu.sample(10, 1).int()
    assert apart.abs().max() <= 2


def test_three_lines_of_python_use_a_model(runs):
    model = sivae_fast.load(runs.style)
    samples = model.sample(4, seed=1)
    again = model.reconstruct(samples)
    assert samples.shape == again.shape == (4, 3, 16, 16)
    assert torch.equal(samples, model.sample(4, seed=1)) and not torch.equal(samples, model.sample(4, seed=2))
    assert torch.equal(again, model.reconstruct(samples))  # the decoder's noise repeats, too
    assert not model.training and model.encode(samples).mean.shape == (4, 8)


def test_what_does_not_fit_is_named_with_what_is_accepted(runs):
    run = Inference.load(runs.residual, device="cpu", show=False)
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    accepted = r"must be a uint8 tensor \[N, 1, 16, 16\]"
    for wrong in (
        images.numpy(),
        images.float(),
        images[0],
        images[:0],
        images[..., :8],
        images.expand(2, 3, 16, 16),
    ):
        for function in (run.encode, run.reconstruct):
            with pytest.raises(ValueError, match=f"images is .*{accepted}"):
                function(wrong)
    for wrong in (torch.zeros(2, 5), torch.zeros(4), torch.zeros(0, 4), [0.0], torch.zeros(2, 4).int()):
        with pytest.raises(ValueError, match=r"z is .*, must be a tensor of floats \[N, 4\]"):
            run.decode(wrong)
    for spoilt in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="z holds NaN or infinity, must be finite"):
            run.decode(torch.full((2, 4), spoilt))
    assert torch.equal(run.decode(torch.ones(2, 4).double()), run.decode(torch.ones(2, 4)))
    with pytest.raises(ValueError, match="count is 0, must be a whole number, at least 1"):
        run.sample(0)
    for call in (run.sample, load(runs.translation).own_images):
        with pytest.raises(ValueError, match=r"seed is 0\.5, must be a whole number"):
            call(2, seed=0.5)
    with pytest.raises(ValueError, match="this model is of kind residual, styles need style"):
        run.from_styles(torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match=r"styles is .*\[2, 5, 8\], must be .* \[N, 6, 8\]"):
        load(runs.style).from_styles(torch.zeros(2, 5, 8))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("style", (3, 16, 16)),
        ("residual", (1, 16, 16)),
        ("translation", (3, 16, 16)),
        ("clouds", (20, 3)),
        ("density", (2,)),
    ],
)
def test_a_loaded_model_names_what_it_accepts(runs, kind, shape):
    model = sivae_fast.load(getattr(runs, kind))
    x = torch.rand(2, *shape)
    size = "points, 3" if kind == "clouds" else ", ".join(map(str, shape))
    accepted = rf"must be a float32 tensor \[B, {size}\]"
    for wrong in (x.double(), x.numpy(), x[0], torch.rand(2, *shape[:-1], 9), x.tolist()):
        for function in (model.encode, model.reconstruct):
            with pytest.raises(ValueError, match=f"x.* is .*, {accepted}"):
                function(wrong)
    hint = ": Inference takes bytes" if len(shape) == 3 else ""
    with pytest.raises(ValueError, match=f"torch.uint8.*{accepted}{hint}$"):
        model.reconstruct((x * 255).byte())
    with pytest.raises(ValueError, match=rf"z is .*, must be a float32 tensor \[B, {model.latent_size}\]"):
        model.decode(torch.zeros(2, model.latent_size + 1))
    for count in (0, 2.5):
        with pytest.raises(ValueError, match=f"count is {count}, must be a whole number, at least 1"):
            model.sample(count)
    for seed in (1.5, "1", True, -1, 2**64):
        for call in (model.sample, model.reconstruct):
            start = 2 if call == model.sample else x
            with pytest.raises(
                ValueError, match=rf"seed is {seed!r}, must be a whole number from 0 to 2\^64"
            ):
                call(start, seed=seed)
    assert torch.equal(model.sample(2, seed=np.int64(7)), model.sample(2, seed=7))


def test_truncation_is_a_share_or_more(runs):
    run = load(runs.style)
    z = run.prior(2, 0)
    for wrong in (-0.1, float("nan"), float("inf")):
        for call in (run.sample, run.decode, run.from_styles):
            start = {run.sample: 2, run.decode: z, run.from_styles: run.styles(z)}[call]
            with pytest.raises(ValueError, match=f"truncation is {wrong}, must be 0 or more"):
                call(start, truncation=wrong)


def test_the_seed_is_that_of_the_decoders_noise_too(runs):
    run, images = load(runs.style), load(runs.style).read([runs.colour], 4)
    z = run.prior(4, 0)
    assert torch.equal(run.sample(4, 3), run.decode(run.prior(4, 3), 3))
    for call, start in ((run.decode, z), (run.from_styles, run.styles(z)), (run.reconstruct, images)):
        one, again, other = (call(start, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one, again) and not torch.equal(one, other)
    first, second = load(runs.style, batch=2).decode(z[:1].expand(4, -1)).split(2)
    assert not torch.equal(first, second)  # nor do batches repeat each other's


def test_styles_are_truncated_as_latents_are(runs):
    run = load(runs.style)
    z = run.prior(4, 0)
    for share in (0.0, 0.5):
        assert torch.equal(run.from_styles(run.styles(z), 1, share), run.decode(z, 1, share))
        assert torch.equal(run.sample(4, 1, share), run.decode(run.prior(4, 1), 1, share))
    assert run.decode(z, truncation=0.0, noise="none").unique(dim=0).shape[0] == 1


def test_a_growing_model_takes_images_of_its_size_and_of_whole_multiples(runs):
    run = load(runs.growing)
    images = run.read([runs.colour], 2)
    means = images.float().unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    torch.testing.assert_close(run.to_input(images), means / 127.5 - 1)
    assert run.encode(images[..., ::2, ::2]).shape == (2, 8)
    for side in (0, 4, 12):
        with pytest.raises(ValueError, match=rf"images is .*{side}, {side}\], must be a uint8 tensor"):
            run.encode(torch.zeros(2, 3, side, side, dtype=torch.uint8))


def test_photographs_are_turned_upright_and_keep_their_proportions(runs, tmp_path):
    """Shown, this one is 32 pixels wide and 16 high, red in the middle; a phone has stored it on its side."""
    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[8:24, :, 0] = 200
    pixels[:, :4, 1] = 100  # becomes the top edge
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photograph.png", exif=exif)
    (found,) = load(runs.style).read([tmp_path / "photograph.png"], resize=True)
    assert (found[0] == 200).all() and (found[1, :4] == 100).all() and not found[1, 4:].any()


def test_pixels_are_rounded_down_where_that_is_asked_for(runs):
    run = load(runs.style)
    z = run.prior(4, 0)
    near, below = (torch.cat([*run.decoded(z, round_down=down)]).int() for down in (False, True))
    assert set((near - below).unique().tolist()) == {0, 1}


def test_a_zip_is_read_as_the_folder_in_it(runs, tmp_path):
    packed = shutil.make_archive(str(tmp_path / "set"), "zip", runs.colour)
    run = load(runs.style)
    assert torch.equal(run.read([packed], 3), run.read([runs.colour], 3))
    assert len(run.read([packed])) == len(run.read([packed], 99)) == 24
    nameless = Path(packed).rename(tmp_path / "a set without an ending")
    assert torch.equal(run.read([nameless], 3), run.read([runs.colour], 3))


def test_large_pictures_are_averaged_not_sampled(runs, tmp_path):
    stripes = np.tile(np.uint8([[[0], [200]]]), (32, 16, 3))
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    found = load(runs.style).read([tmp_path / "stripes.png"], resize=True).int()
    assert (found - 100).abs().max() < 20


def test_batch_norm_is_measured_with_the_training_images_in_batches(runs):
    """24 images; of a last batch of one nothing is learned about their variance."""
    sizes = lambda batch: [len(x) for x in load(runs.residual, batch=batch).calibration_batches()]
    assert sizes(5) == [5, 5, 5, 5, 4] and sizes(23) == [23] and sizes(1) == 12 * [2] and sizes(64) == [24]
    drawn = load(runs.residual, batch=7)._latents(encoded=False)
    assert [len(z) for z in drawn] == 32 * [7]  # the decoder's, for samples


def test_a_picture_of_absurd_size_is_named(runs, monkeypatch):
    run = load(runs.style)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"000\.png cannot be used: it is no readable picture \(Image size"):
        run.read([runs.colour / "000.png"])


def test_what_is_said_beside_every_number(runs):
    said = lambda mode: load(runs.residual, batch=7, batch_norm=mode).described
    common = {"images": 1000, "weights": "averaged", "precision": "fp32", "resolution": 16}
    assert load(runs.style, batch=7).described == common
    assert said("running") == {**common, "batch_norm": "running"}  # of any batch
    for mode in ("batch", "recalibrated"):
        assert said(mode) == {**common, "batch_norm": mode, "batch": 7}


def test_a_prepared_model_reconstructs_by_itself_what_its_owner_does(runs):
    run, images = load(runs.residual), load(runs.residual).read([runs.grey], 8)
    wanted = load(runs.residual).reconstruct(images)
    run.sample(2)  # leaves the decoder with the statistics of the prior
    run.prepare()
    with torch.no_grad():
        found = run.model.decode(run.model.encode(run.to_input(images)).mean)
    assert torch.equal(run.to_pixels(found), wanted)


def test_a_model_in_training_is_used_as_a_trained_one(runs):
    model = sivae_fast.load(runs.style).train()
    assert not Inference(model, model.config, 0, show=False).model.training


def test_what_commands_take_for_a_model_a_device_and_a_set(runs, tmp_path, monkeypatch):
    measured_anew = lambda path: batch_norm_is_measured_anew(sivae_fast.load(path))
    assert measured_anew(runs.residual) and not measured_anew(runs.style) and not measured_anew(runs.clouds)
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.chdir(tmp_path)
    assert named_set(None) == {} and named_set(".") == {"data": tmp_path.name}


def test_a_set_with_factors_gives_the_training_images_of_its_models(runs, tmp_path):
    model = {**RESIDUAL, "channels": 3}
    run = load(write_run(tmp_path / "run", {"kind": "factors"}, model), batch_norm="recalibrated")
    factors = run.factors()
    images = factors.images[~factors.test][:5].permute(0, 3, 1, 2)
    assert torch.equal(run.training_images(5), images)
    assert run.reconstruct(run.own_images(2)).shape == (2, 3, 16, 16)  # measures batch norm with them


def test_a_model_samples_its_own_prior_in_its_own_precision_with_noise_of_the_seed(runs):
    model = sivae_fast.load(runs.clouds)
    model.decode = lambda z, stream: z
    assert model.sample(500).std().item() == pytest.approx(0.2, rel=0.1)
    assert model.double().sample(2).dtype == torch.float64
    model.decode = lambda z, stream: stream.normal(len(z), 3)
    for found in (model.sample(2, seed=5), model.reconstruct(torch.rand(2, 20, 3).double(), seed=5)):
        assert torch.equal(found, Stream(5, Rows.all(2)).normal(2, 3))


def test_under_autocast_lower_precision_passes_and_what_is_no_float_or_empty_does_not(runs):
    model, x = sivae_fast.load(runs.clouds), torch.rand(2, 20, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(x.bfloat16()).mean.shape == (2, 4)
        for wrong in (x.int(), x.double(), x[:, :0]):
            with pytest.raises(ValueError, match=r"x is .*, must be a float32 tensor \[B, points, 3\]"):
                model.encode(wrong)


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_are_asked_for_is_an_error(runs, count):
    for run in (load(runs.residual), load(runs.translation)):
        with pytest.raises(ValueError, match=f"count is {count}, must be a whole number, at least 1"):
            run.own_images(count)
    with pytest.raises(ValueError, match=f"count is {count}, must be"):
        load(runs.style).read([runs.colour], count)
