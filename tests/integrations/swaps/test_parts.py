"""Each kind of part by itself, against its own forward pass or the reference's golden output."""

from functools import partial

import pytest
import torch
from torch import nn

from merv_fast import accelerate, explain
from merv_fast.integrations.swaps import llava as llava_swap
from tests.budgets import GOLDEN, relative_error
from tests.golden_files import load, weights
from tests.integrations.swaps.reference_modules import (
    AveragePooling3DProjector,
    AveragePoolingProjector,
    CrossAttentionAdapter,
    DinoSigLip,
    LangBindVideoBackbone,
    Llava,
    ScalarAdapter,
    TimmViT,
    dinov2,
    golden_shape,
    load_golden,
    one_block,
    vivit,
)

PROJECTORS = {
    "projector_avg2d_linear": partial(AveragePoolingProjector, mlp="linear"),
    "projector_avg2d_gelu_mlp": partial(AveragePoolingProjector, mlp="gelu-mlp"),
    "projector_avg2d_fused_gelu_mlp": partial(AveragePoolingProjector, mlp="fused-gelu-mlp"),
    "projector_avg3d_linear": AveragePooling3DProjector,
    "projector_avg3d_half_frames": AveragePooling3DProjector,
}


def both(model, *args):
    """What the model returns, before and after."""
    before = model(*args)
    return before, accelerate(model, strict=True)(*args)


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors(name):
    tensors, shape = load(name)
    size = shape["args"]["output_size"]
    frames = shape.get("out_frames", tensors["input"].shape[1])
    projector = PROJECTORS[name](tensors["input"].shape[-1], 64, output_size=size, output_frames=frames)
    projector.load_state_dict(weights(tensors))
    for got in both(projector, tensors["input"]):
        assert relative_error(got, tensors["output"]) < GOLDEN


@torch.no_grad()
def test_a_projector_without_layers():
    before, after = both(AveragePoolingProjector(12, 12, 3, 2, mlp="none"), torch.randn(2, 2, 49, 12))
    assert relative_error(after, before) < GOLDEN


@torch.no_grad()
@pytest.mark.parametrize("name", ["fusion_cross_attention", "fusion_cross_attention_pe", "fusion_scalar"])
def test_fusions(name):
    tensors, _ = load(name)
    values = [tensors[f"input.{index}"] for index in range(4)]
    positions = name.endswith("_pe")
    fusion = ScalarAdapter() if name == "fusion_scalar" else CrossAttentionAdapter(80, 64, 128, 4, positions)
    fusion.load_state_dict(weights(tensors))
    for tokens, shares in both(fusion, values):
        assert relative_error(tokens, tensors["output"]) < GOLDEN
        assert shares.shape == tensors["encoder_weights"].shape
        assert relative_error(shares, tensors["encoder_weights"]) < GOLDEN


@torch.no_grad()
def test_a_fusion_of_more_or_fewer_encoders_than_it_was_told():
    fusion = CrossAttentionAdapter(16, 8, 5)
    values = [torch.randn(2, 5, 8), torch.randn(2, 1, 8), torch.randn(2, 5, 8)]
    right = [fusion(values), fusion(values[:2])]
    accelerate(fusion)
    for got, expected in zip([fusion(values), fusion(values[:2])], right, strict=True):
        assert all(relative_error(a, b) < GOLDEN for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="values must hold 5 tokens each, or one"):
        fusion([torch.randn(2, 4, 8)] * 2)
    told = accelerate(CrossAttentionAdapter(16, 8, 5, encoders=4, positional_embedding=True))
    with pytest.raises(ValueError, match="values must be of 4 encoders, got 3"):
        told(values)


@torch.no_grad()
@pytest.mark.parametrize("token", [None, "average", "classemb", "noclass", "classemb-at-first"])
def test_languagebind(token):
    backbone = LangBindVideoBackbone(golden_shape("languagebind"), token)
    load_golden(backbone.featurizer, "languagebind")
    tensors, _ = load("encoder_languagebind")
    before, after = both(backbone, tensors["input"], None)
    assert relative_error(after, before) < GOLDEN
    if token == "noclass":
        assert relative_error(after, tensors["features"]) < GOLDEN


@torch.no_grad()
def test_vivit():
    tensors, _ = load("encoder_vivit")
    model = vivit().eval()
    before, after = both(model, tensors["input"])
    assert relative_error(before.last_hidden_state, tensors["hidden"]) < GOLDEN
    assert relative_error(after.last_hidden_state, tensors["hidden"]) < GOLDEN
    # What ours has not is theirs to give.
    assert len(model(tensors["input"], output_hidden_states=True).hidden_states) == 4
    assert isinstance(model(tensors["input"], return_dict=False), tuple)


@torch.no_grad()
def test_dinov2_with_its_prefix():
    tensors, _ = load("encoder_dinov2")
    vit = dinov2(return_prefix_tokens=True).featurizer
    for patches, prefix in both(vit, tensors["input"]):
        assert relative_error(patches, tensors["features"]) < GOLDEN
        assert relative_error(prefix, tensors["prefix"]) < GOLDEN


SHAPE = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 56, "patch": 14}


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_the_token_that_timm_pools(registers):
    before, after = both(TimmViT(**SHAPE, registers=registers).eval(), torch.randn(3, 3, 56, 56))
    assert before.shape == after.shape == (3, 48)
    assert relative_error(after, before) < GOLDEN


@torch.no_grad()
@pytest.mark.parametrize("n", [{0}, [1], {-1}])
@pytest.mark.parametrize("norm", [False, True])
def test_the_tokens_of_any_block(n, norm):
    vit = TimmViT(**SHAPE, registers=4).eval()
    wanted = [range(3)[place] for place in n]
    expected = vit.get_intermediate_layers(pictures := torch.randn(2, 3, 56, 56), n=wanted, norm=norm)[0]
    vit.forward = partial(vit.get_intermediate_layers, n=n, norm=norm)
    assert relative_error(accelerate(vit, strict=True)(pictures), expected) < GOLDEN


@torch.no_grad()
def test_prismatic():
    model = DinoSigLip()
    pictures = {"dino": torch.randn(2, 3, 56, 56), "siglip": torch.randn(2, 3, 56, 56)}
    before, after = both(model, pictures)
    assert relative_error(after, before) < GOLDEN
    runs = [(choice.part, choice.runs) for choice in explain(model)]
    assert ("dino_featurizer", "VisionTransformer") in runs
    assert ("siglip_featurizer", "VisionTransformer") in runs


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("side", "stride"), [(6, 2), (7, 2), (7, 3)])
def test_llava(depth, side, stride, monkeypatch):
    model = Llava(depth, side=side)
    features, sizes = torch.randn(8, side * side, 24), [4, 1, 3]
    calls, op = [], llava_swap.ops.pool_project
    monkeypatch.setattr(llava_swap.ops, "pool_project", lambda *args: calls.append(args[0].shape) or op(*args))
    before, after = both(model, features, sizes, stride)
    for got, right in zip(after, before, strict=True):
        assert relative_error(got, right) < GOLDEN
    assert [shape[0] for shape in calls] == [4, 3]
    grads = [torch.autograd.grad(each[0].sin().sum(), list(model.parameters())) for each in (after, before)]
    for got, right in zip(*grads, strict=True):
        assert relative_error(got, right) < GOLDEN


@torch.no_grad()
def test_llava_that_pools_otherwise():
    model = Llava(mode="bilinear")
    with pytest.raises(ValueError, match="mm_spatial_pool_mode is 'bilinear'; only 'average'"):
        accelerate(model, strict=True)
    # The mode may also change later.
    model = accelerate(Llava(side=7))
    model.config.mm_spatial_pool_mode = "bilinear"
    features = torch.randn(4, 49, 24)
    got = model(features, [4])[0]
    plain = Llava(mode="bilinear", side=7)
    plain.load_state_dict(model.state_dict())
    assert relative_error(got, plain(features, [4])[0]) < GOLDEN


def refused(change, model=None):
    model = model or TimmViT(**SHAPE, registers=4)
    change(model)
    (choice,) = [choice for choice in explain(accelerate(model)) if choice.why.startswith("refused")]
    return choice.why.removeprefix("refused: ")


def put(path, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put("dynamic_img_size", True), "any size"),
        (put("patch_embed.patch_size", (14, 7)), "not square"),
        (put("patch_embed.norm", nn.LayerNorm(4)), "patches are normalised"),
        (put("pos_embed", nn.Parameter(torch.zeros(1, 17, 48))), "class token has a position"),
        (put("norm_pre", nn.LayerNorm(4)), "a norm_pre"),
        (put("blocks.2.attn.qkv", nn.Linear(48, 144, bias=False)), "no biases"),
        (put("blocks.2.attn.k_norm", nn.LayerNorm(12)), "SelfAttention has a k_norm"),
        (put("blocks.0.norm1", nn.Identity()), "no LayerNorms"),
        (put("blocks.0.mlp.act", nn.SiLU()), "no GELU"),
        (put("head", nn.Linear(48, 3)), "has a head"),
        (put("global_pool", "avg"), "pools by 'avg'"),
        (put("forward", lambda x: x), "not get_intermediate_layers"),
        (lambda vit: one_block(vit, reshape=True), "more than the tokens of one block"),
        (lambda vit: put("forward", partial(vit.get_intermediate_layers, n=2))(vit), "more than the tokens"),
    ],
)
def test_refused_transformers(change, why):
    assert why in refused(change)


@pytest.mark.parametrize(
    ("model", "change", "why"),
    [
        (lambda: CrossAttentionAdapter(16, 8, 5), put("averagetoken", False), "all tokens in a row"),
        (lambda: CrossAttentionAdapter(16, 8, 5), put("attention", nn.MultiheadAttention(16, 2)), "2 heads"),
        (lambda: CrossAttentionAdapter(16, 8, 5), put("attention.dropout", 0.5), "drops 0.5"),
        (lambda: CrossAttentionAdapter(16, 8, 5), put("attention.in_proj_bias", None), "other biases"),
        (
            lambda: AveragePoolingProjector(8, 8, 2, 4, "gelu-mlp"),
            put("projector.projector.1", nn.GELU("tanh")),
            "instead of an exact GELU",
        ),
        (
            lambda: AveragePoolingProjector(8, 8, 2, 4),
            put("projector.projector", nn.Linear(8, 8, bias=False)),
            "no plain layer",
        ),
        (lambda: AveragePoolingProjector(8, 8, 2, 4), put("avg_pool.output_size", 2), "a size for each dimension"),
        (lambda: AveragePoolingProjector(8, 8, 2, 4), put("num_query_tokens", 4), "learned queries"),
        (vivit, put("pooler", nn.Linear(48, 48)), "has a pooler"),
        (lambda: LangBindVideoBackbone(golden_shape("languagebind")), put("token", "last"), "its token is 'last'"),
    ],
)
def test_refused_parts(model, change, why):
    assert why in refused(change, model())
