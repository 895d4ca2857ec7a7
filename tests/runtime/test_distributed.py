import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merv_fast.modules import Tail
from merv_fast.ops import fuse_encoders
from tests.budgets import GOLDEN, low_precision, relative_error
from tests.runtime.ranks import GOOD, KINDS, MANY, RANKS, REQUESTS, VIDEOS, front_end, random_model, request

ROOT = Path(__file__).parents[2]
MEMBERS = {4: [[2], [0], [1], [3]], 2: [[2, 3], [0, 1], [2, 3], [0, 1]]}
both = pytest.mark.parametrize("ranks", [2, 4])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of four processes got; those of two ranks are two groups."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.runtime.ranks", str(folder)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe) as process:
        try:
            output = process.communicate(timeout=120)[0].decode()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@torch.inference_mode()
def in_one_process(kind="linear", dtype=torch.float32, number=None, **kwargs):
    encoders, tail, inputs = front_end(kind, dtype, **kwargs)
    inputs = inputs if number is None else request(number, inputs)
    features = [encoder(x) for encoder, x in zip(encoders, inputs, strict=True)]
    if isinstance(tail, Tail):
        return tail(features)
    projectors, fusion = tail
    values = [projector(x) for projector, x in zip(projectors, features, strict=True)]
    return fuse_encoders(values, *fusion.folded(dtype))


def check_alike(got, expected):
    """Every rank's tokens and weights are those of one process, and the same to the bit."""
    (tokens, weights), errors = expected, []
    for *_, own, shares in got:
        errors += [relative_error(own, tokens), relative_error(shares, weights)]
        assert (own.shape, shares.shape) == (tokens.shape, weights.shape)
        assert not own.requires_grad
        assert torch.equal(own, got[0][-2])
        assert torch.equal(shares, got[0][-1])
    print(f"relative error {max(errors):.1e}")
    assert max(errors) < GOLDEN


@both
@pytest.mark.parametrize("kind", ["linear", "gelu-mlp", "single", "functions"])
def test_every_rank_gets_what_one_process_gets(kind, ranks, results):
    tokens, weights = in_one_process(kind)
    # Something is at stake: no encoder has all the weight of every video, and scores are large.
    assert 0.01 < weights.max(1).values.min() < 0.99
    got = [result["run_kinds", ranks][kind, torch.float32] for result in results]
    assert [members for members, *_ in got] == MEMBERS[ranks]
    check_alike(got[:ranks], (tokens, weights))
    check_alike(got[-ranks:], (tokens, weights))


@both
def test_in_bfloat16_the_sum_is_made_in_float32(ranks, results):
    encoders, tail, inputs = front_end(dtype=torch.bfloat16)
    with torch.no_grad():
        features = [encoder(x) for encoder, x in zip(encoders, inputs, strict=True)]
        low, weights = tail(features)
        query, bias = (part.double() for part in tail.fusion.folded(torch.bfloat16))
        values = [projector(x.double()) for projector, x in zip(tail.double().projectors, features, strict=True)]
        exact, _ = fuse_encoders(values, query, bias)
    for result in results:
        _, got, shares = result["run_kinds", ranks]["linear", torch.bfloat16]
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).abs().max() <= low_precision(low, exact)
        assert relative_error(shares, weights) < GOLDEN


def obstacle_to(kind, members):
    """Why encoders of those projectors are projected by themselves, if they are."""
    name = {"functions": "function", "single": "TokenProjector" if 3 in members else None}.get(kind)
    return name and f"{name} is not average pooling and an MLP"


@both
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_rank_makes_one_product_and_takes_part_in_two_sums(kind, dtype, ranks, results):
    for members, result in zip(MEMBERS[ranks], results, strict=True):
        obstacle, calls, sums = result["run_kinds", ranks]["calls", kind, dtype]
        assert obstacle == obstacle_to(kind, members)
        fused = "fuse_encoders" if obstacle else "pool_project_fuse"
        assert [name for name in calls if "pool_" not in name or name.endswith("_fuse")] == ["all_reduce"] * 2 + [fused]
        assert obstacle or "pool_project" not in calls
        assert sums == [((ranks + VIDEOS, 8), torch.float64), ((3, 8, 32), torch.float32)]


@both
@pytest.mark.parametrize("mlp", ["linear", "gelu-mlp"])
def test_a_whole_model_gives_what_it_gives_in_one_process(mlp, ranks, results):
    model, frames = random_model(mlp)
    with torch.inference_mode():
        expected = model.get_video_features(frames)
    assert (expected.encoder_weights[0] - expected.encoder_weights[1]).abs().max() > 0.01
    assert expected.encoder_weights.max() > 2 * expected.encoder_weights.min()
    for held in (mlp, (mlp, "absent")):
        got = [result["run_models", ranks][held] for result in results[:ranks]]
        assert sorted(member for members, *_ in got for member in members) == [0, 1, 2, 3]
        check_alike(got, (expected.pooler_output, expected.encoder_weights))


@both
def test_a_rank_needs_its_own_encoders_and_projectors_only(ranks, results):
    expected = in_one_process()
    for held in ("meta", "none"):
        check_alike([result["run_absent", ranks][held] for result in results[:ranks]], expected)
    for members, result in zip(MEMBERS[ranks], results, strict=True):
        costs, encoders = result["run_absent", ranks]["messages"]
        first = min({0, 1, 2, 3} - set(members))
        rule = f"given where an encoder is absent, as encoders[{first}] is, got None"
        assert costs == f"ValueError: RankedEncoders: costs must be {rule}"
        rule = f"there on this rank, which runs encoder {members[0]}, got None"
        assert encoders == f"ValueError: RankedEncoders: encoders[{members[0]}] must be {rule}"


@both
def test_after_a_request_that_fails_on_one_rank_all_are_right_about_the_next(ranks, results):
    answers = [result["run_failures", ranks] for result in results]
    for number in GOOD:
        got = [answer[number] for answer in answers[:ranks]]
        assert not [text for text in got if isinstance(text, str)], number
        check_alike(got, in_one_process(number=number))
    assert all(isinstance(answer[number], str) for answer in answers for number in {*range(1, REQUESTS + 1)} - {*GOOD})


@both
def test_where_a_request_fails_is_said_on_every_rank(ranks, results):
    last = ranks - 1

    def elsewhere(number, where):
        error = f"request {number} has failed on rank {where} of {ranks}, where it raises its own error"
        return f"RuntimeError: RankedEncoders: {error}"

    for position, result in enumerate(results):
        answer, rank = result["run_failures", ranks], position % ranks
        member = MEMBERS[ranks][position][0]
        missing = f"inputs[{member}] must be there on this rank, which runs encoder {member}, got None"
        assert answer[1] == ("OutOfMemoryError: no memory left" if rank == 0 else elsewhere(1, "0"))
        assert answer[3] == (f"ValueError: RankedEncoders: {missing}" if rank == last else elsewhere(3, last))
        if rank in (0, last):
            assert answer[4].startswith("ValueError: PooledProjector: x must be [B, 2, ")
        else:
            assert answer[4] == elsewhere(4, f"0, {last}")


@both
def test_batches_and_requests_that_differ_are_an_error_on_every_rank(ranks, results):
    shapes = "; ".join(f"[{videos}, 8, 32] torch.float32" for videos in [2, 3, 3, 3][:ranks])
    batches = f"tokens must have one shape and dtype on every rank, got {shapes}"
    numbers = f"request must be the same on every rank, got {[8, 18, 28, 38][:ranks]}"
    for result in results:
        assert result["run_failures", ranks][6] == f"ValueError: RankedEncoders: {batches}"
        assert result["run_failures", ranks][8] == f"RuntimeError: RankedEncoders: {numbers}"


@both
def test_a_batch_may_be_large_or_empty(ranks, results):
    batches = [result["run_batches", ranks] for result in results[:ranks]]
    check_alike([batch["many"] for batch in batches], in_one_process(videos=MANY))
    assert all(batch["none"][1].shape == (0, 8, 32) for batch in batches)


def test_ranks_built_of_different_models_are_an_error_on_every_rank(results):
    rule = "the same on every rank, so that each encoder is on one"
    dtypes = ["float32", "bfloat16", "float32", "float32"]
    shapes = "; ".join(f"[3, 8, 32] torch.{dtype}" for dtype in dtypes)
    for members, result in zip([[0], [1], [3], [3]], results, strict=True):
        assert result["disagreements"] == {
            "members": members,
            "costs": f"ValueError: RankedEncoders: costs must be {rule}, got encoders on [1, 1, 0, 2] ranks",
            "encoders": "ValueError: RankedEncoders: encoders must be as many on every rank, got [4, 4, 4, 5]",
            "dtypes": f"ValueError: RankedEncoders: tokens must have one shape and dtype on every rank, got {shapes}",
        }


def test_arguments_that_do_not_fit(results):
    rules = [
        "ranks must be 1 to 3, the encoders, got 4",
        "projectors must be 4, got 3",
        "costs must be 4, got 3",
        "fusion must be a weighted sum, got ConcatFusion",
    ]
    for result in results:
        assert result["messages"] == [f"ValueError: RankedEncoders: {rule}" for rule in rules]
