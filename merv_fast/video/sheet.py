"""A contact sheet: the frames each encoder gets, as it sees them, in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merv_fast.video.drawing import BRIGHT, DIM, canvas, write
from merv_fast.video.prepare import Recipe, prepare_all

__all__ = ["Row", "contact_sheet", "seen_frames", "tile_boxes"]

COLUMNS = 8
MIN_TILE = 112
# Lengths in dots of the smallest letters.
MARGIN = 24
GAP = 6
TITLE = 26
HEADING = 36
CAPTION = 14
SECTION = 14


@dataclass(frozen=True)
class Row:
    """One encoder's frames uint8 [F, S, S, 3], their indices in the video, and what to write above them."""

    name: str
    detail: str
    frames: Tensor
    indices: Sequence[int]


def seen_frames(frames: Tensor, recipes: Sequence[Recipe], num_frames: Sequence[int]) -> list[Tensor]:
    """What each encoder sees: `prepare_all`'s result with mean and deviation taken out again.

    Args:
        frames: uint8 [F, H, W, 3].
        recipes: One for each encoder.
        num_frames: How many frames each encoder takes.

    Returns:
        uint8 [F_e, S_e, S_e, 3], rounded to the nearest level; bicubic overshoot was already cut off.

    >>> half = (0.5, 0.5, 0.5)
    >>> recipe = Recipe(8, 8, "resize-naive", "bicubic", antialias=True, mean=half, std=half)
    >>> seen_frames(torch.full((4, 9, 16, 3), 200, dtype=torch.uint8), [recipe], [2])[0].unique()
    tensor([200], dtype=torch.uint8)
    """
    seen = []
    for recipe, tensor in zip(recipes, prepare_all(frames, recipes, num_frames), strict=True):
        mean, std = (tensor.new_tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
        levels = (tensor * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        seen.append(levels.movedim(-3, -1).cpu())
    return seen


def contact_sheet(title: str, rows: Sequence[Row]) -> Tensor:
    """Draw the sheet: for each of one or more rows its name and its frames, eight to a line, each over its index.

    A tile shows every pixel of its frame, small frames enlarged by a whole number.

    Returns:
        uint8 [H, W, 3].
    """
    boxes, dot = tile_boxes(rows), dot_size(rows)
    width = max(left + side for row in boxes for _, left, side in row) + MARGIN * dot
    height = max(top + side for row in boxes for top, _, side in row) + (CAPTION + MARGIN) * dot
    sheet = canvas(height, width)
    write(sheet, title, MARGIN * dot, MARGIN * dot, DIM, 2 * dot)
    for row, places in zip(rows, boxes, strict=True):
        top, left, _ = places[0]
        end = write(sheet, row.name, top - 24 * dot, left, BRIGHT, 2 * dot)
        write(sheet, row.detail, top - 17 * dot, end + 12 * dot, DIM, dot)
        for frame, index, (top, left, side) in zip(row.frames, row.indices, places, strict=True):
            scale = side // frame.shape[0]
            enlarged = frame.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            sheet[top : top + side, left : left + side] = enlarged
            write(sheet, str(index), top + side + 4 * dot, left, DIM, dot)
    return sheet


def tile_boxes(rows: Sequence[Row]) -> list[list[tuple[int, int, int]]]:
    """Where each frame of each row lies on the sheet: (top, left, side)."""
    dot = dot_size(rows)
    boxes, top = [], (MARGIN + TITLE) * dot
    for row, side in zip(rows, sides(rows), strict=True):
        top += HEADING * dot
        down, right = side + (CAPTION + GAP) * dot, side + GAP * dot
        boxes.append(
            [
                (top + place // COLUMNS * down, MARGIN * dot + place % COLUMNS * right, side)
                for place in range(len(row.frames))
            ]
        )
        top = boxes[-1][-1][0] + side + (CAPTION + SECTION) * dot
    return boxes


def sides(rows: Sequence[Row]) -> list[int]:
    """Side of each row's tiles."""
    return [side * max(1, -(-MIN_TILE // side)) for side in (row.frames.shape[1] for row in rows)]


def dot_size(rows: Sequence[Row]) -> int:
    """Pixels of a dot of the smallest letters: they grow with the tiles."""
    return max(sides(rows)) // MIN_TILE
