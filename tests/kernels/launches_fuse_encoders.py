"""fuse_encoders: MERV's values, and shapes that take other paths."""

import torch

from merv_fast.kernels import _blend, fuse_encoders
from tests.kernels.registry import case, meta

WIDTHS = [1024, 1024, 768, 768]


@case("fuse_encoders", torch.bfloat16, 1, [1024] * 4, 4096)
@case("fuse_encoders: batch of 8", torch.bfloat16, 8, [1024] * 4, 4096)
@case("fuse_encoders: float16, single tokens", torch.float16, 1, [1024, 1, 1024, 1], 4096)
@case("fuse_encoders: eight, float32", torch.float32, 1, [256] * 8, 4096)
@case("fuse_encoders: eight, odd width", torch.bfloat16, 3, [35] * 8, 769)
@case("fuse_encoders: float32, odd width", torch.float32, 3, [35, 1], 769)
@case("fuse_encoders: one token of one encoder", torch.bfloat16, 1, [1], 4096)
@case("fuse_encoders: one encoder, odd width", torch.bfloat16, 2, [257], 769)
@case("fuse_encoders: ones", torch.bfloat16, 1, [1], 1)
@case("fuse_encoders: over 2^31 elements", torch.bfloat16, 64, [16384, 16384], 4096)
def fuse(dtype, B, lengths, D):
    values, query = [meta(B, S, D, dtype=dtype) for S in lengths], meta(D, dtype=dtype)
    tokens, weights = fuse_encoders.launch(values, query, meta(len(lengths), dtype=dtype))
    fuse_encoders.launch_backward(tokens, meta(*weights.shape, dtype=torch.float32), values, query, weights)


@case("fuse_encoders: backward of the collapsed tail, ones", 1, [1], 1)
@case("fuse_encoders: backward of the collapsed tail", 1, [1024, 1024, 768, 768])
@case("fuse_encoders: backward of the collapsed tail, odd width", 1, [33])
@case("fuse_encoders: backward of the collapsed tail, float16, odd width", 1, [33], 1024, torch.float16)
@case("fuse_encoders: backward of the collapsed tail, float16, odd widths", 2, [769] * 5, 257, torch.float16)
@case("fuse_encoders: backward of the collapsed tail, eight, odd widths", 2, [769] * 8, 1024, torch.float16)
@case("fuse_encoders: backward of the collapsed tail of MLPs, batch of 8", 8, [4096] * 4)
def tail(B, widths, S=1024, dtype=torch.bfloat16):
    grads, values = ([meta(B, S, D, dtype=dtype) for D in widths] for _ in range(2))
    dw, _ = _blend.dots(grads, values)
    vectors = [meta(D, dtype=torch.float32) for D in widths]
    _blend.blend(dw, grads=grads, ds=dw, vectors=vectors, dvalues=grads, values=values, weighed=values)
    _blend.blend(dw, values=values, weighed=values)
