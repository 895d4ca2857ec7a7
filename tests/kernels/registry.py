"""Calls whose kernels are compiled for every GPU, entered by the modules launches_*.py beside this one.

Their tensors are on the meta device: they have shapes, strides and alignment, and no memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CASES", "Case", "case", "meta"]


class Case(NamedTuple):
    """A call, the kernels of it that must run on the tensor cores, by ``wgmma`` on sm_90, and how they are launched.

    ``dependent``: from sm_90 on all but so many first ones are launched before the one in front has ended; 0: none.
    """

    call: Callable[[], None]
    matrix: tuple[str, ...]
    dependent: int


CASES: dict[str, Case] = {}


def case(name: str, *args, matrix: tuple[str, ...] = (), dependent: int = 0) -> Callable:
    """Enter the decorated function, called with ``args``, under ``name``."""

    def enter(function: Callable[..., None]) -> Callable[..., None]:
        assert name not in CASES, name
        CASES[name] = Case(lambda: function(*args), matrix, dependent)
        return function

    return enter


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
