import pickle

import pytest
import torch
from torch import Tensor, nn

from merv_fast.modules.fusion import (
    ChannelConcatFusion,
    ConcatFusion,
    CrossAttentionFusion,
    FirstFusion,
    MixedFusion,
    ScalarFusion,
    build_fusion,
    convert_fusion_state_dict,
)
from tests import budgets, golden_files

KINDS = {
    "cross_attention_avg_lq": CrossAttentionFusion,
    "concat": ConcatFusion,
    "concat_channel": ChannelConcatFusion,
    "concat_channel_ln": ChannelConcatFusion,
    "scalar": ScalarFusion,
    "mixed25": MixedFusion,
    "first": FirstFusion,
}


def random_values(encoders: int = 4, tokens: int = 6, width: int = 8) -> list[Tensor]:
    return [torch.randn(2, tokens, width, dtype=torch.float64) for _ in range(encoders)]


def oracle(attention: nn.MultiheadAttention, query: Tensor, pe: Tensor | None, values: list[Tensor]) -> tuple:
    """The rule as the paper states it, with PyTorch's own attention."""
    tokens = max(value.shape[1] for value in values)
    stacked = torch.stack([value.expand(-1, tokens, -1) for value in values], 1)
    keys = stacked.mean(2) if pe is None else stacked.mean(2) + pe
    _, weights = attention(query.expand(len(keys), 1, -1), keys, keys)
    return torch.einsum("be,besd->bsd", weights[:, 0], stacked), weights[:, 0]


@pytest.mark.parametrize("name", ["cross_attention", "cross_attention_pe"])
def test_golden_cross_attention(name: str) -> None:
    tensors, _ = golden_files.load(f"fusion_{name}")
    weights = convert_fusion_state_dict(golden_files.weights(tensors))
    fusion = build_fusion("cross_attention_avg_lq", 4, 64, query_width=80, positional_embedding="pe" in weights)
    fusion.load_state_dict(weights, strict=True)
    tokens, encoder_weights = fusion([tensors[f"input.{index}"] for index in range(4)])
    assert budgets.relative_error(tokens, tensors["output"]) < budgets.GOLDEN
    assert budgets.relative_error(encoder_weights, tensors["encoder_weights"]) < budgets.GOLDEN


def test_golden_scalar() -> None:
    tensors, _ = golden_files.load("fusion_scalar")
    fusion = build_fusion("scalar", 4, 64)
    fusion.load_state_dict(convert_fusion_state_dict(golden_files.weights(tensors)), strict=True)
    tokens, encoder_weights = fusion([tensors[f"input.{index}"] for index in range(4)])
    assert budgets.relative_error(tokens, tensors["output"]) < budgets.GOLDEN
    assert encoder_weights.shape == (2, 4)
    assert budgets.relative_error(encoder_weights, tensors["encoder_weights"].expand(2, 4)) < budgets.GOLDEN


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("query_width", [8, 12])
def test_cross_attention_against_multihead_attention(query_width: int, positional: bool, single: bool) -> None:
    """Width 8 is also the tokens' width, where the attention packs its weights."""
    attention = nn.MultiheadAttention(query_width, 1, kdim=8, vdim=8, batch_first=True).double()
    assert (attention.in_proj_weight is None) == (query_width != 8)
    query = torch.randn(1, query_width, dtype=torch.float64)
    pe = torch.randn(4, 8, dtype=torch.float64) if positional else None
    # The biases start at zero, where they would hide a mistake; large weights make the scores differ.
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    values = random_values()
    if single:
        values[2] = values[2][:, :1]

    theirs = {f"attention.{name}": tensor for name, tensor in attention.state_dict().items()}
    theirs |= {"Q": query} if pe is None else {"Q": query, "pe": pe}
    fusion = build_fusion("cross_attention_avg_lq", 4, 8, query_width, positional).double()
    fusion.load_state_dict(convert_fusion_state_dict(theirs), strict=True)

    tokens, encoder_weights = fusion(values)
    expected_tokens, expected_weights = oracle(attention, query, pe, values)
    assert expected_weights.std(1).min() > 0.01
    assert budgets.relative_error(encoder_weights, expected_weights) < budgets.FLOAT64
    assert budgets.relative_error(tokens, expected_tokens) < budgets.FLOAT64


def test_cross_attention_gradients_against_multihead_attention() -> None:
    attention = nn.MultiheadAttention(12, 1, kdim=8, vdim=8, batch_first=True).double()
    query = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    pe = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(attention.in_proj_bias)
    fusion = CrossAttentionFusion(4, 8, 12, positional_embedding=True).double()
    theirs = {f"attention.{name}": tensor for name, tensor in attention.state_dict().items()}
    fusion.load_state_dict(convert_fusion_state_dict({**theirs, "Q": query, "pe": pe}))
    values = random_values()
    grad = torch.randn(2, 6, 8, dtype=torch.float64)
    fusion(values)[0].backward(grad)
    oracle(attention, query, pe, values)[0].backward(grad)
    gradients = {"Q": query.grad, "pe": pe.grad, "attention.in_proj_bias": attention.in_proj_bias.grad}
    gradients["attention.q_proj_weight"] = attention.q_proj_weight.grad
    gradients["attention.k_proj_weight"] = attention.k_proj_weight.grad
    for name, expected in convert_fusion_state_dict(gradients).items():
        assert fusion.get_parameter(name).grad is not None, name
        # A common offset of all scores cancels in the softmax, so the key bias has no gradient but rounding.
        if name != "k_proj.bias":
            assert budgets.relative_error(fusion.get_parameter(name).grad, expected) < budgets.FLOAT64, name


def test_the_start_is_that_of_multihead_attention() -> None:
    fusion = CrossAttentionFusion(4, 128, 96, positional_embedding=True)
    for name in ("Q", "q_proj.weight", "k_proj.weight", "pe"):
        parameter = fusion.get_parameter(name)
        bound = (6 / sum(parameter.shape)) ** 0.5
        assert 0.9 * bound < parameter.abs().max() <= bound, name
    assert not fusion.q_proj.bias.any()
    assert not fusion.k_proj.bias.any()


def test_conversion_drops_what_never_matters_and_passes_the_rest() -> None:
    tensors, _ = golden_files.load("fusion_cross_attention_pe")
    names = {"Q", "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "pe"}
    converted = convert_fusion_state_dict(golden_files.weights(tensors))
    assert set(converted) == names
    assert set(convert_fusion_state_dict(converted)) == names
    other = {"1.projector.weight": torch.zeros(1), "unknown": torch.zeros(1)}
    assert convert_fusion_state_dict(other) == other


def test_scalar_is_a_softmax_over_learned_numbers() -> None:
    fusion = ScalarFusion(3, 8).double()
    values = random_values(3)
    tokens, encoder_weights = fusion(values)
    expected = fusion.scalar.softmax(0)
    assert budgets.relative_error(encoder_weights, expected.expand(2, 3)) < budgets.FLOAT64
    weighted = torch.einsum("e,ebsd->bsd", expected, torch.stack(values))
    assert budgets.relative_error(tokens, weighted) < budgets.FLOAT64
    (gradient,) = torch.autograd.grad(tokens.square().sum(), fusion.scalar)
    (expected_gradient,) = torch.autograd.grad(weighted.square().sum(), fusion.scalar)
    assert budgets.relative_error(gradient, expected_gradient) < budgets.FLOAT64


def test_concat_keeps_the_encoders_in_order() -> None:
    values = [torch.full((2, tokens, 8), float(index)) for index, tokens in enumerate((3, 1, 2))]
    tokens, encoder_weights = build_fusion("concat", 3, 8)(values)
    assert encoder_weights is None
    assert tokens[1, :, 5].tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_concat_channel(layer_norm: bool) -> None:
    """The oracle has the reference's module structure, so the names are checked by loading them."""
    linear = nn.ModuleDict({"projector": nn.Linear(24, 8)}).double()
    norm = nn.LayerNorm(24).double()
    nn.init.normal_(norm.weight)
    reference = nn.Sequential(norm, linear) if layer_norm else linear
    fusion = build_fusion("concat_channel_ln" if layer_norm else "concat_channel", 3, 8).double()
    fusion.load_state_dict(convert_fusion_state_dict(reference.state_dict()), strict=True)
    values = random_values(3)
    joined = torch.cat(values, -1)
    expected = linear["projector"](norm(joined) if layer_norm else joined)
    tokens, encoder_weights = fusion(values)
    assert encoder_weights is None
    assert budgets.relative_error(tokens, expected) < budgets.FLOAT64


@pytest.mark.parametrize("tokens", [1024, 6])
def test_mixed_shares_are_equal_and_cover_every_position_once(tokens: int) -> None:
    """Token value = encoder * 10000 + position."""
    values = [10000.0 * index + torch.arange(tokens).view(1, -1, 1).expand(2, -1, 3) for index in range(4)]
    mixed, encoder_weights = build_fusion("mixed25", 4, 3)(values)
    assert encoder_weights is None
    assert mixed.shape == (2, tokens, 3)
    encoder, position = mixed[0, :, 0].div(10000, rounding_mode="floor"), mixed[0, :, 0] % 10000
    counts = torch.bincount(encoder.int(), minlength=4)
    assert counts.max() - counts.min() <= (tokens % 4 > 0)
    assert encoder.tolist() == sorted(encoder.tolist())
    assert position.sort().values.tolist() == list(range(tokens))
    assert position[: counts[0]].diff().unique().tolist() == [4]


def test_first() -> None:
    values = random_values()
    tokens, encoder_weights = build_fusion("first", 4, 8)(values)
    assert tokens is values[0]
    assert encoder_weights is None


@pytest.mark.parametrize("name", KINDS)
def test_output_tokens_is_what_comes_out(name: str) -> None:
    fusion = build_fusion(name, 4, 8, query_width=12).double()
    assert type(fusion) is KINDS[name]
    tokens, _ = fusion(random_values(tokens=6))
    assert tokens.shape == (2, fusion.output_tokens([6, 6, 6, 6]), 8)


def test_output_tokens() -> None:
    assert build_fusion("concat", 4, 8).output_tokens([1024, 1, 1024, 512]) == 2561
    assert build_fusion("first", 2, 8).output_tokens([7, 9]) == 7
    assert build_fusion("mixed25", 4, 8).output_tokens([10, 10, 10, 10]) == 10
    assert build_fusion("concat_channel", 2, 8).output_tokens([5, 5]) == 5
    for name in ("cross_attention_avg_lq", "scalar"):
        fusion = build_fusion(name, 3, 8, query_width=12)
        assert fusion.output_tokens([1024, 1, 1024]) == 1024
        assert fusion.output_tokens([1, 1, 1]) == 1
        with pytest.raises(ValueError, match=r"tokens_per_encoder must be equal or 1, got \[4, 1, 6\]"):
            fusion.output_tokens([4, 1, 6])


@pytest.mark.parametrize("name", ["concat_channel", "concat_channel_ln", "mixed25"])
def test_unequal_lengths_are_refused(name: str) -> None:
    fusion = build_fusion(name, 2, 8)
    with pytest.raises(ValueError, match=r"Fusion: tokens_per_encoder must be equal, got \[6, 4\]"):
        fusion([torch.zeros(1, 6, 8), torch.zeros(1, 4, 8)])


@pytest.mark.parametrize("name", KINDS)
def test_the_number_of_encoders_is_checked(name: str) -> None:
    fusion = build_fusion(name, 4, 8, query_width=12)
    with pytest.raises(ValueError, match=f"{KINDS[name].__name__}: encoders must be 4, got 3"):
        fusion([torch.zeros(1, 6, 8)] * 3)


@pytest.mark.parametrize("name", ["query_mlp", "cross_attention", "", "none"])
def test_unknown_fusion_lists_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="build_fusion: feature_fusion must be one of ") as error:
        build_fusion(name, 4, 8)
    assert all(kind in str(error.value) for kind in KINDS)
    assert str(error.value).endswith(f"got {name!r}")


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="build_fusion: encoders must be at least 1, got 0"):
        build_fusion("concat", 0, 8)
    for name in ("cross_attention_avg_lq", "scalar"):
        with pytest.raises(ValueError, match=f"{KINDS[name].__name__}: encoders must be at most 8, got 9"):
            build_fusion(name, 9, 8)
    with pytest.raises(ValueError, match="positional_embedding must be False for scalar, got True"):
        build_fusion("scalar", 4, 8, positional_embedding=True)


def folding_fusion() -> CrossAttentionFusion:
    return CrossAttentionFusion(2, 8, query_width=6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_folds_once_until_a_parameter_changes(context) -> None:
    fusion = folding_fusion()
    with context():
        query, _ = fusion.folded(torch.float32)
        assert fusion.folded(torch.float32)[0] is query
        assert not query.is_inference()
    optimiser = torch.optim.SGD(fusion.parameters(), lr=1.0)
    fusion([torch.ones(1, 3, 8), torch.zeros(1, 3, 8)])[1][0, 0].backward()
    optimiser.step()
    with context():
        changed, _ = fusion.folded(torch.float32)
        assert not torch.equal(changed, query)
        assert torch.equal(changed, fusion.fold()[0])


def test_folds_anew_where_gradients_are_asked_for() -> None:
    fusion = folding_fusion()
    with torch.no_grad():
        kept, _ = fusion.folded(torch.float32)
    query, _ = fusion.folded(torch.float32)
    assert query is not kept
    assert query.requires_grad


@torch.no_grad()
def test_folds_in_the_dtype_asked_for_whatever_autocast_does() -> None:
    fusion = folding_fusion()
    exact, _ = fusion.folded(torch.float32)
    with torch.autocast("cpu"):
        assert torch.equal(folding_copy(fusion).folded(torch.float32)[0], exact)
    assert fusion.folded(torch.float16)[0].dtype == torch.float16
    assert torch.equal(fusion.folded(torch.float32)[0], exact)


def folding_copy(fusion: CrossAttentionFusion) -> CrossAttentionFusion:
    """Through pickle, which must not stumble over what is kept."""
    return pickle.loads(pickle.dumps(fusion))


@torch.no_grad()
def test_writes_that_are_not_counted_are_seen_after_eval() -> None:
    fusion = folding_fusion()
    before, _ = fusion.folded(torch.float32)
    fusion.k_proj.weight.data.mul_(2)
    assert torch.equal(fusion.eval().folded(torch.float32)[0], 2 * before)
