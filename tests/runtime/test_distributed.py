import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merv_fast.ops import fuse_encoders
from tests.budgets import GOLDEN, relative_error
from tests.runtime.ranks import RANKS, front_end

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of four processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.runtime.ranks", str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE) for rank in range(RANKS)]
    try:
        errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def in_one_process(dtype):
    encoders, projectors, fusion, inputs = front_end(dtype)
    with torch.inference_mode():
        values = [p(e(x)) for e, p, x in zip(encoders, projectors, inputs, strict=True)]
        return fuse_encoders(values, *fusion.folded(dtype))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_what_one_process_gets(ranks, results):
    tokens, weights = in_one_process(torch.float32)
    # Something is at stake: no encoder has all the weight of every video, and scores are large.
    assert 0.01 < weights.max(1).values.min() < 0.99
    for result in results:
        _, got, shares = result[ranks, torch.float32]
        assert relative_error(got, tokens) < GOLDEN
        assert relative_error(shares, weights) < GOLDEN
    first = results[0][ranks, torch.float32][1]
    assert all(torch.equal(result[ranks, torch.float32][1], first) for result in results)


@pytest.mark.parametrize("ranks", [2, 4])
def test_in_bfloat16_the_sum_is_rounded_once(ranks, results):
    tokens, _ = in_one_process(torch.bfloat16)
    got = results[0][ranks, torch.bfloat16][1]
    assert got.dtype == torch.bfloat16
    # One rounding of each rank's tokens and one of the sum, where one process has only the last.
    assert (got.float() - tokens.float()).abs().max() <= 2 * 2**-8 * tokens.float().abs().max()


def test_encoders_are_shared_out_by_cost(results):
    assert [result[4, torch.float32][0] for result in results] == [[2], [0], [1], [3]]
    assert [result[2, torch.float32][0] for result in results[:2]] == [[2, 3], [0, 1]]


def test_an_encoder_that_is_twice_there_is_an_error_on_every_rank(results):
    for result in results:
        assert result["twice"].endswith("members must hold every encoder once over all ranks, got [1, 1, 2, 0]")
        assert "must be a tensor on this rank, got None" in result["none"]
