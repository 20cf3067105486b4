"""Painted mountain lakes: small pictures in which few things vary.

A picture is a function of its number: the hour (which sets all colours), the place of the sun or moon, the
shape of the peaks and hills, the shore, the clouds. Lengths are in units of the picture's height, y points
down. All arithmetic is float32 on small arrays: a picture takes a few milliseconds.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 128, 96
_X = ((np.arange(WIDTH) + 0.5) / HEIGHT).astype(np.float32)[None, :]
_Y = ((np.arange(HEIGHT) + 0.5) / HEIGHT).astype(np.float32)[:, None]

# Six hours of a day that returns to its beginning; between them colours are mixed.
# Sky above, sky at the horizon, sun or moon, rock, hills.
_HOURS = np.array(
    [
        [[0.36, 0.52, 0.82], [1.00, 0.78, 0.68], [1.00, 0.92, 0.78], [0.50, 0.44, 0.64], [0.20, 0.36, 0.38]],
        [[0.12, 0.45, 0.90], [0.74, 0.92, 0.99], [1.00, 0.99, 0.88], [0.36, 0.47, 0.64], [0.18, 0.52, 0.26]],
        [[0.26, 0.58, 0.82], [1.00, 0.88, 0.58], [1.00, 0.95, 0.66], [0.58, 0.46, 0.48], [0.52, 0.46, 0.14]],
        [[0.36, 0.20, 0.55], [1.00, 0.54, 0.28], [1.00, 0.82, 0.42], [0.46, 0.22, 0.40], [0.28, 0.12, 0.22]],
        [[0.12, 0.10, 0.40], [0.92, 0.42, 0.54], [1.00, 0.76, 0.66], [0.30, 0.18, 0.46], [0.12, 0.09, 0.25]],
        [[0.02, 0.05, 0.18], [0.16, 0.36, 0.55], [0.95, 0.97, 1.00], [0.12, 0.21, 0.40], [0.03, 0.10, 0.18]],
    ],
    np.float32,
)
_WHITE = np.ones(3, np.float32)


def paint(number: int) -> Image.Image:
    """Picture `number`: RGB, WIDTH x HEIGHT pixels."""
    rng = np.random.Generator(np.random.Philox(key=number))
    hour = rng.random() * 6
    above, horizon, light, rock, hill = _colours(hour)
    night = max(0.0, 1 - abs(hour - 5))
    shore = rng.uniform(0.66, 0.70)
    sun = rng.uniform(0.3, 1.03), rng.uniform(0.12, 0.32)

    sky = above + (horizon - above) * _ease(_Y / shore)[..., None]
    picture = np.broadcast_to(sky, (HEIGHT, WIDTH, 3)).copy()
    distance = np.hypot(_X - sun[0], _Y - sun[1])
    _lay(picture, light, 0.5 * np.exp(-distance * 5) + 0.3 * np.exp(-distance * 14))
    _clouds(picture, rng, light, horizon, shore)
    _lay(picture, light + (_WHITE - light) * 0.4, _cover(0.075 - distance))
    _peaks(picture, rng, shore, sun[0], (above, horizon, light, rock), 0.75 - 0.4 * night)
    _hills(picture, rng, shore, hill, horizon)
    _lake(picture, rng, shore, sun[0], light, hill)
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def _colours(hour: float) -> np.ndarray:
    whole = int(hour)
    return _HOURS[whole] + (_HOURS[(whole + 1) % 6] - _HOURS[whole]) * float(_ease(hour - whole))


def _clouds(picture, rng, light, horizon, shore) -> None:
    for _ in range(rng.integers(0, 3)):
        x, y = rng.uniform(0, 1.33), rng.uniform(0.05, 0.35)
        long, high = rng.uniform(0.15, 0.35), rng.uniform(0.015, 0.035)
        for part in rng.uniform(-0.5, 0.5, 3).tolist():
            shape = np.exp(-(((_X - x - part * long) / long) ** 2) - ((_Y - y - part * high) / high) ** 2)
            _lay(picture, 0.5 * light + 0.5 * _WHITE * horizon.max(), 0.35 * shape)


def _peaks(picture, rng, shore, sun, colours, bright) -> None:
    """A large mountain with a smaller one on each side, lit from where the sun stands, with snow."""
    above, horizon, light, rock = colours
    x0 = rng.uniform(0.5, 0.83)
    tops = np.array([x0 - rng.uniform(0.38, 0.46), x0, x0 + rng.uniform(0.38, 0.46)], np.float32)
    heights = np.array([rng.uniform(0.16, 0.22), rng.uniform(0.38, 0.5), rng.uniform(0.16, 0.22)], np.float32)
    steep = rng.uniform(0.8, 1.0)
    tents = heights[:, None] - steep * np.abs(_X - tops[:, None])
    which = tents.argmax(0)
    wave = which.astype(np.float32)
    rough = sum(a * np.abs((_X[0] * f + rng.random()) % 1 - 0.5) for a, f in ((0.03, 7), (0.02, 13)))
    ridge = shore - np.maximum(tents.max(0), 0.02) - rough + 0.02
    depth = _Y - ridge
    crest = tops[which] + (0.3 * np.sin(11 * depth + wave)) * depth
    lit = _cover((_X - crest) * np.sign(sun - tops[which]), 2)
    colour = rock * 0.78 + above * 0.1 + (rock * 0.5 + light * 0.42 - rock * 0.78) * lit[..., None] * bright
    snow_line = heights[which] * 0.42 + 0.05 * np.abs((_X * 9 + rng.random()) % 1 - 0.5)
    snowy = _cover(snow_line - (_Y - (shore - heights[which]))) * (which == 1)
    snow = (rock + above) * 0.3 + 0.3 + (light * 0.98 - (rock + above) * 0.3 - 0.3) * lit[..., None]
    colour = colour + (snow - colour) * snowy[..., None]
    haze = np.clip(depth / 0.35, 0, 1) * 0.35
    colour = colour + (horizon - colour) * haze[..., None]
    _lay(picture, colour, _cover(depth))


def _hills(picture, rng, shore, hill, horizon) -> None:
    for k, (base, size) in enumerate(((0.075, 0.04), (0.03, 0.03))):
        phase, length = rng.uniform(0, 6.28), rng.uniform(3, 6)
        top = shore - base - size * np.sin(_X * length + phase) - 0.01 * np.sin(_X * 17 + 2 * phase)
        colour = hill + (horizon - hill) * (0.4 - 0.28 * k)
        shade = 1.15 - np.clip((_Y - top) / 0.12, 0, 1) * 0.4
        _lay(picture, colour * shade[..., None], _cover(_Y - top))


def _lake(picture, rng, shore, sun, light, hill) -> None:
    """Everything above the shore once more below it, trembling and darker, and the path of the light."""
    line = int(shore * HEIGHT)
    rows = np.arange(line, HEIGHT)
    below = (rows - line + 1)[:, None]
    swing = np.sin(below * 1.7 + rng.uniform(0, 6.28)) * below * 0.06
    columns = np.clip(np.arange(WIDTH) + np.rint(swing), 0, WIDTH - 1).astype(int)
    mirrored = picture[np.clip(2 * line - rows - 1, 0, line - 1)[:, None], columns]
    depth = below[..., None] / (HEIGHT - line)
    water = mirrored * (0.9 - 0.3 * depth) + hill * 0.08
    spread = 0.03 + 0.05 * depth[..., 0]
    path = np.exp(-(((_X - sun) / spread) ** 2)) * (0.45 + 0.25 * np.sin(below * 2.1))
    picture[line:] = water + (light - water) * path[..., None]


def _ease(t):
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _cover(distance, soft: float = 1.0):
    """How much of a pixel lies inside an edge at signed `distance`: 0 ... 1 over `soft` pixels."""
    return np.clip(distance * (HEIGHT / soft) + 0.5, 0, 1)


def _lay(picture, colour, amount) -> None:
    picture += (colour - picture) * amount[..., None]
