import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from merv_fast.ops import fuse_encoders
from tests.budgets import FLOAT64, GOLDEN, low_precision, relative_error
from tests.golden_files import load, weights

SHAPES = {  # B, (S_e), D
    "four": (2, (12, 12, 12, 12), 16),
    "one-encoder": (3, (5,), 7),
    "eight": (1, (3,) * 8, 9),
    "a-single-token": (2, (6, 1, 6), 769),
    "single-tokens-first": (2, (1, 1, 4), 5),
    "all-single": (2, (1, 1), 5),
}
LOW = [torch.float32, torch.float16, torch.bfloat16]


def stacked(values: list[Tensor], query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Everything repeated, stacked and multiplied out, in the dtype of the values."""
    S = max(value.shape[1] for value in values)
    stack = torch.stack([value.repeat(1, S // value.shape[1], 1) for value in values], 1)
    encoder_weights = torch.softmax(stack.mean(2) @ query + bias, -1)
    return torch.einsum("be,besd->bsd", encoder_weights, stack), encoder_weights


def case(shape, dtype=torch.float64, requires_grad=False):
    B, lengths, D = shape
    torch.manual_seed(0)
    values = [torch.randn(B, S, D, dtype=torch.float64) + 0.3 * e for e, S in enumerate(lengths)]
    tensors = [
        *values,
        torch.randn(D, dtype=torch.float64) / D**0.5,
        torch.randn(len(lengths), dtype=torch.float64),
    ]
    *values, query, bias = (tensor.to(dtype).requires_grad_(requires_grad) for tensor in tensors)
    return values, query, bias


def to(case_, dtype, requires_grad=False):
    values, query, bias = case_
    return [v.detach().to(dtype).requires_grad_(requires_grad) for v in values], *(
        t.detach().to(dtype).requires_grad_(requires_grad) for t in (query, bias)
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_weighs_and_sums(shape):
    arguments = case(shape)
    for got, expected in zip(fuse_encoders(*arguments), stacked(*arguments), strict=True):
        assert got.shape == expected.shape
        assert got.is_contiguous()
        assert relative_error(got, expected) <= FLOAT64


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["four", "a-single-token"])
def test_within_budget_of_each_dtype(name, dtype):
    arguments = case(SHAPES[name], dtype)
    tokens, encoder_weights = fuse_encoders(*arguments)
    assert (tokens.dtype, encoder_weights.dtype) == (dtype, torch.float32)
    low, exact = stacked(*arguments), stacked(*to(arguments, torch.float64))
    single = stacked(*to(arguments, torch.float32))
    assert (tokens.double() - exact[0]).abs().max() <= low_precision(low[0], exact[0])
    assert (encoder_weights.double() - exact[1]).abs().max() <= low_precision(single[1], exact[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype):
    """Scores, softmax and sums are float32, so nothing but the tokens is rounded to the low dtype."""
    arguments = case(SHAPES["four"], dtype)
    tokens, encoder_weights = fuse_encoders(*arguments)
    wide_tokens, wide_weights = fuse_encoders(*to(arguments, torch.float32))
    assert torch.equal(encoder_weights, wide_weights)
    assert torch.equal(tokens, wide_tokens.to(dtype))


def test_is_the_weighing_of_multihead_attention():
    values, _, _ = case(SHAPES["four"])
    D, width = 16, 20
    attention = nn.MultiheadAttention(width, 1, kdim=D, vdim=D, batch_first=True, dtype=torch.float64)
    nn.init.normal_(attention.in_proj_bias)
    learned = torch.randn(1, 1, width, dtype=torch.float64)
    means = torch.stack([value.mean(1) for value in values], 1)
    _, expected = attention(learned.expand(2, 1, width), means, means)
    q_bias, k_bias, _ = attention.in_proj_bias.chunk(3)
    q = (attention.q_proj_weight @ learned.flatten() + q_bias) / width**0.5
    _, got = fuse_encoders(values, attention.k_proj_weight.T @ q, (q @ k_bias).expand(4))
    assert relative_error(got, expected[:, 0]) <= FLOAT64


@pytest.mark.parametrize("name", ["fusion_cross_attention", "fusion_cross_attention_pe"])
def test_equals_the_reference(name):
    tensors, _ = load(name)
    state, values = weights(tensors), [tensors[f"input.{e}"] for e in range(4)]
    q_bias, k_bias, _ = state["attention.in_proj_bias"].chunk(3)
    k_proj = state["attention.k_proj_weight"]
    q = (state["attention.q_proj_weight"] @ state["Q"][0] + q_bias) / len(q_bias) ** 0.5
    positions = state.get("pe", torch.zeros(4, k_proj.shape[1]))
    tokens, encoder_weights = fuse_encoders(values, k_proj.T @ q, (positions @ k_proj.T + k_bias) @ q)
    assert relative_error(encoder_weights, tensors["encoder_weights"]) <= GOLDEN
    assert relative_error(tokens, tensors["output"]) <= GOLDEN


def test_empty_batch():
    values, query, bias = case(SHAPES["a-single-token"])
    tokens, encoder_weights = fuse_encoders([value[:0] for value in values], query, bias)
    assert tokens.shape == (0, 6, 769)
    assert encoder_weights.shape == (0, 3)


def test_any_strides():
    values, query, bias = case(SHAPES["four"])
    views = [torch.stack([v, v], 3).permute(2, 1, 0, 3)[..., 0].permute(2, 1, 0) for v in values]
    views[1] = values[1][:, :1].expand(2, 12, 16)
    copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
    strided = [torch.stack([vector, vector], 1)[:, 0] for vector in (query, bias)]
    for got, expected in zip(fuse_encoders(views, *strided), stacked(copies, query, bias), strict=True):
        assert got.is_contiguous()
        assert relative_error(got, expected) <= FLOAT64


def test_returns_a_copy_even_of_one_encoder():
    values, query, bias = case(SHAPES["one-encoder"], torch.float32)
    tokens, _ = fuse_encoders(values, query, bias)
    assert torch.equal(tokens, values[0])
    assert tokens.data_ptr() != values[0].data_ptr()


@pytest.mark.parametrize("lengths", [(3, 3), (2, 1, 2), (1, 1), (2,)], ids=str)
def test_gradients(lengths):
    values, query, bias = case((2, lengths, 3), requires_grad=True)
    assert gradcheck(lambda *tensors: fuse_encoders(list(tensors[:-2]), *tensors[-2:]), (*values, query, bias))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_within_budget_of_each_dtype(dtype):
    arguments = case(SHAPES["a-single-token"], dtype, requires_grad=True)
    wide, low = to(arguments, torch.float64, True), to(arguments, dtype, True)
    grad = torch.randn(2, 6, 769).to(dtype)
    for fuse, (values, query, bias) in ((fuse_encoders, arguments), (stacked, wide), (stacked, low)):
        tokens, encoder_weights = fuse(values, query, bias)
        (tokens * grad.to(tokens.dtype)).sum().add(encoder_weights[:, 0].sum()).backward()
    for got, exact, rough in zip(*([*v, q, b] for v, q, b in (arguments, wide, low)), strict=True):
        assert got.grad.dtype == dtype
        assert (got.grad.double() - exact.grad).abs().max() <= low_precision(rough.grad, exact.grad)


def test_gradient_of_one_output_alone():
    arguments = case(SHAPES["a-single-token"], requires_grad=True)
    for index in (0, 1):
        tensors = [*arguments[0], *arguments[1:]]
        grad = torch.randn_like(stacked(*arguments)[index])
        got = torch.autograd.grad(fuse_encoders(*arguments)[index], tensors, grad)
        expected = torch.autograd.grad(stacked(*arguments)[index], tensors, grad)
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) <= FLOAT64


def test_refuses_second_derivatives():
    values, query, bias = case(SHAPES["one-encoder"], requires_grad=True)
    (dvalue,) = torch.autograd.grad(fuse_encoders(values, query, bias)[0].sum(), values, create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        dvalue.sum().backward()
    assert str(raised.value) == "fuse_encoders_backward: derivative must be of first order, got a second one"


@pytest.mark.parametrize(
    ("B", "lengths", "dtype"),
    [(0, (6, 1, 6), torch.float32), (2, (6, 1, 6), torch.bfloat16), (2, (5,), torch.float32)],
    ids=str,
)
def test_operator_contract(B, lengths, dtype):
    values, query, bias = case((B, lengths, 4), dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.merv_fast.fuse_encoders.default, (values, query, bias))
    values, query, bias = to((values, query, bias), dtype)
    tokens, encoder_weights = fuse_encoders(values, query, bias)
    torch.library.opcheck(
        torch.ops.merv_fast.fuse_encoders_backward.default,
        (tokens, encoder_weights * 2, values, query, encoder_weights),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def fused(*tensors):
        tokens, encoder_weights = fuse_encoders(list(tensors[:-2]), *tensors[-2:])
        return tokens.square().sum() + encoder_weights[:, 0].sum()

    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, S in ((2, 6), (3, 5)):
        values, query, bias = case((B, (S, 1, S), 8), torch.float32, requires_grad=True)
        tensors = (*values, query, bias)
        got, expected = compiled(*tensors), fused(*tensors)
        assert torch.equal(got, expected)
        for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(expected, tensors), strict=True):
            assert torch.equal(one, other)


V, Q, B2 = torch.zeros(2, 6, 4), torch.zeros(4), torch.zeros(2)
ERRORS = [
    (([], Q, B2), ValueError, "values must be tensors of 1 to 8 encoders, got 0"),
    (([V] * 9, Q, B2), ValueError, "values must be tensors of 1 to 8 encoders, got 9"),
    (
        ([V.int(), V], Q, B2),
        TypeError,
        "values[0] must be float64, float32, bfloat16 or float16, got torch.int32",
    ),
    (([V, V.half()], Q, B2), TypeError, "values[1] must be torch.float32 like values[0], got torch.float16"),
    (([V, V], Q.double(), B2), TypeError, "query must be torch.float32 like values[0], got torch.float64"),
    (([V, V], Q, B2.bfloat16()), TypeError, "bias must be torch.float32 like values[0], got torch.bfloat16"),
    (([V, V], Q.to("meta"), B2), ValueError, "query must be on cpu like values[0], got meta"),
    (([V, V[0]], Q, B2), ValueError, "values[1] must be [B, S, D], S and D at least 1, got shape (6, 4)"),
    (([V, V[:, :0]], Q, B2), ValueError, "values[1] must be [B, S, D], S and D at least 1, got shape (2, 0, 4)"),
    (([V[..., :0]] * 2, Q[:0], B2), ValueError, "values[0] must be [B, S, D], S and D at least 1, got shape (2, 6, 0)"),
    (([V, V[:, :3]], Q, B2), ValueError, "values[1] must be [2, 6 or 1, 4], got shape (2, 3, 4)"),
    (([V, V[:1]], Q, B2), ValueError, "values[1] must be [2, 6 or 1, 4], got shape (1, 6, 4)"),
    (([V, V[..., :3]], Q, B2), ValueError, "values[1] must be [2, 6 or 1, 4], got shape (2, 6, 3)"),
    (([V, V], Q[:3], B2), ValueError, "query must be [4], got shape (3,)"),
    (([V, V], Q[None], B2), ValueError, "query must be [4], got shape (1, 4)"),
    (([V, V], Q, B2[:1]), ValueError, "bias must be [2], got shape (1,)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[text for *_, text in ERRORS])
def test_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error) as raised:
        fuse_encoders(*arguments)
    assert str(raised.value) == f"fuse_encoders: {message}"
