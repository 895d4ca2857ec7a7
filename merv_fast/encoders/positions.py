"""Position embeddings for another grid than the one they were learned on."""

from math import isqrt

from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["resample_positions"]


def resample_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic antialiased resampling of a square grid of position embeddings, computed in float32.

    Args:
        positions: ``[side * side, C]``, row by row.
        grid: rows and columns wanted.

    Returns:
        ``[rows * columns, C]`` in the dtype of ``positions``; itself when the grid is the same.

    Raises:
        ValueError: ``positions`` are not a square grid.

    Source: ``resample_abs_pos_embed`` of timm.
    """
    side = isqrt(len(positions))
    if positions.dim() != 2 or side * side != len(positions):
        shape = list(positions.shape)
        raise ValueError(f"resample_positions: positions must be [side * side, C], got {shape}")
    if grid == (side, side):
        return positions
    image = positions.float().T.unflatten(1, (side, side)).unsqueeze(0)
    image = interpolate(image, size=grid, mode="bicubic", antialias=True)
    return image.squeeze(0).flatten(1).T.to(positions.dtype).contiguous()
