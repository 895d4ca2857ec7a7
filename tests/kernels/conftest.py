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
def right_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter round to bfloat16 as a GPU does, and multiply its numbers, not their bits as integers."""
    convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype != tl.bfloat16:
            return x
        return interpreter.TensorHandle(convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
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
