import errno

import pytest
import torch
from PIL import Image

from sivae_fast.cli import main
from sivae_fast.commands import clouds, pictures
from sivae_fast.commands.pictures import _layers, _round_trip, between, interpolate, mix, reconstruct, sample
from sivae_fast.inference import Inference
from sivae_fast.inference_clouds import CloudInference


@pytest.fixture(scope="module")
def style(runs):
    return Inference.load(runs.style, device="cpu", show=False)


@pytest.fixture(scope="module")
def residual(runs):
    return Inference.load(runs.residual, device="cpu", show=False)


def size(columns, rows, cell=64, gap=2):
    return (columns * (cell + gap) + gap, rows * (cell + gap) + gap)


def test_samples_as_a_grid_and_as_single_files(style, tmp_path):
    assert Image.open(sample(style, tmp_path / "deep" / "s.png", count=10)).size == size(4, 3)
    folder = sample(style, tmp_path / "single", count=3)
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(folder / "000000.png").size == (16, 16)


def test_a_disk_that_becomes_full_leaves_no_samples(style, tmp_path, monkeypatch):
    def full(path, image):
        path.touch()
        if path.name == "000002.png":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "save_image", full)
    with pytest.raises(OSError, match=f"while writing {tmp_path / 'single'}; nothing was written"):
        sample(style, tmp_path / "single", count=3)
    assert not list(tmp_path.iterdir())


def test_truncation_pulls_styles_together_and_needs_them(style, residual, tmp_path):
    close, far = (style.sample(8, truncation=t).float().std(0).mean() for t in (0.0, 1.0))
    assert close < far
    with pytest.raises(ValueError, match=r"truncation=0\.5: this model is of kind residual"):
        sample(residual, tmp_path / "s.png", truncation=0.5)


def test_reconstructions_lie_under_their_images_and_are_measured(residual, style, runs, tmp_path):
    found = reconstruct(residual, tmp_path / "r.png", [runs.grey], count=10, columns=4)
    assert Image.open(tmp_path / "r.png").size == size(4, 6)
    images = residual.read([runs.grey], 10)
    x, y = images.float() / 255, residual.reconstruct(images).float() / 255
    assert found["mse"] == pytest.approx((x - y).square().mean().item(), rel=1e-5)
    assert set(found) == {"mse", "psnr", "ssim"}
    assert reconstruct(style, tmp_path / "t.png", count=2).keys() == {"mse", "psnr", "ssim"}


def test_interpolation_begins_and_ends_at_the_pictures(residual, runs, tmp_path):
    files = sorted(runs.grey.glob("*.png"))
    interpolate(residual, tmp_path / "i.png", files[:2], steps=3)
    assert Image.open(tmp_path / "i.png").size == size(3, 1)
    ends = residual.encode(residual.read(files[:4]))
    line = between(ends[:2], 5)
    assert torch.equal(line[0], ends[0]) and torch.equal(line[-1], ends[1])
    square = between(ends, 3).view(3, 3, -1)
    corners = square[0, 0], square[0, 2], square[2, 0], square[2, 2]
    torch.testing.assert_close(torch.stack(corners), ends)
    torch.testing.assert_close(square[1, 1], ends.mean(0))


def test_an_animation_visits_every_picture_and_returns(residual, style, runs, tmp_path):
    files = sorted(runs.grey.glob("*.png"))[:3]
    path = interpolate(residual, tmp_path / "i.gif", files, steps=4)
    assert Image.open(path).n_frames == 12
    ends = torch.randn(3, 5)
    torch.testing.assert_close(_round_trip(ends, 4)[::4], ends)
    assert Image.open(interpolate(style, tmp_path / "w.gif", space="w", steps=2)).n_frames == 10
    whole = interpolate(residual, tmp_path / "f.gif", [runs.grey], steps=2)
    assert Image.open(whole).n_frames == 2 * len(list(runs.grey.glob("*.png"))) > 8


def test_interpolation_in_w_is_linear_in_styles(style, runs, tmp_path):
    z = style.encode(style.read([runs.colour], 2))
    middle = between(style.styles(z), 3)[1]
    torch.testing.assert_close(middle, style.styles(z).mean(0))
    interpolate(style, tmp_path / "w.png", sorted(runs.colour.glob("*.png"))[:2], space="w")
    interpolate(style, tmp_path / "z.png", sorted(runs.colour.glob("*.png"))[:2], space="z")
    assert (tmp_path / "w.png").read_bytes() != (tmp_path / "z.png").read_bytes()


def test_mixing_everything_gives_the_source_and_nothing_the_destination(style, runs, tmp_path):
    path = mix(style, tmp_path / "m.png", count=3, layers="0-5")
    picture = Image.open(path)
    assert picture.size == size(4, 4)

    def cell(column, row):
        return picture.crop((2 + 66 * column, 2 + 66 * row, 66 + 66 * column, 66 + 66 * row)).tobytes()

    # All layers from the source: every row shows the first row again (noise is drawn by position).
    assert [cell(c, 2) for c in (1, 2, 3)] == [cell(c, 3) for c in (1, 2, 3)]
    assert cell(1, 1) != cell(2, 1)
    mix(style, tmp_path / "n.png", layers="fine" if style.model.lod > 3 else "middle", sources=[runs.colour])


def test_each_destination_can_have_layers_of_its_own(style, runs, tmp_path):
    picture = Image.open(mix(style, tmp_path / "m.png", count=2, layers=["0-5", "coarse"]))
    rows = [picture.crop((68, 2 + 66 * row, 200, 66 + 66 * row)).tobytes() for row in range(3)]
    for row, layers in ((1, "0-5"), (2, "coarse")):
        alone = Image.open(mix(style, tmp_path / "n.png", count=2, layers=layers))
        assert alone.crop((68, 2 + 66 * row, 200, 66 + 66 * row)).tobytes() == rows[row]
    with pytest.raises(
        ValueError, match="layers are coarse, middle, coarse: one is needed for all, or one for"
    ):
        mix(style, tmp_path / "l.png", count=2, layers=["coarse", "middle", "coarse"])
    command = ["mix", str(runs.style), "--device", "cpu", "--count", "2", "--out", str(tmp_path / "c.png")]
    assert main([*command, "--layers", "0-5", "coarse"]) == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "m.png").read_bytes()


def test_layers_by_name_and_range():
    assert _layers("coarse", 14) == (0, 4)
    assert _layers("fine", 14) == (8, 14)
    assert _layers("middle", 6) == (4, 6)
    assert _layers("2-5", 14) == (2, 6)
    assert _layers("2-13", 14) == (2, 14)
    for text in ("fine", "6-7", "2-6", "2-99", "5-2"):
        with pytest.raises(ValueError, match="this model has layers 0 to 5"):
            _layers(text, 6)
    with pytest.raises(ValueError, match=r"must be one of coarse, middle, fine or a range such as 2-5"):
        _layers("all", 6)


def test_noise_and_style_mixing_are_those_of_the_model(style, runs, tmp_path):
    with torch.no_grad():
        bump = style.model.decode(style.prior(4, 0), noise="bump")
    assert torch.equal(style.sample(4, noise="bump"), style.to_pixels(bump))
    seen = {style.sample(4, noise=noise).numpy().tobytes() for noise in ("sample", "batch", "bump", "none")}
    assert len(seen) == 4
    plain = lambda seed, **style_: style.sample(4, seed, noise="none", **style_)
    mixed = next(seed for seed in range(9) if not torch.equal(plain(seed), plain(seed, mixing=True)))
    assert torch.equal(plain(mixed, mixing=True), plain(mixed, mixing=True))
    out = tmp_path / "r.png"
    errors = [reconstruct(style, out, [runs.colour], noise=noise) for noise in ("none", "bump")]
    assert errors[0] != errors[1]
    common = ["sample", str(runs.style), "--device", "cpu", "--count", "4", "--seed", str(mixed)]
    for number, flags in enumerate([[], ["--noise", "none"], ["--noise", "none", "--mixing"]]):
        assert main([*common, "--out", str(tmp_path / f"{number}.png"), *flags]) == 0
    assert len({(tmp_path / f"{number}.png").read_bytes() for number in range(3)}) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, out, one: sample(run, out / "s.png", noise="none"), "noise=none: this model is of kind"),
        (lambda run, out, one: sample(run, out / "s.png", mixing=True), "mixing=True: this model is of kind"),
        (lambda run, out, one: reconstruct(run, out / "r.png", [one], noise="batch"), "noise=batch: this"),
        (lambda run, out, one: interpolate(run, out / "i.png", [one]), "between 2 or 4 pictures, got 1"),
        (lambda run, out, one: interpolate(run, out / "i.gif", [one]), "give 2 or more, got 1"),
        (lambda run, out, one: interpolate(run, out / "i.jpg"), r"ending in \.png, \.gif or \.mp4"),
        (lambda run, out, one: interpolate(run, out / "i.gif", milliseconds=0), "milliseconds is 0"),
        (lambda run, out, one: interpolate(run, out / "i.gif", milliseconds=9), "is 9, must be 10 to 655350"),
        (lambda run, out, one: interpolate(run, out / "i.gif", milliseconds=10**6), "is 1000000, must be 10"),
        (lambda run, out, one: interpolate(run, out / "i.mp4", milliseconds=10**6), "is 1000000, must be 1 "),
        (lambda run, out, one: sample(run, out / "s.png", truncation=float("nan")), "truncation is nan"),
        (lambda run, out, one: sample(run, out / "s.png", columns=0), "columns is 0"),
        (lambda run, out, one: interpolate(run, out / "i.png", steps=1), "steps is 1"),
        (lambda run, out, one: interpolate(run, out / "i.png", space="x"), "space is 'x'"),
        (lambda run, out, one: interpolate(run, out / "i.png", space="w"), "styles need style"),
        (lambda run, out, one: mix(run, out / "m.png"), "is residual: this takes style models"),
        (lambda run, out, one: sample(run, out / "s.npy"), r"s\.npy: .* ending in \.png or a folder"),
        (lambda run, out, one: sample(run, out / "s.jpg"), r"s\.jpg: .* ending in \.png or a folder"),
        (lambda run, out, one: sample(run, "/dev/full"), r"/dev/full: .* folder without an ending is needed"),
        (lambda run, out, one: sample(run, out / "s.png", count=0), "count is 0"),
        (lambda run, out, one: reconstruct(run, out / "folder"), r"ending in \.png"),
    ],
)  # fmt: skip
def test_bad_input_is_named(residual, runs, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(residual, tmp_path, next(runs.grey.glob("*.png")))


def test_a_folder_with_other_files_is_refused(runs, tmp_path):
    run, out = Inference.load(runs.residual, device="cpu", show=False), tmp_path / "set"
    pictures.sample(run, out, count=3)
    pictures.sample(run, out, count=3, seed=1)  # replaces exactly its own
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        ValueError, match=r"set holds 1 files that are not of these 2, such as 000002.png: give"
    ):
        pictures.sample(run, out, count=2)
    cloud_run = CloudInference.load(runs.clouds, device="cpu", show=False)
    for write in (clouds.sample, clouds.reconstruct):
        with pytest.raises(
            ValueError, match=r"set holds 3 files that are not of these 2, such as 000000.png"
        ):
            write(cloud_run, out, count=2)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
