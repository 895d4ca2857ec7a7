"""Say no to second derivatives where an op has none, instead of returning wrong ones."""

from typing import Any

import torch

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(name: str) -> None:
    """Make differentiating the op ``merv_fast::<name>``, itself a backward, a RuntimeError."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: derivative must be of first order, got a second one")

    torch.library.register_autograd(f"merv_fast::{name}", backward)
