import pytest
import torch

from merv_fast.modules.attention import attention
from tests.budgets import FLOAT64, low_precision, relative_error


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def heads(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_definition_in_float64(lead):
    q, k, v = heads(*lead, 4, 5, 6), heads(*lead, 4, 7, 6), heads(*lead, 4, 7, 6) + 1
    assert relative_error(attention(q, k, v), definition(q, k, v)) < FLOAT64


def test_strided_heads_and_gradients():
    packed = heads(2, 5, 3 * 4 * 6).requires_grad_()
    q, k, v = packed.unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    got, expected = attention(q, k, v), definition(q, k, v)
    assert relative_error(got, expected) < FLOAT64
    weight = heads(*got.shape)
    (gradient,) = torch.autograd.grad((got * weight).sum(), packed, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), packed)
    assert relative_error(gradient, expected_gradient) < FLOAT64


def test_bfloat16():
    q, k, v = (heads(2, 4, 9, 8).bfloat16() for _ in range(3))
    exact = definition(q.double(), k.double(), v.double())
    got = attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max().item() <= low_precision(definition(q, k, v), exact)
