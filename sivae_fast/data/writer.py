"""Writing an image set so that an interrupted run can go on and nothing unfinished looks finished."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple


class FolderWriter:
    """A set as a folder of files; `done` maps the names that are there already to their CRC-32."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, int] = {}
        for file in path.rglob("*"):
            if file.suffix == ".tmp":
                file.unlink()
            elif file.is_file():
                self.done[file.relative_to(path).as_posix()] = zlib.crc32(file.read_bytes())

    def add(self, name: str, data: bytes) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, file)
        self.done[name] = zlib.crc32(data)

    def finish(self) -> None:
        """Everything is on the disk when this returns."""
        os.sync()

    def close(self) -> None:
        pass


class Member(NamedTuple):
    name: str
    crc: int
    size: int
    offset: int


class ZipWriter:
    """A set as a zip of stored files; `done` maps the members that are there already to their CRC-32.

    The file holds nothing but complete members until `finish` adds the directory, so what an interrupted run
    left can be read back and continued. All dates are 1 January 1980: equal contents are equal files. Beyond
    4 GiB or 65,535 members the directory is in the zip64 form (APPNOTE.TXT 4.3.14 to 4.3.16, 4.5.3).
    """

    def __init__(self, path: Path):
        self.path = path
        path.touch()
        self._file = open(path, "r+b")  # noqa: SIM115 - closed by close()
        self._members = _complete_members(self._file)
        self._file.truncate(self._file.tell())
        self.done = {member.name: member.crc for member in self._members}

    def add(self, name: str, data: bytes) -> None:
        member = Member(name, zlib.crc32(data), len(data), self._file.tell())
        if self.done.get(name) == member.crc:
            return
        self._file.write(_LOCAL.pack(b"PK\3\4", *_fields(member), len(name.encode()), 0) + name.encode())
        self._file.write(data)
        self._members.append(member)
        self.done[name] = member.crc

    def finish(self) -> None:
        """Everything is on the disk and readable as a zip when this returns."""
        start = self._file.tell()
        for member in self._members:
            large = member.offset >= _LARGE
            extra = struct.pack("<HHQ", 1, 8, member.offset) if large else b""
            offset = _LARGE if large else member.offset
            name = member.name.encode()
            self._file.write(
                _CENTRAL.pack(
                    b"PK\1\2", 45, *_fields(member), len(name), len(extra), 0, 0, 0, 0o644 << 16, offset
                )
                + name
                + extra
            )
        count, size, end = len(self._members), self._file.tell() - start, self._file.tell()
        if count >= 0xFFFF or end >= _LARGE:
            self._file.write(
                struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
            )
            self._file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        count, start = min(count, 0xFFFF), min(start, _LARGE)
        self._file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, start, 0))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


_LARGE = 0xFFFFFFFF
_JANUARY_1980 = 1 << 5 | 1
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")


def _fields(member: Member) -> tuple[int, ...]:
    """Version needed, flags (names are UTF-8), method (stored), time, date, CRC-32, both sizes."""
    return 45, 0x800, 0, 0, _JANUARY_1980, member.crc, member.size, member.size


def _complete_members(file) -> list[Member]:
    """The members at the start of the file that are whole; leaves the file's position behind them."""
    members = []
    while True:
        offset = file.tell()
        header = file.read(_LOCAL.size)
        if len(header) == _LOCAL.size and header[:4] == b"PK\3\4":
            *_, crc, size, _, name_length, _ = _LOCAL.unpack(header)
            name, data = file.read(name_length), file.read(size)
            if len(data) == size and zlib.crc32(data) == crc:
                members.append(Member(name.decode(), crc, size, offset))
                continue
        file.seek(offset)
        return members
