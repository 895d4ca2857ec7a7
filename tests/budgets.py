"""Every tolerance of the test suite and where it comes from; no other file holds one."""

import torch
from torch import Tensor

GOLDEN = 1e-4
"""Relative to the largest magnitude, float32: the golden files were made on another CPU with other BLAS kernels."""

NORMALISED_FRAMES = 1e-6
"""Absolute: one float32 rounding of (x/255 - mean)/std, whose magnitude stays below 3, in another order."""

FLOAT64 = 1e-12
"""Relative: reassociated float64 sums of a few thousand terms of similar size."""

RGB_LEVELS = 3
"""Of 255: Y, Cb and Cr rounded to 8 bits are off by 1/2 each, so
BT.709's blue = 1.164 Y + 2.112 Cb by 1.64, and libswscale's own rounding adds up to 1."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude, in float64."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((got.double() - expected.double()).abs().max() / scale).item()


def low_precision(low: Tensor, exact: Tensor) -> float:
    """Absolute budget: twice (an honest low-precision evaluation's own error + one rounding step).

    ``low`` is the reference evaluated in the low dtype, ``exact`` the same in float64.
    """
    step = torch.finfo(low.dtype).eps * exact.double().abs().max().item()
    return 2 * ((low.double() - exact.double()).abs().max().item() + step)
