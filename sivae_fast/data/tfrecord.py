"""Images in TFRecord files as StyleGAN's and ALAE's tools wrote them, read without TensorFlow.

A file is a sequence of records: length (uint64), checksum of the length, payload, checksum of the
payload. The payload is a protocol buffer `Example`, a map from names to lists: `data` holds the pixels
(uint8, channels first), `shape` their shape. Level r of such a set has images of 2^r x 2^r pixels and
lies in files like NAME-r08.tfrecords or NAME-r08.tfrecords.000.
"""

from __future__ import annotations

import os
import re
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_NAME = re.compile(r"(-r(\d\d))?\.tfrecords?(\.\d+)?$")


def is_record_file(name: str) -> bool:
    return _NAME.search(name) is not None


def level_of(name: str) -> int | None:
    """The r of NAME-r08.tfrecords, None where the name has none."""
    found = _NAME.search(name)
    return int(found.group(2)) if found and found.group(2) else None


def offsets(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of every payload. Raises ValueError where the file is cut off or no TFRecord file.

    The checksums of the lengths are compared; those of the payloads are not (too slow in Python), a damaged
    payload is found when it is taken apart.
    """
    found, at, size = [], 0, path.stat().st_size
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(12)
            if len(header) < 12:
                raise ValueError(f"{path} is cut off in record {len(found)}")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise ValueError(f"{path} is no TFRecord file, or damaged at record {len(found)}")
            if at + 16 + length > size:
                raise ValueError(f"{path} is cut off in record {len(found)}")
            found.append((at + 12, length))
            at += 16 + length
    return found


class RecordFile:
    """The images of one file."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets = offsets(path)
        self._file = open(path, "rb")  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> np.ndarray:
        """Pixels uint8 [H, W, C], or [H, W] for one channel. Raises OSError on a damaged record."""
        offset, length = self._offsets[index]
        payload = os.pread(self._file.fileno(), length, offset)
        try:
            features = parse_example(payload)
            data = np.frombuffer(features["data"][0], np.uint8)
            shape = features.get("shape") or [3, *[round((len(data) / 3) ** 0.5)] * 2]
            pixels = data.reshape(shape).transpose(1, 2, 0)
        except (KeyError, IndexError, TypeError, ValueError, struct.error) as error:
            raise OSError(f"record {index} holds no image: {error}") from None
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def parse_example(payload: bytes) -> dict[str, list]:
    """The features of an `Example` by name: lists of bytes or of integers."""
    features = {}
    for _, example in _fields(payload):
        for _, entry in _fields(example):
            parts = dict(_fields(entry))
            for kind, values in _fields(parts[2]):
                if kind == 1:
                    features[bytes(parts[1]).decode()] = [value for _, value in _fields(values)]
                elif kind == 3:
                    features[bytes(parts[1]).decode()] = list(_integers(values))
    return features


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of every field of a protocol buffer message; values are bytes or integers."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        elif key & 7 == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError(f"field of wire type {key & 7}")
        if at > len(message):
            raise ValueError("a field is cut off")
        yield key >> 3, value


def _integers(message: bytes) -> Iterator[int]:
    """The numbers of an Int64List, packed or one by one."""
    for _, value in _fields(message):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of the TFRecord format: CRC-32C (Castagnoli), rotated by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
