"""resample_frames: resize uint8 pictures to the bit as Pillow's Image.resize does, antialiased.

    frames  [..., H, W, C]   uint8, any strides, any leading dimensions
    out     [..., h, w, C]   uint8, contiguous

Two passes, one a dimension; a pass whose size does not change is skipped. The vertical pass runs first if
H - h > max(0, 2 * (W - w)), else the horizontal one. The picture is rounded to uint8 between them.

A pass from n to m samples, with scale = n / m, stretch = max(scale, 1) and the support s of the filter (1 for
bilinear, 2 for bicubic), gives output j by

    centre = (j + 0.5) * scale
    start  = max(int(centre - s * stretch + 0.5), 0)
    end    = min(int(centre + s * stretch + 0.5), n)
    f_k    = filter((k - centre + 0.5) * (1 / stretch))        k = start .. end - 1
    c_k    = int(f_k / sum(f) * 2^22 +- 0.5)                   rounded half away from zero, int32
    out_j  = clip((2^21 + sum_k c_k * in_k) >> 22, 0, 255)     int32, arithmetic shift

with filter(x) = 1 - |x| below 1 (bilinear), or Keys' cubic of a = -0.5 below 2 (bicubic), 0 beyond.
The table is made on the host in the order written above, as the last bit of c_k depends on it.

Source: Pillow 13, src/libImaging/Resample.c.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from merv_fast.ops._checks import check_grid

__all__ = ["resample_frames"]


def resample_frames(frames: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """Resize ``frames [..., H, W, C]`` to ``size = (h, w)``, bit-identical to Pillow's ``Image.resize``.

    Args:
        frames: uint8 pictures, channels last; leading dimensions may be absent or empty.
        size: (h, w), both at least 1.
        method: "bicubic" or "bilinear", both with Pillow's antialiasing.

    Raises:
        ValueError: a shape, size or method that does not fit.
        TypeError: frames are not uint8.

    >>> resample_frames(torch.tensor([0, 100], dtype=torch.uint8).view(1, 2, 1), (1, 3), "bilinear").flatten()
    tensor([  0,  50, 100], dtype=torch.uint8)
    """
    check_frames("resample_frames", frames, size, method)
    return torch.ops.merv_fast.resample_frames.default(frames, size, method)


def check_frames(op: str, frames: Tensor, size: Sequence[int], method: str) -> None:
    """Raise unless ``frames`` are uint8 [..., H, W, C] that can be resized to ``size`` with ``method``."""
    if frames.dtype != torch.uint8:
        raise TypeError(f"{op}: frames must be uint8, got {frames.dtype}")
    if frames.ndim < 3 or min(frames.shape[-3:]) < 1:
        raise ValueError(f"{op}: frames must be [..., H, W, C], got shape {tuple(frames.shape)}")
    check_grid(op, "size", size)
    if method not in _FILTERS:
        raise ValueError(f"{op}: method must be 'bicubic' or 'bilinear', got {method!r}")


torch.library.define("merv_fast::resample_frames", "(Tensor frames, SymInt[] size, str method) -> Tensor")


def reference(frames: Tensor, size: list[int], method: str) -> Tensor:
    """Each pass as matrix products in float64, exact because every partial sum is an integer below 2^53."""
    (*lead, H, W, C), (h, w) = frames.shape, size
    flat = frames.reshape(-1, H, W, C)
    out = flat.new_empty(len(flat), h, w, C)
    vertical_first = H - h > max(0, 2 * (W - w))
    step = max(1, _CHUNK // (max(H, h) * max(W, w) * C))
    for start in range(0, len(flat), step):
        planes = flat[start : start + step].permute(0, 3, 1, 2).double()
        if vertical_first:
            planes = _columns(planes, h, method)
        planes = _rows(planes, w, method)
        if not vertical_first:
            planes = _columns(planes, h, method)
        out[start : start + step] = planes.permute(0, 2, 3, 1)
    return out.view(*lead, h, w, C)


_CHUNK = 1 << 21
"""Samples held in float64 at once, 16 MiB (or one frame): near a CPU's cache, however long the clip."""

_BAND = 32
"""Outputs of one matrix product: neighbours read nearly the same samples, so its matrix has few zeros."""

_ONE = 1 << 22
"""The coefficient that stands for 1."""


class Band(NamedTuple):
    """Outputs from ``first`` on of a pass, as a matrix over its samples ``start`` to ``end`` (excluded)."""

    first: int
    start: int
    end: int
    matrix: Tensor


def _rows(planes: Tensor, m: int, method: str) -> Tensor:
    """The horizontal pass over float64 planes [F, C, H, W]."""
    n = planes.shape[-1]
    if n == m:
        return planes
    out = planes.new_empty(*planes.shape[:-1], m)
    for first, start, end, matrix in _bands(n, m, method):
        out[..., first : first + len(matrix)] = planes[..., start:end] @ matrix.to(planes.device).T
    return _round(out)


def _columns(planes: Tensor, m: int, method: str) -> Tensor:
    """The vertical pass over float64 planes [F, C, H, W]."""
    n = planes.shape[-2]
    if n == m:
        return planes
    out = planes.new_empty(*planes.shape[:-2], m, planes.shape[-1])
    for first, start, end, matrix in _bands(n, m, method):
        out[..., first : first + len(matrix), :] = matrix.to(planes.device) @ planes[..., start:end, :]
    return _round(out)


def _round(sums: Tensor) -> Tensor:
    # A division by a power of two is exact, so this is (2^21 + sum) >> 22.
    return sums.div_(_ONE).add_(0.5).floor_().clamp_(0, 255)


@lru_cache(maxsize=128)
def _bands(n: int, m: int, method: str) -> list[Band]:
    """The pass from n to m samples cut into bands of float64 matrices on the CPU."""
    taps = coefficients(n, m, method)
    bands = []
    for first in range(0, m, _BAND):
        block = taps[first : first + _BAND]
        start, end = block[0][0], max(s + len(c) for s, c in block)
        matrix = torch.zeros(len(block), end - start, dtype=torch.float64)
        for row, (s, c) in zip(matrix, block, strict=True):
            row[s - start : s - start + len(c)] = torch.tensor(c, dtype=torch.float64)
        bands.append(Band(first, start, end, matrix))
    return bands


@lru_cache(maxsize=128)
def coefficients(n: int, m: int, method: str) -> list[tuple[int, list[int]]]:
    """For each of m outputs: the first of the n samples it reads, and their integer coefficients."""
    support, kernel = _FILTERS[method]
    scale = n / m
    stretch = max(scale, 1.0)
    reach, shrink = support * stretch, 1.0 / stretch
    taps = []
    for j in range(m):
        centre = (j + 0.5) * scale
        start, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), n)
        weights = [kernel((k - centre + 0.5) * shrink) for k in range(start, end)]
        # Not sum(): from Python 3.12 on it compensates rounding, and Pillow does not.
        total = 0.0
        for weight in weights:
            total += weight
        shares = [weight / total for weight in weights]
        taps.append((start, [int(share * _ONE + (0.5 if share >= 0 else -0.5)) for share in shares]))
    return taps


def _bilinear(x: float) -> float:
    x = abs(x)
    return 1.0 - x if x < 1.0 else 0.0


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


_FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {
    "bilinear": (1.0, _bilinear),
    "bicubic": (2.0, _bicubic),
}
"""Support and kernel of each method, in samples of the coarser of input and output."""

torch.library.impl("merv_fast::resample_frames", "default", reference)


@torch.library.register_fake("merv_fast::resample_frames")
def _fake(frames: Tensor, size: list[int], method: str) -> Tensor:
    return frames.new_empty(*frames.shape[:-3], size[0], size[1], frames.shape[-1])
