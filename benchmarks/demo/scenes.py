"""Procedural landscapes with a caption: the ground truth that the shipped model is trained on and measured against.

A scene is a pure function of a seed. It can be drawn at any canvas size and any crop of that canvas, and a crop holds the
same pixels as the whole. Every texture is a sum of octaves that enter only once the canvas resolves them, so an enlarged
view keeps gaining detail. numpy only.

Lengths inside a scene are in *units* of the canvas's shorter side; `x` and `y` of a disk are fractions of width and height.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hires.tiling.geometry import Box, Size

Array = NDArray[np.float32]

TIMES = ("dawn", "noon", "dusk", "night")
GROUNDS = ("lake", "meadow", "desert")
MOUNTAINS = ("green", "purple", "blue", "brown", "red", "grey")
THIRDS = ("left", "middle", "right")
HORIZON = 0.66
EDGE_PX = 1.5
COARSEST = 0.16

SKY = {  # zenith, horizon
    "dawn": ((0.42, 0.50, 0.72), (0.93, 0.70, 0.62)),
    "noon": ((0.20, 0.44, 0.78), (0.62, 0.78, 0.90)),
    "dusk": ((0.24, 0.20, 0.44), (0.90, 0.48, 0.28)),
    "night": ((0.03, 0.05, 0.14), (0.13, 0.18, 0.34)),
}
LIGHT = {"dawn": 0.85, "noon": 1.0, "dusk": 0.70, "night": 0.48}
DISK = {"sun": (1.0, 0.95, 0.74), "moon": (0.90, 0.92, 0.96)}
MOUNTAIN = {
    "green": (0.24, 0.46, 0.22),
    "purple": (0.44, 0.28, 0.56),
    "blue": (0.22, 0.36, 0.62),
    "brown": (0.48, 0.34, 0.22),
    "red": (0.62, 0.26, 0.20),
    "grey": (0.46, 0.47, 0.48),
}
GROUND = {"meadow": (0.42, 0.60, 0.24), "desert": (0.84, 0.68, 0.42)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One sun or moon: centre as fractions of width and height, radius in units of the shorter side."""

    kind: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that decides a picture; two equal scenes draw equal pixels."""

    seed: int
    time: str
    ground: str
    mountains: str
    disks: tuple[Disk, ...]

    @property
    def third(self) -> str:
        """The third of the picture that holds the first disk."""
        return THIRDS[int(self.disks[0].x * 3)]

    @property
    def kind(self) -> tuple[str, str, str, str, str]:
        """What the caption says, as a key: disk, third, mountains, ground, time."""
        return (self.disks[0].kind, self.third, self.mountains, self.ground, self.time)

    @property
    def caption(self) -> str:
        return caption(self.kind)


Kind = tuple[str, str, str, str, str]


def caption(kind: Kind) -> str:
    """The full sentence of a kind, as used in training and in the README."""
    disk, third, mountains, ground, time = kind
    place = "in the middle" if third == "middle" else f"on the {third}"
    return f"a {disk} {place} over {mountains} mountains and a {ground} at {time}"


@lru_cache(maxsize=1)
def kinds() -> tuple[Kind, ...]:
    """Every combination a caption can name: 324 of them."""
    skies = [("sun", t) for t in TIMES[:3]] + [("moon", t) for t in ("dawn", "dusk", "night")]
    return tuple(
        (disk, third, mountains, ground, time)
        for (disk, time), third, mountains, ground in itertools.product(skies, THIRDS, MOUNTAINS, GROUNDS)
    )


def scene(seed: int, kind: Kind | None = None) -> Scene:
    """The scene of a seed, of the given kind or of one drawn from the seed, with exactly one disk."""
    rng = np.random.default_rng(seed)
    drawn = kinds()[int(rng.integers(len(kinds())))]
    disk, third, mountains, ground, time = kind or drawn
    centre = (THIRDS.index(third) + 0.5) / 3
    first = Disk(
        kind=disk,
        x=float(centre + rng.uniform(-0.07, 0.07)),
        y=float(rng.uniform(0.15, 0.30)),
        radius=float(rng.uniform(0.060, 0.085)),
    )
    return Scene(seed=seed, time=time, ground=ground, mountains=mountains, disks=(first,))


def with_disks(base: Scene, count: int) -> Scene:
    """The scene with `count` separate disks of the same kind (0 to 3), for testing a counter."""
    rng = np.random.default_rng([base.seed, count])
    kind = base.disks[0].kind
    slots = rng.permutation(3)[:count]
    disks = tuple(
        Disk(
            kind=kind,
            x=float((slot + 0.5) / 3 + rng.uniform(-0.07, 0.07)),
            y=float(rng.uniform(0.15, 0.30)),
            radius=float(rng.uniform(0.050, 0.085)),
        )
        for slot in slots
    )
    return replace(base, disks=disks)


def _hash(rows: NDArray[np.int64], cols: NDArray[np.int64], seed: int) -> Array:
    """Unit-variance uniform values on integer lattice points, (len(rows), len(cols)); a pure function of the point."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1))
    r = rows.astype(np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03)
    c = cols.astype(np.uint64)[None, :] * np.uint64(0x8CB92BA72F3D8DD7)
    z = r + c + key
    z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    z = (z ^ (z >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    z = z ^ (z >> np.uint64(32))
    unit = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return ((unit - np.float32(0.5)) * np.float32(12**0.5)).astype(np.float32)


def _spline(coords: NDArray[np.float64], spacing: float) -> tuple[NDArray[np.int64], Array]:
    """Lattice points that reach `coords`, and the cubic B-spline weights (len(coords), len(points)) that blend them."""
    t = coords / spacing
    low = int(np.floor(t.min())) - 1
    points = np.arange(low, int(np.floor(t.max())) + 3, dtype=np.int64)
    cell = np.floor(t).astype(np.int64)
    f = t - cell
    weights = np.zeros((len(coords), len(points)), dtype=np.float32)
    taps = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    rows = np.arange(len(coords))
    for k, tap in enumerate(taps):
        weights[rows, cell - 1 + k - low] = tap / 6
    return points, weights


_SPLINE_STD = 0.4794  # on the plane, of cubic B-spline noise over a unit-variance lattice: variance 151/315 per axis


def _noise(y: NDArray[np.float64], x: NDArray[np.float64], spacing: tuple[float, float], seed: int) -> Array:
    """Smooth noise of mean 0 and standard deviation about 1 on the product grid of y and x, (len(y), len(x))."""
    rows, wy = _spline(y, spacing[0])
    cols, wx = _spline(x, spacing[1])
    blended = wy @ _hash(rows, cols, seed) @ wx.T
    return np.asarray(blended / _SPLINE_STD, dtype=np.float32)


def _resolved(spacing_px: float) -> float:
    """How much of an octave the canvas shows: 0 below 1.5 px between lattice points, all from 4 px on."""
    f = min(max((spacing_px - 1.5) / 2.5, 0.0), 1.0)
    return f * f * (3 - 2 * f)


def _fbm(
    y: NDArray[np.float64],
    x: NDArray[np.float64],
    unit_px: int,
    seed: int,
    *,
    gain: float,
    stretch: float = 1.0,
    crease: float = 0.0,
) -> Array:
    """Octaves of noise from `COARSEST` units down to the pixel; `crease` folds part of each octave into sharp lines."""
    total = np.zeros((len(y), len(x)), dtype=np.float32)
    spacing, amplitude = COARSEST, 1.0
    for octave in itertools.count():
        shown = _resolved(spacing * unit_px)
        if shown == 0.0:
            return total
        n = _noise(y, x, (spacing, spacing * stretch), seed * 131 + octave)
        if crease:
            n = np.float32(1 - crease) * n + np.float32(crease) * (np.float32(1.2) - 2 * np.abs(n))
        total += np.float32(shown * amplitude) * n
        spacing, amplitude = spacing / 2, amplitude * gain
    raise AssertionError("unreachable")


def _ridge(x: NDArray[np.float64], unit_px: int, seed: int) -> Array:
    """A mountain line over x: height 0 to about 1, peaks from folded octaves, finer ones as the canvas resolves them."""
    at = np.zeros(1)
    total = np.zeros(len(x), dtype=np.float32)
    spacing, amplitude = 0.34, 0.55
    for octave in itertools.count():
        shown = _resolved(spacing * unit_px)
        if shown == 0.0:
            return total
        n = _noise(at, x, (1.0, spacing), seed * 137 + octave)[0] * np.float32(0.7)
        if octave < 3:
            n = 1 - 2 * np.abs(n)
        total += np.float32(shown * amplitude) * n
        spacing, amplitude = spacing / 2, amplitude * 0.52
    raise AssertionError("unreachable")


def _rgb(colour: tuple[float, float, float]) -> Array:
    return np.asarray(colour, dtype=np.float32)


def _mix(a: Array, b: Array, t: Array) -> Array:
    return a + (b - a) * t[..., None]


def _below(y: NDArray[np.float64], line: Array, x: NDArray[np.float64], unit_px: int) -> Array:
    """Coverage (len(y), len(x)) of what lies below a line over x, softened across the line by `EDGE_PX`."""
    slope = np.gradient(line, x) if len(x) > 1 else np.zeros_like(line)
    steep = np.sqrt(1 + slope.astype(np.float64) ** 2)
    distance_px = (y[:, None] - line[None, :]) * (unit_px / steep)[None, :]
    return np.clip(distance_px / EDGE_PX + 0.5, 0, 1).astype(np.float32)


def _sky(scene: Scene, y: NDArray[np.float64], x: NDArray[np.float64], canvas: Size) -> Array:
    unit_px = min(canvas.height, canvas.width)
    zenith, horizon = map(_rgb, SKY[scene.time])
    height = canvas.height / unit_px
    t = np.clip(y / (HORIZON * height), 0, 1).astype(np.float32) ** np.float32(1.3)
    picture = np.repeat(_mix(zenith, horizon, t)[:, None, :], len(x), axis=1)
    for disk in scene.disks:
        dx = x[None, :] - disk.x * canvas.width / unit_px
        dy = y[:, None] - disk.y * height
        glow = np.exp(-(dx**2 + dy**2) / (2 * (2.6 * disk.radius) ** 2)).astype(np.float32)
        strength = 0.30 if disk.kind == "sun" else 0.14
        picture = _mix(picture, _rgb(DISK[disk.kind]), glow * np.float32(strength))
    cirrus = _fbm(y, x, unit_px, scene.seed * 7 + 1, gain=0.90, stretch=3.0)
    return picture + (np.float32(0.008 * (0.4 + LIGHT[scene.time])) * cirrus)[..., None]


def _paint_disks(picture: Array, scene: Scene, y: NDArray[np.float64], x: NDArray[np.float64], canvas: Size) -> Array:
    unit_px = min(canvas.height, canvas.width)
    for disk in scene.disks:
        dx = x[None, :] - disk.x * canvas.width / unit_px
        dy = y[:, None] - disk.y * canvas.height / unit_px
        inside_px = (disk.radius - np.hypot(dx, dy)) * unit_px
        if inside_px.max() < -EDGE_PX:
            continue
        cover = np.clip(inside_px / EDGE_PX + 0.5, 0, 1).astype(np.float32)
        face = np.broadcast_to(_rgb(DISK[disk.kind]), picture.shape)
        if disk.kind == "moon":
            maria = _fbm(y, x, unit_px, scene.seed * 7 + 2, gain=0.8)
            face = face + (np.float32(0.022) * maria)[..., None]
        picture = _mix(picture, face, cover)
    return picture


def _paint_mountains(picture: Array, scene: Scene, y: NDArray[np.float64], x: NDArray[np.float64], canvas: Size) -> Array:
    unit_px = min(canvas.height, canvas.width)
    height = canvas.height / unit_px
    haze = _rgb(SKY[scene.time][1])
    light = np.float32(LIGHT[scene.time])
    for layer, (top, tall, hazy) in enumerate(((0.52, 0.085, 0.34), (0.595, 0.080, 0.08))):
        line = (top * height - tall * _ridge(x, unit_px, scene.seed * 11 + layer)).astype(np.float32)
        cover = _below(y, line, x, unit_px)
        if not cover.any():
            continue
        base = _rgb(MOUNTAIN[scene.mountains]) * light
        rock = _fbm(y, x, unit_px, scene.seed * 13 + layer, gain=0.90, crease=0.6)
        shade = np.clip(1 + np.float32(0.12) * rock, 0.3, 1.9)
        body = _mix(base * shade[..., None], haze, np.full(shade.shape, hazy, dtype=np.float32))
        picture = _mix(picture, body, cover)
    return picture


def _paint_ground(picture: Array, scene: Scene, y: NDArray[np.float64], x: NDArray[np.float64], canvas: Size) -> Array:
    unit_px = min(canvas.height, canvas.width)
    height = canvas.height / unit_px
    shore = np.full(len(x), HORIZON * height, dtype=np.float32)
    if scene.ground != "lake":
        shore = shore - np.float32(0.012) * _ridge(x, unit_px, scene.seed * 17)
    cover = _below(y, shore, x, unit_px)
    if not cover.any():
        return picture
    near = np.clip((y / height - HORIZON) / (1 - HORIZON), 0, 1).astype(np.float32)  # 0 at the shore, 1 at the bottom
    paint = _lake if scene.ground == "lake" else _land
    return _mix(picture, paint(scene, y, x, canvas, near), cover)


def _lake(scene: Scene, y: NDArray[np.float64], x: NDArray[np.float64], canvas: Size, near: Array) -> Array:
    unit_px = min(canvas.height, canvas.width)
    zenith, horizon = map(_rgb, SKY[scene.time])
    water = _mix(horizon, zenith, near)[:, None, :] * np.float32(0.72)
    ripples = _fbm(y, x, unit_px, scene.seed * 19, gain=0.90, stretch=5.0, crease=0.5)
    shade = 1 + np.float32(0.09) * ripples * (0.35 + 0.65 * near)[:, None]
    body: Array = water * shade[..., None]
    for disk in scene.disks:
        dx = x[None, :] - disk.x * canvas.width / unit_px
        path = np.exp(-(dx**2) / (2 * (0.5 * disk.radius * (1 + 1.5 * near[:, None])) ** 2)).astype(np.float32)
        glitter = path * np.clip(0.30 + 0.16 * ripples, 0, 0.8)
        body = _mix(body, _rgb(DISK[disk.kind]) * np.float32(0.5 + 0.5 * LIGHT[scene.time]), glitter)
    return body


def _land(scene: Scene, y: NDArray[np.float64], x: NDArray[np.float64], canvas: Size, near: Array) -> Array:
    unit_px = min(canvas.height, canvas.width)
    desert = scene.ground == "desert"
    base = _rgb(GROUND[scene.ground]) * np.float32(0.15 + 0.85 * LIGHT[scene.time])
    grain = _fbm(y, x, unit_px, scene.seed * 23, gain=0.90, stretch=2.6 if desert else 0.9, crease=0.55)
    shade = (1.06 - 0.22 * near)[:, None] + np.float32(0.06 if desert else 0.09) * grain
    return base * shade[..., None]


def draw(scene: Scene, canvas: Size, box: Box | None = None) -> Array:
    """Pixels (height, width, 3) float32 in [0, 1] of `box` (default: all) of the scene drawn `canvas` large."""
    box = box or Box(0, 0, canvas.height, canvas.width)
    unit_px = min(canvas.height, canvas.width)
    y = (np.arange(box.top, box.top + box.height) + 0.5) / unit_px
    x = (np.arange(box.left, box.left + box.width) + 0.5) / unit_px
    picture = _sky(scene, y, x, canvas)
    picture = _paint_disks(picture, scene, y, x, canvas)
    picture = _paint_mountains(picture, scene, y, x, canvas)
    picture = _paint_ground(picture, scene, y, x, canvas)
    return np.clip(picture, 0, 1, out=picture)


def draw_bands(scene: Scene, canvas: Size, rows: int = 256) -> Iterator[Array]:
    """The same picture from top to bottom, `rows` at a time, for canvases too large to hold twice."""
    for top in range(0, canvas.height, rows):
        yield draw(scene, canvas, Box(top, 0, min(rows, canvas.height - top), canvas.width))
