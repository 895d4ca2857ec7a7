"""The layers of a projector before its last one: linear, then exact (erf) GELU, and their gradients."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hidden_layers", "hidden_layers_backward", "linear_backward"]


def hidden_layers(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Apply gelu(x W^T + b) layer after layer; with no layers this is x itself."""
    for weight, bias in zip(weights, biases, strict=True):
        x = F.gelu(F.linear(x, weight, bias))
    return x


def hidden_layers_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of x (None unless needed), weights and biases, recomputing the layers from x."""
    inputs, linears = [x], []
    for weight, bias in zip(weights, biases, strict=True):
        linears.append(F.linear(inputs[-1], weight, bias))
        inputs.append(F.gelu(linears[-1]))
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = []
    for layer in reversed(range(len(weights))):
        grad = torch.ops.aten.gelu_backward.default(grad, linears[layer])
        dweight, dbias = linear_backward(grad, inputs[layer])
        dweights.insert(0, dweight)
        dbiases.insert(0, dbias)
        if layer or needs_x:
            grad = grad @ weights[layer]
    return (grad if needs_x else None), dweights, dbiases


def linear_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a linear layer, from those of its output and its input."""
    rows = grad.flatten(0, -2)
    dbias = rows.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
    return rows.T @ x.flatten(0, -2), dbias
