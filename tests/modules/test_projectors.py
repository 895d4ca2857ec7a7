import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from merv_fast.modules.projectors import (
    AttentivePooler,
    Conv3dProjector,
    ConvProjector,
    PooledProjector,
    Projector,
    TokenProjector,
    build_projector,
)
from tests import budgets, golden_files

MLPS = ["linear", "gelu-mlp", "fused-gelu-mlp"]
KINDS = {
    "avg": PooledProjector,
    "3davg": PooledProjector,
    "attntv": AttentivePooler,
    "conv": ConvProjector,
    "3dconv": Conv3dProjector,
}
GOLDEN = {
    "avg2d_linear": "avg+linear",
    "avg2d_gelu_mlp": "avg+gelu-mlp",
    "avg2d_fused_gelu_mlp": "avg+fused-gelu-mlp",
    "avg3d_linear": "3davg+linear",
    "avg3d_half_frames": "3davg+frame2+linear",
    "conv_linear": "conv+linear",
    "3dconv_linear": "3dconv+linear",
}


def pooled(x: Tensor, grid: tuple[int, int], out: tuple[int, int, int]) -> Tensor:
    """Adaptive average pooling, stated channels first: ``[B, T, H*W, C] -> [B, t*h*w, C]``."""
    maps = x.permute(0, 3, 1, 2).unflatten(3, grid)
    return F.adaptive_avg_pool3d(maps, out).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    tensors, metadata = golden_files.load(f"projector_{name}")
    weights = golden_files.weights(tensors)
    x, expected = tensors["input"], tensors["output"]
    _, slots, tokens, width = x.shape
    side, out_side = round(tokens**0.5), metadata["args"]["output_size"]
    projector = build_projector(GOLDEN[name], width, expected.shape[-1], out_side**2, slots, (side, side))
    projector.load_state_dict(weights, strict=True)
    assert projector.output_slots == metadata["out_frames"]
    assert projector.output_tokens_per_slot == out_side**2
    assert budgets.relative_error(projector(x), expected) < budgets.GOLDEN


def test_golden_attentive_pooler() -> None:
    tensors, metadata = golden_files.load("projector_attntv_linear")
    queries, heads = metadata["args"]["num_query_tokens"], metadata["args"]["num_heads"]
    projector = AttentivePooler(48, 64, "linear", queries, slots=8, heads=heads)
    projector.load_state_dict(golden_files.weights(tensors), strict=True)
    assert budgets.relative_error(projector(tensors["input"]), tensors["output"]) < budgets.GOLDEN


@pytest.mark.parametrize("mlp", [*MLPS, "none"])
@pytest.mark.parametrize("resampler", KINDS)
def test_every_resampler_with_every_mlp(resampler: str, mlp: str) -> None:
    width = 16 if mlp == "none" else 24
    projector = build_projector(f"no-align+{resampler}+{mlp}", width, 16, 4, slots=3, grid=(5, 6))
    assert type(projector) is KINDS[resampler]
    assert (projector.output_slots, projector.output_tokens_per_slot) == (3, 4)
    x = torch.randn(2, 3, 30, width, requires_grad=True)
    out = projector(x)
    assert out.shape == (2, 12, 16)
    out.square().sum().backward()
    for name, tensor in [("x", x), *projector.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0 or name.endswith("kv.bias"), name


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 100, 144, 256])
@pytest.mark.parametrize("resampler", KINDS)
def test_token_counts(resampler: str, tokens: int) -> None:
    projector = build_projector(f"{resampler}+linear", 8, 16, tokens, slots=2, grid=(14, 14))
    assert projector.output_tokens_per_slot == tokens
    assert projector(torch.randn(1, 2, 196, 8)).shape == (1, 2 * tokens, 16)


@pytest.mark.parametrize(("resampler", "frames"), [("avg", 0), ("3davg", 0), ("3davg", 2), ("3davg", 3)])
def test_pooling_and_mlp_in_float64(resampler: str, frames: int) -> None:
    specifier = f"{resampler}{f'+frame{frames}' if frames else ''}+gelu-mlp"
    projector = build_projector(specifier, 8, 16, 9, slots=7, grid=(5, 7)).double()
    x = torch.randn(2, 7, 35, 8, dtype=torch.float64)
    first, second = projector.projector.linears
    slots = 7 // frames if frames else 7
    hidden = F.gelu(F.linear(pooled(x, (5, 7), (slots, 3, 3)), first.weight, first.bias))
    expected = F.linear(hidden, second.weight, second.bias)
    assert projector.output_slots == slots
    assert budgets.relative_error(projector(x), expected) < budgets.FLOAT64


def test_pooling_alone_keeps_the_width() -> None:
    x = torch.randn(2, 3, 25, 8, dtype=torch.float64)
    projector = build_projector("3davg+none", 8, 8, 4, slots=3, grid=(5, 5))
    assert not list(projector.parameters())
    assert budgets.relative_error(projector(x), pooled(x, (5, 5), (3, 2, 2))) < budgets.FLOAT64
    with pytest.raises(ValueError, match=r"MLP: in_width must be out_width \(16\) without layers, got 8"):
        build_projector("3davg+none", 8, 16, 4, slots=3, grid=(5, 5))


@pytest.mark.parametrize("resampler", KINDS)
def test_slots_are_outermost(resampler: str) -> None:
    """Changing one slot changes only that slot's tokens, its neighbours' too for a convolution over slots."""
    projector = build_projector(f"{resampler}+linear", 8, 16, 4, slots=5, grid=(4, 4))
    x = torch.randn(2, 5, 16, 8)
    changed = x.clone()
    changed[:, 4] += 1
    difference = (projector(changed) - projector(x)).unflatten(1, (5, 4)).abs().amax((0, 2, 3))
    expected = [0, 0, 0, 1, 1] if resampler == "3dconv" else [0, 0, 0, 0, 1]
    assert (difference > 0).int().tolist() == expected


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("tokens", [1, 257])
def test_class_token_or_every_token(tokens: int, mlp: str) -> None:
    projector = build_projector(f"no-align+{mlp}", 8, 16, tokens, slots=3, grid=None)
    assert isinstance(projector, TokenProjector)
    assert (projector.output_slots, projector.output_tokens_per_slot) == (3, tokens)
    names = {"linear": ["projector"], "gelu-mlp": ["projector.0", "projector.2"]}
    names["fused-gelu-mlp"] = [*names["gelu-mlp"], "projector.4"]
    assert list(projector.state_dict()) == [f"{n}.{kind}" for n in names[mlp] for kind in ("weight", "bias")]
    x = torch.randn(2, 3, tokens, 8)
    expected = torch.stack([projector.projector(x[:, slot]) for slot in range(3)], dim=1).flatten(1, 2)
    assert budgets.relative_error(projector(x), expected) < budgets.GOLDEN


@pytest.mark.parametrize("resampler", [*KINDS, "none"])
def test_gelu_of_every_mlp_is_exact(resampler: str) -> None:
    """Stated as the linear projector with the first layer's weights, then erf GELU and the second layer."""
    tokens = 16 if resampler == "none" else 4
    deep = build_projector(f"{resampler}+gelu-mlp", 16, 16, tokens, slots=2, grid=(4, 4)).double()
    linear = build_projector(f"{resampler}+linear", 16, 16, tokens, slots=2, grid=(4, 4)).double()
    renamed = {name.replace("projector.0.", "projector."): value for name, value in deep.state_dict().items()}
    linear.load_state_dict({name: value for name, value in renamed.items() if "projector.2." not in name})
    x = 10 * torch.randn(2, 2, 16, 16, dtype=torch.float64)
    last = [value for name, value in renamed.items() if "projector.2." in name]
    hidden = linear(x)
    expected = F.linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), *last)
    assert budgets.relative_error(deep(x), expected) < budgets.FLOAT64


def test_attentive_pooler_starts_like_v_jepa() -> None:
    projector = AttentivePooler(256, 256, "linear", 64, slots=1)
    assert projector.query_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    assert projector.cross_attn.xattn.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (projector.cross_attn.xattn.proj, projector.cross_attn.mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("specifier", "tokens", "slots", "grid", "message"),
    [
        ("3davg+linear", 48, 2, (4, 4), "tokens_per_slot must be a square number, got 48"),
        ("attntv+linear", 8, 2, (4, 4), "tokens_per_slot must be a square number, got 8"),
        ("avg+linear", 0, 2, (4, 4), "tokens_per_slot must be a square number, got 0"),
        ("avg+linear", -4, 2, (4, 4), "tokens_per_slot must be a square number, got -4"),
        ("avg+linear", 4, 2, None, "grid must be (height, width) for avg, got None"),
        ("conv+linear", 4, 2, None, "grid must be (height, width) for conv, got None"),
        ("3dconv+linear", 4, 2, None, "grid must be (height, width) for 3dconv, got None"),
        ("linear", 4, 2, (4, 4), "tokens_per_slot must be the grid's without a resampler (16), got 4"),
        ("3davg+frame3+linear", 4, 2, (4, 4), "frame<k> must leave a slot of 2, got '3davg+frame3+linear'"),
    ],
)
def test_refused(specifier: str, tokens: int, slots: int, grid: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(ValueError, match="build_projector: ") as error:
        build_projector(specifier, 8, 16, tokens, slots, grid)
    assert str(error.value) == f"build_projector: {message}"


def test_attention_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"CrossAttention: width must be a multiple of heads \(8\), got 12"):
        build_projector("attntv+linear", 12, 16, 4, slots=2, grid=(4, 4))


@pytest.mark.parametrize("shape", [(2, 4, 16, 8), (2, 3, 17, 8), (2, 3, 16, 9), (2, 48, 8)])
@pytest.mark.parametrize("resampler", [*KINDS, "none"])
def test_input_of_another_shape_is_refused(resampler: str, shape: tuple[int, ...]) -> None:
    tokens = 16 if resampler == "none" else 4
    projector: Projector = build_projector(f"{resampler}+linear", 8, 16, tokens, slots=3, grid=(4, 4))
    any_tokens = resampler == "attntv"
    if any_tokens and shape == (2, 3, 17, 8):
        assert projector(torch.randn(shape)).shape == (2, 12, 16)
        return
    tokens_in = (17 if shape[2] == 17 else "N" if len(shape) == 3 else 16) if any_tokens else 16
    with pytest.raises(ValueError, match=f"{type(projector).__name__}: x must be ") as error:
        projector(torch.randn(shape))
    assert str(error.value).endswith(f"x must be [B, 3, {tokens_in}, 8], got {list(shape)}")
