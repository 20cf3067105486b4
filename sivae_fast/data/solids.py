"""Solids made of boxes, balls and cylinders: sampled as point clouds, rendered as pictures.

Everything rests on one operation, the interval in which a straight line is inside a convex body.
Coordinates: x to the right, y away from the viewer, z up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_UPRIGHT = np.eye(3)


class Body(NamedTuple):
    """A box, ball or cylinder (about its own z axis) with half sizes along its own axes."""

    kind: str
    centre: np.ndarray  # [3]
    half: np.ndarray  # [3]
    turn: np.ndarray = _UPRIGHT  # [3, 3] rotation; its columns are the body's own axes

    def own(self, points: np.ndarray, is_direction: bool = False) -> np.ndarray:
        """Points or directions [..., 3] in the frame in which the body is the unit box, ball or cylinder."""
        return (points if is_direction else points - self.centre) @ self.turn / self.half

    def moved(self, scale: float, turn: np.ndarray, shift: np.ndarray) -> Body:
        """The body under p -> scale * turn p + shift."""
        return Body(self.kind, scale * turn @ self.centre + shift, scale * self.half, turn @ self.turn)


ROUND_AXES = {"box": (), "ball": (0, 1, 2), "cylinder": (0, 1)}


def intervals(bodies: Sequence[Body], origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Where lines are inside each body: [bodies, 2, n] entry and exit t of origin + t direction, [n, 3] each.

    Entry is +inf and exit -inf where a line misses.
    """
    result = np.empty((len(bodies), 2, len(origin)), origin.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        for body, (enter, leave) in zip(bodies, result, strict=True):
            o, d = body.own(origin), body.own(direction, True)
            enter[:], leave[:] = -np.inf, np.inf
            rounds = list(ROUND_AXES[body.kind])
            for axis in sorted({0, 1, 2} - set(rounds)):
                ends = (np.array([[-1], [1]], o.dtype) - o[:, axis]) / d[:, axis]
                np.maximum(enter, ends.min(0), out=enter)
                np.minimum(leave, ends.max(0), out=leave)
            if rounds:
                # The floor is for lines along a cylinder, which meet its side at infinity.
                a = np.maximum((d[:, rounds] ** 2).sum(1), 1e-12)
                b = (o[:, rounds] * d[:, rounds]).sum(1)
                root = np.sqrt(b * b - a * ((o[:, rounds] ** 2).sum(1) - 1))
                np.maximum(enter, (-b - root) / a, out=enter)
                np.minimum(leave, (-b + root) / a, out=leave)
            missed = ~(enter < leave)  # also where there is no root
            enter[missed], leave[missed] = np.inf, -np.inf
    return result


def normals(body: Body, points: np.ndarray) -> np.ndarray:
    """Outward unit normals [n, 3] at points [n, 3] on the body's surface."""
    own = body.own(points)
    rounds = list(ROUND_AXES[body.kind])
    height = np.abs(own)
    if rounds:
        height[:, rounds] = 0
        height[:, rounds[0]] = np.linalg.norm(own[:, rounds], axis=1)
    face = height.argmax(1)
    normal = np.where(np.arange(3) == face[:, None], np.sign(own), 0.0)
    if rounds:
        on_side = np.isin(face, rounds)[:, None]
        normal = np.where(on_side & np.isin(np.arange(3), rounds), own, normal)
    normal = normal / body.half @ body.turn.T
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def surface_points(bodies: Sequence[Body], count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` points [count, 3], uniform over the outer surface of the union of the bodies.

    Random straight lines (uniform direction, uniform offset) cross a surface uniformly by area; crossings
    that lie inside another body are not on the outside.
    """
    centres, reach = (
        np.array([b.centre for b in bodies]),
        np.array([np.linalg.norm(b.half) for b in bodies]),
    )
    middle = (centres.min(0) + centres.max(0)) / 2
    radius = (np.linalg.norm(centres - middle, axis=1) + reach).max()
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        direction = rng.standard_normal((2 * count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        offset = rng.standard_normal((2 * count, 3))
        offset -= (offset * direction).sum(1, keepdims=True) * direction
        offset *= radius * np.sqrt(rng.random((2 * count, 1))) / np.linalg.norm(offset, axis=1, keepdims=True)
        origin = middle + offset
        spans = intervals(bodies, origin, direction)
        for own in range(len(bodies)):
            others = np.delete(spans, own, 0)
            for t in spans[own]:
                line = np.isfinite(t) & ~((others[:, 0] < t) & (t < others[:, 1])).any(0)
                found.append(origin[line] + t[line, None] * direction[line])
    return rng.permutation(np.concatenate(found))[:count]


def yaw(angle: float) -> np.ndarray:
    """Rotation about the vertical axis, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def _tilt(angle: float) -> np.ndarray:
    """Rotation about the x axis, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]])


_LYING = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])  # a cylinder along x


def _body(kind: str, x, y, z, half_x, half_y, half_z, turn: np.ndarray = _UPRIGHT) -> Body:
    return Body(kind, np.array([x, y, z], float), np.array([half_x, half_y, half_z], float), turn)


def table(rng: np.random.Generator) -> list[Body]:
    width, depth, height = rng.uniform(0.7, 1.2), rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.65)
    thick, leg = rng.uniform(0.02, 0.05), rng.uniform(0.025, 0.05)
    is_round, has_foot = rng.random() < 0.35, rng.random() < 0.35
    if is_round:
        depth = width
    top = _body("cylinder" if is_round else "box", 0, 0, height, width, depth, thick)
    if has_foot:
        foot = rng.uniform(0.4, 0.6)
        return [
            top,
            _body("cylinder", 0, 0, 0, 1.6 * leg, 1.6 * leg, height),
            _body("cylinder", 0, 0, -height, foot * width, foot * depth, thick),
        ]
    inset = 0.62 if is_round else rng.uniform(0.8, 0.92)
    kind = rng.choice(["box", "cylinder"])
    at = [(sx * inset * width, sy * inset * depth) for sx in (-1, 1) for sy in (-1, 1)]
    return [top, *(_body(kind, x, y, 0, leg, leg, height) for x, y in at)]


def chair(rng: np.random.Generator) -> list[Body]:
    width, depth = rng.uniform(0.4, 0.55), rng.uniform(0.4, 0.5)
    seat, back = rng.uniform(0.35, 0.5), rng.uniform(0.4, 0.65)
    thick, leg = rng.uniform(0.03, 0.07), rng.uniform(0.025, 0.045)
    kind = rng.choice(["box", "cylinder"])
    bodies = [
        _body("box", 0, 0, 0, width, depth, thick),
        _body("box", 0, depth - thick, back, width, thick, back, _tilt(-rng.uniform(0, 0.15))),
    ]
    for sx in (-1, 1):
        x = sx * (width - leg)
        bodies += [_body(kind, x, sy * (depth - leg), -seat, leg, leg, seat) for sy in (-1, 1)]
    if rng.random() < 0.4:
        rest = rng.uniform(0.25, 0.4)
        for sx in (-1, 1):
            bodies.append(_body("box", sx * (width - leg), 0, rest, leg, depth, leg))
            bodies.append(_body(kind, sx * (width - leg), -depth + leg, rest / 2, leg, leg, rest / 2))
    return bodies


def plane(rng: np.random.Generator) -> list[Body]:
    length, thick = 1.0, rng.uniform(0.09, 0.14)
    span, chord, sweep = rng.uniform(0.75, 1.05), rng.uniform(0.12, 0.2), rng.uniform(0.0, 0.6)
    bodies = [_body("ball", 0, 0, 0, length, thick, thick)]
    tail = rng.uniform(0.28, 0.4)
    for sy in (-1, 1):
        wing = yaw(sy * sweep)
        bodies.append(
            Body("box", wing @ [0, sy * span / 2, 0] + [0.1, 0, 0], np.array([chord, span / 2, 0.02]), wing)
        )
        bodies.append(
            Body(
                "box",
                wing @ [0, sy * tail / 2, 0] + [-0.85, 0, 0],
                np.array([chord / 2, tail / 2, 0.015]),
                wing,
            )
        )
    bodies.append(_body("box", -0.87, 0, tail / 2 + 0.02, chord / 2, 0.015, tail / 2))
    engines = rng.integers(0, 3)
    for at in np.linspace(0.35, 0.6, engines) if engines else ():
        for sy in (-1, 1):
            x, y, _ = yaw(sy * sweep) @ [0, sy * span * at, 0]
            bodies.append(_body("cylinder", x + 0.22, y, -0.06, 0.05, 0.05, 0.13, _LYING))
    return bodies


def car(rng: np.random.Generator) -> list[Body]:
    length, width, height = 1.0, rng.uniform(0.38, 0.48), rng.uniform(0.12, 0.2)
    cabin, roof, behind = rng.uniform(0.4, 0.6), rng.uniform(0.12, 0.2), rng.uniform(0.0, 0.3)
    wheel = rng.uniform(0.16, 0.22)
    bodies = [
        _body("box", 0, 0, 0, length, width, height),
        _body("box", -behind, 0, height + roof, cabin, 0.88 * width, roof),
    ]
    upright = _tilt(np.pi / 2)
    for x in (-0.6, 0.6):
        bodies += [_body("cylinder", x, sy * width, -height, wheel, wheel, 0.07, upright) for sy in (-1, 1)]
    return bodies


KINDS: dict[str, Callable[[np.random.Generator], list[Body]]] = {
    "chair": chair,
    "table": table,
    "plane": plane,
    "car": car,
}


def made_cloud(
    index: int, points: int = 2048, kinds: Sequence[str] = ("chair", "table", "plane")
) -> np.ndarray:
    """Cloud `index` of an endless set of varied solids: float32 [points, 3], the farthest point at radius
    0.5.

    The kinds take turns, so its class is index % len(kinds). Raises ValueError for an unknown kind.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"classes={list(kinds)}: made solids are {', '.join(KINDS)}")
    rng = np.random.Generator(np.random.Philox(index))
    cloud = surface_points(KINDS[kinds[index % len(kinds)]](rng), points, rng)
    cloud -= (cloud.min(0) + cloud.max(0)) / 2
    return (0.5 * cloud / np.linalg.norm(cloud, axis=1).max()).astype(np.float32)
