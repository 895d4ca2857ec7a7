"""The ops inside of what Inductor makes: its kernels before and after them, their layouts, gradients, other sizes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from merv_fast import ops
from tests.budgets import INDUCTOR, relative_error
from tests.ops.tails import SHAPES, case

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """What an op says of its results is no part of the key under which Inductor keeps its kernels."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def pooled(x: Tensor) -> Tensor:
    return ops.pool_tokens(x.movedim(1, 2).sin(), (4, 4), (2, 2)).cos().mT


def projected(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return ops.pool_project(x.exp(), weights, biases, (4, 4), (2, 2)).tanh()


def fused(values: list[Tensor], query: Tensor, bias: Tensor) -> Tensor:
    tokens, weights = ops.fuse_encoders([value.sin() for value in values], query * 2, bias)
    return tokens.cos() * weights.sum(1)[:, None, None]


def collapsed(*arguments) -> Tensor:
    xs, *rest = arguments
    tokens, weights = ops.pool_project_fuse([x.sin() for x in xs], *rest)
    return tokens.cos() * weights[:, :1, None]


def attended(x: Tensor, weight: Tensor) -> Tensor:
    return ops.temporal_attention(x @ weight.T, heads=2, frames=4, window=2).relu() + x


def examples(batch: int) -> dict:
    torch.manual_seed(batch)
    x = torch.randn(batch, 16, 3, 20)
    layers = [torch.randn(24, 20), torch.randn(9, 24)], [torch.randn(24), torch.randn(9)]
    values = [torch.randn(batch, 5, 8), torch.randn(batch, 1, 8)]
    shape = (batch, *SHAPES["two-layers"][1:])
    return {
        pooled: (x,),
        projected: (x.movedim(1, 2), *layers),
        fused: (values, torch.randn(8), torch.randn(2)),
        collapsed: case(shape, torch.float32),
        attended: (torch.randn(4 * batch, 3, 16), torch.randn(48, 16)),
    }


def leaves(arguments) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [pooled, projected, fused, collapsed, attended], ids=lambda f: f.__name__)
def test_inductor_gives_the_same_with_gradients(device, function, dynamic):
    compiled = torch.compile(function, fullgraph=True, backend="inductor", dynamic=dynamic)
    for batch in (2, 3):
        arguments = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.to(device).requires_grad_(), examples(batch)[function]
        )
        expected, got = function(*arguments), compiled(*arguments)
        assert relative_error(got, expected) <= INDUCTOR
        grad, tensors = torch.randn_like(expected), leaves(arguments)
        for one, other in zip(
            torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
        ):
            assert relative_error(one, other) <= INDUCTOR


def test_inductor_gives_the_same_in_inference(device):
    linear = nn.Linear(20, 20).to(device)
    layers = [linear.weight], [linear.bias]
    model = torch.compile(lambda x: ops.pool_project(linear(x), *layers, (4, 4), (2, 2)), backend="inductor")
    x = torch.randn(2, 3, 16, 20, device=device)
    with torch.inference_mode():
        expected = ops.pool_project(linear(x), *layers, (4, 4), (2, 2))
        assert relative_error(model(x), expected) <= INDUCTOR
