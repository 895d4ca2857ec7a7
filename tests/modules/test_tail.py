import copy

import pytest
import torch
from torch import Tensor, nn

from merv_fast.modules.fusion import build_fusion
from merv_fast.modules.projectors import build_projector
from merv_fast.modules.tail import Tail
from tests import budgets

GRIDS = [(6, 6), (5, 7), (4, 4), (6, 6)]
WIDTHS = [12, 12, 8, 10]
SLOTS = [4, 4, 2, 4]


def build_tail(specifier: str, fusion: str, encoders: int = 4, slots: int | None = None, **kwargs: object) -> Tail:
    projectors = [
        build_projector(specifier, WIDTHS[e % 4], 16, 9, slots or SLOTS[e % 4], GRIDS[e % 4]) for e in range(encoders)
    ]
    tail = Tail(projectors, build_fusion(fusion, encoders, 16, query_width=12, **kwargs)).double()
    for parameter in tail.parameters():
        nn.init.normal_(parameter, std=0.4)
    return tail


def random_inputs(tail: Tail) -> list[Tensor]:
    shapes = [(2, p.slots, p.tokens_in, p.in_width) for p in tail.projectors]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def separately(tail: Tail, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return tail.fusion([projector(x) for projector, x in zip(tail.projectors, xs, strict=True)])


@pytest.mark.parametrize("kwargs", [{}, {"positional_embedding": True}])
@pytest.mark.parametrize("mlp", ["linear", "gelu-mlp", "fused-gelu-mlp"])
@pytest.mark.parametrize("pooling", ["avg", "3davg", "3davg+frame2"])
def test_collapsed_equals_separate(pooling: str, mlp: str, kwargs: dict[str, bool]) -> None:
    tail = build_tail(f"no-align+{pooling}+{mlp}", "cross_attention_avg_lq", slots=4, **kwargs)
    assert tail.collapsed
    xs = random_inputs(tail)
    leaves = dict(tail.named_parameters()) | {f"x{index}": x for index, x in enumerate(xs)}
    tokens, weights = tail(xs)
    expected_tokens, expected_weights = separately(tail, xs)
    assert expected_weights.std(1).min() > 0.01
    assert tokens.shape == (2, tail.output_tokens, 16)
    assert budgets.relative_error(tokens, expected_tokens) < budgets.FLOAT64
    assert budgets.relative_error(weights, expected_weights) < budgets.FLOAT64

    grad = torch.randn_like(tokens)
    gradients = torch.autograd.grad(tokens, leaves.values(), grad)
    expected_gradients = torch.autograd.grad(expected_tokens, leaves.values(), grad)
    for name, gradient, expected in zip(leaves, gradients, expected_gradients, strict=True):
        # A common offset of all scores cancels in the softmax, so the key bias has no gradient but rounding.
        if name != "fusion.k_proj.bias":
            assert gradient.abs().max() > 0, name
            assert budgets.relative_error(gradient, expected) < budgets.FLOAT64, name


def test_slots_averaged_to_a_common_number() -> None:
    """One encoder has four slots and the others two: ``frame2`` brings the first down to theirs."""
    projectors = [
        build_projector("3davg+frame2+linear", 12, 16, 9, 4, (6, 6)),
        build_projector("3davg+linear", 8, 16, 9, 2, (5, 7)),
        build_projector("3davg+linear", 10, 16, 9, 2, (4, 4)),
    ]
    tail = Tail(projectors, build_fusion("cross_attention_avg_lq", 3, 16, query_width=12)).double()
    assert tail.collapsed
    xs = random_inputs(tail)
    for got, expected in zip(tail(xs), separately(tail, xs), strict=True):
        assert budgets.relative_error(got, expected) < budgets.FLOAT64


def test_scalar_weights_collapse_too() -> None:
    tail = build_tail("3davg+gelu-mlp", "scalar", slots=4)
    assert tail.collapsed
    xs = random_inputs(tail)
    for got, expected in zip(tail(xs), separately(tail, xs), strict=True):
        assert budgets.relative_error(got, expected) < budgets.FLOAT64


@pytest.mark.parametrize("step", ["optimizer", "load_state_dict", "inference"])
def test_folded_vectors_follow_the_weights(step: str) -> None:
    """Whichever way the weights change, the next call equals that of a fresh module with those weights."""
    tail = build_tail("3davg+linear", "cross_attention_avg_lq", slots=4, positional_embedding=True)
    xs = random_inputs(tail)
    with torch.inference_mode(step == "inference"):
        before, weights_before = tail(xs)
    if step == "load_state_dict":
        donor = build_tail("3davg+linear", "cross_attention_avg_lq", slots=4, positional_embedding=True)
        tail.fusion.load_state_dict(donor.fusion.state_dict())
    else:
        optimizer = torch.optim.SGD(tail.fusion.parameters(), lr=1.0)
        tail(xs)[0].square().sum().backward()
        optimizer.step()
    with torch.inference_mode(step == "inference"):
        after, weights_after = tail(xs)
    assert (weights_after - weights_before).abs().max() > 1e-3
    expected, expected_weights = separately(copy.deepcopy(tail), xs)
    assert budgets.relative_error(after, expected) < budgets.FLOAT64
    assert budgets.relative_error(weights_after, expected_weights) < budgets.FLOAT64
    assert not torch.equal(before, after)


@pytest.mark.parametrize("fusion", ["concat", "concat_channel", "concat_channel_ln", "mixed25", "first"])
@pytest.mark.parametrize("resampler", ["3davg", "attntv", "conv", "3dconv"])
def test_every_other_combination_runs_separately(resampler: str, fusion: str) -> None:
    projectors = [build_projector(f"{resampler}+linear", 8, 16, 4, 2, grid) for grid in ((4, 4), (3, 3))]
    tail = Tail(projectors, build_fusion(fusion, 2, 16))
    assert not tail.collapsed
    tokens, weights = tail([torch.randn(2, 2, 16, 8), torch.randn(2, 2, 9, 8)])
    assert tokens.shape == (2, tail.output_tokens, 16)
    assert weights is None


def test_a_single_token_beside_many() -> None:
    """A clip-level class token is repeated, as the reference does."""
    projectors = [
        build_projector("3davg+linear", 8, 16, 4, 2, (4, 4)),
        build_projector("linear", 8, 16, 1, 1, None),
    ]
    tail = Tail(projectors, build_fusion("cross_attention_avg_lq", 2, 16, query_width=12))
    assert not tail.collapsed
    tokens, weights = tail([torch.randn(2, 2, 16, 8), torch.randn(2, 1, 1, 8)])
    assert tokens.shape == (2, 8, 16)
    assert weights.shape == (2, 2)


def test_plan_when_collapsed() -> None:
    ((part, op, reason),) = build_tail("3davg+linear", "cross_attention_avg_lq", slots=4).plan
    assert (part, op) == ("projectors and fusion", "pool_project_fuse")
    assert reason == "4 encoders, each averaged to 4 slots of 3x3, 1 linear layer(s), then a weighted sum"


def one(specifier: str, tokens: int = 4, slots: int = 2):
    return build_projector(specifier, 16, 16, tokens, slots, (4, 4))


@pytest.mark.parametrize(
    ("projectors", "fusion", "ops", "obstacle"),
    [
        (
            [one("3davg+linear"), one("avg+linear")],
            "concat",
            ["pool_project", "pool_project", "torch"],
            "ConcatFusion is not a weighted sum of the encoders",
        ),
        (
            [one("3davg+linear"), one("attntv+linear")],
            "cross_attention_avg_lq",
            ["pool_project", "torch", "fuse_encoders"],
            "AttentivePooler is not average pooling and an MLP",
        ),
        (
            [one("3davg+linear"), one("3davg+gelu-mlp")],
            "cross_attention_avg_lq",
            ["pool_project", "pool_project", "fuse_encoders"],
            "the projectors' MLPs differ in depth",
        ),
        (
            [one("avg+none"), one("avg+none")],
            "cross_attention_avg_lq",
            ["pool_tokens", "pool_tokens", "fuse_encoders"],
            "the projectors have no linear layer to merge",
        ),
        (
            [one("avg+linear", tokens=4, slots=4), one("avg+linear", tokens=16, slots=1)],
            "cross_attention_avg_lq",
            ["pool_project", "pool_project", "fuse_encoders"],
            "the projectors pool to different grids or slots",
        ),
    ],
)
def test_plan_when_separate(projectors: list, fusion: str, ops: list[str], obstacle: str) -> None:
    tail = Tail(projectors, build_fusion(fusion, len(projectors), 16, query_width=12))
    assert [op for _, op, _ in tail.plan] == ops
    assert tail.plan[0] == ("projector 0", ops[0], "PooledProjector")
    assert tail.plan[-1] == ("fusion", ops[-1], f"separate: {obstacle}")
    xs = [torch.randn(1, p.slots, 16, 16) for p in projectors]
    tokens, _ = tail(xs)
    assert torch.equal(tokens, separately(tail, xs)[0])


def test_projectors_that_do_not_fit_the_fusion_are_refused() -> None:
    with pytest.raises(ValueError, match="CrossAttentionFusion: encoders must be 3, got 2"):
        Tail([one("3davg+linear")] * 2, build_fusion("cross_attention_avg_lq", 3, 16, query_width=12))
    with pytest.raises(ValueError, match=r"tokens_per_encoder must be equal or 1, got \[8, 32\]"):
        Tail(
            [one("3davg+linear"), one("3davg+linear", tokens=16)],
            build_fusion("cross_attention_avg_lq", 2, 16, query_width=12),
        )


def test_inputs_are_checked() -> None:
    tail = build_tail("3davg+linear", "cross_attention_avg_lq", slots=4)
    xs = random_inputs(tail)
    with pytest.raises(ValueError, match="CrossAttentionFusion: encoders must be 4, got 3"):
        tail(xs[:3])
    with pytest.raises(ValueError, match=r"PooledProjector: x must be \[B, 4, 35, 12\], got \[2, 4, 36, 12\]"):
        tail([xs[0], xs[0], *xs[2:]])


def test_state_dict_has_the_checkpoint_groups() -> None:
    tail = build_tail("3davg+linear", "cross_attention_avg_lq", encoders=2, slots=4)
    assert set(tail.projectors.state_dict()) == {
        f"{index}.projector.projector.{kind}" for index in range(2) for kind in ("weight", "bias")
    }
    assert {name.split(".")[0] for name in tail.state_dict()} == {"projectors", "fusion"}


def test_bfloat16_collapsed_is_no_worse_than_separate() -> None:
    tail = build_tail("3davg+gelu-mlp", "cross_attention_avg_lq", slots=4, positional_embedding=True).bfloat16()
    xs = [x.detach().bfloat16() for x in random_inputs(tail)]
    low, low_weights = separately(tail, xs)
    tokens, weights = tail(xs)
    assert tokens.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    exact, exact_weights = separately(tail.double(), [x.double() for x in xs])
    assert (tokens.double() - exact).abs().max() <= budgets.low_precision(low, exact)
    step = torch.finfo(torch.bfloat16).eps * exact_weights.max()
    assert (weights - exact_weights).abs().max() <= 2 * ((low_weights - exact_weights).abs().max() + step)


def test_compiles_to_one_graph() -> None:
    tail = build_tail("3davg+frame2+gelu-mlp", "cross_attention_avg_lq", slots=4)
    xs = random_inputs(tail)
    torch.compiler.reset()
    tokens, _ = torch.compile(tail, fullgraph=True, backend="eager")(xs)
    assert budgets.relative_error(tokens, tail(xs)[0]) < budgets.FLOAT64
