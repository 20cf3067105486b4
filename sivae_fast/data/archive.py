"""Image sets as they lie on disk: a folder or a StyleGAN zip of PNG or JPEG files, labels in dataset.json."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import struct
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MANIFEST = "manifest.json"
FORMAT = "sivae-fast image set"
LABELS = "dataset.json"
#: What an image of a set may be stored as; everything else has to pass through `prepare` first.
STORED_MODES = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "PA": 3, "CMYK": 3, "YCbCr": 3}
PREPARE_HINT = "run `sivae-fast prepare SOURCE DEST --resolution N` to make a set that trains"


class Folder:
    """The files below a folder, sorted by name, hidden ones left out; or those named.

    Raises ValueError for a folder that may not be read, at any depth.
    """

    def __init__(self, path: Path, names: list[str] | None = None):
        self.path = path
        self._known: dict[str, tuple[int, float]] = {}
        if names is not None:
            self.names = names
            return
        found, visited = [], set()
        for root, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
            if (place := os.path.realpath(root)) in visited:  # a link to a folder above
                folders.clear()
                continue
            visited.add(place)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
            base = Path(root).relative_to(path)
            found += [(base / f).as_posix() for f in files if not f.startswith(".")]
        self.names = sorted(found)

    def size(self, name: str) -> int:
        return self._looked_up(name)[0]

    def changed(self, names: list[str]) -> float:
        """When the last of the files was written."""
        return max((self._looked_up(name)[1] for name in names), default=0.0)

    def _looked_up(self, name: str) -> tuple[int, float]:
        """Size and time of a file, asked for once; zeros for a link to nothing."""
        if name not in self._known:
            self._known[name] = (0, 0.0)
            with contextlib.suppress(OSError):
                found = (self.path / name).stat()
                self._known[name] = (found.st_size, found.st_mtime)
        return self._known[name]

    def checksum(self, names: list[str]) -> int:
        """CRC-32 of the content of the files, which are all read."""
        return functools.reduce(lambda crc, name: zlib.crc32(self.read(name), crc), names, 0)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises OSError."""
        return (self.path / name).read_bytes()


class Zip:
    """The members of a zip file, sorted by name, readable from many threads and forked processes at once.

    Members are read by position (pread) through one descriptor, so readers share no file position and no
    lock.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ValueError(f"{path} is not a readable zip file: {error}") from None
        self._members = {n: m for m in members if not is_hidden(n := plain_name(m.filename))}
        self.names = sorted(self._members)
        self._file = open(path, "rb")  # noqa: SIM115 - lives as long as this object
        # Closed with the object and not before: a thread that still decodes has it, too.
        weakref.finalize(self, self._file.close)

    def size(self, name: str) -> int:
        return self._members[name].file_size

    def changed(self, names: list[str]) -> float:
        return self.path.stat().st_mtime

    def checksum(self, names: list[str]) -> int:
        """CRC-32 of the checksums of the members; nothing is read."""
        crcs = np.array([self._members[name].CRC for name in names], np.uint32)
        return zlib.crc32(crcs.tobytes())

    def read(self, name: str) -> bytes:
        """The bytes of one member, checked against its checksum. Raises OSError."""
        member, fd = self._members[name], self._file.fileno()
        header = os.pread(fd, 30, member.header_offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise OSError("no zip member at its place")
        if member.flag_bits & 1:
            raise OSError("it is encrypted")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = member.header_offset + 30 + name_length + extra_length
        data = os.pread(fd, member.compress_size, offset)
        if member.compress_type == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompress(data, -15)
            except zlib.error as error:
                raise OSError(f"{error}") from None
        elif member.compress_type != zipfile.ZIP_STORED:
            raise OSError(f"zip compression {member.compress_type} is not read; store or deflate is")
        if zlib.crc32(data) != member.CRC:
            raise OSError("wrong checksum")
        return data

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip. ValueError where it may not be read, which zipfile takes for no zip."""
    try:
        with open(path, "rb") as file:
            return zipfile.is_zipfile(file)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None


def plain_name(name: str) -> str:
    """A member's name as it is in a folder: archives of "." call it ./name."""
    return name.removeprefix("./")


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


class ImageSet:
    """The images of a folder or zip, all of one size, ready to train on.

    `resolution` is the side in pixels, `channels` 1 (grey) or 3, `labels` None, int64 [N] or, where they are
    no whole numbers, float32 [N] or [N, D] (from dataset.json), `manifest` what `prepare` wrote beside the
    images or None. Raises ValueError for a path that is no image set, an empty one, and for images that are
    not square, of one size, of 8 bits, or (unless `any_size`) whose side is no power of two. A sample of the
    images is looked at when the set is opened, every other one when it is decoded, and colour in a set whose
    sample is grey is then an error; `damaged` ones may be in the sample, but not be all of it.
    """

    def __init__(self, path: str | os.PathLike, *, any_size: bool = False, damaged: bool = False):
        self.path = Path(path)
        self._files = _open(self.path)
        self.names = [n for n in self._files.names if is_image_name(n)]
        if not self.names:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(
                f"no images in {self.path} ({len(self._files.names)} other files); looked for {kinds}"
            )
        self.manifest = self._manifest()
        self._check_complete()
        self.resolution, self.channels = self._shape(any_size, damaged)
        self.labels = self._labels()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path of one image inside the set, with forward slashes."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """The stored bytes (a PNG or JPEG file) of one image. Raises ValueError naming the file."""
        try:
            return self._files.read(self.names[index])
        except OSError as error:
            raise ValueError(f"{self.names[index]} of {self.path} cannot be read: {error}") from None

    def checksum(self) -> str:
        """Of all names, and of the content: of every image of a zip, of up to 64 of a folder."""
        names = "\0".join(self.names).encode(errors="surrogateescape")
        sample = self.names if isinstance(self._files, Zip) else [self.names[i] for i in self._spread()]
        return f"{zlib.crc32(names):08x}{self._files.checksum(sample):08x}"

    def decode(self, index: int) -> np.ndarray:
        """One image: uint8 [resolution, resolution, channels]. Raises ValueError naming the file."""
        data = self.read(index)
        try:
            with Image.open(io.BytesIO(data)) as image:
                self._check_image(index, image)
                if "exif" in image.info:
                    image = ImageOps.exif_transpose(image)
                mode = "RGB" if self.channels == 3 else "L"
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        except _DECODE_ERRORS as error:
            raise self._corrupt(index, error) from None
        return pixels.reshape(self.resolution, self.resolution, self.channels)

    def check(self, index: int, data: bytes) -> None:
        """Raises ValueError, naming the file, where the header of its bytes is not that of an image of this
        set: for decoders that turn colour into grey without a word."""
        try:
            with Image.open(io.BytesIO(data)) as image:
                self._check_image(index, image)
        except _DECODE_ERRORS as error:
            raise self._corrupt(index, error) from None

    def _check_image(self, index: int, image: Image.Image) -> None:
        self._check_header(index, image, self.resolution)
        if STORED_MODES[image.mode] > self.channels:
            raise ValueError(
                f"{self.names[index]} of {self.path} is stored in colour ({image.mode}), the images "
                f"that were looked at first are grey; {PREPARE_HINT}"
            )

    def _shape(self, any_size: bool, damaged: bool) -> tuple[int, int]:
        """Side and channels, from the headers of up to 64 images spread over the set."""
        side, channels, problem = None, 1, None
        for index in self._spread():
            try:
                image = Image.open(io.BytesIO(self.read(index)))
            except _DECODE_ERRORS as error:
                problem = problem or self._corrupt(index, error)
                continue
            side = side or image.size[0]
            self._check_header(index, image, side)
            channels = max(channels, STORED_MODES[image.mode])
        if problem and not (damaged and side):
            raise problem
        if not any_size and (side < 4 or side & (side - 1)):
            raise ValueError(
                f"{self.names[0]} of {self.path} has a side of {side} pixels, which is no power of two; "
                f"{PREPARE_HINT}"
            )
        return side, channels

    def _spread(self) -> list[int]:
        """Up to 64 images, from the first to the last."""
        return sorted({i * (len(self) - 1) // 63 for i in range(64)})

    def _check_header(self, index: int, image: Image.Image, side: int) -> None:
        where = f"{self.names[index]} of {self.path}"
        width, height = image.size
        if width != height:
            raise ValueError(f"{where} is not square ({width}x{height}); {PREPARE_HINT}")
        if width != side:
            raise ValueError(f"{where} is {width}x{height}, others are {side}x{side}; {PREPARE_HINT}")
        if image.mode not in STORED_MODES:
            raise ValueError(
                f"{where} is stored as {image.mode}, not as 8-bit grey or colour; {PREPARE_HINT}"
            )

    def _check_complete(self) -> None:
        expected = (self.manifest or {}).get("images", len(self))
        if expected != len(self):
            raise ValueError(
                f"{self.path} holds {len(self)} images, its {MANIFEST} says {expected}: copy it again"
            )

    def _corrupt(self, index: int, error: Exception) -> ValueError:
        if isinstance(error, ValueError) and str(self.path) in str(error):
            return error
        return ValueError(
            f"{self.names[index]} of {self.path} cannot be decoded ({reason(error)}); remove it, or "
            f"{PREPARE_HINT}: with --allow-bad SHARE it skips such files, up to that share of all"
        )

    def _manifest(self) -> dict | None:
        if MANIFEST not in self._files.names:
            return None
        try:
            found = json.loads(self._files.read(MANIFEST))
        except (OSError, ValueError) as error:
            raise ValueError(f"{MANIFEST} of {self.path} is not readable JSON: {error}") from None
        # Other programs have files of this name, too.
        ours = isinstance(found, dict) and str(found.get("format")).startswith(FORMAT)
        return found if ours else None

    def _labels(self) -> np.ndarray | None:
        by_name = read_labels(self._files)
        if not by_name:
            return None
        missing = [n for n in self.names if n not in by_name]
        if missing:
            raise ValueError(
                f"{LABELS} of {self.path} has no label for {missing[0]} ({len(missing)} missing)"
            )
        labels = np.array([by_name[n] for n in self.names])
        whole = labels.ndim == 1 and (labels % 1 == 0).all()
        return labels.astype(np.int64 if whole else np.float32)


def read_labels(files) -> dict[str, object]:
    """The labels in the dataset.json of a folder, zip or tar by name, {} without any. Raises ValueError."""
    if LABELS not in files.names:
        return {}
    try:
        labels = dict((json.loads(files.read(LABELS)) or {}).get("labels") or {})
        values = np.array(list(labels.values()))  # ValueError where the lists are not equally long
        if values.dtype.kind not in "biuf" or values.ndim > 2:
            raise ValueError(f"found {next(iter(labels.values()))!r}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{LABELS} of {files.path} holds no list of [name, label], where labels are numbers or equally "
            f"long lists of numbers: {error}"
        ) from None
    return labels


def reason(error: Exception) -> str:
    """Why a picture cannot be decoded. Pillow's own words for what it does not know name an address."""
    return "not a picture" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)


_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, struct.error)


def _open(path: Path) -> Folder | Zip:
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        partial = Path(f"{path}.partial")
        hint = (
            f"; {partial} is an unfinished one: run the same `sivae-fast prepare` again"
            if partial.exists()
            else ""
        )
        raise ValueError(f"there is no image set at {path} (a folder or a .zip file){hint}")
    if is_zip(path):
        return Zip(path)
    raise ValueError(f"{path} is neither a folder nor a whole zip file; {PREPARE_HINT}")
