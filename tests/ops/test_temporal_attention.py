import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from merv_fast.ops import temporal_attention
from tests.budgets import FLOAT64, low_precision, relative_error

SHAPES = {  # B, N, C, heads, frames, window
    "two-windows": (2, 5, 32, 4, 8, 4),
    "one-window": (1, 7, 24, 3, 5, 5),
    "alone": (2, 3, 8, 2, 3, 1),
    "one-head-odd-width": (3, 2, 13, 1, 6, 3),
    "one-video-one-head": (1, 4, 6, 1, 4, 4),
    "no-videos": (0, 5, 16, 2, 4, 2),
}
LOW = [torch.float32, torch.float16, torch.bfloat16]


def window_by_window(qkv: Tensor, heads: int, frames: int, window: int) -> Tensor:
    """torch's attention over transposed copies, one window of one video after the other."""
    rows, N, width = qkv.shape
    C = width // 3
    out = torch.empty(rows, N, C, dtype=qkv.dtype)
    for start in range(0, rows, window):
        video, first = divmod(start, frames)
        assert first + window <= frames
        chunk = qkv[video * frames + first : video * frames + first + window].transpose(0, 1)
        q, k, v = (part.reshape(N, window, heads, C // heads).transpose(1, 2) for part in chunk.split(C, 2))
        attended = F.scaled_dot_product_attention(q, k, v)
        out[start : start + window] = attended.transpose(1, 2).reshape(N, window, C).transpose(0, 1)
    return out


def case(shape, dtype=torch.float64, requires_grad=False):
    B, N, C, heads, frames, window = shape
    torch.manual_seed(0)
    qkv = torch.randn(B * frames, N, 3 * C, dtype=torch.float64).to(dtype)
    return qkv.requires_grad_(requires_grad), heads, frames, window


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attends_within_windows(shape):
    arguments = case(shape)
    got = temporal_attention(*arguments)
    assert got.is_contiguous()
    assert got.shape == (shape[0] * shape[4], shape[1], shape[2])
    if got.numel():
        assert relative_error(got, window_by_window(*arguments)) <= FLOAT64


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_within_budget_of_each_dtype(dtype):
    qkv, *how = case(SHAPES["two-windows"], dtype)
    exact, got = window_by_window(qkv.double(), *how), temporal_attention(qkv, *how)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= low_precision(window_by_window(qkv, *how), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Scores, softmax and sums are float32, so nothing but the result is rounded to the low dtype."""
    qkv, *how = case(SHAPES["two-windows"], dtype)
    assert torch.equal(temporal_attention(qkv, *how), temporal_attention(qkv.float(), *how).to(dtype))


def test_any_strides():
    qkv, *how = case((1, 4, 6, 2, 4, 2), torch.float32)
    view = torch.stack([qkv, -qkv], 3).transpose(0, 1)[..., 0].transpose(0, 1)
    assert not view.is_contiguous()
    assert torch.equal(temporal_attention(view, *how), temporal_attention(qkv, *how))


@pytest.mark.parametrize("shape", [(2, 2, 4, 2, 4, 2), (1, 1, 3, 1, 3, 3)], ids=str)
def test_gradients(shape):
    qkv, *how = case(shape, requires_grad=True)
    assert gradcheck(lambda qkv: temporal_attention(qkv, *how), qkv)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradient_within_budget_of_each_dtype(dtype):
    qkv, *how = case(SHAPES["two-windows"], dtype, requires_grad=True)
    wide, low = (qkv.detach().to(kind).requires_grad_() for kind in (torch.float64, dtype))
    grad = torch.randn(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3).to(dtype)
    temporal_attention(qkv, *how).backward(grad)
    window_by_window(wide, *how).backward(grad.double())
    window_by_window(low, *how).backward(grad)
    assert qkv.grad.dtype == dtype
    assert (qkv.grad.double() - wide.grad).abs().max() <= low_precision(low.grad, wide.grad)


def test_refuses_second_derivatives():
    qkv, *how = case(SHAPES["one-window"], requires_grad=True)
    (dqkv,) = torch.autograd.grad(temporal_attention(qkv, *how).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        dqkv.sum().backward()
    assert str(raised.value) == "temporal_attention_backward: derivative must be of first order, got a second one"


@pytest.mark.parametrize("name", ["two-windows", "one-video-one-head", "no-videos"])
def test_operator_contract(name):
    qkv, heads, _, window = case(SHAPES[name], torch.float32, requires_grad=True)
    torch.library.opcheck(torch.ops.merv_fast.temporal_attention.default, (qkv, heads, window))
    qkv = qkv.detach()
    grad = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3)
    torch.library.opcheck(torch.ops.merv_fast.temporal_attention_backward.default, (grad, qkv, heads, window))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def attended(qkv):
        return temporal_attention(qkv, 2, 4, 2).square() + 1

    compiled = torch.compile(attended, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, N in ((2, 3), (3, 5)):
        qkv = torch.randn(B * 4, N, 24, requires_grad=True)
        got, expected = compiled(qkv), attended(qkv)
        assert torch.equal(got, expected)
        (dqkv,) = torch.autograd.grad(got.sum(), qkv)
        assert torch.equal(dqkv, *torch.autograd.grad(expected.sum(), qkv))


QKV = torch.zeros(8, 3, 24)
PACKED = "qkv must be [B*T, N, 3*C] with C divisible by"
ERRORS = [
    ((QKV.long(), 2, 4, 2), TypeError, "qkv must be float64, float32, bfloat16 or float16, got torch.int64"),
    ((QKV[0], 2, 4, 2), ValueError, f"{PACKED} 2 heads, got shape (3, 24)"),
    ((QKV, 3, 4, 2), ValueError, f"{PACKED} 3 heads, got shape (8, 3, 24)"),
    ((QKV[..., :0], 2, 4, 2), ValueError, f"{PACKED} 2 heads, got shape (8, 3, 0)"),
    ((QKV, 0, 4, 2), ValueError, "heads must be at least 1, got 0"),
    ((QKV, 2, 0, 2), ValueError, "frames must be at least 1, got 0"),
    ((QKV, 2, 4, 0), ValueError, "window must be at least 1, got 0"),
    ((QKV, 2, 3, 3), ValueError, "qkv must hold whole videos of 3 frames, got 8 frames"),
    ((QKV, 2, 4, 3), ValueError, "window must divide 4 frames, got 3"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error) as raised:
        temporal_attention(*arguments)
    assert str(raised.value) == f"temporal_attention: {message}"
