"""Drawing on uint8 pixels: a canvas, boxes, letters, a PNG file."""

from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["BACKGROUND", "BRIGHT", "DIM", "GLYPHS", "LETTER", "Colour", "box", "canvas", "png", "write"]

Colour = tuple[int, int, int]

BACKGROUND = (24, 26, 31)
BRIGHT = (238, 240, 244)
DIM = (148, 154, 166)

LETTER = 6
"""Dots from one letter to the next."""

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
    "+": (0, 4, 4, 31, 4, 4, 0),
    "(": (2, 4, 8, 8, 8, 4, 2),
    ")": (8, 4, 2, 2, 2, 4, 8),
    "%": (25, 25, 2, 4, 8, 19, 19),
    " ": (0, 0, 0, 0, 0, 0, 0),
}
UNKNOWN = (31, 17, 17, 17, 17, 17, 31)


def canvas(height: int, width: int) -> Tensor:
    """uint8 [height, width, 3] of the background's colour."""
    return torch.tensor(BACKGROUND, dtype=torch.uint8).repeat(height, width, 1)


def box(sheet: Tensor, top: int, left: int, height: int, width: int, colour: Colour) -> None:
    """Fill a box, as far as it lies on the sheet."""
    sheet[top : top + height, left : left + width] = torch.tensor(colour, dtype=torch.uint8)


def write(sheet: Tensor, text: str, top: int, left: int, colour: Colour, scale: int) -> int:
    """Write ``text`` in capitals, cut off at the right edge; return the column after it."""
    for letter in text.upper():
        dots = torch.tensor([[row >> bit & 1 for bit in range(4, -1, -1)] for row in GLYPHS.get(letter, UNKNOWN)])
        mask = dots.repeat_interleave(scale, 0).repeat_interleave(scale, 1).bool()
        area = sheet[top : top + mask.shape[0], left : left + mask.shape[1]]
        area[mask[: area.shape[0], : area.shape[1]]] = torch.tensor(colour, dtype=torch.uint8)
        left += LETTER * scale
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
