import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merv_fast.runtime.chunking import in_chunks


def double(inputs):
    return [2 * x for x in inputs]


@given(st.integers(0, 9), st.integers(1, 12))
def test_parts_make_the_whole(batch, size):
    inputs = [torch.randn(batch, 3), torch.randn(batch, 2, 2)]
    sizes = []

    def call(part):
        sizes.append(len(part[0]))
        return double(part)

    outputs = in_chunks(call, inputs, size)
    assert all(torch.equal(y, 2 * x) for x, y in zip(inputs, outputs, strict=True))
    assert sum(sizes) == batch
    assert max(sizes) <= size


def runs_out(most, rows):
    """A call that has memory for so many rows; ``rows`` notes what it was asked for."""

    def call(part):
        rows.append(len(part[0]))
        if len(part[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return double(part)

    return call


def test_out_of_memory_once_halves_what_is_left(caplog):
    x, rows = torch.randn(10, 3), []
    with caplog.at_level(logging.WARNING, "merv_fast"):
        (y,) = in_chunks(runs_out(4, rows), [x], 8)
    assert torch.equal(y, 2 * x)
    assert rows == [8, 4, 4, 2]
    assert caplog.messages == [
        "out of memory with 8 videos at a time, going on with 4 (CUDA out of memory. Tried to allocate 2 GiB.)"
    ]


@pytest.mark.parametrize(("most", "size", "expected"), [(1, 8, [8, 4]), (0, 1, [1])])
def test_out_of_memory_twice_or_with_one_row_is_raised(most, size, expected):
    rows = []
    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(runs_out(most, rows), [torch.randn(8, 3)], size)
    assert rows == expected


def test_half_of_a_last_part(caplog):
    rows = []
    (y,) = in_chunks(runs_out(2, rows), [torch.zeros(3)], 8)
    assert rows == [3, 1, 1, 1]
    assert len(y) == 3


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        in_chunks(double, [torch.zeros(1)], 0)
