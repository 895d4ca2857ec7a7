"""The temporal_attention kernels against the op's reference."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from merv_fast.kernels import temporal_attention as kernels
from tests.budgets import low_precision
from tests.kernels.drawing import CONTIGUOUS, drawn, laid_out, layouts
from tests.kernels.memory import far_apart

# The package exports the function under the module's name.
op = importlib.import_module("merv_fast.ops.temporal_attention")

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
WHOLE, PARTS = kernels.Launch(8, 8, 16), kernels.Launch(2, 4, 16)
"""Large programs, as the interpreter pays by the program; and the second takes windows over 4 in parts."""


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cpu":
        monkeypatch.setitem(kernels.LAUNCHES, 80, WHOLE)


def check(got: Tensor, low: Tensor, exact: Tensor, parts: int) -> None:
    """Each of the ``parts`` side by side is within its own budget, and contiguous as a whole."""
    assert got.dtype == low.dtype
    assert got.shape == exact.shape
    assert got.is_contiguous()
    for mine, theirs, right in zip(*(x.chunk(parts, 2) for x in (got, low, exact)), strict=True):
        assert (mine.double() - right).abs().max() <= low_precision(theirs, right)


def check_both(qkv: Tensor, heads: int, window: int, grad: Tensor | None = None, layouts=CONTIGUOUS) -> None:
    if grad is None:
        grad = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3, device=qkv.device).to(qkv.dtype)
        qkv, grad = laid_out([qkv, grad], layouts)
    low, exact = op.reference(qkv, heads, window), op.reference(qkv.double(), heads, window)
    check(kernels.launch(qkv, heads, window), low, exact, 1)
    low = op.reference_backward(grad, qkv, heads, window)
    exact = op.reference_backward(grad.double(), qkv.double(), heads, window)
    check(kernels.launch_backward(grad, qkv, heads, window), low, exact, 3)


@drawn(10)
@given(
    windows=st.integers(1, 2),
    N=st.integers(1, 5),
    heads=st.integers(1, 3),
    d=st.integers(1, 40),
    window=st.integers(1, 9),
    dtype=st.sampled_from([HALF, SINGLE, BRAIN]),
    choice=st.sampled_from([WHOLE, PARTS]),
    # Slots that are all alike have gradients of zero, of which no error is a fraction.
    layouts=layouts(repeatable=(1, 2)),
)
@example(windows=2, N=17, heads=4, d=64, window=8, dtype=BRAIN, choice=WHOLE, layouts=CONTIGUOUS)
@example(windows=1, N=5, heads=2, d=80, window=5, dtype=HALF, choice=WHOLE, layouts=CONTIGUOUS)
@example(windows=1, N=2, heads=1, d=769, window=3, dtype=SINGLE, choice=WHOLE, layouts=CONTIGUOUS)
@example(windows=2, N=3, heads=2, d=16, window=7, dtype=SINGLE, choice=PARTS, layouts=CONTIGUOUS)
@example(windows=1, N=2, heads=1, d=8, window=20, dtype=HALF, choice=WHOLE, layouts=CONTIGUOUS)
def test_any_shape_and_strides(device, windows, N, heads, d, window, dtype, choice, layouts):
    torch.manual_seed(0)
    qkv = torch.randn(windows * window, N, 3 * heads * d, device=device).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.LAUNCHES, 80, choice if device == "cpu" else kernels.LAUNCHES[80])
        check_both(qkv, heads, window, layouts=layouts)


def test_views(device):
    torch.manual_seed(0)
    wide, grad = torch.randn(6, 9, 97, device=device), torch.randn(6, 9, 40, device=device)
    check_both(wide[:, 1:6, 1:], 2, 3, grad[:, 2:7, 3:35])
    check_both(wide[::2, ::3, :96], 4, 3, grad[::2, ::3, :32])
    check_both(wide.transpose(1, 2)[:, :4, :6], 1, 3, grad.transpose(1, 2)[:, :4, :2])
    check_both(wide[:, :1, :96].expand(6, 4, 96), 2, 2, grad[:1, :, :32].expand(6, 9, 32)[:, :4])
    check_both(wide.flatten()[1 : 1 + 4 * 5 * 96].view(4, 5, 96), 2, 4)


def test_scores_far_from_zero(device):
    """exp of a score that is not measured from the maximum would be Inf or 0."""
    torch.manual_seed(0)
    qkv = torch.randn(6, 3, 24, device=device)
    qkv[..., :8] *= 100
    qkv = qkv.half()
    with pytest.MonkeyPatch.context() as patch:
        for choice in (WHOLE, PARTS):
            patch.setitem(kernels.LAUNCHES, 80, choice if device == "cpu" else kernels.LAUNCHES[80])
            check_both(qkv, 1, 6)


def kinds(x: Tensor) -> Tensor:
    """0 where finite, another number for each of NaN, Inf and -Inf."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


@pytest.mark.parametrize("part", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("choice", [WHOLE, PARTS], ids=["whole", "parts"])
def test_non_finite_values_reach_just_the_elements_of_the_reference(device, monkeypatch, part, choice):
    if device == "cpu":
        monkeypatch.setitem(kernels.LAUNCHES, 80, choice)
    torch.manual_seed(0)
    qkv, grad = torch.randn(10, 4, 48, device=device), torch.randn(10, 4, 16, device=device)
    # Slots 0 to 2 of the second window: a block of keys whose scores may all be -inf before finite ones come.
    stray = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    (grad if part == "grad" else qkv.view(10, 4, 3, 16)[:, :, "qkv".index(part)])[5:8, :3, 9] = stray
    got, expected = kernels.launch(qkv, 2, 5), op.reference(qkv, 2, 5)
    assert torch.equal(kinds(got), kinds(expected))
    got, expected = kernels.launch_backward(grad, qkv, 2, 5), op.reference_backward(grad, qkv, 2, 5)
    assert torch.equal(kinds(got), kinds(expected))
    assert kinds(expected).any()


@pytest.mark.parametrize("which", ["slots", "patches"])
def test_offsets_beyond_32_bits(device, which):
    far = 1 << 30
    torch.manual_seed(0)
    strides = (far, 64) if which == "slots" else (64, far)
    qkv, grad = far_apart(device, (3, 3, 24), (*strides, 1)), far_apart(device, (3, 3, 8), (*strides, 1))
    qkv[:], grad[:] = torch.randn(3, 3, 24, device=device), torch.randn(3, 3, 8, device=device)
    check_both(qkv, 2, 3, grad)


def test_the_op_runs_the_kernels(device, kernels_serve, monkeypatch):
    torch.manual_seed(0)
    calls = []
    for name in ("launch", "launch_backward"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, kernel=kernel: calls.append(kernel) or kernel(*args))
    attend = torch.compile(lambda x: op.temporal_attention(x, 2, 4, 2) * 2, fullgraph=True, backend="aot_eager")
    for function in (attend, lambda x: op.temporal_attention(x, 2, 4, 2) * 2):
        calls.clear()
        qkv = torch.randn(4, 3, 24, device=device, requires_grad=True)
        out, grad = function(qkv), torch.randn(4, 3, 8, device=device)
        out.backward(grad)
        assert len(calls) == 2
        wide = qkv.detach().double()
        low, exact = (op.reference(x, 2, 2) * 2 for x in (qkv.detach(), wide))
        check(out.detach(), low, exact, 1)
        low = op.reference_backward(2 * grad, qkv.detach(), 2, 2)
        check(qkv.grad, low, op.reference_backward(2 * grad.double(), wide, 2, 2), 3)


@pytest.mark.parametrize(
    "qkv", [torch.randn(4, 3, 24, dtype=torch.float64), torch.randn(0, 3, 24)], ids=["64", "empty"]
)
def test_the_reference_serves_float64_and_no_elements(device, kernels_serve, qkv):
    qkv = qkv.to(device).requires_grad_()
    out = op.temporal_attention(qkv, 2, 4, 2)
    out.sum().backward()
    assert torch.equal(out, op.reference(qkv, 2, 2))
    assert torch.equal(qkv.grad, op.reference_backward(torch.ones_like(out), qkv, 2, 2))


def test_cost_of_mervs_case():
    qkv = torch.empty(16, 257, 3072, dtype=BRAIN, device="meta")
    scores = 2 * 257 * 16 * 8 * 8
    assert kernels.cost(qkv, 16, 8) == (2 * scores * 2 * 64, 16 * 257 * (3072 + 1024) * 2)
