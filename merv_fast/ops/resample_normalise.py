"""resample_normalise: resize uint8 pictures as resample_frames does, cut out a part, and map the 256 levels.

    frames     [..., H, W, C]     uint8, any strides, any leading dimensions
    levels[e]  [C, 256]           float64 | float32 | bfloat16 | float16: what each byte of a channel becomes
    out[e]     [..., C, ch, cw]   levels[e].dtype, contiguous

With r = resample_frames(frames, size, method) and crop = (top, left, ch, cw):

    out[e][..., c, i, j] = levels[e][c, r[..., top + i, left + j, c]]

One resampling serves all tables: encoders that want the same picture differ only in how they normalise it. A table
made with the arithmetic of a normalisation gives that normalisation to the bit, on every device.

Source: the image transforms of MERV's encoders (arXiv 2501.01426); Pillow 13, src/libImaging/Resample.c.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merv_fast.ops._checks import check_floating
from merv_fast.ops.resample_frames import check_frames

__all__ = ["resample_normalise"]


def resample_normalise(
    frames: Tensor,
    size: tuple[int, int],
    method: str,
    crop: tuple[int, int, int, int],
    levels: Sequence[Tensor],
) -> list[Tensor]:
    """Resize ``frames [..., H, W, C]`` to ``size``, cut out ``crop``, and look up each of ``levels``.

    Args:
        frames: uint8 pictures, channels last; leading dimensions may be absent or empty.
        size: (h, w), both at least 1.
        method: "bicubic" or "bilinear", both with Pillow's antialiasing.
        crop: (top, left, rows, columns), inside ``size``.
        levels: one or more ``[C, 256]`` tables, float64, float32, bfloat16 or float16.

    Returns:
        One ``[..., C, rows, columns]`` for each of ``levels``, in its dtype.

    Raises:
        ValueError: a shape, size, method, crop or device that does not fit.
        TypeError: frames are not uint8, or levels not of one of the four dtypes.

    >>> frames = torch.tensor([0, 100], dtype=torch.uint8).view(1, 2, 1)
    >>> (out,) = resample_normalise(frames, (1, 3), "bilinear", (0, 1, 1, 2), [torch.arange(256.0)[None] / 100])
    >>> out.flatten()
    tensor([0.5000, 1.0000])
    """
    op = "resample_normalise"
    check_frames(op, frames, size, method)
    if len(crop) != 4:
        raise ValueError(f"{op}: crop must be (top, left, rows, columns), got {tuple(crop)}")
    top, left, rows, columns = crop
    if min(top, left) < 0 or min(rows, columns) < 1 or top + rows > size[0] or left + columns > size[1]:
        raise ValueError(f"{op}: crop must lie inside {tuple(size)} and not be empty, got {tuple(crop)}")
    if not levels:
        raise ValueError(f"{op}: levels must be at least one table, got none")
    for e, table in enumerate(levels):
        check_floating(op, f"levels[{e}]", table)
        if table.shape != (frames.shape[-1], 256):
            raise ValueError(f"{op}: levels[{e}] must be [{frames.shape[-1]}, 256], got shape {tuple(table.shape)}")
        if table.device != frames.device:
            raise ValueError(f"{op}: levels[{e}] must be on {frames.device} like frames, got {table.device}")
    return torch.ops.merv_fast.resample_normalise.default(frames, size, method, crop, list(levels))


torch.library.define(
    "merv_fast::resample_normalise",
    "(Tensor frames, SymInt[] size, str method, SymInt[] crop, Tensor[] levels) -> Tensor[]",
)


def reference(frames: Tensor, size: list[int], method: str, crop: list[int], levels: list[Tensor]) -> list[Tensor]:
    """Resample, cut out, and index each table."""
    top, left, rows, columns = crop
    resized = torch.ops.merv_fast.resample_frames.default(frames, size, method)
    part = resized[..., top : top + rows, left : left + columns, :].movedim(-1, -3).int()
    channel = torch.arange(part.shape[-3], device=frames.device)[:, None, None]
    return [table[channel, part].contiguous() for table in levels]


torch.library.impl("merv_fast::resample_normalise", "default", reference)


@torch.library.register_fake("merv_fast::resample_normalise")
def _fake(frames: Tensor, size: list[int], method: str, crop: list[int], levels: list[Tensor]) -> list[Tensor]:
    return [table.new_empty(*frames.shape[:-3], frames.shape[-1], crop[2], crop[3]) for table in levels]
