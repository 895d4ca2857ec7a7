from dataclasses import replace

import pytest
import torch
from torch import Tensor

from merv_fast.encoders import EncoderConfig, VisionTransformer, convert_state_dict
from merv_fast.encoders.registry import FAMILIES
from merv_fast.errors import CheckpointError
from tests.budgets import GOLDEN, relative_error
from tests.encoders.small_encoders import SMALL, encoder, golden, pixels, seeded

POOLED = replace(SMALL["siglip"], tokens="pooled", blocks=3, final_norm=True)
WHOLE = {
    "languagebind": replace(SMALL["languagebind"], blocks=3, final_norm=True),
    "dinov2": replace(SMALL["dinov2"], blocks=4, final_norm=True),
    "vivit": SMALL["vivit"],
    "siglip": POOLED,
}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


@pytest.mark.parametrize("config", [*SMALL.values(), POOLED], ids=lambda config: f"{config.family}-{config.tokens}")
def test_our_own_names(config):
    state = seeded(config).state_dict()
    assert same(convert_state_dict(config, state), state)


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_every_weight_is_used(family):
    """Each tensor of a checkpoint changes the output and is missed when taken away."""
    config = replace(WHOLE[family], blocks=1)
    later = tuple(f".{block}." for block in range(1, config.depth))
    state = {key: value for key, value in golden(family)[1].items() if not any(part in key for part in later)}
    x, model = pixels(config, videos=1), encoder(config, state)
    whole = model(x)
    for key, value in state.items():
        changed = {**state, key: value + torch.linspace(0, 1, value.shape[-1])}
        model.load_state_dict(convert_state_dict(config, changed))
        # A term that is the same for every key does not reach a softmax.
        if not key.endswith(("k_proj.bias", "attention.key.bias")):
            assert relative_error(model(x), whole) > 0, key
        del changed[key]
        with pytest.raises(CheckpointError):
            convert_state_dict(config, changed)


def test_open_clip():
    _, state, _ = golden("siglip")
    wrapped = {f"visual.trunk.{key}": value for key, value in state.items()}
    text = (
        "text.token_embedding.weight",
        "text.transformer.resblocks.0.ln_1.bias",
        "logit_scale",
        "logit_bias",
    )
    wrapped |= {key: torch.zeros(1) for key in text}
    assert same(convert_state_dict(POOLED, wrapped), convert_state_dict(POOLED, state))


def test_languagebind_with_its_text_tower():
    config = SMALL["languagebind"]
    _, state, _ = golden("languagebind")
    whole = {f"vision_model.{key}": value for key, value in state.items()}
    others = (
        "text_model.embeddings.position_ids",
        "text_model.encoder.layers.0.layer_norm1.weight",
        "text_projection.weight",
        "visual_projection.weight",
        "vision_model.embeddings.position_ids",
        "logit_scale",
    )
    whole |= {key: torch.zeros(1) for key in others}
    assert same(convert_state_dict(config, whole), convert_state_dict(config, state))


def test_published_names_of_vivit_and_dinov2():
    for family in ("vivit", "dinov2"):
        config = SMALL[family]
        naming = FAMILIES[family].namings[-1]
        state = transformers_names(config)
        extra = {"classifier.weight": torch.zeros(1)}
        prefix = next(prefix for prefix in naming.prefixes if prefix)
        prefixed = {prefix + key: value for key, value in state.items()} | extra
        assert same(convert_state_dict(config, prefixed), convert_state_dict(config, state))


def transformers_names(config: EncoderConfig) -> dict[str, Tensor]:
    """A random checkpoint under the names that are on the hub."""
    generator = torch.Generator().manual_seed(0)
    patches = config.patch_grid[0] * config.patch_grid[1] * (config.num_frames // 2 if config.tubelet == 2 else 1)
    tube = (2,) if config.tubelet == 2 else ()
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, 48),
        "embeddings.position_embeddings": (1, patches + 1, 48),
        "embeddings.patch_embeddings.projection.weight": (48, 3, *tube, config.patch, config.patch),
        "embeddings.patch_embeddings.projection.bias": (48,),
        "layernorm.weight": (48,),
        "layernorm.bias": (48,),
    }
    if config.register_tokens:
        shapes |= {"embeddings.register_tokens": (1, 4, 48), "embeddings.mask_token": (1, 48)}
    for block in range(config.depth):
        stem = f"encoder.layer.{block}"
        linears = {f"attention.attention.{part}": (48, 48) for part in ("query", "key", "value")}
        linears["attention.output.dense"] = (48, 48)
        if config.family == "dinov2":
            norms = ("norm1", "norm2")
            linears |= {"mlp.fc1": (192, 48), "mlp.fc2": (48, 192)}
            shapes |= {f"{stem}.layer_scale{n}.lambda1": (48,) for n in (1, 2)}
        else:
            norms = ("layernorm_before", "layernorm_after")
            linears |= {"intermediate.dense": (96, 48), "output.dense": (48, 96)}
        for name, shape in linears.items():
            shapes |= {f"{stem}.{name}.weight": shape, f"{stem}.{name}.bias": shape[:1]}
        shapes |= {f"{stem}.{name}.{leaf}": (48,) for name in norms for leaf in ("weight", "bias")}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_packed_order_is_query_key_value():
    config = SMALL["vivit"]
    state = transformers_names(config)
    got = convert_state_dict(config, state)["blocks.1.attention.qkv.weight"]
    parts = [state[f"encoder.layer.1.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(got, torch.cat(parts))


def test_positions_of_another_grid_are_resampled_before_the_bias_is_added():
    config = SMALL["siglip"]
    _, state, _ = golden("siglip")
    constant = {**state, "pos_embed": torch.full((1, 36, 48), 2.0)}
    got = convert_state_dict(config, constant)["position"]
    assert got.shape == (16, 48)
    assert relative_error(got, (2 + state["patch_embed.proj.bias"]).expand(16, 48)) < GOLDEN


def test_low_precision_keeps_its_dtype():
    _, state, _ = golden("siglip")
    low = {key: value.bfloat16() for key, value in state.items()}
    got = convert_state_dict(POOLED, low)
    assert {value.dtype for value in got.values()} == {torch.bfloat16}
    VisionTransformer(POOLED).bfloat16().load_state_dict(got)


@pytest.mark.parametrize("family", SMALL)
def test_unused_parts_are_dropped(family):
    """Later blocks, norms and heads may be there or not."""
    _, state, _ = golden(family)
    config = SMALL[family]
    later = f".{config.blocks}."
    least = {
        key: value
        for key, value in state.items()
        if later not in key and not key.startswith(("attn_pool.", "post_layernorm."))
    }
    assert config.blocks == config.depth or len(least) < len(state)
    assert same(convert_state_dict(config, least), convert_state_dict(config, state))


def test_problems_are_listed():
    config = SMALL["dinov2"]
    _, state, _ = golden("dinov2")
    del state["blocks.1.norm1.bias"]
    state["blocks.4.norm1.bias"] = torch.zeros(48)
    state["colour"] = torch.zeros(1)
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(191, 48)
    with pytest.raises(CheckpointError) as caught:
        convert_state_dict(config, state)
    assert str(caught.value) == (
        "convert_state_dict: timm tensors must match dinov2-video-all-tokens, got "
        "unknown: blocks.4.norm1.bias, colour; missing: blocks.1.norm1.bias; "
        "misshapen: blocks.0.mlp.fc1.weight [191, 48] for [192, 48]"
    )


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "languagebind",
            {"embeddings.position_embedding.weight": (16, 48)},
            r"position_embedding.weight \[15, 48\]",
        ),
        (
            "languagebind",
            {"encoder.layers.0.temporal_embedding": (1, 8, 48)},
            r"temporal_embedding \[8, 48\] for \[4, 48\]",
        ),
        ("languagebind", {"text.weight": (1,)}, "unknown: text.weight"),
        ("languagebind", {"encoder.layers.0.self_attn.q_proj.weight": (48, 47)}, r"q_proj.weight \[48, 47\]"),
        ("dinov2", {"reg_token": (1, 3, 48)}, r"reg_token \[3, 48\] for \[4, 48\]"),
        ("dinov2", {"pos_embed": (1, 17, 48)}, r"pos_embed \[17, 48\] for \[16, 48\]"),
        ("dinov2", {"pos_embed": (48,)}, r"pos_embed \[48\] for \[16, 48\]"),
        ("dinov2", {"attn_pool.norm.colour": (48,)}, "unknown: attn_pool.norm.colour"),
        (
            "vivit",
            {"embeddings.position_embeddings": (1, 65, 48)},
            r"position_embeddings \[64, 48\] for \[128, 48\]",
        ),
        (
            "vivit",
            {"embeddings.patch_embeddings.projection.weight": (48, 3, 16, 16)},
            r"for \[48, 3, 2, 16, 16\]",
        ),
        ("siglip", {"cls_token": (1, 1, 48)}, "unknown: cls_token"),
        (
            "siglip",
            {"patch_embed.proj.weight": (48, 3, 14, 14)},
            r"patch_embed.proj.weight \[48, 3, 14, 14\]",
        ),
    ],
)
def test_errors(family, changes, message):
    _, state, _ = golden(family)
    state |= {key: torch.zeros(shape) for key, shape in changes.items()}
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(SMALL[family], state)


def test_class_position_is_missed():
    _, state, _ = golden("languagebind")
    del state["embeddings.position_embedding.weight"]
    with pytest.raises(CheckpointError, match=r"missing: class_position, position$"):
        convert_state_dict(SMALL["languagebind"], state)


def test_unknown_naming():
    with pytest.raises(CheckpointError, match=r"dinov2 must be named by one of .*'timm', 'transformers'\], got a, b"):
        convert_state_dict(SMALL["dinov2"], {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="got no keys"):
        convert_state_dict(SMALL["dinov2"], {})


def test_our_own_names_are_checked():
    config = SMALL["siglip"]
    state = seeded(config).state_dict()
    position = state.pop("position")
    with pytest.raises(CheckpointError, match="missing: position"):
        convert_state_dict(config, state)
    with pytest.raises(CheckpointError, match=r"misshapen: position \[25, 48\] for \[16, 48\]"):
        convert_state_dict(config, {**state, "position": torch.zeros(25, 48)})
    with pytest.raises(CheckpointError, match="unknown: colour"):
        convert_state_dict(config, {**state, "position": position, "colour": position})
