"""The pool_project kernels against the op's reference, forward and through autograd."""

import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merv_fast.kernels import _gemm, pool_project, pool_tokens
from merv_fast.ops import pool_project as pool_project_op
from tests.budgets import low_precision
from tests.kernels.drawing import drawn, laid_out, layouts
from tests.kernels.test_gemm import DTYPES, TILE

op = importlib.import_module("merv_fast.ops.pool_project")


@pytest.fixture(autouse=not torch.cuda.is_available())
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_gemm.LAUNCHES, 80, dict.fromkeys(("large", "small", "gelu", "float32"), TILE))
    monkeypatch.setitem(pool_tokens.LAUNCHES, 80, pool_tokens.Launch(64, 64, 4))


def arguments(device, dtype, B, T, grid, out_grid, t, widths):
    torch.manual_seed(0)
    x = torch.randn(B, T, grid[0] * grid[1], widths[0], device=device)
    weights = [torch.randn(n, m, device=device) / m**0.5 for m, n in pairwise(widths)]
    biases = [torch.randn(n, device=device) for n in widths[1:]]
    cast = [x.to(dtype)], [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
    return cast[0][0], cast[1], cast[2], grid, out_grid, t


def wide(x, weights, biases, *how):
    return x.double(), [w.double() for w in weights], [b.double() for b in biases], *how


side = st.integers(1, 5)


@drawn(10)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 3),
    t=st.integers(1, 3),
    grid=st.tuples(side, side),
    out_grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts(),
)
def test_any_shape_and_strides(device, B, T, t, grid, out_grid, widths, dtype, layouts):
    x, weights, biases, *how = arguments(device, dtype, B, T, grid, out_grid, t, widths)
    x, *parameters = laid_out([x, *weights, *biases], layouts)
    case = x, parameters[: len(weights)], parameters[len(weights) :], *how
    got, exact = pool_project.launch(*case), op.reference(*wide(*case))
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert (got.double() - exact).abs().max() <= low_precision(op.reference(*case), exact)


def test_views(device):
    x, weights, *rest = arguments(device, torch.float32, 2, 2, (4, 5), (2, 2), 2, [24, 9])
    maps = torch.randn(2, 2, 21, 25, device=device)
    for view in (maps[:, :, 1:, 1:], maps[:, :, :20, 1:], x.transpose(1, 2).contiguous().transpose(1, 2)):
        case = view, [w.T.contiguous().T for w in weights], *rest
        exact = op.reference(*wide(*case))
        assert (pool_project.launch(*case).double() - exact).abs().max() <= low_precision(op.reference(*case), exact)


@pytest.mark.parametrize("widths", [[20, 9], [20, 30, 9]], ids=str)
def test_gradients(device, kernels_serve, widths):
    case = arguments(device, torch.float32, 2, 3, (4, 3), (2, 2), 2, widths)
    x, weights, biases, *how = case
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
    out = pool_project_op(x, weights, biases, *how)
    grad = torch.randn_like(out)
    exact = wide(*case)
    rights = torch.autograd.grad(op.reference(*exact), [exact[0], *exact[1], *exact[2]], grad.double())
    roughs = torch.autograd.grad(op.reference(*case), tensors, grad)
    for got, rough, right in zip(torch.autograd.grad(out, tensors, grad), roughs, rights, strict=True):
        assert (got.double() - right).abs().max() <= low_precision(rough, right)


def test_the_op_runs_the_kernel(device, kernels_serve, monkeypatch):
    case = arguments(device, torch.float32, 1, 1, (2, 2), (1, 1), 1, [8, 8])
    monkeypatch.setattr(pool_project, "launch", lambda *args: torch.full((1, 1, 8), 7.0, device=device))
    assert torch.equal(pool_project_op(*case), torch.full((1, 1, 8), 7.0, device=device))


@pytest.mark.parametrize("widths", [[8, 16], [8, 16, 16]], ids=str)
def test_the_pooling_lets_a_dependent_layer_begin(device, widths, monkeypatch):
    table, told = _gemm.LAUNCHES[_gemm.capability()], []
    monkeypatch.setitem(table, "gelu", table["gelu"]._replace(dependent=True))
    monkeypatch.setattr(_gemm, "dependent_launches", lambda: True)

    def pool(*args, dependents):
        told.append(dependents)
        raise InterruptedError

    monkeypatch.setattr(pool_project, "pool", pool)
    with pytest.raises(InterruptedError):
        pool_project.launch(*arguments(device, torch.float16, 1, 1, (2, 2), (1, 1), 1, widths))
    assert told == [len(widths) > 2]
