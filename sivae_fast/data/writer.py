"""Writing an image set so that an interrupted run can go on and nothing unfinished looks finished."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path


class FolderWriter:
    """A set as a folder of files; `done` maps the names that are there already to their CRC-32."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, int] = {}
        for file in path.rglob("*"):
            if file.is_file() and file.suffix != ".tmp":
                self.done[file.relative_to(path).as_posix()] = zlib.crc32(file.read_bytes())

    def add(self, name: str, data: bytes) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, file)
        self.done[name] = zlib.crc32(data)

    def close(self) -> None:
        pass

    def publish(self, dest: Path) -> None:
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink()
        os.sync()
        os.rename(self.path, dest)


class ZipWriter:
    """A set as a zip of stored files; `done` maps the members that are there already to their CRC-32."""

    def __init__(self, path: Path):
        self.path = path
        path.touch()
        self._file = open(path, "r+b")  # noqa: SIM115 - closed by close()
        members, end = recover(self._file)
        self._file.truncate(end)
        self._file.seek(end)
        self._zip = zipfile.ZipFile(self._file, "w")
        self._zip.filelist.extend(members)
        self._zip.NameToInfo.update({m.filename: m for m in members})
        self.done = {m.filename: m.CRC for m in members}

    def add(self, name: str, data: bytes) -> None:
        # A fixed date keeps the bytes of the whole file a function of its content.
        member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
        member.external_attr = 0o644 << 16
        self._zip.writestr(member, data)
        self.done[name] = member.CRC

    def close(self) -> None:
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self, dest: Path) -> None:
        os.replace(self.path, dest)


def recover(file) -> tuple[list[zipfile.ZipInfo], int]:
    """The complete members of a zip that was never finished, and where the last one ends."""
    members, end = [], 0
    while True:
        file.seek(end)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            return members, end
        crc, stored, size, name_length, extra_length = struct.unpack("<14xIIIHH", header)
        name = file.read(name_length)
        file.seek(extra_length, os.SEEK_CUR)
        data = file.read(stored)
        if len(data) < stored or stored != size or zlib.crc32(data) != crc:
            return members, end
        member = zipfile.ZipInfo(name.decode(), (1980, 1, 1, 0, 0, 0))
        member.external_attr = 0o644 << 16
        member.CRC, member.compress_size, member.file_size, member.header_offset = crc, stored, size, end
        members.append(member)
        end = file.tell()
