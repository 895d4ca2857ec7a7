"""Give an op its Triton kernel: the op on a GPU, imported at the first call."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["KERNELS", "register_kernel"]

KERNELS: dict[str, Callable[..., Any]] = {}
"""By op, what serves it on a GPU. Tests put these in the CPU's place to run them in Triton's interpreter."""


def register_kernel(op: str, reference: Callable[..., Any], launch: Callable[..., Any] | None = None) -> None:
    """Let ``launch`` serve ``merv_fast::<op>`` on CUDA, tensors on the current device.

    Without one it is ``merv_fast.kernels.<op>.launch``, or ``launch_backward`` there for ``<op>_backward``.
    ``reference`` goes on to serve float64, which is for checking, and tensors without elements.
    """
    name = op.removesuffix("_backward")
    entry = "launch" if op == name else "launch_backward"

    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if first.dtype == torch.float64 or first.numel() == 0:
            return reference(*args)
        serve = launch or getattr(import_module(f"merv_fast.kernels.{name}"), entry)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return serve(*args)

    KERNELS[op] = run
    torch.library.impl(f"merv_fast::{op}", "cuda", run)
