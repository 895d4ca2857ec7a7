import doctest
import importlib

import pytest

from merv_fast import ops


@pytest.mark.parametrize("name", ops.__all__)
def test_example_runs(name):
    module = importlib.import_module(f"merv_fast.ops.{name}")
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
