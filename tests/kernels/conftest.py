"""The kernels in the place of the CPU's own, so that ops run them in Triton's interpreter, or on the GPU."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from merv_fast.ops._kernels import KERNELS

# It stands in for a GPU, where the kernels are launched in earnest.
collect_ignore = ["test_launching.py"] if torch.cuda.is_available() else []


@pytest.fixture(autouse=not torch.cuda.is_available())
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter multiply the numbers, and not their bits taken for integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype != tl.bfloat16:
            return x
        data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


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
