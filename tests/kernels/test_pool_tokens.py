"""The pool_tokens kernels against the op's reference."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from merv_fast.kernels import pool_tokens as kernels
from tests.budgets import float32_sum, low_precision
from tests.kernels.drawing import CONTIGUOUS, drawn, laid_out, layouts
from tests.kernels.memory import far_apart

# The package exports the function under the module's name.
op = importlib.import_module("merv_fast.ops.pool_tokens")

LOW = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The interpreter pays by the program."""
    if device == "cpu":
        monkeypatch.setitem(kernels.LAUNCHES, 80, kernels.Launch(64, 256, 4))


def check(got: Tensor, arguments: tuple, reference) -> None:
    """``got`` is within budget of ``reference(*arguments)``."""
    x, *how = arguments
    exact = reference(x.double(), *how)
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert got.is_contiguous()
    assert (got.double() - exact).abs().max() <= low_precision(reference(*arguments), exact)


def check_both(x: Tensor, grid, out_grid, out_slots: int, layouts=CONTIGUOUS) -> None:
    grad = torch.randn(len(x), out_slots, out_grid[0] * out_grid[1], x.shape[3]).to(x)
    x, grad = laid_out([x, grad], layouts)
    check(kernels.launch(x, grid, out_grid, out_slots), (x, grid, out_grid, out_slots), op.reference)
    got = kernels.launch_backward(grad, grid, out_grid, x.shape[1])
    check(got, (grad, grid, out_grid, x.shape[1]), op.reference_backward)


side = st.integers(1, 7)


@drawn(15)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 4),
    t=st.integers(1, 4),
    grid=st.tuples(side, side),
    out_grid=st.tuples(side, side),
    C=st.integers(1, 80),
    dtype=st.sampled_from(LOW),
    layouts=layouts(),
)
@example(B=2, T=2, t=2, grid=(14, 14), out_grid=(8, 8), C=65, dtype=torch.float16, layouts=CONTIGUOUS)
@example(B=1, T=3, t=2, grid=(5, 7), out_grid=(2, 3), C=769, dtype=torch.bfloat16, layouts=CONTIGUOUS)
@example(B=1, T=1, t=1, grid=(16, 16), out_grid=(1, 1), C=8, dtype=torch.float32, layouts=CONTIGUOUS)
def test_any_shape_and_strides(device, B, T, t, grid, out_grid, C, dtype, layouts):
    torch.manual_seed(0)
    check_both(torch.randn(B, T, grid[0] * grid[1], C, device=device).to(dtype), grid, out_grid, t, layouts)


def test_views(device):
    torch.manual_seed(0)
    tokens = torch.randn(2, 3, 21, 24, device=device)
    check_both(tokens[:, :, 1:, 3:20], (4, 5), (2, 2), 3)
    check_both(tokens[:, ::2, 1:, :], (4, 5), (2, 2), 2)
    check_both(tokens.transpose(2, 3)[:, :, :20, :], (4, 5), (2, 2), 3)
    check_both(tokens[:1, :, :20].expand(3, 3, 20, 24), (4, 5), (2, 2), 3)


@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_just_the_cells_of_the_reference(device, stray):
    x = torch.randn(1, 2, 16, 40, device=device)
    x[0, 1, 6, 3] = stray
    got, expected = kernels.launch(x, (4, 4), (3, 3), 2), op.reference(x, [4, 4], [3, 3], 2)
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert torch.equal(got[~got.isfinite()].nan_to_num(), expected[~expected.isfinite()].nan_to_num())


def test_offsets_beyond_32_bits(device):
    x = far_apart(device, (3, 1, 4, 8), (1 << 30, 32, 8, 1))
    x[:] = torch.arange(96, device=device).view(3, 1, 4, 8)
    assert torch.equal(kernels.launch(x, (2, 2), (1, 1), 1), op.reference(x, [2, 2], [1, 1], 1))


def test_scores_of_several_encoders(device):
    torch.manual_seed(0)
    grids, widths, S = [(4, 4), (3, 5), (2, 2)], [70, 24, 130], 3 * 4
    xs = [torch.randn(2, 3, h * w, C, device=device) for (h, w), C in zip(grids, widths, strict=True)]
    vectors = [torch.randn(C, device=device) for C in widths]
    outs = torch.empty(2, S, sum(widths), device=device).split(widths, 2)
    sums, chunks = kernels.pool(xs, grids, (2, 2), 3, outs, vectors)
    for e, (x, grid, a) in enumerate(zip(xs, grids, vectors, strict=True)):
        expected = op.reference(x, grid, [2, 2], 3).flatten(1, 2)
        exact = op.reference(x.double(), grid, [2, 2], 3).flatten(1, 2)
        assert (outs[e].double() - exact).abs().max() <= low_precision(expected, exact)
        for own, video in zip(sums[:, e, : chunks[e]], outs[e].double() * a.double(), strict=True):
            assert abs(own.sum().double() - video.sum()) <= float32_sum(video)


def test_fills_wider_rows_with_zeros(device):
    x, out = torch.randn(2, 2, 4, 10, device=device), torch.empty(2, 2, 16, device=device)
    kernels.pool([x], [(2, 2)], (1, 1), 2, [out])
    assert torch.equal(out[..., :10], kernels.launch(x, (2, 2), (1, 1), 2).flatten(1, 2))
    assert not out[..., 10:].any()


def test_the_op_runs_the_kernel(device, kernels_serve, monkeypatch):
    x = torch.randn(1, 2, 16, 8, device=device, requires_grad=True)
    calls = []
    kernel = kernels.pool
    monkeypatch.setattr(kernels, "pool", lambda *args, **how: calls.append(args) or kernel(*args, **how))
    out = torch.ops.merv_fast.pool_tokens(x, [4, 4], [2, 2], 2)
    out.sum().backward()
    assert len(calls) == 2
    assert torch.equal(x.grad, torch.full_like(x, 0.25))
