"""The kernel for what scores add to gradients: any shape and strides, not-finite numbers, matrices far apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merv_fast.kernels import _outer
from merv_fast.ops import _tail_passes
from tests.budgets import low_precision
from tests.kernels.drawing import drawn, laid_out, layouts
from tests.kernels.memory import far_apart
from tests.kernels.test_gemm import DTYPES


@pytest.fixture(autouse=not torch.cuda.is_available())
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_outer.LAUNCHES, 80, _outer.Launch(4, 16, 1))


@drawn(40)
@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    D=st.integers(2, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts(repeatable=()),
    gap=st.integers(0, 3),
)
def test_any_shape_and_strides(device, widths, D, dtype, layouts, gap):
    torch.manual_seed(0)
    shapes = [(D, C) for C in widths]
    *weights, query = laid_out([torch.randn(*shape, device=device).to(dtype) for shape in (*shapes, (D,))], layouts)
    means = [torch.randn(C, device=device) for C in widths]
    padded = [torch.randn(D, C + gap, device=device).to(dtype) for C in widths]
    grads = [grad[:, : grad.shape[1] - gap] for grad in padded]

    def expected(dtype, wide):
        added = [grad.to(dtype, copy=True) for grad in grads]
        out = _tail_passes.add_outer(
            added, [weight.to(dtype) for weight in weights], query.to(dtype), [mean.to(wide) for mean in means]
        )
        return [*added, out]

    low, exact = expected(dtype, torch.float32), expected(torch.float64, torch.float64)
    around = [grad[:, grad.shape[1] - gap :].clone() for grad in padded]
    out = _outer.add_outer(grads, weights, query, means)
    assert out.dtype == torch.float32
    for got, rough, right in zip((*grads, out), low, exact, strict=True):
        assert (got.double() - right).abs().max() <= low_precision(rough, right)
    for grad, before in zip(padded, around, strict=True):
        assert torch.equal(grad[:, grad.shape[1] - gap :], before)


@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(device, stray):
    grads, weights = ([torch.ones(20, C, device=device) for C in (19, 5)] for _ in range(2))
    query, means = torch.ones(20, device=device), [torch.ones(C, device=device) for C in (19, 5)]
    grads[0][1, 18] = weights[1][19, 4] = stray
    out = _outer.add_outer(grads, weights, query, means)
    twos, sums = [torch.full((20, C), 2.0, device=device) for C in (19, 5)], torch.full((20,), 24.0, device=device)
    twos[0][1, 18] = sums[19] = stray
    for got, right in zip((*grads, out), (*twos, sums), strict=True):
        assert torch.equal(got.nan_to_num(7), right.nan_to_num(7))


def test_offsets_beyond_32_bits(device):
    grad, weight = (far_apart(device, (3, 16), (1 << 30, 1)) for _ in range(2))
    grad[:], weight[:] = 1, torch.arange(48, device=device).view(3, 16)
    out = _outer.add_outer([grad], [weight], torch.ones(3, device=device).half(), [torch.ones(16, device=device)])
    assert torch.equal(grad, torch.full_like(grad, 2))
    assert torch.equal(out, weight.float().sum(1))
