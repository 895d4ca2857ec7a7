"""How everything here learns: Muon moves the matrices inside, AdamW all else, and a log says what comes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from merv_fast.training.tiny.muon import Muon

__all__ = ["EVERY", "Learner"]

logger = logging.getLogger("merv_fast")

EVERY = 10
"""Steps that are averaged to one entry of a log."""


class Learner:
    """Steps down a loss.

    Args:
        name: in the log.
        matrices: parameters that `Muon` moves; may be none.
        others: parameters that AdamW moves, or groups of them as torch's optimisers take, some with an ``lr``.
        steps: how many there will be.
        rates: learning rates of Muon and of AdamW at their peak.
        rising: the share of them, the first ones, in which learning rates rise to their peak.
        falling: the share of them, the last ones, in which they fall to nothing.
        together: whether all processes of the default group learn the same, each from a share of every batch.
    """

    def __init__(
        self,
        name: str,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        steps: int,
        rates: tuple[float, float],
        rising: float,
        falling: float,
        together: bool = False,
    ) -> None:
        self.name = name
        self.together = together
        self.optimisers: list[Optimizer] = [AdamW(others, lr=rates[1], weight_decay=0.01, betas=(0.9, 0.98))]
        if matrices := list(matrices):
            self.optimisers.append(Muon(matrices, lr=rates[0]))
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        share = partial(share_of_rate, steps=steps, rising=rising, falling=falling)
        self.schedules = [LambdaLR(optimiser, share) for optimiser in self.optimisers]
        self.log: list[dict[str, float]] = []
        """The loss and what else is told, every `EVERY` steps the mean since the last."""
        self.since: list[dict[str, float]] = []

    @property
    def step(self) -> int:
        """How many steps there have been."""
        return len(self.log) * EVERY + len(self.since)

    def learn(self, loss: Tensor, **told: float) -> None:
        """One step, by the gradients of ``loss``; ``told`` is for the log."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        if self.together:
            average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, schedule in zip(self.optimisers, self.schedules, strict=True):
            optimiser.step()
            schedule.step()
        self.since.append({"loss": loss.item(), **told})
        if len(self.since) == EVERY:
            self.log.append(means(self.since))
            self.since = []
            if not self.together or dist.get_rank() == 0:
                told = {key: round(value, 3) for key, value in self.log[-1].items()}
                logger.info("%s, step %d: %s", self.name, self.step, told)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def share_of_rate(step: int, steps: int, rising: float, falling: float) -> float:
    """Of the learning rate at its peak: straight up, level, straight down."""
    return min(1.0, (step + 1) / (rising * steps), (steps - step) / (falling * steps))


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of every key, without what is not a number."""
    return {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
