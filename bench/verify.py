"""What stands before every measurement: a result that is not right has no time."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import OURS, Way, tensors_of
from tests.budgets import FLOAT64, low_precision, relative_error

__all__ = ["WrongResult", "in_float64", "in_other_memory", "verify"]


class WrongResult(Exception):
    """A way whose result is not what it should be."""


def verify(
    way: Way,
    arguments: tuple,
    wide: tuple,
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    serving: AbstractContextManager | None = None,
) -> float:
    """How far the result of ``way`` is from ``exact``, relative to the largest magnitude there.

    Args:
        way: a way with ``lows`` must be within the budget of the worst of them; one without must be exact in float64.
        arguments: of the way.
        wide: the same in float64.
        exact: the right result, in float64.
        dtype: to which values on the way are rounded.
        serving: in which ours is called, if given.

    Raises:
        WrongResult: it is another shape, or further off than its budget.
    """
    ours, shown = way.name == OURS, way.shown or (lambda result: result)
    with serving if ours and serving else nullcontext(), poisoned() if ours else nullcontext():
        result = way.call(*arguments)
    got = list(tensors_of(shown(result)))
    for i, (one, right) in enumerate(zip(got, exact, strict=True)):
        if one.shape != right.shape:
            raise WrongResult(f"output {i} is {list(one.shape)}, not {list(right.shape)}")
    if way.lows:
        lows = zip(*(tensors_of(low(*arguments)) for low in way.lows), strict=True)
        errors = [
            ((one.double() - right.double()).abs().max().item(), max(budget(rough, right, dtype) for rough in roughs))
            for one, roughs, right in zip(got, lows, exact, strict=True)
        ]
    else:
        found = tensors_of(shown(way.call(*wide)))
        errors = [(relative_error(one, right), FLOAT64) for one, right in zip(found, exact, strict=True)]
    for i, (error, most) in enumerate(errors):
        # NaN is not within any budget.
        if not error <= most:
            raise WrongResult(f"output {i} is off by {error:.3g}, budget {most:.3g}")
    return max(relative_error(one, right) for one, right in zip(got, exact, strict=True))


def budget(rough: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """Absolute; integers are equal or wrong."""
    return low_precision(rough, right, dtype) if rough.is_floating_point() else 0.0


@contextmanager
def poisoned() -> Iterator[None]:
    """While it lasts, new memory is filled with NaN, so that what is not written shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def in_float64(value: Any) -> Any:
    """A copy of ``value`` with every floating tensor in it in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return type(value)(map(in_float64, value)) if isinstance(value, (list, tuple)) else value


def in_other_memory(value: Any) -> Any:
    """A copy of ``value``; modules, for which code is compiled, stay the same."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(map(in_other_memory, value)) if isinstance(value, (list, tuple)) else value
