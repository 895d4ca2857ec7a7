"""The kernel for score vectors and their offsets: any shape and strides, not-finite numbers, one matrix far apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merv_fast.kernels import _scoring
from merv_fast.ops import _tail_passes
from tests.budgets import low_precision
from tests.kernels.drawing import drawn, laid_out, layouts
from tests.kernels.memory import far_apart
from tests.kernels.test_gemm import DTYPES


@pytest.fixture(autouse=not torch.cuda.is_available())
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_scoring.LAUNCHES, 80, _scoring.Launch(2, 8, 16, 1))


Arguments = tuple[list[Tensor], Tensor, list[Tensor], Tensor]


def expected(arguments: Arguments, dtype: torch.dtype) -> list[Tensor]:
    """The vectors, and the offsets."""
    weights, query, biases, bias = (
        [t.to(dtype) for t in part] if isinstance(part, list) else part.to(dtype) for part in arguments
    )
    return [*_tail_passes.score_vectors(weights, query), torch.stack([(b * query).sum() for b in biases]) + bias]


def check(arguments: Arguments) -> None:
    vectors, offsets = _scoring.scoring(*arguments)
    got, single, exact = [*vectors, offsets], expected(arguments, torch.float32), expected(arguments, torch.float64)
    assert [t.shape for t in got] == [t.shape for t in exact]
    assert all(t.dtype == torch.float32 for t in got)
    assert all(vector.data_ptr() % 16 == 0 for vector in vectors)
    # Together, as the error of one sum that nearly cancels says little.
    got, single, exact = torch.cat(got), torch.cat(single), torch.cat(exact)
    assert (got.double() - exact).abs().max() <= low_precision(single, exact)


@drawn(40)
@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    D=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts(repeatable=()),
)
def test_any_shape_and_strides(device, widths, D, dtype, layouts):
    torch.manual_seed(0)
    E, shapes = len(widths), [(D, C) for C in widths]
    tensors = [torch.randn(*shape, device=device).to(dtype) for shape in (*shapes, *[(D,)] * E, (D,), (E,))]
    weights, rest = laid_out(tensors, layouts)[:E], laid_out(tensors, layouts)[E:]
    check((weights, rest[E], rest[:E], rest[E + 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_matrices_and_no_offsets(device, dtype):
    weights = [torch.randn(96, C, device=device).to(dtype) for C in (64, 16, 48)]
    query = torch.randn(96, device=device).to(dtype)
    biases, bias = [torch.randn(96, device=device).to(dtype) for _ in weights], torch.randn(3, device=device).to(dtype)
    check((weights, query, biases, bias))
    vectors, offsets = _scoring.scoring(weights, query)
    assert len(offsets) == 0
    for vector, other in zip(vectors, _scoring.scoring(weights, query, biases, bias)[0], strict=True):
        assert torch.equal(vector, other)


@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_column(device, stray):
    weights, query = [torch.ones(20, C, device=device) for C in (19, 5)], torch.ones(20, device=device)
    biases, bias = [torch.ones(20, device=device) for _ in weights], torch.zeros(2, device=device)
    weights[0][19, 18] = biases[1][19] = stray
    vectors, offsets = _scoring.scoring(weights, query, biases, bias)
    twenties = [torch.full((C,), 20.0, device=device) for C in (19, 5, 2)]
    twenties[0][18] = twenties[2][1] = stray
    for got, right in zip((*vectors, offsets), twenties, strict=True):
        assert torch.equal(got.nan_to_num(7), right.nan_to_num(7))


def test_offsets_beyond_32_bits(device):
    weight = far_apart(device, (3, 16), (1 << 30, 1))
    weight[:] = torch.arange(48, device=device).view(3, 16)
    vectors, _ = _scoring.scoring([weight], torch.ones(3, device=device).half())
    assert torch.equal(vectors[0], weight.float().sum(0))
