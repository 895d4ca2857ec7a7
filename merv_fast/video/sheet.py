"""A contact sheet: the frames each encoder gets, as it sees them, in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from merv_fast.video.prepare import Recipe, prepare_all

__all__ = ["Row", "contact_sheet", "png", "seen_frames", "tile_boxes"]

COLUMNS = 8
MIN_TILE = 112
# Lengths in dots of the smallest letters.
MARGIN = 24
GAP = 6
TITLE = 26
HEADING = 36
CAPTION = 14
SECTION = 14

BACKGROUND = (24, 26, 31)
BRIGHT = (238, 240, 244)
DIM = (148, 154, 166)

# Five columns by seven rows of dots a letter; each number is a row, its highest of five bits the leftmost dot.
GLYPHS = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 15),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 25, 21, 19, 19, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "Q": (14, 17, 17, 17, 21, 18, 13),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "W": (17, 17, 17, 21, 21, 21, 10),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4),
    "Z": (31, 1, 2, 4, 8, 16, 31),
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (14, 17, 1, 6, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
    "-": (0, 0, 0, 14, 0, 0, 0),
    "_": (0, 0, 0, 0, 0, 0, 31),
    ".": (0, 0, 0, 0, 0, 12, 12),
    ",": (0, 0, 0, 0, 12, 4, 8),
    ":": (0, 12, 12, 0, 12, 12, 0),
    "/": (1, 1, 2, 4, 8, 16, 16),
    " ": (0, 0, 0, 0, 0, 0, 0),
}
UNKNOWN = (31, 17, 17, 17, 17, 17, 31)


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
    sheet = torch.tensor(BACKGROUND, dtype=torch.uint8).repeat(height, width, 1)
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


def write(sheet: Tensor, text: str, top: int, left: int, colour: tuple[int, int, int], scale: int) -> int:
    """Write ``text`` in capitals, cut off at the right edge; return the column after it."""
    for letter in text.upper():
        dots = torch.tensor([[row >> bit & 1 for bit in range(4, -1, -1)] for row in GLYPHS.get(letter, UNKNOWN)])
        mask = dots.repeat_interleave(scale, 0).repeat_interleave(scale, 1).bool()
        area = sheet[top : top + mask.shape[0], left : left + mask.shape[1]]
        area[mask[: area.shape[0], : area.shape[1]]] = torch.tensor(colour, dtype=torch.uint8)
        left += 6 * scale
    return left


def png(pixels: Tensor) -> bytes:
    """A PNG file of uint8 [H, W, 3].

    >>> png(torch.zeros(2, 3, 3, dtype=torch.uint8))[1:4]
    b'PNG'
    """
    import av

    height, width, _ = pixels.shape
    encoder = av.VideoCodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), "rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
