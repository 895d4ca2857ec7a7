"""Other launch choices for the GEMM, whatever its tables say."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from merv_fast.kernels import _gemm

__all__ = ["scheduled"]


@contextmanager
def scheduled(programs: int | None = None, **fields: bool) -> Iterator[list[int]]:
    """While it lasts, every choice of this GPU has these fields, and a persistent grid at most so many programs.

    Yields a list that gets an entry for each persistent grid that is launched.
    """
    table, processors, launched = _gemm.LAUNCHES[_gemm.capability()], _gemm.processors, []

    def counted() -> int:
        launched.append(programs or processors())
        return launched[-1]

    changed = {name: choice._replace(**fields) for name, choice in table.items()}
    with patch.dict(table, changed), patch.object(_gemm, "processors", counted):
        yield launched
