"""From a scene to pictures: a textured background, and shapes with smooth edges in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample, interpolate

from merv_fast.training.tiny.scenes import COLOURS, Scene, Thing

__all__ = ["draw", "visible"]

Array = NDArray[np.floating[Any]]

TURNS = {"up": 0.0, "right": np.pi / 2, "down": np.pi, "left": -np.pi / 2}
"""By how much an arrow that points up is turned, clockwise."""


def circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.92


def square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def triangle(x: Array, y: Array) -> Array:
    return np.maximum(y - 0.62, 0.866 * np.abs(x) - 0.5 * y - 0.52)


def star(x: Array, y: Array) -> Array:
    """Inside at least four of the five lines of a pentagram."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(5) / 5
    lines = np.stack([x * np.cos(angle) + y * np.sin(angle) for angle in angles]) - 0.36
    return np.partition(lines, 3, axis=0)[3]


def cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.3), np.maximum(x - 0.3, y - 1))


def arrow(x: Array, y: Array) -> Array:
    head = np.maximum(y + 0.05, 0.74 * np.abs(x) - 0.67 * y - 0.67)
    shaft = np.maximum(np.abs(x) - 0.27, np.abs(y - 0.45) - 0.55)
    return np.minimum(head, shaft)


OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "arrow": arrow,
}
"""About the distance from a shape's outline, negative inside; x to the right, y down, within the unit circle."""


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The frames of a scene, RGB [F, H, W, 3]."""
    height, width = scene.size
    times = scene.times()
    pictures = background(scene, times)
    for thing in scene.things:
        colour = np.clip(np.add(COLOURS[thing.colour], thing.tint), 0, 255).astype(np.float32)
        for picture, time in zip(pictures, times, strict=True):
            if thing.seen(time):
                rows, columns, cover = covered(scene, thing, time, height, width)
                part = picture[rows, columns]
                part += cover[..., None] * (colour - part)
    return np.round(pictures).clip(0, 255).astype(np.uint8)


def visible(scene: Scene, times: Sequence[float], side: int) -> NDArray[np.uint8]:
    """Which thing is in front at each pixel of square pictures: [times, side, side], its number from 1, or 0."""
    found = np.zeros((len(times), side, side), np.uint8)
    for number, thing in enumerate(scene.things, 1):
        for picture, time in zip(found, times, strict=True):
            if thing.seen(time):
                rows, columns, cover = covered(scene, thing, time, side, side)
                picture[rows, columns][cover > 0.5] = number
    return found


def covered(scene: Scene, thing: Thing, time: float, height: int, width: int) -> tuple[slice, slice, Array]:
    """Rows and columns of the part of the picture with a thing, and how much of each pixel there it covers."""
    # The radius is a share of the height; a picture that is to be squeezed into a square squeezes its shapes too.
    x, y, radius = scene.on_screen(thing, time)
    wide = radius * scene.size[0] / scene.size[1]
    rows = slice(max(0, int((y - radius) * height) - 1), max(0, int((y + radius) * height) + 2))
    columns = slice(max(0, int((x - wide) * width) - 1), max(0, int((x + wide) * width) + 2))
    across = (np.arange(width, dtype=np.float32)[columns] + 0.5) / width - x
    down = (np.arange(height, dtype=np.float32)[rows] + 0.5) / height - y
    across, down = np.broadcast_arrays(across[None] / wide, down[:, None] / radius)
    turn = thing.tilt + (TURNS[thing.pointing(time)] if thing.shape == "arrow" else 0.0)
    along = across * np.cos(turn) + down * np.sin(turn)
    upright = down * np.cos(turn) - across * np.sin(turn)
    return rows, columns, np.clip(0.5 - OUTLINES[thing.shape](along, upright) * radius * height, 0, 1)


def background(scene: Scene, times: Sequence[float]) -> Array:
    """Dull textures, as the camera sees them: [F, H, W, 3], 0 to 255."""
    height, width = scene.size
    noise = torch.Generator().manual_seed(scene.seed)
    texture = torch.zeros(1, 3, 192, 192)
    for cells, strength in ((4, 34.0), (14, 26.0), (48, 16.0)):
        # Alike in all channels but for a hint of colour.
        grey = torch.randn(1, 1, cells, cells, generator=noise) + 0.15 * torch.randn(
            1, 3, cells, cells, generator=noise
        )
        texture += strength * interpolate(grey, size=(192, 192), mode="bicubic")
    texture = (texture + 70 + 50 * torch.rand(1, generator=noise)).clamp(15, 175)
    # The texture spans twice the picture, so that no view leaves it.
    steps = [(torch.arange(size) + 0.5) / size - 0.5 for size in (height, width)]
    views = sorted({scene.view(time) for time in times}) if scene.camera == "static" else [scene.view(t) for t in times]
    grids = []
    for zoom, dx, dy in views:
        rows, columns = torch.meshgrid(steps[0] / zoom + dy, steps[1] / zoom + dx, indexing="ij")
        grids.append(torch.stack([columns, rows], -1))
    seen = grid_sample(texture.expand(len(grids), -1, -1, -1), torch.stack(grids), align_corners=False)
    seen = seen.movedim(1, -1).expand(len(times), -1, -1, -1)
    return np.array(seen.numpy(), order="C")
