"""The GEMM of all encoders against products in float64, both ways of reading, every epilogue."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from merv_fast.kernels import _gemm
from tests.budgets import float32_sum, low_precision
from tests.kernels.drawing import CONTIGUOUS, drawn, laid_out, layouts
from tests.kernels.memory import far_apart
from tests.kernels.schedules import scheduled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILE = _gemm.Launch(16, 32, 32, 4, 2)


@pytest.fixture(params=["by descriptor", "by pointer"], autouse=not torch.cuda.is_available())
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that few numbers make several; read as on sm_90 or as on sm_80."""
    capability = 90 if request.param == "by descriptor" else 80
    monkeypatch.setattr(_gemm, "capability", lambda: capability)
    monkeypatch.setitem(_gemm.LAUNCHES, capability, dict.fromkeys(("large", "small", "gelu", "float32"), TILE))


def weighed(xs, ws, biases, scores) -> Tensor:
    """``sum_e softmax(scores)_e (x_e w_e^T + b_e)`` as one encoder after the other gives it."""
    w = torch.softmax(scores, 1)
    values = [F.linear(x, weight, bias) for x, weight, bias in zip(xs, ws, biases, strict=True)]
    return sum(w[:, e, None, None].to(value.dtype) * value for e, value in enumerate(values))


def operands(device, dtype, B, S, widths, N):
    torch.manual_seed(0)
    xs = [torch.randn(B, S, K, device=device).to(dtype) for K in widths]
    ws = [(torch.randn(N, K, device=device) / K**0.5).to(dtype) for K in widths]
    return xs, ws, [torch.randn(N, device=device).to(dtype) for _ in widths]


def check_weighed(device, dtype, B, S, widths, N, spread, layouts):
    xs, ws, biases = (laid_out(ts, layouts) for ts in operands(device, dtype, B, S, widths, N))
    E = len(widths)
    sums, offsets = torch.randn(B, E, 3, device=device) * S, torch.randn(E, device=device) * spread
    chunks = [1 + e % 3 for e in range(E)]
    means = torch.stack([sums[:, e, : chunks[e]].sum(1) / S for e in range(E)], 1)
    for e in range(E):
        sums[:, e, chunks[e] :] = float("nan")
    tokens, w = _gemm.project_weighed(xs, ws, biases, sums, chunks, offsets)
    scores = means.double() + offsets.double()
    exact = weighed(*([t.double() for t in ts] for ts in (xs, ws, biases)), scores)
    assert tokens.dtype == dtype
    assert (tokens.double() - exact).abs().max() <= low_precision(weighed(xs, ws, biases, scores.float()), exact)
    right = torch.softmax(scores, 1)
    assert (w.double() - right).abs().max() <= low_precision(torch.softmax(means + offsets, 1), right)


width = st.integers(1, 70)


@drawn(12)
@given(
    B=st.integers(1, 3),
    S=st.integers(1, 20),
    widths=st.lists(width, min_size=1, max_size=8),
    N=st.integers(1, 40),
    spread=st.sampled_from([1.0, 100.0]),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts(),
)
@example(B=2, S=17, widths=[33, 64, 7, 16], N=34, spread=1.0, dtype=torch.float16, layouts=CONTIGUOUS)
@example(B=1, S=4, widths=[769], N=33, spread=1.0, dtype=torch.float32, layouts=CONTIGUOUS)
@example(B=64, S=3, widths=[16, 7], N=20, spread=1.0, dtype=torch.float32, layouts=CONTIGUOUS)
def test_weighed(device, B, S, widths, N, spread, dtype, layouts):
    check_weighed(device, dtype, B, S, widths, N, spread, layouts)


def test_a_weight_of_nothing_leaves_the_others_exact(device):
    # The scores differ by more than exp can say: weights of 0 and 1, in either order.
    for order in (1, -1):
        xs, ws, biases = (ts[::order] for ts in operands(device, torch.float32, 2, 5, [20, 40, 16], 8))
        offsets = torch.tensor([0.0, 200.0, -50.0][::order], device=device)
        sums = torch.zeros(2, 3, 1, device=device)
        tokens, w = _gemm.project_weighed(xs, ws, biases, sums, [1, 1, 1], offsets)
        assert w.count_nonzero() == 2
        exact = weighed(*([t.double() for t in ts] for ts in (xs, ws, biases)), offsets.double().expand(2, 3))
        rough = weighed(xs, ws, biases, offsets.expand(2, 3))
        assert (tokens.double() - exact).abs().max() <= low_precision(rough, exact)


@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scores", [(0.0, 1.0), (-float("inf"), 1.0), (float("nan"), 1.0)], ids=str)
def test_non_finite_values_are_those_of_the_sum(device, stray, scores):
    xs, ws, biases = operands(device, torch.float32, 1, 5, [20, 40], 8)
    xs[0][0, 3, 7] = stray
    offsets = torch.tensor(scores, device=device)
    tokens, _ = _gemm.project_weighed(xs, ws, biases, torch.zeros(1, 2, 1, device=device), [1, 1], offsets)
    expected = weighed(xs, ws, biases, offsets[None])
    assert torch.equal(tokens.isfinite(), expected.isfinite())
    assert torch.equal(tokens.isnan(), expected.isnan())


def test_a_sum_that_overflows_is_infinite_beside_a_weight_of_nothing(device):
    xs, ws, biases = operands(device, torch.float32, 1, 5, [20, 40, 16], 8)
    xs[2][0, 3] = ws[2][6] = 1e20
    offsets = torch.tensor([0.0, 1.0, 200.0], device=device)
    tokens, _ = _gemm.project_weighed(xs, ws, biases, torch.zeros(1, 3, 1, device=device), [1, 1, 1], offsets)
    assert (tokens == float("inf")).nonzero().tolist() == [[0, 3, 6]]
    assert tokens.isfinite().sum() == tokens.numel() - 1


@drawn(12)
@given(
    B=st.integers(1, 2),
    S=st.integers(1, 20),
    K=width,
    N=st.integers(1, 70),
    gelu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts(),
)
def test_one_encoder(device, B, S, K, N, gelu, dtype, layouts):
    (x,), (w,), (bias,) = operands(device, dtype, B, S, [K], N)
    x, w, bias = laid_out([x, w, bias], layouts)
    vector = torch.randn(N, device=device)
    sums = torch.full((B, _gemm.score_chunks(B, S, N, dtype) + 1), float("nan"), device=device)
    got = _gemm.project(x, w, bias, gelu, (vector, sums))
    act = F.gelu if gelu else lambda y: y
    rough, exact = act(F.linear(x, w, bias)), act(F.linear(x.double(), w.double(), bias.double()))
    assert (got.double() - exact).abs().max() <= low_precision(rough, exact)
    for own, video in zip(sums, got.double() * vector.double(), strict=True):
        assert abs(own[:-1].sum().double() - video.sum()) <= float32_sum(video)
    assert sums[:, -1].isnan().all()
    assert torch.equal(_gemm.project(x, w, bias, gelu), got)


def test_views_and_alignment(device):
    (x,), (w,), (bias,) = operands(device, torch.float32, 2, 6, [48], 24)
    wide = torch.randn(2, 7, 70, device=device)
    views = [
        x,
        wide[:, 1:, 1:49],
        wide[:, :6, 16:64],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:1].expand(2, 6, 48),
    ]
    views.append(x.transpose(1, 2).contiguous().transpose(1, 2))
    for view in views:
        for matrix in (w, w.T.contiguous().T, torch.randn(25, 49, device=device)[1:, 1:]):
            got, exact = _gemm.project(view, matrix, bias), F.linear(view.double(), matrix.double(), bias.double())
            assert (got.double() - exact).abs().max() <= low_precision(F.linear(view, matrix, bias), exact)


def test_offsets_beyond_32_bits(device):
    far, bias = 1 << 30, torch.randn(3, device=device).half()
    x, w = far_apart(device, (1, 3, 16), (3 * far, far, 1)), far_apart(device, (3, 16), (far, 1))
    x[:], w[:] = torch.randn(1, 3, 16, device=device), torch.randn(3, 16, device=device)
    exact = F.linear(x.double(), w.double(), bias.double())
    got = _gemm.project(x, w, bias)
    assert (got.double() - exact).abs().max() <= low_precision(F.linear(x, w, bias), exact)


# Programs of two tiles or three, one that makes all, and more than there are tiles.
@pytest.mark.parametrize("programs", [5, 1, 1000])
def test_a_persistent_grid_makes_the_same_tiles(device, programs):
    dtype, (B, S, N) = torch.float16, (2, 33, 48) if device == "cpu" else (3, 400, 4096)
    xs, ws, biases = operands(device, dtype, B, S, [33, 16], N)
    sums, offsets = torch.randn(B, 2, 3, device=device) * S, torch.randn(2, device=device)
    vector, scores = torch.randn(N, device=device), torch.empty(B, _gemm.score_chunks(B, S, N, dtype), device=device)

    def run():
        found = _gemm.project_weighed(xs, ws, biases, sums, [3, 1], offsets)
        return *found, _gemm.project(xs[0], ws[0], biases[0], True, (vector, scores)), scores.clone()

    plain = run()
    scores.fill_(float("nan"))
    with scheduled(programs, persistent=True) as launched:
        for one, other in zip(run(), plain, strict=True):
            assert torch.equal(one, other)
    assert launched == [programs] * 2


def test_rows_that_are_not_aligned_are_not_made_in_a_persistent_grid(device):
    (x,), (w,), (bias,) = operands(device, torch.float16, 1, 3, [16], 33)
    with scheduled(1, persistent=True) as launched:
        got = _gemm.project(x, w, bias)
    assert not launched
    assert torch.equal(got, _gemm.project(x, w, bias))


@pytest.mark.parametrize("capability", [80, 100])
def test_a_loop_that_would_spill_is_not_made(monkeypatch, capability):
    monkeypatch.setattr(_gemm, "capability", lambda: capability)
    assert _gemm.can_loop(4, 4096, True, False, False)
    assert _gemm.can_loop(1, 4096, False, True, True)
    assert _gemm.can_loop(8, 4096, True, False, False) == (capability != 80)
    assert _gemm.can_loop(1, 4096, True, False, False) == (capability != 100)
    assert _gemm.can_loop(1, 4096, False, True, False) == (capability != 100)
