"""Pictures and image sets that the data tests share."""

import io
import zipfile

import numpy as np
from PIL import Image


def picture(index: int, width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
    """A smooth random picture, different for every index."""
    coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_zip(path, files: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_folder(path, files: dict[str, bytes]):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def stylegan_names(count: int, suffix: str = ".png") -> list[str]:
    return [f"{i // 10:05d}/img{i:08d}{suffix}" for i in range(count)]


def png_zip(path, count: int = 21, size: int = 16):
    """A StyleGAN zip of colour PNG files."""
    return write_zip(path, {n: encoded(picture(i, size, size)) for i, n in enumerate(stylegan_names(count))})


def everything(path):
    """Name to bytes of a finished set, folder or zip."""
    if path.is_dir():
        return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}
