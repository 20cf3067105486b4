"""Vertices of .ply files: ascii and binary ones are read, binary ones written."""

from __future__ import annotations

import os

import numpy as np

from sivae_fast.files import atomic

_SCALARS = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
_LENGTHS = {"format": 2, "element": 3, "property": 3}  # words of a line of the header, at least


def read_ply(path: str | os.PathLike) -> np.ndarray:
    """The vertices of a .ply file: float32 [n, 3]. Faces and other properties are passed over.

    Raises ValueError, naming the file, for anything that is not such a file: another format, no x, y, z,
    fewer vertices than the header promises.
    """
    with open(path, "rb") as file:
        data = file.read()
    head, found, body = data.partition(b"end_header\n")
    if not found:
        head, found, body = data.partition(b"end_header\r\n")
    lines = head.decode("ascii", "replace").split("\n")
    if not found or lines[0].strip() != "ply":
        raise ValueError(f"{path}: not a .ply file (it starts with 'ply' and has a line 'end_header')")
    try:
        order, count, fields = _header([line.split() for line in lines[1:]])
        vertices = _ascii(body, count, fields) if order == "=" else _binary(body, count, fields, order)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return np.stack([vertices[axis].astype(np.float32) for axis in "xyz"], 1)


def write_ply(path: str | os.PathLike, points: np.ndarray) -> None:
    """Writes points [n, 3], as float32, as the vertices of a little-endian binary .ply file, atomically."""
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{path}: points have shape {list(points.shape)}, accepted is [n, 3]")
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    with atomic(path) as file:
        file.write(header.encode())
        file.write(np.ascontiguousarray(points, "<f4").tobytes())


def _ascii(body: bytes, count: int, fields: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    rows = [row.split() for row in body.decode("ascii", "replace").splitlines() if row.strip()][:count]
    _check_count(len(rows), count)
    for i, row in enumerate(rows):
        if len(row) < len(fields):
            raise ValueError(f"vertex {i} has {len(row)} numbers, the header promises {len(fields)}")
    columns = {name: column for column, (name, _) in enumerate(fields)}
    return {axis: np.array([row[columns[axis]] for row in rows], np.float32) for axis in "xyz"}


def _binary(body: bytes, count: int, fields: list[tuple[str, str]], order: str) -> np.ndarray:
    kind = np.dtype([(name, order + scalar) for name, scalar in fields])
    _check_count(len(body) // kind.itemsize, count)
    return np.frombuffer(body, kind, count)


def _check_count(found: int, promised: int) -> None:
    if found < promised:
        raise ValueError(f"holds {found} vertices, the header promises {promised}: copy it again")


def _header(lines: list[list[str]]) -> tuple[str, int, list[tuple[str, str]]]:
    """(byte order, vertices, [(property, NumPy scalar)]) of a file that begins with its vertices."""
    order, count, fields, inside = None, None, [], False
    for words in lines:
        if not words:
            continue
        if len(words) < _LENGTHS.get(words[0], 0):
            raise ValueError(f"the header's line {' '.join(words)!r} is not complete")
        if words[0] == "format":
            if words[1] not in _ORDERS:
                raise ValueError(f"format {words[1]}: accepted are {', '.join(_ORDERS)}")
            order = _ORDERS[words[1]]
        elif words[0] == "element":
            if count is None and words[1] != "vertex":
                raise ValueError(f"first element is {words[1]}: accepted is vertex")
            inside = words[1] == "vertex"
            if inside and not words[2].isdecimal():
                raise ValueError(f"element vertex {words[2]}: accepted is a whole number")
            count = int(words[2]) if inside else count
        elif words[0] == "property" and inside:
            if words[1] not in _SCALARS:
                raise ValueError(f"vertex property of type {words[1]}: accepted are {', '.join(_SCALARS)}")
            fields.append((words[2], _SCALARS[words[1]]))
    missing = {"x", "y", "z"} - {name for name, _ in fields}
    if order is None or count is None or missing:
        raise ValueError("the header lacks a format, a vertex element or its properties x, y, z")
    return order, count, fields
