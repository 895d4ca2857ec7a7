"""Two tables of results, row by row: ``python -m bench.compare BEFORE.csv AFTER.csv [--share 0.1]``.

Rows are one measurement if op, case, implementation, device and dtype agree; of several runs in a file the last counts.
A row is a regression if its median grew by more than the share *and* its fast fifth (p20) is slower than the slow fifth
(p80) before: a median that moved within the spread of its own samples says nothing and is called unclear. Exits with 1
on a regression, with 2 if no row is in both.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.table import Row, read_latest

SHARE = 0.1


class Change(NamedTuple):
    """One measurement before and after."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """How many times as long it takes."""
        return self.after.p50 / self.before.p50

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest ratio of what lies between p20 and p80."""
        return self.after.p20 / self.before.p80, self.after.p80 / self.before.p20

    def verdict(self, share: float) -> str:
        """Slower or faster by more than ``share``, unclear where the spreads overlap, else nothing."""
        low, high = self.spread
        if self.ratio > 1 + share:
            return "slower" if low > 1 else "unclear"
        if 1 / self.ratio > 1 + share:
            return "faster" if high < 1 else "unclear"
        return ""


def show(changes: Sequence[Change], share: float) -> None:
    """A table, the largest ratio first."""
    table = Table("op", "case", "implementation", "before, ms", "after, ms", "ratio", "spread", "verdict")
    for change in sorted(changes, key=lambda change: -change.ratio):
        before, after, (low, high) = change.before, change.after, change.spread
        times = f"{before.p50:.4g}", f"{after.p50:.4g}"
        spread = f"{low:.2f}-{high:.2f}"
        table.add_row(before.op, before.case, before.impl, *times, f"{change.ratio:.2f}", spread, change.verdict(share))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--share", type=float, default=SHARE, help=f"how much slower is a regression ({SHARE})")
    options = parser.parse_args(arguments)
    if options.share < 0:
        parser.error(f"--share must be at least 0, got {options.share}")
    try:
        before, after = (read_latest(file) for file in (options.before, options.after))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    changes = [Change(row, after[key]) for key, row in before.items() if key in after]
    for file, rows, others in ((options.before, before, after), (options.after, after, before)):
        for key in rows:
            if key not in others:
                print(f"only in {file}: {', '.join(part for part in key if part)}")
    if not changes:
        print("compare: the two files must share a row, got none")
        return 2
    show(changes, options.share)
    slower = [change for change in changes if change.verdict(options.share) == "slower"]
    print(f"{len(changes)} rows in both, {len(slower)} slower by more than {options.share:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
