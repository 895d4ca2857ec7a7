"""The counter: every product once, by kind; ops of ours as their definition; nothing passed over in silence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines import ReferenceTail
from bench.counting import Count, count, parameters
from merv_fast import ops
from merv_fast.encoders import build_encoder
from merv_fast.kernels import pool_project as project_kernels
from merv_fast.kernels import temporal_attention as temporal_kernels
from tests.encoders.small_encoders import SMALL


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


CALLS = {
    "linear": (lambda: F.linear(meta(2, 7, 3), meta(5, 3), meta(5)), Count(linear=2 * 7 * 3 * 5)),
    "linear without bias": (lambda: F.linear(meta(2, 7, 3), meta(5, 3)), Count(linear=2 * 7 * 3 * 5)),
    "matrix and vector": (lambda: meta(4, 3) @ meta(3), Count(linear=4 * 3)),
    "vector and matrix": (lambda: meta(3) @ meta(3, 4), Count(linear=4 * 3)),
    "vector and vector": (lambda: meta(3) @ meta(3), Count(linear=3)),
    "convolution": (lambda: F.conv2d(meta(2, 6, 8, 8), meta(4, 6, 3, 3)), Count(linear=2 * 6 * 6 * 4 * 6 * 9)),
    "depthwise": (lambda: F.conv2d(meta(1, 6, 8, 8), meta(6, 1, 3, 3), groups=6), Count(linear=6 * 6 * 6 * 9)),
    "batch": (lambda: meta(2, 4, 3) @ meta(2, 3, 5), Count(attention=2 * 4 * 3 * 5)),
    "attention": (
        lambda: F.scaled_dot_product_attention(meta(2, 4, 7, 8), meta(2, 4, 9, 8), meta(2, 4, 9, 8)),
        Count(attention=2 * 2 * 4 * 7 * 9 * 8),
    ),
    # The masked half is counted with the rest, as counters in the field do.
    "causal attention": (
        lambda: F.scaled_dot_product_attention(*(meta(1, 2, 6, 4) for _ in "qkv"), is_causal=True),
        Count(attention=2 * 2 * 6 * 6 * 4),
    ),
    "pooling": (lambda: F.adaptive_avg_pool3d(meta(1, 5, 4, 8, 8), (2, 4, 4)), Count(pooled=5 * 4 * 8 * 8)),
    "elementwise": (lambda: (F.layer_norm(meta(4, 8), (8,)) * 2).softmax(-1) + meta(8), Count()),
    "pool_tokens": (lambda: ops.pool_tokens(meta(2, 3, 16, 5), (4, 4), (2, 2)), Count(pooled=2 * 3 * 16 * 5)),
    "pool_project": (
        lambda: ops.pool_project(
            meta(2, 3, 16, 5), [meta(7, 5), meta(6, 7)], [meta(7), meta(6)], grid=(4, 4), out_grid=(2, 2)
        ),
        Count(linear=2 * 3 * 4 * (5 * 7 + 7 * 6), pooled=2 * 3 * 16 * 5),
    ),
    "fuse_encoders": (
        lambda: ops.fuse_encoders([meta(2, 9, 6), meta(2, 9, 6)], meta(6), meta(2)),
        Count(linear=2 * 2 * 6),
    ),
    # One product over both encoders' channels; two score vectors, two scores, and the biases twice.
    "pool_project_fuse": (
        lambda: ops.pool_project_fuse(
            [meta(1, 3, 16, 5), meta(1, 3, 36, 7)],
            [meta(6, 5), meta(6, 7)],
            [meta(6), meta(6)],
            meta(6),
            meta(2),
            grids=[(4, 4), (6, 6)],
            out_grid=(2, 2),
        ),
        Count(linear=12 * (5 + 7) * 6 + 6 * (5 + 7) + (5 + 7) + 2 * 6 + 2 * 6, pooled=3 * 16 * 5 + 3 * 36 * 7),
    ),
    "temporal_attention": (
        lambda: ops.temporal_attention(meta(8, 5, 3 * 6), heads=2, frames=8, window=4),
        Count(attention=2 * (8 // 4) * 5 * 4 * 4 * 6),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    call, expected = CALLS[name]
    assert count(call)[1] == expected


def test_what_has_no_formula_raises():
    with pytest.raises(RuntimeError, match=r"every product must have a formula, got aten\.addmv"):
        count(torch.addmv, meta(4), meta(4, 3), meta(3))


def test_the_result_comes_back_and_the_parts_add_up():
    layers = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    out, whole = count(layers, x)
    assert torch.equal(out, layers(x))
    hidden, first = count(layers[:2], x)
    _, last = count(layers[2], hidden)
    assert first + last == whole == Count(linear=4 * (3 * 5 + 5 * 2))
    assert whole - last == first
    assert Count(10, 20, 30) * 0.5 == Count(5, 10, 15)
    assert Count(10, 20, 30).macs == 30
    assert parameters(layers) == 3 * 5 + 5 + 5 * 2 + 2


@pytest.mark.parametrize("family", ["dinov2", "vivit", "siglip"])
def test_encoders_against_pytorch_s_counter(family):
    config = SMALL[family]
    with torch.device("meta"):
        encoder = build_encoder(config)
    pixels = meta(1, config.num_frames, 3, config.image_size, config.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        encoder(pixels)
    assert 2 * count(encoder, pixels)[1].macs == theirs.get_total_flops() > 0


def test_the_reference_s_tail_against_pytorch_s_counter():
    widths, grids = (24, 16), ((4, 4), (6, 6))
    with torch.device("meta"):
        tail = ReferenceTail(widths, grids, D=32, query_width=8, out_grid=(2, 2)).requires_grad_(False)
    xs = [meta(1, 3, 16, 24), meta(1, 3, 36, 16)]
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        tail(xs)
    assert 2 * count(tail, xs)[1].macs == theirs.get_total_flops() > 0


def test_kernels_declare_the_same():
    x, weights, biases = meta(2, 3, 16, 5), [meta(7, 5), meta(6, 7)], [meta(7), meta(6)]
    _, needs = count(ops.pool_project, x, weights, biases, (4, 4), (2, 2))
    declared = project_kernels.cost(x, weights, biases, (4, 4), (2, 2), 3)
    assert declared.flops == 2 * needs.linear + needs.pooled
    qkv = meta(8, 5, 18)
    _, needs = count(ops.temporal_attention, qkv, 2, 8, 4)
    assert temporal_kernels.cost(qkv, 2, 4).flops == 2 * needs.macs
