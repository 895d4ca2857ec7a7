from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merv_fast.runtime.cache.memory import MemoryTier

KEYS = st.sampled_from("abcdef")
STEPS = st.lists(st.tuples(st.sampled_from(["get", "put"]), KEYS, st.integers(0, 12)), max_size=60)


def entry(size):
    return {"x": torch.full((size,), size, dtype=torch.uint8)}


@given(st.integers(0, 30), STEPS)
def test_it_is_a_bounded_lru(bound, steps):
    """Against a plain list of keys by last use; never over the bound, and only the oldest leave."""
    tier, model = MemoryTier(bound), OrderedDict()
    for step, key, size in steps:
        if step == "get":
            got = tier.get(key)
            assert (got is None) == (key not in model)
            if got is not None:
                assert got["x"].tolist() == [model[key]] * model[key]
                model.move_to_end(key)
        else:
            tier.put(key, entry(size))
            model.pop(key, None)
            if size <= bound:
                model[key] = size
                while sum(model.values()) > bound:
                    model.popitem(last=False)
        assert tier.nbytes == sum(model.values()) <= bound
        assert len(tier) == len(model)
        assert list(tier._entries) == list(model)


def test_what_is_too_large_replaces_nothing_but_its_own_key():
    tier = MemoryTier(8)
    tier.put("a", entry(4))
    tier.put("b", entry(4))
    tier.put("a", entry(9))
    assert tier.get("a") is None
    assert tier.get("b")["x"].tolist() == [4] * 4
    assert tier.nbytes == 4


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_sizes_are_those_of_the_elements(shape):
    tier = MemoryTier(1000)
    tier.put("a", {"x": torch.zeros(shape, dtype=torch.float64), "y": torch.zeros(3, dtype=torch.bool)})
    assert tier.nbytes == 8 * torch.Size(shape).numel() + 3
    tier.clear()
    assert (len(tier), tier.nbytes, tier.get("a")) == (0, 0, None)
