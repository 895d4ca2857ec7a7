"""One GEMM over the channels of all encoders: a program makes a tile of BLOCK_M tokens by BLOCK_N columns.

    out[b, s] = sum_e w[b, e] (xs[e][b, s] ws[e]^T + biases[e])         w = 1 where it is not asked for

The weight of an encoder scales its share of the sum. Scaling its tokens before the product would take them
through registers, and one accumulator an encoder spills; instead the one accumulator is kept in units of the
present encoder's weight and, from one encoder to the next, multiplied by the ratio of the two: E - 1 times a
tile. Tokens and matrices so go from memory to the tensor cores by TMA and wgmma untouched, as in a plain GEMM.
A weight below 2^-60 counts as 2^-60 in this, so that no ratio overflows: what it adds is below rounding unless
tokens differ by 10^10 in size, and sums above 10^20 in front of it become infinite. Infinite tokens make their
encoder's score infinite as well: -inf is a weight of zero, and what is infinite then is NaN, as 0 * inf is.

Every tile makes its video's weights again from the partial scores, a few KiB, instead of waiting for a launch
that does. The epilogue adds the mixed bias; for a hidden layer it applies GELU and may multiply with a score
vector, as pool_tokens does.

Two choices are there to be measured. In a persistent grid a program stays on its SM and makes every tile that is
a multiple of the grid away. It makes the weights anew for each: MERV's 128 tiles a video on 132 SMs put no two of
one video in a program, and 14 KiB of scores are 0.5% of the 2.75 MB that a tile reads. A dependent launch starts
while the kernel before it ends, so that its programs are in place when they may begin.

Bytes: tokens, matrices and the result once each; the tiles of a wave share the rest through L2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from merv_fast.kernels._launch import capability, cdiv, dependent_launches, power_of_2, processors
from merv_fast.kernels._weighing import encoder_scores, pick, softmax

__all__ = ["ALIGNMENT", "LAUNCHES", "Launch", "aligned", "is_dependent", "project", "project_weighed", "score_chunks"]

LEAST_WEIGHT = tl.constexpr(2.0**-60)


@triton.jit
def make_tile(
    tile, xs, ws, biases, out_ptr, a_ptr, sums_ptr, stride_sb, partial_ptr, offset_ptr, weights_ptr, chunks, lengths,
    strides_x, strides_w, B, S, N, Ks, m_tiles, n_tiles, CHUNKS,
    E: tl.constexpr, E_POWER: tl.constexpr, WEIGHED: tl.constexpr, GELU: tl.constexpr, SCORES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # GROUP row tiles share their column tiles while these are in L2.
    rows = B * m_tiles
    first = tile // (GROUP * n_tiles) * GROUP
    height = min(rows - first, GROUP)
    row_tile = first + tile % (GROUP * n_tiles) % height
    n_tile = tile % (GROUP * n_tiles) // height
    b, m_tile = row_tile // m_tiles, row_tile % m_tiles
    row = b * S + m_tile * BLOCK_M
    s = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_s, in_n = s < S, n < N
    # Rows and columns past the edge read the first one: masked tiles would lose the wide loads.
    x_rows = (b.to(tl.int64) * S + tl.where(in_s, s, 0))[:, None]
    w_rows = tl.where(in_n, n, 0).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]

    if WEIGHED:
        scores = encoder_scores(partial_ptr, offset_ptr, b.to(tl.int64), chunks, lengths, CHUNKS, E, E_POWER)
        w, e_index = softmax(scores, E, E_POWER), tl.arange(0, E_POWER)
        if (m_tile == 0) & (n_tile == 0):
            tl.store(weights_ptr + b * E + e_index, w, mask=e_index < E)
        # Of zeros those that an infinite score made are negative: a register for this through all products spills.
        w = tl.where((scores == float("-inf")) & (e_index < E), w * -1.0, w)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    unit = 1.0
    for e in tl.static_range(E):
        if WEIGHED:
            weight = pick(w, e, E_POWER)
            next_unit = tl.where(weight < LEAST_WEIGHT, LEAST_WEIGHT, weight)
            if e > 0:
                accumulator *= unit / next_unit
            unit = next_unit
        for start in range(0, Ks[e], BLOCK_K):
            if DESCRIPTORS:
                x_tile = xs[e].load([row, start])
                w_tile = ws[e].load([n_tile * BLOCK_N, start])
            else:
                in_k = start + k < Ks[e]
                x_tile = tl.load(xs[e] + x_rows * strides_x[e] + start + k, mask=in_k, other=0.0)
                w_tile = tl.load(ws[e] + w_rows * strides_w[e] + start + k, mask=in_k, other=0.0)
            accumulator = tl.dot(x_tile, w_tile.T, accumulator, input_precision=PRECISION)

    bias = tl.zeros((BLOCK_N,), tl.float32)
    for e in tl.static_range(E):
        one = tl.load(biases[e] + n, mask=in_n, other=0.0).to(tl.float32)
        bias += one * pick(w, e, E_POWER) if WEIGHED else one
    if WEIGHED:
        accumulator *= unit
        infinite = tl.sum(tl.where(w.to(tl.int32, bitcast=True) < 0, 1, 0), 0) > 0
        accumulator = tl.where(infinite & (tl.abs(accumulator) == float("inf")), float("nan"), accumulator)
    accumulator += bias[None, :]
    if GELU:
        accumulator = 0.5 * accumulator * (1.0 + tl.erf(accumulator * 0.7071067811865476))
    result = accumulator.to(out_ptr.dtype.element_ty)
    inside = in_s[:, None] & in_n[None, :]
    tl.store(out_ptr + (b.to(tl.int64) * S + s)[:, None] * N + n[None, :], result, mask=inside)
    if SCORES:
        a = tl.load(a_ptr + n, mask=in_n, other=0.0)
        products = tl.where(inside, result.to(tl.float32) * a[None, :], 0.0)
        tl.store(sums_ptr + b * stride_sb + m_tile * n_tiles + n_tile, tl.sum(products))


@triton.jit
def gemm_kernel(
    x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7,
    biases, out_ptr, a_ptr, sums_ptr, stride_sb,
    partial_ptr, offset_ptr, weights_ptr, chunks, lengths,
    strides_x, strides_w, B, S, N, Ks, m_tiles, n_tiles, CHUNKS,
    E: tl.constexpr, E_POWER: tl.constexpr, WEIGHED: tl.constexpr, GELU: tl.constexpr, SCORES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    # The kernel before may still run. Before it touches memory every program waits until that one has ended and what it
    # wrote can be seen. So this one never ends first, and launches that are not dependent wait, with it, for both.
    if DEPENDENT:
        gdc_wait()
    # One argument each, as a descriptor inside a tuple does not reach a kernel.
    xs, ws = (x0, x1, x2, x3, x4, x5, x6, x7), (w0, w1, w2, w3, w4, w5, w6, w7)
    operands = (
        xs, ws, biases, out_ptr, a_ptr, sums_ptr, stride_sb, partial_ptr, offset_ptr, weights_ptr, chunks, lengths,
        strides_x, strides_w, B, S, N, Ks, m_tiles, n_tiles, CHUNKS,
    )  # fmt: skip
    if PERSISTENT:
        # What does not depend on the tile would stay in registers through the loop: that spills.
        for tile in tl.range(tl.program_id(0), B * m_tiles * n_tiles, tl.num_programs(0), disable_licm=True):
            make_tile(
                tile, *operands, E, E_POWER, WEIGHED, GELU, SCORES,
                DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
            )  # fmt: skip
    else:
        make_tile(
            tl.program_id(0), *operands, E, E_POWER, WEIGHED, GELU, SCORES,
            DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
        )  # fmt: skip


class Launch(NamedTuple):
    """Tile of a program, its warps, and how many K steps are in flight; whether programs make several tiles.

    ``dependent``, from sm_90 on: whether it is launched before the kernel in front of it has ended.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    dependent: bool = False


LAUNCHES = {
    80: {
        "large": Launch(128, 128, 64, 8, 3),
        "small": Launch(64, 64, 64, 4, 3),
        "gelu": Launch(128, 128, 64, 8, 3),
        "float32": Launch(64, 64, 32, 4, 3),
    },
    90: {
        "large": Launch(128, 256, 64, 8, 4),
        "small": Launch(64, 128, 64, 4, 4),
        "gelu": Launch(128, 128, 64, 8, 4),
        "float32": Launch(64, 64, 32, 4, 3),
    },
    100: {
        "large": Launch(128, 256, 64, 8, 4),
        "small": Launch(64, 128, 64, 4, 4),
        "gelu": Launch(128, 128, 64, 8, 4),
        "float32": Launch(64, 64, 32, 4, 3),
    },
}
"""By architecture and class: "gelu" and "float32" need registers beside the tile, "large" is for where
its tiles are enough for most of the chip and N is a multiple of 16; "small" is for the rest."""

MOST_ENCODERS = 8
ENOUGH_TILES = 96
ALIGNMENT = 16
"""Elements: what Triton takes as known of a stride, and at least TMA's 16 bytes."""

GROUP = 8


def project(
    x: Tensor, w: Tensor, bias: Tensor, gelu: bool = False, score: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x [B, S, K]`` through ``w [N, K]`` and ``bias [N]`` to ``[B, S, N]``, through GELU as well if asked to.

    ``score`` is (vector [N], sums [B, CHUNKS or more]), both float32: the first ``score_chunks(...)`` of a row of
    sums are then filled with what adds up to ``sum_s out[:, s] . vector``.
    """
    out, _ = _run([x], [w], [bias], None, gelu, score)
    return out


def project_weighed(
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    biases: Sequence[Tensor],
    sums: Tensor,
    chunks: Sequence[int],
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """``xs[e] [B, S, K_e]`` through ``ws[e] [N, K_e]`` and ``biases[e] [N]``, weighed, to ``[B, S, N]``.

    The weights, returned as well, are softmax_e(sum(sums[b, e, :chunks[e]]) / S + offsets[e]) with ``sums``
    [B, E, CHUNKS] and ``offsets [E]`` float32.
    """
    return _run(xs, ws, biases, (sums, chunks, offsets), False, None)


def is_dependent(B: int, S: int, N: int, dtype: torch.dtype, gelu: bool = False) -> bool:
    """Whether a GEMM of this shape waits itself for the kernel before it, which should let it launch early."""
    return choose(B, S, N, dtype, gelu).dependent and dependent_launches()


def score_chunks(B: int, S: int, N: int, dtype: torch.dtype) -> int:
    """How many partial scores a video gets from `project`."""
    choice = choose(B, S, N, dtype, gelu=True)
    return cdiv(S, choice.block_m) * cdiv(N, choice.block_n)


def _run(
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    biases: Sequence[Tensor],
    weighing: tuple[Tensor, Sequence[int], Tensor] | None,
    gelu: bool,
    score: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    (B, S, _), E, N = xs[0].shape, len(xs), ws[0].shape[0]
    xs, ws = [aligned(x) for x in xs], [aligned(w) for w in ws]
    biases = [bias.contiguous() for bias in biases]
    choice = choose(B, S, N, xs[0].dtype, gelu)
    m_tiles, n_tiles = cdiv(S, choice.block_m), cdiv(N, choice.block_n)
    out = torch.empty(B, S, N, dtype=xs[0].dtype, device=xs[0].device)
    weights = torch.empty(B, E if weighing else 0, dtype=torch.float32, device=out.device)
    partials, chunks, offsets = weighing or (weights, (0,) * E, weights)
    vector, sums = score or (weights, weights)
    flat = [x.as_strided((B * S, x.shape[2]), (x.stride(1), 1)) for x in xs]
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    # Products in full float32 are made outside the tensor cores, where tiles read by TMA spill.
    descriptors = capability() >= 90 and (out.dtype != torch.float32 or precision == "tf32")
    dependent, tiles = choice.dependent and dependent_launches(), B * m_tiles * n_tiles
    persistent = choice.persistent and can_loop(E, N, weighing is not None, gelu, score is not None)
    gemm_kernel[(min(tiles, processors()) if persistent else tiles,)](
        *(describe(x, choice.block_m, choice.block_k) if descriptors else x for x in flat),
        *[None] * (MOST_ENCODERS - E),
        *(describe(w, choice.block_n, choice.block_k) if descriptors else w for w in ws),
        *[None] * (MOST_ENCODERS - E),
        tuple(biases),
        out,
        vector,
        sums,
        sums.stride(0),
        partials,
        offsets,
        weights,
        tuple(chunks),
        (S,) * E,
        tuple(x.stride(0) for x in flat),
        tuple(w.stride(0) for w in ws),
        B,
        S,
        N,
        tuple(w.shape[1] for w in ws),
        m_tiles,
        n_tiles,
        partials.shape[-1],
        E=E,
        E_POWER=power_of_2(max(E, 2)),
        WEIGHED=weighing is not None,
        GELU=gelu,
        SCORES=score is not None,
        DESCRIPTORS=descriptors,
        PRECISION=precision,
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        GROUP=GROUP,
        PERSISTENT=persistent,
        DEPENDENT=dependent,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
        launch_pdl=dependent,
    )
    return out, weights


def choose(B: int, S: int, N: int, dtype: torch.dtype, gelu: bool) -> Launch:
    """The launch choice of a shape, dtype and epilogue."""
    table = LAUNCHES[capability()]
    if dtype == torch.float32:
        return table["float32"]
    # Rows of the result that are not aligned are written element by element: a large tile then spills.
    if N % ALIGNMENT:
        return table["small"]
    if gelu:
        return table["gelu"]
    large = table["large"]
    tiles = B * cdiv(S, large.block_m) * cdiv(N, large.block_n)
    return large if tiles >= ENOUGH_TILES else table["small"]


def can_loop(E: int, N: int, weighed: bool, gelu: bool, scored: bool) -> bool:
    """Whether a program can make several tiles without a spill, as far as the compiler has been seen to."""
    # Rows of the result that are not aligned are written element by element.
    spills = {80: E > 4, 90: False, 100: (weighed and E == 1) or (gelu and not scored)}
    return N % ALIGNMENT == 0 and not spills[capability()]


def aligned(x: Tensor) -> Tensor:
    """``x [..., M, K]`` itself where TMA and wide loads can address it; else a copy, K filled up with zeros.

    That is: K and the distance of rows are multiples of 16, and all rows lie at one distance.
    """
    K, stride = x.shape[-1], x.stride(-2)
    even = K % ALIGNMENT == 0 and stride % ALIGNMENT == 0 and x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    if even and (x.ndim == 2 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * stride):
        return x
    return torch.nn.functional.pad(x, (0, -K % ALIGNMENT)).contiguous()


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The tiles of ``x [M, K]`` for TMA; what lies outside reads as zero."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
