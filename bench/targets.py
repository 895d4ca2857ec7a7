"""What times should be, and whether they are: the targets of `bench.kernels` and of `pytest bench/ --benchmark`."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.cases import EAGER
from bench.table import Row

__all__ = ["Target", "of_the_model"]


@dataclass
class Target:
    """``measured`` should be at most (or at least) ``asked``; None where it was not measured."""

    name: str
    measured: float | None
    asked: float
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if (self.measured <= self.asked if self.at_most else self.measured >= self.asked) else "missed"

    def __str__(self) -> str:
        got = "" if self.measured is None else f", got {self.measured:.2f}"
        return f"{self.verdict}: {self.name}: {'<=' if self.at_most else '>='} {self.asked:g}{got}"


def of_the_model(rows: Iterable[Row]) -> list[Target]:
    """Of the four encoders, the front end and an answer on an H200 in bfloat16, the best of our ways."""
    best: dict[tuple[str, str], Row] = {}
    eager: dict[tuple[str, str], Row] = {}
    for row in rows:
        whose, key = (eager if row.impl == EAGER else best), (row.op, row.case.rpartition(", ")[2])
        if row.impl.startswith((EAGER, "merv_fast")) and (key not in whose or row.p50 < whose[key].p50):
            whose[key] = row

    def percent(op: str, case: str) -> float | None:
        return best[op, case].percent_of_roof if (op, case) in best else None

    def ratio(op: str, case: str) -> float | None:
        known = (op, case) in best and (op, case) in eager
        return eager[op, case].p50 / best[op, case].p50 if known else None

    answer = percent("answer", "B=1")
    return [
        *(
            Target(f"four encoders, {case}: % of the GEMM's rate", percent("encoders", case), asked)
            for case, asked in (("B=1", 55), ("B=8", 70))
        ),
        *(
            Target(f"{op}, B=1: {EAGER} over it", ratio(op, "B=1"), 10)
            for op in ("front end", "front end and decoding")
        ),
        Target("answer: time over reading the weights", answer and 100 / answer, 1.3, at_most=True),
    ]
