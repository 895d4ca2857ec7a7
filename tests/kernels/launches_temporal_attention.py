"""temporal_attention: MERV's windows of 8, and shapes that take other paths."""

import torch

from merv_fast.kernels import temporal_attention
from tests.kernels.registry import case, meta

HALF, SINGLE = torch.float16, torch.float32


@case("temporal_attention", meta(16, 257, 3072), 16, 8)
@case("temporal_attention: batch 8", meta(128, 257, 3072, dtype=HALF), 16, 8)
@case("temporal_attention: float32", meta(16, 257, 3072, dtype=SINGLE), 16, 8)
@case("temporal_attention: long window", meta(62, 257, 3072), 16, 62)
@case("temporal_attention: narrow heads", meta(8, 35, 384), 16, 4)
@case("temporal_attention: padded heads", meta(15, 257, 1920, dtype=HALF), 8, 15)
@case("temporal_attention: wide heads", meta(32, 257, 3072, dtype=HALF), 4, 16)
@case("temporal_attention: wide heads, float32", meta(8, 35, 1536, dtype=SINGLE), 2, 8)
@case("temporal_attention: odd heads", meta(15, 35, 39), 1, 5)
@case("temporal_attention: odd heads, float32", meta(8, 35, 3 * 769, dtype=SINGLE), 1, 8)
@case("temporal_attention: misaligned", meta(16, 257, 3073)[..., 1:], 16, 8)
@case("temporal_attention: alone", meta(16, 257, 3072), 16, 1)
@case("temporal_attention: one patch, one head", meta(8, 1, 192), 1, 8)
@case("temporal_attention: ones", meta(1, 1, 3), 1, 1)
@case("temporal_attention: ones, window in parts", meta(9, 1, 3), 1, 9)
@case("temporal_attention: over 2^31 elements", meta(4096, 257, 3072), 16, 8)
def attend(qkv, heads, window):
    out = temporal_attention.launch(qkv, heads, window)
    temporal_attention.launch_backward(out, qkv, heads, window)
