"""``pytest bench/`` runs every benchmark once as a test; ``pytest bench/ --benchmark`` also times them.

A test is one way of doing one case. It fails, and has no number, unless its result is right. The ways of a case that
are right are timed together, in turns, by bench/clock.py; pytest-benchmark is then shown those times by a timer that
plays them back, so that its tables, ``--benchmark-json`` and ``--benchmark-compare`` hold them.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench.clock import pin_threads
from bench.comparison import Comparison, Entry, Roofs
from bench.provenance import today
from bench.table import Row, append, tabulate

# The scripts have no tests in them, and may import what is not there.
collect_ignore = [file.name for file in Path(__file__).parent.glob("*.py") if not file.name.startswith("test_")]


class Session:
    """What the tests of a run share; each row is written at once, so that it survives a run that is cut short."""

    def __init__(self, config: pytest.Config) -> None:
        # Where this file is found late, as by `pytest .`, its options were not read.
        self.timed = config.getoption("benchmark", False)
        self.table: Path | None = config.getoption("append", None)
        seconds = config.getoption("seconds", None)
        self.seconds = math.inf if seconds is None else seconds
        self.started = time.monotonic()
        self.roofs, self.about, self.rows = Roofs(), today(), list[Row]()
        self.current: Comparison | None = None

    def compare(self, entry: Entry) -> Comparison:
        """The case's comparison, which is kept until another case is asked for."""
        if self.current is None or self.current.entry is not entry:
            if time.monotonic() - self.started > self.seconds:
                pytest.skip(f"no time left of {self.seconds:g} s")
            self.current = None
            torch.compiler.reset()
            gc.collect()
            if entry.setup.device == "cuda":
                torch.cuda.empty_cache()
            self.current = Comparison(entry, self.roofs)
        return self.current

    def keep(self, *rows: Row) -> None:
        self.rows += rows
        if self.table:
            append(self.table, rows)


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="Time what is right; without it everything runs once.")
    group.addoption("--append", type=Path, metavar="FILE", help="Add the times as rows to this CSV table.")
    group.addoption("--seconds", type=float, metavar="N", help="Begin no case after so many seconds.")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench: pytest-benchmark must be installed, got none")
    session = config.stash[SESSION] = Session(config)
    if session.timed:
        if processes := config.getoption("numprocesses", None):
            raise pytest.UsageError(f"--benchmark: it must run in one process, got -n {processes}")
        # Our table holds more, and all of it in one.
        config.option.benchmark_quiet = not config.option.benchmark_verbose
        if not torch.cuda.is_available():
            pin_threads()
    elif session.table:
        raise pytest.UsageError("--append: it must be given with --benchmark, got it alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``entry`` and ``impl`` runs for every way of the ENTRIES of its module."""
    if "entry" in metafunc.fixturenames:
        parameters = [
            pytest.param(
                entry,
                way.name,
                id=f"{', '.join(entry.names)}: {way.name}",
                marks=pytest.mark.benchmark(group=", ".join(entry.names), timer=played_back),
            )
            for entry in metafunc.module.ENTRIES
            for way in entry.case.ways
        ]
        metafunc.parametrize(("entry", "impl"), parameters)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Entry, str], None]:
    """Verify a way of a case, which runs it; with --benchmark, time it and keep its row."""
    session = request.config.stash[SESSION]

    def run(entry: Entry, impl: str) -> None:
        if obstacle := entry.obstacle(impl):
            pytest.skip(obstacle)
        comparison = session.compare(entry)
        comparison.verify(impl)
        if session.timed:
            times, benchmark = comparison.milliseconds(impl), request.getfixturevalue("benchmark")
            row = comparison.row(impl, session.about)
            benchmark.extra_info |= asdict(row)
            upcoming = iter(times)
            benchmark.pedantic(lambda: play_back(next(upcoming)), rounds=len(times))
            session.keep(row)

    return run


_played = 0.0


def played_back() -> float:
    """The timer that pytest-benchmark reads, in seconds: it moves by a measured time whenever one is played back."""
    return _played


def play_back(milliseconds: float) -> None:
    """Let that time pass for pytest-benchmark."""
    global _played
    _played += 1e-3 * milliseconds


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash[SESSION]
    state.keep(*state.roofs.rows(state.about))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each way beside the others of its case."""
    session = config.stash[SESSION]
    if session.rows:
        terminalreporter.ensure_newline()
        terminalreporter.write_line(tabulate(session.rows))
        if session.table:
            terminalreporter.write_line(f"{len(session.rows)} rows in {session.table}")
