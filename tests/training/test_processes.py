"""Two gloo processes give the losses of one: data parallel, sharded by FSDP2, and resumed."""

import json
import socket
import subprocess
import sys

import pytest
import torch

import merv_fast
from merv_fast.training import STAGES, Collator, TrainingDataset, read_entries
from merv_fast.training.run import tokeniser
from tests import budgets
from tests.training import ranks
from tests.training.small import ANSWERS, conversation, write_data


@pytest.fixture(scope="module")
def mixed(clips):
    """Sixteen entries, four of text alone: in the order of the seed, one process at times has no video."""
    entries = [conversation(answer, video=clip.name) for clip, answer in zip(clips, ANSWERS, strict=True)]
    for place in (4, 6, 10, 11):
        del entries[place]["video"]
    return write_data(clips[0].parent, entries, "mixed.json")


@pytest.fixture(scope="module")
def two(mixed, tmp_path_factory):
    """The folder and the losses of two processes."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.training.ranks", str(mixed), str(out)]
    running = [
        subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(ranks.RANKS)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks.RANKS))
    assert first == second
    return out, first


@pytest.fixture(scope="module")
def one(mixed, tmp_path_factory):
    """The folder and the losses of one process."""
    out = tmp_path_factory.mktemp("one")
    return out, {name: ranks.run(name, mixed, out / name, 1) for name in ranks.RUNS}


@pytest.mark.parametrize("name", ranks.RUNS)
def test_two_processes_give_the_losses_of_one(mixed, one, two, name):
    expected, got = one[1][name], two[1][name]
    assert len(got) == len(expected) == ranks.STEPS
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= budgets.TRAINING * expected[0]
    before, after = (loss_of_the_saved(folder / name, mixed) for folder in (one[0], two[0]))
    assert abs(before - after) <= budgets.TRAINING * expected[0]
    assert after < expected[0]


def test_sharded_training_resumes(two):
    assert two[1]["resumed"] == two[1]["fsdp"]


def loss_of_the_saved(folder, data):
    vidlm = merv_fast.load_vid(folder)
    samples = TrainingDataset(read_entries(data), tokeniser(vidlm, STAGES["finetune"]), max(vidlm.config.num_frames))
    batch = Collator.of(vidlm.model.video_model, vidlm.tokenizer)(list(samples))
    del batch["skipped"]
    with torch.no_grad():
        return vidlm.model(**batch).loss.item()
