"""Every tolerance of the test suite and where it comes from; no other file holds one."""

import torch
from torch import Tensor

GOLDEN = 1e-4
"""Relative to the largest magnitude, float32: the golden files were made on another CPU with other BLAS kernels."""

NORMALISED_FRAMES = 1e-6
"""Absolute: one float32 rounding of (x/255 - mean)/std, whose magnitude stays below 3, in another order."""

FLOAT64 = 1e-12
"""Relative: reassociated float64 sums of a few thousand terms of similar size."""

DALI_LEVELS = 2
"""Of 255: DALI converts the same Y'CbCr as FFmpeg, so the rounding before it, above one of RGB_LEVELS, is shared."""

EIGHT_BIT_WEIGHTS = 2**-6
"""Absolute, of a probability after two small layers: weights are off by 1/256 of the largest in their row at most."""

TRAINING = 1e-4
"""Relative to the first loss, float32: gradients differ by a few 1e-7, and 200 steps of descent add up at most."""

INDUCTOR = 1e-5
"""Relative, float32: its exp, sin and tanh may be off by an ulp or two, which sums of a hundred products carry on."""

RGB_LEVELS = 3
"""Of 255: Y, Cb and Cr rounded to 8 bits are off by 1/2 each, so
BT.709's blue = 1.164 Y + 2.112 Cb by 1.64, and libswscale's own rounding adds up to 1."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude, in float64."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((got.double() - expected.double()).abs().max() / scale).item()


def low_precision(low: Tensor, exact: Tensor, rounded_to: torch.dtype | None = None) -> float:
    """Absolute budget: twice (an honest low-precision evaluation's own error + one rounding step).

    ``low`` is the reference evaluated in the low dtype, ``exact`` the same in float64. ``rounded_to`` is the
    dtype to which values on the way are rounded, where it is coarser than that of the result.
    """
    step = torch.finfo(rounded_to or low.dtype).eps * exact.double().abs().max().item()
    return 2 * ((low.double() - exact.double()).abs().max().item() + step)


def float32_sum(terms: Tensor) -> float:
    """Absolute budget of a float32 sum of ``terms``, and of products of two, in any order.

    Each of its n roundings is at most eps / 2 of a partial sum, and none of those exceeds the sum of magnitudes.
    """
    return terms.numel() * torch.finfo(torch.float32).eps * terms.double().abs().sum().item()
