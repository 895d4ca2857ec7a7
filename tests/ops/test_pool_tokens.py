import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from merv_fast.ops import pool_tokens
from tests.budgets import FLOAT64, low_precision, relative_error

SHAPES = {  # B, T, (H, W), (h, w), t, C
    "divides": (2, 3, (16, 16), (8, 8), None, 16),
    "overlapping-bins": (1, 2, (14, 14), (8, 8), None, 8),
    "oblong-odd-channels": (1, 1, (5, 7), (2, 3), None, 769),
    "identity": (1, 2, (4, 4), (4, 4), None, 32),
    "one-token": (2, 2, (3, 5), (1, 1), 1, 4),
    "enlarges": (1, 2, (2, 3), (3, 4), 3, 5),
    "halves-slots": (2, 8, (4, 4), (2, 2), 4, 6),
    "overlapping-slots": (1, 5, (3, 4), (2, 3), 3, 7),
    "one-channel": (2, 3, (4, 2), (2, 2), 2, 1),
}
LOW = [torch.float32, torch.float16, torch.bfloat16]


def bin_by_bin(x: Tensor, grid, out_grid, out_slots) -> Tensor:
    """Mean of each bin, one after the other, in the dtype of x."""
    (B, T, _, C), (H, W), (h, w) = x.shape, grid, out_grid
    t = out_slots or T
    maps = x.reshape(B, T, H, W, C)
    cells = [
        maps[
            :,
            k * T // t : -((k + 1) * T // -t),
            i * H // h : -((i + 1) * H // -h),
            j * W // w : -((j + 1) * W // -w),
        ].mean((1, 2, 3))
        for k in range(t)
        for i in range(h)
        for j in range(w)
    ]
    return torch.stack(cells, 1).reshape(B, t, h * w, C)


def case(shape, dtype=torch.float64, requires_grad=False):
    B, T, grid, out_grid, t, C = shape
    torch.manual_seed(0)
    x = torch.randn(B, T, grid[0] * grid[1], C, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad), grid, out_grid, t


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_averages_each_bin(shape):
    arguments = case(shape)
    assert relative_error(pool_tokens(*arguments), bin_by_bin(*arguments)) <= FLOAT64


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_within_budget_of_each_dtype(shape, dtype):
    x, *how = case(shape, dtype)
    exact, got = bin_by_bin(x.double(), *how), pool_tokens(x, *how)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert (got.double() - exact).abs().max() <= low_precision(bin_by_bin(x, *how), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Sums are float32, so nothing but the result is rounded to the low dtype."""
    x, *how = case(SHAPES["halves-slots"], dtype)
    assert torch.equal(pool_tokens(x, *how), pool_tokens(x.float(), *how).to(dtype))


@pytest.mark.parametrize("shape", [(0, 3, 16, 8), (2, 3, 16, 8)], ids=["empty-batch", "batch"])
def test_shapes(shape):
    assert pool_tokens(torch.randn(shape), (2, 8), (1, 3), 2).shape == (shape[0], 2, 3, 8)


def test_any_strides():
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64).transpose(2, 3)[..., ::2]
    for out_slots in (2, 3):
        got = pool_tokens(x, (3, 4), (2, 2), out_slots)
        assert got.is_contiguous()
        assert relative_error(got, bin_by_bin(x, (3, 4), (2, 2), out_slots)) <= FLOAT64


@pytest.mark.parametrize(
    "shape",
    [(1, 3, (2, 3), (2, 2), 2, 1), (1, 1, (2, 2), (2, 2), None, 2), (1, 2, (1, 2), (2, 3), 3, 1)],
    ids=["overlapping", "identity", "enlarges"],
)
def test_gradients(shape):
    x, *how = case(shape, requires_grad=True)
    assert gradcheck(lambda x: pool_tokens(x, *how), x)
    assert gradgradcheck(lambda x: pool_tokens(x, *how), x)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradient_within_budget_of_each_dtype(dtype):
    x, *how = case(SHAPES["overlapping-slots"], dtype, requires_grad=True)
    wide, low = (x.detach().to(kind).requires_grad_() for kind in (torch.float64, dtype))
    out = pool_tokens(x, *how)
    grad = torch.randn_like(out)
    out.backward(grad)
    bin_by_bin(wide, *how).backward(grad.double())
    bin_by_bin(low, *how).backward(grad)
    assert x.grad.dtype == dtype
    assert (x.grad.double() - wide.grad).abs().max() <= low_precision(low.grad, wide.grad)


def test_gradient_with_any_strides():
    x, *how = case(SHAPES["overlapping-bins"], requires_grad=True)
    out = pool_tokens(x, *how)
    (expanded,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (written_out,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(expanded, written_out)


def test_operator_contract():
    op, backward = torch.ops.merv_fast.pool_tokens.default, torch.ops.merv_fast.pool_tokens_backward.default
    for B, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        x = torch.randn(B, 3, 12, 4, dtype=dtype, requires_grad=True)
        torch.library.opcheck(op, (x, (3, 4), (2, 2), 2))
        torch.library.opcheck(op, (x, (3, 4), (3, 4), 3))
        grad = torch.randn(B, 2, 4, 4, dtype=dtype, requires_grad=True)
        torch.library.opcheck(backward, (grad, (3, 4), (2, 2), 3))
    torch.library.opcheck(op, (torch.randn(2, 3, 8, 12).transpose(2, 3), (3, 4), (2, 2), 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def pooled(x):
        return pool_tokens(x, (3, 4), (2, 2), 2).square() + 1

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, T in ((2, 3), (4, 5)):
        x = torch.randn(B, T, 12, 4, requires_grad=True)
        got, expected = compiled(x), pooled(x)
        assert torch.equal(got, expected)
        (dx,) = torch.autograd.grad(got.sum(), x)
        assert torch.equal(dx, *torch.autograd.grad(expected.sum(), x))


X = torch.zeros(1, 2, 16, 8)
ERRORS = [
    (
        (X.int(), (4, 4), (2, 2)),
        TypeError,
        "x must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    ((X[0], (4, 4), (2, 2)), ValueError, "x must be [B, T, H*W, C], got shape (2, 16, 8)"),
    (
        (X[:, :0], (4, 4), (2, 2)),
        ValueError,
        "x must have at least one slot and channel, got shape (1, 0, 16, 8)",
    ),
    (
        (X[..., :0], (4, 4), (2, 2)),
        ValueError,
        "x must have at least one slot and channel, got shape (1, 2, 16, 0)",
    ),
    ((X[:, :, 1:], (4, 4), (2, 2)), ValueError, "x must hold 16 tokens a slot for grid (4, 4), got 15"),
    ((X, (4, 0), (2, 2)), ValueError, "grid must be (rows, columns), both at least 1, got (4, 0)"),
    ((X, (4, 4), (2, 2, 2)), ValueError, "out_grid must be (rows, columns), both at least 1, got (2, 2, 2)"),
    ((X, (4, 4), (2, 2), 0), ValueError, "out_slots must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error) as raised:
        pool_tokens(*arguments)
    assert str(raised.value) == f"pool_tokens: {message}"
