"""Pictures of coloured solids on a floor: class is shape and colour, content is the place."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np

from sivae_fast.data.solids import KINDS, Body, intervals, normals, yaw

#: Shapes are (kind of solid, seed of its proportions).
SHAPES = (("chair", 3), ("chair", 1), ("table", 4), ("plane", 5), ("car", 2), ("car", 7))
COLOURS = np.array(
    [
        [0.86, 0.24, 0.2],
        [0.96, 0.68, 0.16],
        [0.36, 0.68, 0.3],
        [0.2, 0.6, 0.78],
        [0.4, 0.32, 0.72],
        [0.9, 0.88, 0.84],
    ],
    np.float32,
)
ACROSS = np.linspace(-0.52, 0.52, 11)
AWAY = np.linspace(-0.45, 0.45, 7)

CLASSES = len(SHAPES) * len(COLOURS)
CONTENTS = len(ACROSS) * len(AWAY)

_TURN = np.radians(30.0)  # the direction of all solids
_EYE = np.array([0, -3.3, 1.9], np.float32)
_AIM = np.array([0, 0.05, 0.3], np.float32)
_LIGHT = np.array([-0.45, -0.5, 0.74], np.float32)
_FLOOR = np.array([0.78, 0.77, 0.75], np.float32)
_WALL = np.array([0.62, 0.68, 0.74], np.float32)
_DARK = np.array([0.16, 0.16, 0.18], np.float32)
_SMOOTH = 2  # rays for a pixel, along each axis


def made_images(size: int = 64) -> np.ndarray:
    """All pictures: uint8 [CLASSES, CONTENTS, size, size, 3]. Raises ValueError for a size under 8."""
    if size < 8:
        raise ValueError(f"resolution={size}: must be at least 8")
    out = np.empty((len(SHAPES), len(COLOURS), CONTENTS, size, size, 3), np.uint8)
    places = list(itertools.product(ACROSS, AWAY))
    for shape, row in zip(SHAPES, out, strict=True):
        for i, (x, y) in enumerate(places):
            row[:, i] = _pictures(_placed(*shape, x, y), size)
    return out.reshape(CLASSES, CONTENTS, size, size, 3)


@cache
def _shape(kind: str, seed: int) -> tuple[list[Body], float]:
    """(the bodies around the origin with radius about 0.5, the height of the origin over the floor)."""
    bodies = KINDS[kind](np.random.Generator(np.random.Philox(seed)))
    corners = np.concatenate(
        [
            b.centre + (np.array(list(itertools.product((-1, 1), repeat=3))) * b.half) @ b.turn.T
            for b in bodies
        ]
    )
    middle = (corners.min(0) + corners.max(0)) / 2
    scale = 0.62 / np.linalg.norm(corners - middle, axis=1).max()
    return [b.moved(scale, np.eye(3), -scale * middle) for b in bodies], scale * (middle - corners.min(0))[2]


def _placed(kind: str, seed: int, x: float, y: float) -> list[Body]:
    bodies, height = _shape(kind, seed)
    moved = [body.moved(1.0, yaw(_TURN), np.array([x, y, height])) for body in bodies]
    return [Body(b.kind, *(part.astype(np.float32) for part in b[1:])) for b in moved]


@cache
def _rays(size: int) -> np.ndarray:
    """Directions [rays, 3] of one picture, row by row."""
    side = size * _SMOOTH
    ahead = _AIM - _EYE
    ahead /= np.linalg.norm(ahead)
    right = np.array([1, 0, 0], np.float32)
    up = np.cross(right, ahead)
    at = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32) * 0.6
    rays = ahead + at[None, :, None] * right - at[:, None, None] * up
    return (rays / np.linalg.norm(rays, axis=2, keepdims=True)).reshape(-1, 3)


def _pictures(bodies: list[Body], size: int) -> np.ndarray:
    """One scene in every colour: uint8 [COLOURS, size, size, 3]."""
    rays = _rays(size)
    ground = np.where(rays[:, 2] < -1e-4, -_EYE[2] / np.minimum(rays[:, 2], -1e-4), np.inf)
    on_floor = ground < np.where(rays[:, 1] > 0, (1.9 - _EYE[1]) / rays[:, 1], np.inf)
    light = np.full(len(rays), 1.0, np.float32)
    feet = _EYE + ground[on_floor, None] * rays[on_floor]
    light[on_floor] = 1 - 0.45 * _blocked(bodies, feet)
    fade = 1.06 - 0.05 * np.linalg.norm(feet[:, :2], axis=1) ** 2
    back = np.where(on_floor[:, None], _FLOOR, _WALL * (1.0 + 0.5 * rays[:, 2:]))
    back[on_floor] *= fade[:, None]

    body, t = _first_hit(bodies, rays)
    hit = np.flatnonzero(body >= 0)
    shade, dark = _shading(bodies, body[hit], _EYE + t[hit, None] * rays[hit], rays[hit])
    pictures = np.repeat((back * light[:, None])[None], len(COLOURS), 0)
    paint = np.where(dark[None, :, None], _DARK, COLOURS[:, None])
    pictures[:, hit] = paint * shade[:, :1] + shade[:, 1:]
    pictures = pictures.reshape(len(COLOURS), size, _SMOOTH, size, _SMOOTH, 3).mean((2, 4))
    return (255 * np.clip(pictures, 0, 1) + 0.5).astype(np.uint8)


def _near(bodies: list[Body], origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Numbers of the rays that come within reach of the solid at all."""
    centre = np.mean([b.centre for b in bodies], 0)
    reach = max(np.linalg.norm(b.centre - centre) + np.linalg.norm(b.half) for b in bodies)
    to = centre - origin
    along = (to * direction).sum(1)
    return np.flatnonzero((to * to).sum(1) - along**2 < reach**2)


def _first_hit(bodies: list[Body], rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the body that each ray from the eye meets first, or -1; how far away)."""
    body, t = np.full(len(rays), -1), np.full(len(rays), np.inf, np.float32)
    near = _near(bodies, np.broadcast_to(_EYE, rays.shape), rays)
    enter = intervals(bodies, np.broadcast_to(_EYE, (len(near), 3)), rays[near])[:, 0]
    t[near] = enter.min(0)
    body[near] = np.where(np.isfinite(t[near]), enter.argmin(0), -1)
    return body, t


def _blocked(bodies: list[Body], points: np.ndarray) -> np.ndarray:
    """Where the way from points [n, 3] to the light is blocked: bool [n]."""
    light = np.broadcast_to(_LIGHT / np.linalg.norm(_LIGHT), points.shape)
    result = np.zeros(len(points), bool)
    near = _near(bodies, points, light)
    spans = intervals(bodies, points[near], light[near])
    result[near] = (spans[:, 1] > np.maximum(spans[:, 0], 1e-3)).any(0)
    return result


def _shading(bodies: list[Body], body: np.ndarray, points: np.ndarray, rays: np.ndarray):
    """(factor on the paint and gloss added to it [n, 2]; whether the part is dark, as wheels are [n])."""
    light = _LIGHT / np.linalg.norm(_LIGHT)
    normal = np.empty_like(points)
    for number in np.unique(body):
        own = body == number
        normal[own] = normals(bodies[number], points[own])
    lit = ~_blocked(bodies, points + 2e-3 * normal)
    towards = np.clip(normal @ light, 0, 1) * lit
    halfway = light - rays
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
    gloss = 0.18 * lit * np.clip((normal * halfway).sum(1), 0, 1) ** 24
    low = np.clip(points[:, 2] / 0.35, 0, 1)  # corners near the floor see less of the sky
    ambient = (0.42 + 0.14 * normal[:, 2]) * (0.7 + 0.3 * low)
    dark = np.array([b.kind == "cylinder" for b in bodies])[body]
    return np.stack([ambient + 0.62 * towards, gloss], 1), dark
