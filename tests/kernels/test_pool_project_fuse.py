"""The pool_project_fuse kernels against the op's reference: forward, backward, compiled, remembered, in training."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from merv_fast.kernels import _blend, _gemm, pool_project_fuse, pool_tokens
from merv_fast.modules import Tail, build_fusion, build_projector
from merv_fast.ops import pool_project_fuse as pool_project_fuse_op
from tests.budgets import TRAINING, low_precision, relative_error
from tests.kernels.drawing import drawn, laid_out, layouts
from tests.kernels.schedules import scheduled
from tests.kernels.test_gemm import DTYPES, TILE
from tests.ops.tails import SHAPES, case, flat, tensors_of, to

op = importlib.import_module("merv_fast.ops.pool_project_fuse")


@pytest.fixture(autouse=not torch.cuda.is_available())
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_gemm.LAUNCHES, 80, dict.fromkeys(("large", "small", "gelu", "float32"), TILE))
    monkeypatch.setitem(pool_tokens.LAUNCHES, 80, pool_tokens.Launch(64, 64, 4))
    for table in (_blend.DOTS, _blend.BLEND):
        monkeypatch.setitem(table, 80, _blend.Launch(32, 64, 4))


def on(device, arguments):
    xs, weights, biases, query, bias, *how = arguments
    move = [[t.to(device) for t in ts] for ts in (xs, weights, biases)]
    return *move, query.to(device), bias.to(device), *how


def check(gots, roughs, rights) -> None:
    dtype = gots[0].dtype  # of the tokens, to which hidden ones are rounded as well: the weights come from these
    for got, rough, right in zip(gots, roughs, rights, strict=True):
        assert got.dtype == rough.dtype
        assert got.shape == right.shape
        assert (got.double() - right).abs().max() <= low_precision(rough, right, dtype)


@st.composite
def shapes(draw):
    E, layers, t = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    side, width = st.integers(1, 5), st.integers(1, 70)
    slots = tuple(draw(st.integers(1, 3)) for _ in range(E))
    grids = tuple((draw(side), draw(side)) for _ in range(E))
    widths = tuple(tuple(draw(width) for _ in range(layers)) for _ in range(E))
    out_grid = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(st.integers(1, 3)), slots, grids, out_grid, t, widths, draw(width)


def arguments_of(device, shape, dtype, layouts):
    arguments = on(device, flat(case(shape, dtype)))
    tensors, E, n = laid_out(tensors_of(arguments), layouts), len(arguments[0]), len(arguments[1])
    return tensors[:E], tensors[E : E + n], tensors[E + n : E + 2 * n], *tensors[E + 2 * n :], *arguments[5:]


@drawn(10)
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), layouts=layouts())
def test_any_shape_and_strides(device, shape, dtype, layouts):
    arguments = arguments_of(device, shape, dtype, layouts)
    right = op.reference(*to(arguments, torch.float64))
    check(pool_project_fuse.launch(*arguments), op.reference(*arguments), right)


@drawn(8)
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), needs_xs=st.booleans(), layouts=layouts())
def test_backward_of_any_shape_and_strides(device, shape, dtype, needs_xs, layouts):
    xs, weights, biases, query, bias, *how = arguments_of(device, shape, dtype, layouts)
    tokens, w = op.reference(xs, weights, biases, query, bias, *how)
    grads = laid_out([torch.randn_like(tokens), torch.randn_like(w)], layouts)

    def gradients(formulas, dtype):
        parts = [[t.to(dtype) for t in ts] for ts in (xs, weights, biases)]
        wide = torch.promote_types(dtype, torch.float32)
        given = grads[0].to(dtype), grads[1].to(wide), *parts, query.to(dtype), w.to(wide)
        found = formulas(*given, *how, needs_xs)
        return [tensor for part in found for tensor in ([part] if isinstance(part, torch.Tensor) else part)]

    rough, right = gradients(op.reference_backward, dtype), gradients(op.reference_backward, torch.float64)
    check(gradients(op.kernel_backward, dtype), rough, right)


@pytest.mark.parametrize("name", ["one-oblong-encoder", "two-layers"])
def test_gradients_through_autograd(device, kernels_serve, name):
    arguments = on(device, case(SHAPES[name], torch.float32))
    tensors = [t.requires_grad_() for t in tensors_of(arguments)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    E, n = len(arguments[0]), len(arguments[1])

    def run(function, tensors):
        parts = tensors[:E], tensors[E : E + n], tensors[E + n : E + 2 * n], *tensors[E + 2 * n :]
        out, w = function(*flat((*parts, *arguments[5:])))
        torch.manual_seed(1)
        return torch.autograd.grad([out, w], tensors, [torch.randn(out.shape).to(out), torch.randn(w.shape).to(w)])

    got = run(torch.ops.merv_fast.pool_project_fuse, tensors)
    check(got, run(op.reference, tensors), run(op.reference, exact))


def test_compiles_whole_with_gradients(device, kernels_serve):
    arguments = on(device, case(SHAPES["two-layers"], torch.float32))
    tensors = [t.requires_grad_() for t in tensors_of(arguments)]
    compiled = torch.compile(lambda *a: pool_project_fuse_op(*a)[0].sin(), fullgraph=True, backend="aot_eager")
    plain = pool_project_fuse_op(*arguments)[0].sin()
    made = compiled(*arguments)
    assert torch.equal(made, plain)
    for one, other in zip(
        torch.autograd.grad(made.sum(), tensors), torch.autograd.grad(plain.sum(), tensors), strict=True
    ):
        assert torch.equal(one, other)


def test_score_vectors_are_remembered_until_a_weight_changes(device, monkeypatch):
    made = []
    scoring = pool_project_fuse.scoring
    monkeypatch.setattr(pool_project_fuse, "scoring", lambda *args: made.append(args) or scoring(*args))
    arguments = on(device, flat(case(SHAPES["two-layers"], torch.float32)))
    xs, weights, biases, query, bias, *how = arguments
    first, _ = pool_project_fuse.launch(*arguments)
    again, _ = pool_project_fuse.launch(*arguments)
    assert torch.equal(first, again)
    assert len(made) == 1
    for changed in (weights[1], weights[3], biases[3], query, bias):
        changed.mul_(1.5)
        exact = [[t.double() for t in ts] for ts in (xs, weights, biases)]
        right = op.reference(*exact, query.double(), bias.double(), *how)
        check(pool_project_fuse.launch(*arguments), op.reference(*arguments), right)
    assert len(made) == 6
    # Another matrix in the place of one that is gone, under the same query.
    weights[1] = weights[1] + 1
    pool_project_fuse.launch(xs, weights, biases, query, bias, *how)
    assert len(made) == 7


@pytest.mark.parametrize("layers", [1, 2])
def test_persistent_and_dependent_launches_change_nothing(device, layers, monkeypatch):
    side, width, D, repeats = (4, 40, 80, 1) if device == "cpu" else (16, 512, 4096, 50)
    shape = 2, (4, 4), ((side, side),) * 2, (side // 2,) * 2, None, ((width,) * layers,) * 2, D
    arguments = on(device, flat(case(shape, torch.float16)))
    if device == "cuda":
        # Memory that is filled puts a kernel between the pooling and the GEMM.
        monkeypatch.undo()
    plain = pool_project_fuse.launch(*arguments)
    with scheduled(persistent=True, dependent=True) as launched:
        for _ in range(repeats):
            for one, other in zip(pool_project_fuse.launch(*arguments), plain, strict=True):
                assert torch.equal(one, other)
    assert launched


@pytest.mark.parametrize("layers", [1, 2])
def test_the_pooling_lets_a_dependent_layer_begin(device, layers, monkeypatch):
    table, told = _gemm.LAUNCHES[_gemm.capability()], []
    monkeypatch.setitem(table, "gelu", table["gelu"]._replace(dependent=True))
    monkeypatch.setattr(_gemm, "dependent_launches", lambda: True)

    def pool(*args, dependents):
        told.append(dependents)
        raise InterruptedError

    monkeypatch.setattr(pool_project_fuse, "pool", pool)
    shape = 1, (1, 1), ((2, 2),) * 2, (1, 1), None, ((8, 16)[:layers],) * 2, 16
    with pytest.raises(InterruptedError):
        pool_project_fuse.launch(*on(device, flat(case(shape, torch.float16))))
    assert told == [layers == 2]


def tail(seed: int = 0) -> Tail:
    torch.manual_seed(seed)
    projectors = [build_projector("avg+linear", C, 16, 4, slots=1, grid=(3, 3)) for C in (12, 20)]
    return Tail(projectors, build_fusion("cross_attention_avg_lq", 2, llm_width=16, query_width=8))


def lessons(steps: int) -> list[tuple[list[Tensor], Tensor]]:
    """Features, and the tokens that another tail makes of them, with noise that cannot be learnt."""
    teacher = tail(seed=1)
    with torch.no_grad():
        drawn = [[torch.randn(1, 1, 9, C) for C in (12, 20)] for _ in range(steps)]
        return [(xs, (tokens := teacher(xs)[0]) + torch.randn_like(tokens) / 10) for xs in drawn]


def train(tail: Tail, lessons: list[tuple[list[Tensor], Tensor]], device: str) -> list[float]:
    """Losses of gradient descent, a step a lesson."""
    optimiser, losses = torch.optim.SGD(tail.parameters(), lr=0.3, momentum=0.9), []
    for xs, goal in lessons:
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(tail([x.to(device) for x in xs])[0], goal.to(device))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_two_hundred_steps_of_training_follow_the_reference(device, request):
    data = lessons(200)
    plain = torch.tensor(train(tail(), data, "cpu"))
    request.getfixturevalue("kernels_serve")
    losses = torch.tensor(train(tail().to(device), data, device))
    # What is left is the noise, a fourteenth of the first loss.
    assert losses[-8:].mean() < losses[0] * 0.15
    assert relative_error(losses, plain) <= TRAINING


def test_an_optimiser_step_changes_the_output(device, kernels_serve):
    module = tail().to(device)
    xs = [torch.randn(1, 1, 9, C, device=device) for C in (12, 20)]
    with torch.no_grad():
        before = [module(xs) for _ in range(2)]
    assert torch.equal(before[0][0], before[1][0])
    optimiser = torch.optim.SGD(module.fusion.parameters(), lr=1.0)
    module(xs)[0].square().sum().backward()
    optimiser.step()
    with torch.no_grad():
        tokens, w = module(xs)
    assert not torch.equal(w, before[0][1])
    assert not torch.equal(tokens, before[0][0])
