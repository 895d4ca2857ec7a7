import pytest
import torch
from torch.autograd import gradcheck

from merv_fast.ops import fuse_encoders, pool_project, pool_project_fuse
from tests.budgets import FLOAT64, low_precision, relative_error
from tests.ops.tails import SHAPES, case, flat, one_after_the_other, tensors_of, to

LOW = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_is_projection_then_fusion(shape):
    arguments = case(shape)
    for got, expected in zip(pool_project_fuse(*arguments), one_after_the_other(*arguments), strict=True):
        assert got.shape == expected.shape
        assert got.is_contiguous()
        assert relative_error(got, expected) <= FLOAT64


def test_is_the_two_ops_it_collapses():
    xs, weights, biases, query, bias, grids, *how = case(SHAPES["two-layers"])
    values = [
        pool_project(x, weights[2 * e : 2 * e + 2], biases[2 * e : 2 * e + 2], grids[e], *how) for e, x in enumerate(xs)
    ]
    got = pool_project_fuse(xs, weights, biases, query, bias, grids, *how)
    for one, other in zip(got, fuse_encoders(values, query, bias), strict=True):
        assert relative_error(one, other) <= FLOAT64


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_within_budget_of_each_dtype(shape, dtype):
    arguments = case(shape, dtype)
    got, low = pool_project_fuse(*arguments), one_after_the_other(*arguments)
    exact = one_after_the_other(*to(arguments, torch.float64))
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    for one, rough, right in zip(got, low, exact, strict=True):
        assert (one.double() - right).abs().max() <= low_precision(rough, right)


def test_empty_batch():
    xs, *rest = case(SHAPES["two-layers"])
    tokens, encoder_weights = pool_project_fuse([x[:0] for x in xs], *rest)
    assert tokens.shape == (0, 8, 9)
    assert encoder_weights.shape == (0, 2)


def test_any_strides():
    xs, weights, *rest = case(SHAPES["two-layers"])
    views = (
        [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in xs],
        [w.T.contiguous().T for w in weights],
    )
    for got, expected in zip(pool_project_fuse(*views, *rest), pool_project_fuse(xs, weights, *rest), strict=True):
        assert got.is_contiguous()
        assert relative_error(got, expected) <= FLOAT64


@pytest.mark.parametrize(
    "shape",
    [
        (2, (1, 2), ((1, 3), (2, 2)), (1, 2), 1, ((2,), (1,)), 3),
        (2, (1,), ((2, 2),), (1, 2), None, ((1, 2),), 2),
    ],
    ids=["linear", "two-layers"],
)
def test_gradients(shape):
    arguments = case(shape, requires_grad=True)
    how = arguments[5:]
    E, W = len(arguments[0]), len(arguments[0]) + len(arguments[1])

    def op(*tensors):
        return pool_project_fuse(tensors[:E], tensors[E:W], tensors[W:-2], *tensors[-2:], *how)

    assert gradcheck(op, tensors_of(arguments))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_are_those_of_the_uncollapsed_form(shape):
    arguments = case(shape, requires_grad=True)
    got, expected = pool_project_fuse(*arguments), one_after_the_other(*arguments)
    grads = [torch.randn_like(one) for one in expected]
    # A lone encoder's weight is 1 whatever its score: query and bias have no gradient to compare.
    tensors = tensors_of(arguments)[: -2 if len(arguments[0]) == 1 else None]
    for one, other in zip(
        torch.autograd.grad(got, tensors, grads), torch.autograd.grad(expected, tensors, grads), strict=True
    ):
        assert one.is_contiguous()
        assert relative_error(one, other) <= FLOAT64


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
@pytest.mark.parametrize("name", ["merv", "three-layers-fewer-slots"])
def test_gradients_within_budget_of_each_dtype(name, frozen, dtype):
    arguments = case(SHAPES[name], dtype, requires_grad=True)
    wide, low = to(arguments, torch.float64, True), to(arguments, dtype, True)
    grad = torch.randn_like(one_after_the_other(*arguments)[0])
    for x in arguments[0] if frozen else []:
        x.requires_grad_(False)
    pool_project_fuse(*arguments)[0].backward(grad)
    one_after_the_other(*wide)[0].backward(grad.double())
    one_after_the_other(*low)[0].backward(grad)
    compared = slice(len(arguments[0]) if frozen else 0, None)
    for got, exact, rough in zip(*(tensors_of(one)[compared] for one in (arguments, wide, low)), strict=True):
        assert got.grad.dtype == dtype
        assert (got.grad.double() - exact.grad).abs().max() <= low_precision(rough.grad, exact.grad)


@pytest.mark.parametrize("name", ["merv", "two-layers"])
def test_frozen_features_cost_no_gradient(name):
    xs, *rest = arguments = case(SHAPES[name], requires_grad=True)
    frozen = pool_project_fuse([x.detach() for x in xs], *rest)
    grads = [torch.randn_like(one) for one in frozen]
    layers = tensors_of(arguments)[len(xs) :]
    expected = torch.autograd.grad(pool_project_fuse(*arguments), layers, grads)
    for one, other in zip(torch.autograd.grad(frozen, layers, grads), expected, strict=True):
        assert relative_error(one, other) <= FLOAT64
    xs, weights, biases, query, _, *how = flat(to(arguments, torch.float64))
    dxs, *_ = torch.ops.merv_fast.pool_project_fuse_backward(
        *grads, xs, weights, biases, query, frozen[1].detach(), *how, False
    )
    assert dxs == []


def test_gradients_of_an_empty_batch_are_zero():
    xs, weights, *rest = case(SHAPES["merv"], requires_grad=True)
    tokens, _ = pool_project_fuse([x[:0].detach() for x in xs], weights, *rest)
    for grad in torch.autograd.grad(tokens.sum(), weights):
        assert not grad.any()


def test_float16_gradients_fit_where_an_encoder_weighs_little():
    """Before they are weighed, the sums of its products do not."""
    xs, weights, biases, query, bias, *how = case(SHAPES["merv"], torch.float16, requires_grad=True)
    bias = torch.tensor([-8.0, 0, 0, 0], dtype=torch.float16)
    tokens, _ = pool_project_fuse([torch.full_like(x, 10) for x in xs], weights, biases, query * 0, bias, *how)
    (grad,) = torch.autograd.grad(tokens, weights[0], torch.full_like(tokens, 100))
    assert grad.isfinite().all()
    assert grad.any()


def test_one_encoder_frozen():
    xs, *rest = arguments = case(SHAPES["two-layers"], requires_grad=True)
    grads = [torch.randn_like(one) for one in one_after_the_other(*arguments)]
    (got,) = torch.autograd.grad(pool_project_fuse([xs[0].detach(), xs[1]], *rest), [xs[1]], grads)
    (expected,) = torch.autograd.grad(one_after_the_other(*arguments), [xs[1]], grads)
    assert relative_error(got, expected) <= FLOAT64


def test_refuses_second_derivatives():
    arguments = case(SHAPES["two-layers"], requires_grad=True)
    (dquery,) = torch.autograd.grad(pool_project_fuse(*arguments)[0].sum(), arguments[3], create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        dquery.sum().backward()
    assert str(raised.value) == "pool_project_fuse_backward: derivative must be of first order, got a second one"


SMALL = ((2, 3), ((2, 3), (1, 4)), (1, 2), 2, ((3, 4), (2, 5)), 6)


@pytest.mark.parametrize(("B", "dtype"), [(0, torch.float32), (2, torch.bfloat16)], ids=str)
def test_operator_contract(B, dtype):
    arguments = case((B, *SMALL), dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.merv_fast.pool_project_fuse.default, flat(arguments))
    arguments = to(arguments, dtype)
    tokens, encoder_weights = pool_project_fuse(*arguments)
    xs, weights, biases, query, _, *how = flat(arguments)
    for needs_xs in (False, True):
        torch.library.opcheck(
            torch.ops.merv_fast.pool_project_fuse_backward.default,
            (tokens, encoder_weights * 2, xs, weights, biases, query, encoder_weights, *how, needs_xs),
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_whole(frozen, dynamic):
    def fused(*tensors):
        tokens, encoder_weights = pool_project_fuse(
            tensors[:2], tensors[2:6], tensors[6:10], *tensors[10:], [(2, 3), (1, 4)], (1, 2), 2
        )
        return tokens.square().sum() + encoder_weights[:, 0].sum()

    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B in (2, 3):
        tensors = tensors_of(case((B, *SMALL), torch.float32, requires_grad=True))
        for x in tensors[:2]:
            x.requires_grad_(not frozen)
        wanted = tensors[2 * frozen :]
        got, expected = compiled(*tensors), fused(*tensors)
        assert torch.equal(got, expected)
        for one, other in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True):
            assert torch.equal(one, other)


X, W, D4, E2, GRID = torch.zeros(1, 2, 16, 8), torch.zeros(4, 8), torch.zeros(4), torch.zeros(2), (4, 4)


def wrong(**changes):
    """Two encoders of one layer that fit, but for what is changed."""
    right = {"xs": [X, X], "weights": [W, W], "biases": [D4, D4], "query": D4, "bias": E2}
    return {**right, "grids": [GRID, GRID], "out_grid": (2, 2), **changes}


ERRORS = [
    ({"xs": []}, ValueError, "xs must be tensors of 1 to 8 encoders, got 0"),
    ({"xs": [X] * 9}, ValueError, "xs must be tensors of 1 to 8 encoders, got 9"),
    ({"grids": [GRID]}, ValueError, "grids must be 2 pairs like xs, got 1"),
    ({"weights": [W]}, ValueError, "weights must be equally many for each of 2 encoders, got 1"),
    ({"weights": []}, ValueError, "weights must be equally many for each of 2 encoders, got 0"),
    ({"biases": [D4]}, ValueError, "biases must be 2 tensors like weights, got 1"),
    ({"xs": [X, X.int()]}, TypeError, "xs[1] must be float64, float32, bfloat16 or float16, got torch.int32"),
    ({"xs": [X, X.half()]}, TypeError, "xs[1] must be torch.float32 like xs[0], got torch.float16"),
    ({"xs": [X, X[0]]}, ValueError, "xs[1] must be [B, T, H*W, C], got shape (2, 16, 8)"),
    ({"xs": [X[0], X]}, ValueError, "xs[0] must be [B, T, H*W, C], got shape (2, 16, 8)"),
    ({"xs": [X[0, 0, 0, 0], X]}, ValueError, "xs[0] must be [B, T, H*W, C], got shape ()"),
    ({"xs": [X, X.repeat(2, 1, 1, 1)]}, ValueError, "xs[1] must hold 1 videos like xs[0], got 2"),
    ({"xs": [X, X[:, :1]]}, ValueError, "xs[1] must hold 2 slots like xs[0], got 1"),
    ({"grids": [GRID, (4, 5)]}, ValueError, "xs[1] must hold 20 tokens a slot for grids[1] (4, 5), got 16"),
    ({"grids": [GRID, (4,)]}, ValueError, "grids[1] must be (rows, columns), both at least 1, got (4,)"),
    ({"out_grid": (2, -1)}, ValueError, "out_grid must be (rows, columns), both at least 1, got (2, -1)"),
    ({"out_slots": 0}, ValueError, "out_slots must be at least 1, got 0"),
    (
        {"weights": [W, W.double()]},
        TypeError,
        "weights[1] must be torch.float32 like xs[1], got torch.float64",
    ),
    ({"weights": [W, W.T]}, ValueError, "weights[1] must be [out, 8], got shape (8, 4)"),
    ({"weights": [D4, W]}, ValueError, "weights[0] must be [out, 8], got shape (4,)"),
    (
        {"weights": [W[:0]] * 2, "biases": [D4[:0]] * 2, "query": D4[:0]},
        ValueError,
        "weights[0] must have at least one row, got shape (0, 8)",
    ),
    ({"biases": [D4, D4[1:]]}, ValueError, "biases[1] must be [4], got shape (3,)"),
    (
        {"weights": [W, W[1:]], "biases": [D4, D4[1:]]},
        ValueError,
        "weights[1] must be [4, in] like weights[0], got shape (3, 8)",
    ),
    ({"query": D4[1:]}, ValueError, "query must be [4], got shape (3,)"),
    ({"query": D4.half()}, TypeError, "query must be torch.float32 like xs[0], got torch.float16"),
    ({"query": D4.to("meta")}, ValueError, "query must be on cpu like xs[0], got meta"),
    ({"bias": E2.half()}, TypeError, "bias must be torch.float32 like xs[0], got torch.float16"),
    ({"bias": D4}, ValueError, "bias must be [2], got shape (4,)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(changes, error, message):
    with pytest.raises(error) as raised:
        pool_project_fuse(**wrong(**changes))
    assert str(raised.value) == f"pool_project_fuse: {message}"


def test_fits_when_nothing_is_changed():
    assert pool_project_fuse(**wrong())[0].shape == (1, 8, 4)
