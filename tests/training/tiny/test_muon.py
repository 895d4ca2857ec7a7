"""Muon: steps that are orthogonal, as torch's own but for its bfloat16, down to a minimum."""

import torch
from torch import nn

from merv_fast.training.tiny.muon import Muon, orthogonalised


def test_singular_values_are_near_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 20), (2, 40, 16), (2, 16, 40)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3
        assert values.median() > 0.7


def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    start, gradients = [torch.randn(12, 12), torch.randn(24, 12), torch.randn(12, 24)], torch.Generator().manual_seed(1)
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimisers = (
        Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.3),
        torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.3),
    )
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=gradients)
            other.grad = mine.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        # bfloat16 has eight bits, and five steps of orthogonalisation carry its error on.
        assert (mine - other).norm() < 0.05 * (other - before).norm()


def test_what_has_no_gradient_stays():
    parameter = nn.Parameter(torch.ones(2, 2))
    Muon([parameter]).step()
    assert parameter.tolist() == [[1, 1], [1, 1]]
