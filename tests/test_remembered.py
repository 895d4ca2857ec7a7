import gc
import weakref

import pytest
import torch

import merv_fast.versions
from merv_fast.remembered import Constants, Remembered


@pytest.fixture
def counted():
    """(get, weight, results): ``get`` asks for twice the weight, and a result is noted when it is computed."""
    memory, weight, made = Remembered(), torch.ones(2), []

    def get(tag=None):
        return memory.get(weight, [weight], lambda: made.append(2 * weight) or made[-1], tag)

    return memory, get, weight, made


def test_computed_again_when_written_to_forgotten_or_of_another_tag(counted):
    memory, get, weight, made = counted
    assert get() is get()
    weight.mul_(2)
    assert get().tolist() == [4, 4]
    memory.forget(weight)
    get()
    get(torch.float16)
    assert get(torch.float16) is made[3]
    assert len(made) == 4


def test_what_is_written_to_meanwhile_is_computed_again():
    memory, weight = Remembered(), torch.ones(2)
    memory.get(weight, [weight], lambda: (2 * weight, weight.add_(1)))
    assert memory.get(weight, [weight], lambda: 2 * weight).tolist() == [4, 4]


def test_goes_with_its_owner():
    memory, owner = Remembered(), torch.nn.Linear(1, 1)
    result = weakref.ref(memory.get(owner, [owner.weight], lambda: torch.ones(1)))
    assert result() is not None
    del owner
    gc.collect()
    assert result() is None


def test_a_capture_computes_for_itself_or_reads_what_is_kept_for_it(counted, monkeypatch):
    _, get, _, made = counted
    before = get()
    monkeypatch.setattr(merv_fast.versions, "_capturing", lambda: True)
    captured = get()
    assert captured is not before
    with Constants() as constants:
        # Of a capture without constants: every replay makes it anew, and none of it holds before.
        get()
    assert len(made) == 3
    assert constants.hold()
    monkeypatch.undo()
    with Constants() as constants:
        kept = get()
        monkeypatch.setattr(merv_fast.versions, "_capturing", lambda: True)
        assert get() is kept
    assert get() is not kept
    assert constants.hold()


def test_constants_live_as_long_as_what_they_are_for(counted, monkeypatch):
    memory, get, weight, made = counted
    with Constants() as constants:
        get()
    kept = weakref.ref(made.pop())
    # Another stream's, in the place of the first.
    monkeypatch.setattr(merv_fast.versions, "_stream", lambda tensors: 1)
    get()
    assert kept() is not None
    assert constants.hold()
    memory.forget(weight)
    assert not constants.hold()
    del constants
    assert kept() is None


def test_constants_see_what_is_written_or_gone():
    memory, weights = Remembered(), [torch.ones(2), torch.ones(2)]
    owner = torch.nn.Module()
    for change in (lambda: weights[0].mul_(2), weights.pop):
        with Constants() as constants:
            memory.get(owner, weights, lambda: torch.ones(1))
        assert constants.hold()
        change()
        assert not constants.hold()
