"""Whole encoders by every backend of attention that a CPU has, and by stand-ins for the packages."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from merv_fast.encoders import VisionTransformer, build_encoder, encoder_config
from merv_fast.encoders.hiera import Hiera, HieraConfig, hiera_config
from merv_fast.encoders.vit import AttentionPool
from merv_fast.modules import attention_of, set_attention
from tests.budgets import FLOAT64, GOLDEN, low_precision, relative_error
from tests.encoders.small_encoders import SMALL, pixels, seeded
from tests.modules.attention_packages import VARIANTS, install

# Heads of 16: packages take multiples of 8.
CONFIGS = {name: replace(config, heads=3, blocks=2, depth=3) for name, config in SMALL.items()}
CONFIGS["siglip pooled"] = replace(CONFIGS["siglip"], tokens="pooled", final_norm=True)
HIERA = replace(hiera_config("hiera-base-video", 16), image_size=64, embed_width=16, heads=2, stages=(1, 1, 2, 1))
ENCODERS = [*CONFIGS, "hiera"]


def made(name: str) -> tuple[VisionTransformer | Hiera, Tensor]:
    """An encoder with random weights, and its input."""
    if name != "hiera":
        return seeded(CONFIGS[name]), pixels(CONFIGS[name], videos=1)
    torch.manual_seed(0)
    return build_encoder(HIERA).eval(), torch.randn(1, 16, 3, 64, 64)


def test_the_default_is_sdpa():
    for name in ENCODERS:
        assert attention_of(made(name)[0]) == "sdpa"


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash"])
@pytest.mark.parametrize("name", ENCODERS)
def test_what_a_cpu_has_equals_the_definition(name, backend):
    model, x = made(name)
    model, x = model.double(), x.double()
    set_attention(model, "eager")
    expected = model(x)
    set_attention(model, backend)
    assert attention_of(model) == backend
    assert relative_error(model(x), expected) < FLOAT64


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_packages_get_every_block_s_heads(monkeypatch, name, variant):
    stand_in = install(monkeypatch, variant)
    model, x = made(name)
    exact = model.double()(x.bfloat16().double())
    model = model.bfloat16()
    set_attention(model, "eager")
    low = model(x)
    set_attention(model, variant.split()[0])
    stand_in.calls.clear()
    got = model(x)
    assert (got.double() - exact).abs().max().item() <= low_precision(low, exact)
    # Attention over time and of a single query are not theirs.
    assert len(stand_in.calls) == len(model.blocks)
    for block, (q, k, v) in zip(model.blocks, stand_in.calls, strict=True):
        part = block.attn if name == "hiera" else block.attention
        width = part.proj.in_features
        for tensor in (q, k, v):
            assert tensor.shape[2:] == (part.heads, width // part.heads)
        for tensor in (k, v) if name == "hiera" and part.pools else (q, k, v):
            # Views of the packed layer's output.
            assert tensor.stride(1) == 3 * width


def test_a_state_dict_does_not_show_it():
    for name in ENCODERS:
        model, _ = made(name)
        keys = list(model.state_dict())
        set_attention(model, "eager")
        assert list(model.state_dict()) == keys
        assert not any("attend" in key for key in keys)


def test_the_pool_keeps_sdpa(monkeypatch):
    install(monkeypatch, "xformers")
    pool = AttentionPool(CONFIGS["siglip pooled"])
    with pytest.raises(ValueError, match="module must hold attention, got AttentionPool"):
        set_attention(pool, "xformers")


@pytest.mark.parametrize("backend", ["eager", "sdpa_flash"])
@pytest.mark.parametrize("name", ["languagebind", "vivit", "hiera"])
def test_whole_graph_compiles(name, backend):
    model, x = made(name)
    set_attention(model, backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), model(x)) < GOLDEN


def test_heads_of_every_published_encoder_fit():
    for encoder_id in ("languagebind-video-noclass", "dinov2-video-all-tokens", "siglip-vit-so400m"):
        with torch.device("meta"):
            model = build_encoder(encoder_config(encoder_id, 16))
        for backend in ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient"):
            set_attention(model, backend)
    for encoder_id in ("hiera-base-video", "hiera-base-plus-video", "hiera-large-video"):
        config: HieraConfig = hiera_config(encoder_id, 16)
        assert config.embed_width // config.heads in range(8, 257, 8)


def test_where_it_is_placed_counts(monkeypatch):
    install(monkeypatch, "flash_attention_2", on_cpu=False)
    model, x = made("dinov2")
    with pytest.raises(ValueError, match=r"tensors of flash_attention_2 must be on cuda .*, got cpu"):
        set_attention(model, "flash_attention_2")
    assert attention_of(model) == "sdpa"
    set_attention(model, "flash_attention_2", placed=False)
    with pytest.raises(ValueError, match=r"tensors of flash_attention_2 must be on cuda .*, got cpu"):
        model(x)


def test_on_a_gpu(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    for name in ENCODERS:
        model, x = made(name)
        x = x.to(device)
        exact = model.to(device).double()(x.bfloat16().double())
        model: nn.Module = model.bfloat16()
        set_attention(model, "eager")
        low = model(x)
        for backend in ("sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"):
            set_attention(model, backend)
            assert (model(x).double() - exact).abs().max().item() <= low_precision(low, exact), backend
