"""Without a GPU the Triton kernels run in the interpreter, which must be chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One worker a core, one thread a worker.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest

# PyTorch looks up its constructors when a meta device is first used: before they are replaced below.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture
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
