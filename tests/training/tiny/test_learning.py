"""Learning: rates that rise and fall, a log of means, and several processes that learn as one."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch import nn

from merv_fast.training.tiny.learning import EVERY, Learner, share_of_rate

STEPS = 12


def learned(rows, together):
    """Weights after some steps on rows of the same data, and the log."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    matrices = [model[0].weight]
    others = [model[0].bias, *model[1].parameters()]
    learner = Learner("x", matrices, others, STEPS, (0.02, 0.01), rising=0.25, falling=0.5, together=together)
    inputs, targets = torch.randn(STEPS, 8, 4), torch.randn(STEPS, 8, 2)
    for step in range(STEPS):
        assert learner.step == step
        learner.learn((model(inputs[step, rows]) - targets[step, rows]).square().mean(), told=float(step))
    return [parameter.tolist() for parameter in model.parameters()], learner.log


def one_rank(meeting, rank):
    dist.init_process_group("gloo", init_method=f"file://{meeting}/ranks", rank=rank, world_size=2)
    weights, _ = learned(slice(rank, None, 2), True)
    dist.destroy_process_group()
    return weights


def test_several_processes_learn_as_one(tmp_path):
    alone, _ = learned(slice(None), False)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        ranks = list(pool.map(partial(one_rank, tmp_path), range(2)))
    for one, first, second in zip(alone, *ranks, strict=True):
        assert first == second
        assert torch.tensor(first) == pytest.approx(torch.tensor(one), abs=1e-5)


def test_the_log_holds_means():
    _, log = learned(slice(None), False)
    assert len(log) == STEPS // EVERY
    assert log[0]["told"] == pytest.approx(sum(range(EVERY)) / EVERY)


def test_rates_rise_stay_and_fall():
    shares = [share_of_rate(step, 100, 0.1, 0.5) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10:50] == [1.0] * 40
    assert shares[50:] == pytest.approx([(100 - step) / 50 for step in range(50, 100)])


def test_both_optimisers_follow_the_schedule_each_group_from_its_own_rate():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    groups = [{"params": [model[0].bias]}, {"params": [model[1].bias], "lr": 0.001}]
    learner = Learner("x", [model[0].weight], groups, 10, (0.02, 0.01), rising=0.2, falling=0.4)
    for step in range(9):
        rates = [group["lr"] for optimiser in learner.optimisers for group in optimiser.param_groups]
        share = share_of_rate(step, 10, 0.2, 0.4)
        assert rates == pytest.approx([share * 0.01, share * 0.001, share * 0.02])
        learner.learn(model(torch.ones(3, 4)).square().mean())
