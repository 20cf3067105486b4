import sys

import pytest
import torch
from PIL import Image

from sivae_fast.figures import GAP, grid, save_animation, save_grid, to_uint8


def test_floats_are_rounded_clipped_and_not_a_number_is_black():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, float("nan"), float("inf")])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 0, 255]
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0]), (0.0, 1.0)).tolist() == [0, 128, 255]
    assert to_uint8(values, round_down=True).tolist() == [0, 0, 127, 255, 255, 0, 255]
    with pytest.raises(TypeError, match="uint8 or floating point"):
        to_uint8(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must rise"):
        to_uint8(torch.ones(2), (1.0, 1.0))


def test_every_byte_survives_the_way_to_floats_and_back():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(bytes_.float() / 127.5 - 1), bytes_)
    assert torch.equal(to_uint8(bytes_.float() / 255, (0.0, 1.0)), bytes_)


def test_rows_of_different_sizes_colours_and_lengths_share_one_grid(tmp_path):
    real = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    tiny = torch.full((2, 1, 4, 4), -1.0)
    save_grid(tmp_path / "g.png", [real, tiny], smallest=64)
    picture = Image.open(tmp_path / "g.png")
    assert picture.size == (3 * 64 + 4 * GAP, 2 * 64 + 3 * GAP)
    assert picture.mode == "RGB"
    x, y = GAP + 64 + GAP + 8 * 5 + 3, GAP + 8 * 2 + 7  # inside pixel (2, 5) of the second image
    assert picture.getpixel((x, y)) == tuple(real[1, :, 2, 5].tolist())
    assert picture.getpixel((GAP, GAP + 64 + GAP)) == (0, 0, 0)  # second row, dark
    assert picture.getpixel((picture.width - GAP - 1, picture.height - GAP - 1)) == (
        255,
        255,
        255,
    )  # no third


def test_large_images_keep_their_size():
    assert grid([torch.zeros(1, 3, 100, 80)], smallest=64).shape == (3, 100 + 2 * GAP, 80 + 2 * GAP)


@pytest.mark.parametrize(
    "rows", [[], [torch.zeros(0, 3, 4, 4)], [torch.zeros(2, 2, 4, 4)], [torch.zeros(3, 4, 4)]]
)
def test_what_is_no_row_of_images_is_refused(rows):
    with pytest.raises(ValueError, match="row of images"):
        grid(rows)


def test_animation_has_every_frame(tmp_path):
    frames = [torch.full((3, 16, 16), value) for value in (-1.0, 0.0, 1.0)]
    save_animation(tmp_path / "a.gif", frames)
    animation = Image.open(tmp_path / "a.gif")
    assert (animation.n_frames, animation.size) == (3, (16, 16))
    with pytest.raises(ValueError, match="at least one frame"):
        save_animation(tmp_path / "b.gif", [])


def test_a_film_holds_every_frame_and_is_enlarged(tmp_path):
    av = pytest.importorskip("av")
    frames = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 15, 15)
    save_animation(tmp_path / "a.mp4", frames, milliseconds=50)
    with av.open(str(tmp_path / "a.mp4")) as film:
        found = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 20
    assert [frame.shape for frame in found] == [(74, 74, 3)] * 5  # 15 times 5, made even
    assert [frame.mean() for frame in found] == pytest.approx([0, 64, 128, 191, 255], abs=4)


def test_a_film_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"sivae-fast\[video\]"):
        save_animation(tmp_path / "a.mp4", torch.zeros(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())
