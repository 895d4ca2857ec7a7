from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from merv_fast.ops import pool_project
from tests.budgets import FLOAT64, GOLDEN, low_precision, relative_error
from tests.golden_files import load
from tests.golden_files import weights as state_dict

SHAPES = {  # B, T, (H, W), (h, w), t, widths
    "linear": (2, 3, (4, 4), (2, 2), None, (8, 16)),
    "oblong-odd-channels": (1, 2, (5, 7), (2, 3), None, (769, 33)),
    "two-layers-fewer-slots": (2, 5, (3, 4), (2, 3), 3, (6, 10, 9)),
    "three-layers": (1, 2, (7, 7), (3, 3), 2, (5, 20, 8, 8)),
}
LOW = [torch.float32, torch.float16, torch.bfloat16]


def pool_then_project(x: Tensor, weights, biases, grid, out_grid, out_slots) -> Tensor:
    """torch's adaptive pooling in three dimensions on channel-major maps, then an MLP as a chain of modules."""
    maps = x.unflatten(2, grid).permute(0, 4, 1, 2, 3)
    pooled = F.adaptive_avg_pool3d(maps, (out_slots or x.shape[1], *out_grid))
    tokens = pooled.flatten(2).transpose(1, 2)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        tokens = (F.gelu(tokens) if layer else tokens) @ weight.T + bias
    return tokens


def case(shape, dtype=torch.float64, requires_grad=False):
    B, T, grid, out_grid, t, widths = shape
    torch.manual_seed(0)
    x = torch.randn(B, T, grid[0] * grid[1], widths[0], dtype=torch.float64)
    weights = [torch.randn(n, m, dtype=torch.float64) / m**0.5 for m, n in pairwise(widths)]
    biases = [torch.randn(n, dtype=torch.float64) for n in widths[1:]]
    return to((x, weights, biases, grid, out_grid, t), dtype, requires_grad)


def to(case_, dtype, requires_grad=False):
    def cast(tensor):
        return tensor.detach().to(dtype).requires_grad_(requires_grad)

    x, weights, biases, *how = case_
    return cast(x), [*map(cast, weights)], [*map(cast, biases)], *how


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_pools_then_projects(shape):
    arguments = case(shape)
    got, expected = pool_project(*arguments), pool_then_project(*arguments)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert relative_error(got, expected) <= FLOAT64


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_within_budget_of_each_dtype(shape, dtype):
    arguments = case(shape, dtype)
    exact, got = pool_then_project(*to(arguments, torch.float64)), pool_project(*arguments)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= low_precision(pool_then_project(*arguments), exact)


@pytest.mark.parametrize(
    "name", ["avg2d_linear", "avg2d_gelu_mlp", "avg2d_fused_gelu_mlp", "avg3d_linear", "avg3d_half_frames"]
)
def test_equals_the_reference(name):
    tensors, metadata = load(f"projector_{name}")
    state, h = state_dict(tensors), metadata["args"]["output_size"]
    weights = [value for key, value in state.items() if key.endswith("weight")]
    biases = [value for key, value in state.items() if key.endswith("bias")]
    out_slots = int(metadata["out_frames"])
    got = pool_project(tensors["input"], weights, biases, (7, 7), (h, h), out_slots)
    assert relative_error(got, tensors["output"]) <= GOLDEN


def test_empty_batch():
    x, *rest = case(SHAPES["three-layers"])
    assert pool_project(x[:0], *rest).shape == (0, 18, 8)


def test_any_strides():
    x, weights, biases, *how = case(SHAPES["two-layers-fewer-slots"])
    views = (x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), [w.T.contiguous().T for w in weights])
    assert relative_error(pool_project(*views, biases, *how), pool_project(x, weights, biases, *how)) <= FLOAT64


@pytest.mark.parametrize("widths", [(2, 3), (2, 3, 2), (1, 3, 2, 2)], ids=str)
def test_gradients(widths):
    x, weights, biases, *how = case((2, 2, (2, 3), (2, 2), 1, widths), requires_grad=True)
    L = len(weights)
    assert gradcheck(
        lambda x, *layers: pool_project(x, layers[:L], layers[L:], *how),
        (x, *weights, *biases),
        fast_mode=L > 2,
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_within_budget_of_each_dtype(dtype):
    arguments = case(SHAPES["three-layers"], dtype, requires_grad=True)
    wide, low = to(arguments, torch.float64, True), to(arguments, dtype, True)
    out = pool_project(*arguments)
    grad = torch.randn_like(out)
    out.backward(grad)
    pool_then_project(*wide).backward(grad.double())
    pool_then_project(*low).backward(grad)
    for got, exact, rough in zip(*([x, *w, *b] for x, w, b, *_ in (arguments, wide, low)), strict=True):
        assert got.grad.dtype == dtype
        assert (got.grad.double() - exact.grad).abs().max() <= low_precision(rough.grad, exact.grad)


@pytest.mark.parametrize("name", ["linear", "three-layers"])
def test_frozen_features_cost_no_gradient(name):
    arguments = case(SHAPES[name], requires_grad=True)
    x, weights, biases, *how = arguments
    out = pool_project(x, weights, biases, *how)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, [*weights, *biases], grad)
    frozen = pool_project(x.detach(), weights, biases, *how)
    for one, other in zip(torch.autograd.grad(frozen, [*weights, *biases], grad), expected, strict=True):
        assert relative_error(one, other) <= FLOAT64
    how[2] = how[2] or x.shape[1]
    dx, _, _ = torch.ops.merv_fast.pool_project_backward(grad, x, weights, biases, *how, False)
    assert dx == []


def test_gradient_with_any_strides():
    x, weights, biases, *how = case(SHAPES["linear"], requires_grad=True)
    tensors = [x, *weights, *biases]
    out = pool_project(x, weights, biases, *how)
    expanded = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    for one, other in zip(expanded, torch.autograd.grad(out, tensors, torch.ones_like(out)), strict=True):
        assert relative_error(one, other) <= FLOAT64


def test_refuses_second_derivatives():
    x, *rest = case(SHAPES["linear"], requires_grad=True)
    (dx,) = torch.autograd.grad(pool_project(x, *rest).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        dx.sum().backward()
    assert str(raised.value) == "pool_project_backward: derivative must be of first order, got a second one"


@pytest.mark.parametrize(("B", "dtype"), [(0, torch.float32), (2, torch.bfloat16)], ids=str)
def test_operator_contract(B, dtype):
    x, weights, biases, *how = case((B, 3, (2, 3), (2, 2), 2, (3, 5, 4)), dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.merv_fast.pool_project.default, (x, weights, biases, *how))
    x, weights, biases, *how = to((x, weights, biases, *how), dtype)
    grad = torch.randn(B, 8, 4, dtype=dtype)
    for needs_x in (False, True):
        torch.library.opcheck(
            torch.ops.merv_fast.pool_project_backward.default, (grad, x, weights, biases, *how, needs_x)
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_whole(frozen, dynamic):
    def projected(x, *layers):
        return pool_project(x, layers[:2], layers[2:], (2, 3), (2, 2)).square().sum()

    compiled = torch.compile(projected, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, T in ((2, 3), (3, 4)):
        x, weights, biases, *_ = case((B, T, (2, 3), (2, 2), None, (3, 5, 4)), torch.float32, requires_grad=True)
        tensors = (x.requires_grad_(not frozen), *weights, *biases)
        wanted = tensors[frozen:]
        got, expected = compiled(*tensors), projected(*tensors)
        assert torch.equal(got, expected)
        for one, other in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True):
            assert torch.equal(one, other)


X, W, B1 = torch.zeros(1, 2, 16, 8), torch.zeros(4, 8), torch.zeros(4)
GRIDS = ((4, 4), (2, 2))
ERRORS = [
    (
        (X.int(), [W], [B1], *GRIDS),
        TypeError,
        "x must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    ((X[0], [W], [B1], *GRIDS), ValueError, "x must be [B, T, H*W, C], got shape (2, 16, 8)"),
    ((X, [W], [B1], (4, 5), (2, 2)), ValueError, "x must hold 20 tokens a slot for grid (4, 5), got 16"),
    (
        (X, [W], [B1], (4, 4), (0, 2)),
        ValueError,
        "out_grid must be (rows, columns), both at least 1, got (0, 2)",
    ),
    ((X, [W], [B1], *GRIDS, -1), ValueError, "out_slots must be at least 1, got -1"),
    ((X, [], [], *GRIDS), ValueError, "weights must be at least 1 layer, got 0"),
    ((X, [W], [B1, B1], *GRIDS), ValueError, "biases must be 1 tensors like weights, got 2"),
    (
        (X, [W.double()], [B1], *GRIDS),
        TypeError,
        "weights[0] must be torch.float32 like x, got torch.float64",
    ),
    ((X, [W], [B1.half()], *GRIDS), TypeError, "biases[0] must be torch.float32 like x, got torch.float16"),
    ((X, [W.to("meta")], [B1], *GRIDS), ValueError, "weights[0] must be on cpu like x, got meta"),
    ((X, [W.T], [B1], *GRIDS), ValueError, "weights[0] must be [out, 8], got shape (8, 4)"),
    ((X, [W, W], [B1, B1], *GRIDS), ValueError, "weights[1] must be [out, 4], got shape (4, 8)"),
    ((X, [B1], [B1], *GRIDS), ValueError, "weights[0] must be [out, 8], got shape (4,)"),
    ((X, [W], [B1[1:]], *GRIDS), ValueError, "biases[0] must be [4], got shape (3,)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error) as raised:
        pool_project(*arguments)
    assert str(raised.value) == f"pool_project: {message}"
