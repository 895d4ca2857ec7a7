"""Muon in float32: torch's own works in bfloat16, which most CPUs have to emulate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonalised"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: each matrix moves equally far in all directions that its gradients have.

    Args:
        params: matrices. All else is another optimiser's.
        lr: how far, for a square matrix, in each direction; ``max(1, rows / columns) ** 0.5`` times as far for others.
        momentum: Nesterov's.
        weight_decay: times ``lr``, the share of a weight that is lost each step.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                alike[parameter.shape].append((parameter, parameter.grad.lerp(mean, group["momentum"])))
            for (rows, columns), moves in alike.items():
                far = group["lr"] * max(1.0, rows / columns) ** 0.5
                directions = orthogonalised(torch.stack([move for _, move in moves]))
                for (parameter, _), direction in zip(moves, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-far)


def orthogonalised(matrices: Tensor) -> Tensor:
    """``U V'`` of ``U S V'``, roughly: singular values end between 0.7 and 1.2. [B, M, N] in, and out."""
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
