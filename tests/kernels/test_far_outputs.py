"""Results of more than 2^31 elements: what the last program of a grid writes lies where it belongs.

The tensors are only reserved: no other program runs, and pages that nobody touches take no memory.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from merv_fast.kernels import _blend, _gemm, fuse_encoders, pool_tokens, temporal_attention
from tests.budgets import low_precision
from tests.kernels.memory import far_apart

attention = importlib.import_module("merv_fast.ops.temporal_attention")
pooling = importlib.import_module("merv_fast.ops.pool_tokens")

FAR = 1 << 31

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter can run one program of a grid")


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere, but of what is far too large to be filled only the end, which is looked at."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        if out.is_floating_point() and not out.is_meta:
            out.view(-1)[-(1 << 16) :].fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


class LastProgram:
    """A kernel that runs just the last program of its grid, and notes its arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid: tuple[int]) -> Callable:
        return lambda *args, **fields: self.run(grid[0], args, fields)

    def run(self, programs: int, args: tuple, fields: dict) -> None:
        from triton.runtime.interpreter import GridExecutor, interpreter_builder

        self.calls.append(args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: None)
            patch.setattr(interpreter_builder, "set_grid_idx", lambda *_: None)
            # What a program wrote is copied from the host to the device, page by page, though they are the same.
            patch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
            interpreter_builder.grid_dim, interpreter_builder.grid_idx = (programs, 1, 1), (programs - 1, 0, 0)
            self.kernel[(1,)](*args, **fields)


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> Callable:
    def only_last(module: Any, name: str) -> LastProgram:
        kernel = LastProgram(getattr(module, name))
        monkeypatch.setattr(module, name, kernel)
        return kernel

    return only_last


def check(got: Tensor, low: Tensor, exact: Tensor) -> None:
    assert (got.double() - exact).abs().max() <= low_precision(low, exact)


@pytest.mark.parametrize("capability", [80, 90])
def test_gemm(last, monkeypatch, capability):
    tile = _gemm.Launch(16, 32, 32, 4, 2)
    monkeypatch.setattr(_gemm, "capability", lambda: capability)
    monkeypatch.setitem(_gemm.LAUNCHES, capability, dict.fromkeys(("large", "small", "gelu", "float32"), tile))
    last(_gemm, "gemm_kernel")
    N, S = 1 << 16, (FAR >> 16) + 1
    x, w, bias = torch.randn(1, S, 16).half(), torch.randn(N, 16).half(), torch.randn(N).half()
    out = _gemm.project(x, w, bias)
    assert out.numel() > FAR
    x, w, bias = x[0, -1], w[-32:], bias[-32:]
    check(out[0, -1, -32:], F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double()))


def test_sum_of_encoders(last):
    last(fuse_encoders, "sum_kernel")
    # Any score will do: the weight of one encoder is 1.
    last(fuse_encoders, "scores_kernel").run = lambda programs, args, fields: args[2].zero_()
    D, S = 1 << 16, (FAR >> 17) + 1
    value = torch.randn(2, 1, D).half().expand(2, S, D)
    tokens, _ = fuse_encoders.launch([value], torch.zeros(D).half(), torch.zeros(1).half())
    assert tokens.numel() > FAR
    assert torch.equal(tokens[-1, -1, -256:], value[-1, 0, -256:])


far_strides = pytest.mark.parametrize("strides", [(FAR >> 1, 8), (24, FAR >> 1)], ids=["videos", "tokens"])


@far_strides
def test_blend(strides):
    grad, value = torch.randn(3, 3, 8).half(), torch.randn(3, 3, 8).half()
    w, nothing, (dvalue, weighed) = torch.full((3, 1), 0.5), torch.zeros(3, 1), (far(strides) for _ in range(2))
    _blend.blend(w, grads=[grad], ds=nothing, vectors=[torch.zeros(8)], dvalues=[dvalue])
    _blend.blend(w, values=[value], weighed=[weighed])
    assert torch.equal(dvalue, grad / 2)
    assert torch.equal(weighed, value / 2)


@far_strides
def test_pool_tokens(strides):
    x, out = torch.randn(3, 3, 4, 8).half(), far(strides)
    pool_tokens.pool([x], [(2, 2)], (1, 1), 3, [out])
    check(out, *(pooling.reference(each, [2, 2], [1, 1], 3).flatten(1, 2) for each in (x, x.double())))


def far(strides: tuple[int, int]) -> Tensor:
    return far_apart("cpu", (3, 3, 8), (*strides, 1))


HEADS, CHANNELS = 1 << 12, 1 << 16
ENDS = slice(-64, None)
"""The last four heads."""


def programs_of(monkeypatch: pytest.MonkeyPatch, slots: int, keys: int) -> None:
    monkeypatch.setitem(temporal_attention.LAUNCHES, 80, temporal_attention.Launch(slots, keys, 16))


def test_temporal_attention(last, monkeypatch):
    programs_of(monkeypatch, 8, 8)
    last(temporal_attention, "attend_kernel")
    slots, window, N = 6, 2, 8193
    qkv = torch.randn(slots, 1, 3 * CHANNELS).half()
    out = temporal_attention.launch(qkv.expand(slots, N, -1), HEADS, window)
    assert out[:-1].numel() > FAR
    low, exact = (attention.reference(x, HEADS, window) for x in (qkv[-2:], qkv[-2:].double()))
    check(out[-2:, -1:, ENDS], low[..., ENDS], exact[..., ENDS])


def test_temporal_attention_backward(last, monkeypatch):
    programs_of(monkeypatch, 8, 8)
    last(temporal_attention, "attend_backward_kernel")
    slots, N = 2, 11000
    qkv, grad = torch.randn(slots, 1, 3 * CHANNELS).half(), torch.randn(slots, 1, CHANNELS).half()
    got = temporal_attention.launch_backward(grad.expand(slots, N, -1), qkv.expand(slots, N, -1), HEADS, slots)
    assert got[0].numel() > FAR
    inputs = (grad, qkv), (grad.double(), qkv.double())
    low, exact = (attention.reference_backward(*each, HEADS, slots).chunk(3, 2) for each in inputs)
    for mine, theirs, right in zip(got[:, -1:].chunk(3, 2), low, exact, strict=True):
        check(mine[..., ENDS], theirs[..., ENDS], right[..., ENDS])


def test_temporal_attention_backward_in_parts(last, monkeypatch):
    W, window, N = 2, 9, 2049
    programs_of(monkeypatch, W, 4)
    # Zeros that take no memory, where torch writes them.
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: torch.from_numpy(np.zeros(shape, np.float32)))
    kernel = last(temporal_attention, "attend_backward_kernel")
    qkv, grad = torch.randn(window, 1, 3 * CHANNELS).half(), torch.randn(window, 1, CHANNELS).half()

    def run_and_stop(*launch):
        LastProgram.run(kernel, *launch)
        raise InterruptedError

    # The first launch adds up what the first queries give. No other is made, nor are the sums copied.
    kernel.run = run_and_stop
    with pytest.raises(InterruptedError):
        temporal_attention.launch_backward(grad.expand(window, N, -1), qkv.expand(window, N, -1), HEADS, window)
    ((_, _, dqkv, sums, *_),) = kernel.calls
    assert sums[:-1].numel() > FAR
    grad[W:] = 0
    inputs = (grad, qkv), (grad.double(), qkv.double())
    low, exact = (attention.reference_backward(*each, HEADS, window).chunk(3, 2) for each in inputs)
    found = dqkv[:W, -1:, :CHANNELS], *sums[:, -1:].chunk(2, 2)
    for mine, theirs, right in zip(found, low, exact, strict=True):
        rows = slice(len(mine))
        check(mine[..., ENDS], theirs[rows, :, ENDS], right[rows, :, ENDS])
