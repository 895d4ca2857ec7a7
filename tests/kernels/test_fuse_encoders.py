"""The fuse_encoders kernels, and what they share with pool_project_fuse, against the op's reference."""

import importlib

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from merv_fast.kernels import _blend
from merv_fast.kernels import fuse_encoders as kernels
from merv_fast.kernels._weighing import encoder_weights, pick
from tests.budgets import low_precision
from tests.kernels.drawing import CONTIGUOUS, drawn, laid_out, layouts
from tests.kernels.memory import far_apart

# The package exports the function under the module's name.
op = importlib.import_module("merv_fast.ops.fuse_encoders")

LOW = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The interpreter pays by the program."""
    if device == "cpu":
        for module, table in ((kernels, "SCORES"), (kernels, "SUM"), (_blend, "DOTS"), (_blend, "BLEND")):
            monkeypatch.setitem(getattr(module, table), 80, module.Launch(32, 256, 8))


def quarters(*shape: int, device) -> Tensor:
    """Multiples of 1/4 up to 2: sums of their products are exact in float32, so none is lucky in its order."""
    return torch.randint(-8, 9, shape, device=device) / 4


def inputs(device, B: int, lengths, D: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    values = [quarters(B, S, D, device=device).add(e / 4).to(dtype) for e, S in enumerate(lengths)]
    query = (quarters(D, device=device) / 2 ** (D.bit_length() // 2)).to(dtype)
    return values, query, torch.randn(len(lengths), device=device).to(dtype)


def double(arguments):
    return [
        [t.double() for t in argument] if isinstance(argument, list) else argument.double() for argument in arguments
    ]


def check(got, low, exact) -> None:
    """Each tensor of ``got`` is within the budget of ``low``, made by the reference as ``exact`` is in float64."""
    for one, rough, true in zip(flat(got), flat(low), flat(exact), strict=True):
        assert one.dtype == rough.dtype
        assert one.shape == true.shape
        assert one.is_contiguous()
        assert (one.double() - true).abs().max() <= low_precision(rough, true)


def flat(tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else [leaf for tensor in tensors for leaf in flat(tensor)]


def check_both(values: list[Tensor], query: Tensor, bias: Tensor, layouts=CONTIGUOUS) -> None:
    query, bias, *values = laid_out([query, bias, *values], layouts)
    arguments = values, query, bias
    expected = op.reference(*arguments)
    check(kernels.launch(*arguments), expected, op.reference(*double(arguments)))
    tokens, weights = expected
    G = quarters(*tokens.shape, device=tokens.device).to(tokens)
    arguments = *laid_out([G, torch.randn_like(weights)], layouts), values, query, weights
    got, expected = kernels.launch_backward(*arguments), op.reference_backward(*arguments)
    check(got, expected, op.reference_backward(*double(arguments)))


@drawn(8)
@given(
    B=st.integers(1, 3),
    S=st.integers(1, 40),
    single=st.lists(st.booleans(), min_size=1, max_size=4),
    D=st.integers(1, 80),
    dtype=st.sampled_from(LOW),
    layouts=layouts(),
)
@example(B=2, S=35, single=[False, False, True, False], D=769, dtype=torch.bfloat16, layouts=CONTIGUOUS)
@example(B=1, S=64, single=[True, False], D=512, dtype=torch.float32, layouts=CONTIGUOUS)
@example(B=3, S=5, single=[False], D=8, dtype=torch.float16, layouts=CONTIGUOUS)
@example(B=2, S=5, single=[False] * 8, D=9, dtype=torch.float32, layouts=CONTIGUOUS)
def test_any_shape_and_strides(device, B, S, single, D, dtype, layouts):
    check_both(*inputs(device, B, [1 if alone else S for alone in single], D, dtype), layouts)


def test_views(device):
    values, query, bias = inputs(device, 3, [12] * 5, 24, torch.float32)
    query, bias = torch.stack([query, query], 1)[3:20, 0], torch.stack([bias, bias], 1)[:, 0]
    values[1] = values[1].transpose(1, 2).contiguous().transpose(1, 2)
    values[2] = values[2].expand(3, 12, 24)[:1].expand(3, 12, 24)
    values[3] = values[3].transpose(0, 1).contiguous().transpose(0, 1)
    values[4] = values[4][:, ::12]
    values = [value[..., 3:20] for value in values]
    check_both(values, query, bias)
    _, weights = op.reference(values, query, bias)
    inner = quarters(3, 14, 20, device=device)[:, 1:13, 2:19]
    for G in (inner, quarters(3, 17, 12, device=device).mT, quarters(1, device=device).expand(3, 12, 17)):
        arguments = G, torch.randn(1, device=device).expand(3, 5), values, query, weights.T.contiguous().T
        got = kernels.launch_backward(*arguments)
        check(got, op.reference_backward(*arguments), op.reference_backward(*double(arguments)))


def test_a_video_has_the_same_bits_in_every_batch(device):
    values, query, bias = inputs(device, 3, [40, 1, 40], 300, torch.float32)
    tokens, weights = kernels.launch(values, query, bias)
    for b in range(3):
        alone = kernels.launch([value[b : b + 1] for value in values], query, bias)
        assert torch.equal(alone[0][0], tokens[b])
        assert torch.equal(alone[1][0], weights[b])


def assert_same_strays(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert torch.equal(got[~got.isfinite()].nan_to_num(), expected[~expected.isfinite()].nan_to_num())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_reach_just_the_tokens_of_the_reference(device, stray):
    values, query, bias = inputs(device, 3, [6, 6, 1], 40, torch.float32)
    query[3] = 0.5
    values[1][0, 4, 3] = stray
    values[2][2, 0, 3] = stray
    G = torch.randn(3, 6, 40, device=device)
    got, expected = kernels.launch(values, query, bias), op.reference(values, query, bias)
    for one, other in zip(got, expected, strict=True):
        assert_same_strays(one, other)
    weights = torch.softmax(torch.randn(3, 3, device=device), 1)
    arguments = G, torch.zeros(3, 3, device=device), values, query, weights
    for one, other in zip(
        flat(kernels.launch_backward(*arguments)), flat(op.reference_backward(*arguments)), strict=True
    ):
        assert_same_strays(one, other)


def test_sums_the_gradient_of_a_single_token_in_float32(device):
    zeros = [torch.zeros(1, S, 8, device=device, dtype=torch.float16) for S in (40, 1)]
    # 40 of it are more than float16 holds, half of that is not.
    G, weights = zeros[0] + 2048, torch.full((1, 2), 0.5, device=device)
    dvalues, _, _ = kernels.launch_backward(G, torch.zeros_like(weights), zeros, G[0, 0], weights)
    assert torch.equal(dvalues[1], torch.full_like(zeros[1], 40 * 2048 / 2))


def test_offsets_beyond_32_bits(device):
    far = 1 << 30
    values = [far_apart(device, (3, 2, 8), (far, 8, 1)), far_apart(device, (2, 3, 8), (8, far, 1))]
    for value in values:
        value[:] = torch.arange(48, device=device).view(value.shape) / 16
    query, bias = torch.linspace(-1, 1, 8, device=device).half(), torch.zeros(1, device=device).half()
    for value in values:
        (tokens, weights), grad = kernels.launch([value], query, bias), torch.zeros(len(value), 1, device=device)
        assert torch.equal(tokens, value)
        dots, means = _blend.dots([value], [value])
        assert torch.equal(dots[:, 0], value.float().square().sum((1, 2)))
        check(means, value.float().mean(1), value.double().mean(1))
        _blend.blend(2 * weights, grads=[value], ds=grad, vectors=[query], dvalues=[value])
        assert torch.equal(value, 2 * tokens)


@triton.jit
def weigh_kernel(partial_ptr, offset_ptr, out_ptr, last_ptr, chunks, S, CHUNKS, E: tl.constexpr, E_POWER: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    w = encoder_weights(partial_ptr, offset_ptr, b, chunks, S, CHUNKS, E, E_POWER)
    tl.store(out_ptr + b * E_POWER + tl.arange(0, E_POWER), w)
    tl.store(last_ptr + b, pick(w, E - 1, E_POWER))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("chunks", "S"), [((300,), (7,)), ((1, 128), (1, 1)), ((300, 129, 2), (9, 1, 4)), ((5,) * 8, (2,) * 8)], ids=str
)
def test_weights_are_the_softmax_of_scores_in_parts(device, chunks, S):
    torch.manual_seed(0)
    E, B, E_POWER = len(chunks), 6, triton.next_power_of_2(max(len(chunks), 2))
    # What lies behind an encoder's chunks is never written.
    partials = torch.full((B, E, max(chunks)), float("nan"), device=device)
    for e, count in enumerate(chunks):
        partials[:, e, :count] = torch.randn(B, count, device=device) / count**0.5
    partials[1, -1, 0], partials[2, -1, 0], partials[3, -1, 0] = float("nan"), float("inf"), -float("inf")
    partials[4, :, 0] = -float("inf")
    # Scores far below the zeros past E.
    partials[5] = 0.0
    partials[5, :, 0] = -200.0 * torch.tensor(S, device=device)
    offsets = torch.randn(E, device=device)
    got, last = torch.empty(B, E_POWER, device=device), torch.empty(B, device=device)
    weigh_kernel[(B,)](partials, offsets, got, last, chunks, S, max(chunks), E=E, E_POWER=E_POWER)

    def softmax(partials: Tensor, offsets: Tensor) -> Tensor:
        scores = [partials[:, e, :count].sum(1) / S[e] for e, count in enumerate(chunks)]
        return torch.softmax(torch.stack(scores, 1) + offsets, 1)

    expected, exact = softmax(partials, offsets), softmax(partials.double(), offsets.double())
    assert torch.equal(got[:, E:], torch.zeros(B, E_POWER - E, device=device))
    assert torch.equal(got[:, :E].isnan(), expected.isnan())
    assert torch.equal(last.nan_to_num(), got[:, E - 1].nan_to_num())
    got, expected, exact = got[:, :E].nan_to_num(), expected.nan_to_num(), exact.nan_to_num()
    assert (got.double() - exact).abs().max() <= low_precision(expected, exact)


def tail(device, lengths, widths, dtype):
    """Gradients, values and vectors of encoders of different widths, as the collapsed tail has them."""
    torch.manual_seed(0)
    shapes = list(zip(lengths, widths, strict=True))
    grads, values = ([quarters(2, *shape, device=device).to(dtype) for shape in shapes] for _ in range(2))
    return grads, values, [torch.randn(D, device=device) for D in widths]


def test_dots_and_means_of_encoders_of_different_widths(device):
    grads, values, _ = tail(device, (40, 1, 33), (300, 24, 513), torch.float16)

    def expected(grads, values):
        dots = torch.stack([(G * V).sum((1, 2)) for G, V in zip(grads, values, strict=True)], 1)
        return dots, torch.cat([V.mean(1) for V in values], 1)

    single = expected(*([t.float() for t in tensors] for tensors in (grads, values)))
    exact = expected(*([t.double() for t in tensors] for tensors in (grads, values)))
    check(_blend.dots(grads, values), single, exact)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("parts", [("dvalues",), ("weighed",), ("dvalues", "weighed")], ids="+".join)
def test_blends_in_place_and_each_part_alone(device, dtype, parts):
    grads, values, vectors = tail(device, (40, 1, 33), (300, 24, 513), dtype)
    w, ds = torch.randn(3, 2, device=device).T, torch.randn(3, 2, device=device).T
    columns = zip(w[..., None, None].unbind(1), ds[..., None, None].unbind(1), strict=True)
    expected = {"dvalues": [], "weighed": []}
    for (w_e, ds_e), G, V, vector in zip(columns, grads, values, vectors, strict=True):
        expected["dvalues"].append(w_e.double() * G.double() + ds_e.double() * vector.double() / G.shape[1])
        expected["weighed"].append(w_e.double() * V.double())
    arguments = {}
    if "dvalues" in parts:
        arguments |= {"grads": grads, "ds": ds, "vectors": vectors, "dvalues": grads}
    if "weighed" in parts:
        arguments |= {"values": values, "weighed": values}
    _blend.blend(w, **arguments)
    for part in parts:
        exact = expected[part]
        check(arguments[part], [one.to(dtype) for one in exact], exact)


def test_the_op_runs_the_kernels(device, kernels_serve, monkeypatch):
    calls = []
    for name in ("launch", "launch_backward"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args))
    arguments = inputs(device, 2, (5, 1), 24, torch.float32)
    torch.ops.merv_fast.fuse_encoders(*arguments)
    op.fuse_encoders([value.requires_grad_() for value in arguments[0]], *arguments[1:])[0].sum().backward()
    assert calls == ["launch", "launch", "launch_backward"]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_the_op(device, kernels_serve, compiled):
    arguments = inputs(device, 2, (5, 1, 5), 24, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in flat(arguments)]
    fuse = torch.compile(op.fuse_encoders, fullgraph=True, backend="aot_eager") if compiled else op.fuse_encoders
    outputs = fuse(*arguments)
    grads = [torch.randn_like(output) for output in outputs]
    got = torch.autograd.grad(outputs, leaves, grads)
    detached = [[value.detach() for value in arguments[0]], *(tensor.detach() for tensor in arguments[1:])]
    backward = *grads, *detached[:2], outputs[1].detach()
    check(got, op.reference_backward(*backward), op.reference_backward(*double(backward)))
