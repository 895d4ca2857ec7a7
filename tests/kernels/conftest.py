"""The kernels in the place of the CPU's own, so that ops run them in Triton's interpreter, or on the GPU."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from merv_fast.ops._kernels import KERNELS

# It stands in for a GPU, where the kernels are launched in earnest.
collect_ignore = ["test_launching.py"] if torch.cuda.is_available() else []


@pytest.fixture
def kernels_serve(device: str) -> Iterator[None]:
    """While it lasts, ``torch.ops.merv_fast.*`` launch the Triton kernels for CPU tensors too."""
    if device == "cuda":
        yield
        return
    library = torch.library.Library("merv_fast", "IMPL")
    with warnings.catch_warnings():
        # Native kernels may serve the CPU already.
        warnings.simplefilter("ignore")
        for op, run in KERNELS.items():
            library.impl(op, run, "CPU", allow_override=True)
    yield
    library._destroy()
