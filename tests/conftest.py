"""Without a GPU the Triton kernels run in the interpreter, which must be chosen before triton is imported.

With MERV_FAST_REQUIRE_CUDA=1 a session without a GPU ends at once, and what would be skipped fails.
"""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a shell starts in its background ignores Ctrl-C, and so would all that the tests start to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One worker a core, one thread a worker.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest

REQUIRE_CUDA = os.environ.get("MERV_FAST_REQUIRE_CUDA") == "1"

# PyTorch looks up its constructors when a meta device is first used: before they are replaced below.
with torch.device("meta"):
    torch.empty(0)


def pytest_configure(config: pytest.Config) -> None:
    if REQUIRE_CUDA and not torch.cuda.is_available():
        raise pytest.UsageError("MERV_FAST_REQUIRE_CUDA=1, but PyTorch finds no CUDA GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    return refuse_skip((yield))


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> pytest.TestReport | pytest.CollectReport:
    """``report``, a failure instead of a skip where a GPU is required; an expected failure stays one."""
    if REQUIRE_CUDA and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"MERV_FAST_REQUIRE_CUDA=1, but this was left out: {reason}"
    return report


@pytest.fixture(scope="session")
def random_merv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small MERV whose weights are random, so that its answers go on to the last token."""
    from tests.models.random_merv import build_tiny

    folder = tmp_path_factory.mktemp("random")
    build_tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand out NaN instead of stale memory, so an unwritten output cannot pass by luck."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

    monkeypatch.setattr(torch, "empty", poisoned)
