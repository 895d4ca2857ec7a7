"""pool_tokens: MERV's maps, and shapes that take other paths."""

import torch

from merv_fast.kernels import pool_tokens
from tests.kernels.registry import case, meta

GRIDS = [(16, 16), (16, 16), (14, 14), (14, 14)]
WIDTHS = [1024, 1024, 768, 768]


@case("pool_tokens", torch.bfloat16, (1, 16, 256, 1024), (16, 16), (8, 8), 16)
@case("pool_tokens: float32, overlapping bins", torch.float32, (1, 16, 196, 768), (14, 14), (8, 8), 16)
@case("pool_tokens: over 2^31 elements", torch.float16, (64, 512, 256, 1024), (16, 16), (8, 8), 512)
@case("pool_tokens: odd width, upsampled", torch.bfloat16, (1, 16, 35, 769), (5, 7), (8, 8), 16)
@case("pool_tokens: large bins, fewer slots", torch.bfloat16, (1, 16, 1024, 768), (32, 32), (4, 4), 8)
@case("pool_tokens: odd width, large grid, fewer slots", torch.bfloat16, (1, 8, 37 * 37, 769), (37, 37), (16, 16), 3)
@case("pool_tokens: float32, upsampled", torch.float32, (1, 16, 35, 768), (5, 7), (8, 8), 16)
@case("pool_tokens: ones", torch.bfloat16, (1, 1, 1, 1), (1, 1), (1, 1), 1)
def pool(dtype, shape, grid, out_grid, out_slots):
    out = pool_tokens.launch(meta(*shape, dtype=dtype), grid, out_grid, out_slots)
    pool_tokens.launch_backward(out, grid, out_grid, shape[1])


@case("pool_tokens: with scores")
def pool_with_scores():
    xs = [meta(1, 16, H * W, C) for (H, W), C in zip(GRIDS, WIDTHS, strict=True)]
    outs = meta(1, 1024, sum(WIDTHS)).split(WIDTHS, 2)
    pool_tokens.pool(xs, GRIDS, (8, 8), 16, outs, [meta(C, dtype=torch.float32) for C in WIDTHS])


@case("pool_tokens: ones with scores")
def pool_ones_with_scores():
    pool_tokens.pool([meta(1, 1, 1, 1)], [(1, 1)], (1, 1), 1, [meta(1, 1, 1)], [meta(1, dtype=torch.float32)])
