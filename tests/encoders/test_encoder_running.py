from dataclasses import replace

import pytest
import torch
from torch import nn

from merv_fast.encoders.vit import Attention
from tests.budgets import FLOAT64, GOLDEN, relative_error
from tests.encoders.small_encoders import SMALL, encoder, golden, pixels, seeded

VARIANTS = {
    "languagebind": SMALL["languagebind"],
    "dinov2": SMALL["dinov2"],
    "vivit": SMALL["vivit"],
    "siglip": SMALL["siglip"],
    "siglip pooled": replace(SMALL["siglip"], tokens="pooled", final_norm=True),
}


def test_only_needed_blocks_matter():
    x, state, _ = golden("dinov2")
    model = encoder(SMALL["dinov2"], state)
    assert len(model.blocks) == 3
    last = {key: value.clone().fill_(float("nan")) if "blocks.3." in key else value for key, value in state.items()}
    assert torch.equal(model(x), encoder(SMALL["dinov2"], last)(x))
    deeper = encoder(replace(SMALL["dinov2"], blocks=4), state)
    assert relative_error(deeper(x), model(x)) > GOLDEN


def test_temporal_windows_are_independent():
    x, state, _ = golden("languagebind")
    config = SMALL["languagebind"]
    model = encoder(config, state)
    whole = model(x)
    for window in range(2):
        frames = slice(4 * window, 4 * window + 4)
        assert relative_error(model(x[:, frames]), whole[:, frames]) < GOLDEN
    mixed = torch.cat([x[:, 1:4], x[:, :1], x[:, 4:]], 1)
    assert relative_error(model(mixed)[:, 4:], whole[:, 4:]) < GOLDEN
    assert relative_error(model(mixed)[:, 3], whole[:, 0]) > GOLDEN


def test_frames_are_independent_without_a_window():
    model, x = seeded(SMALL["dinov2"]), pixels(SMALL["dinov2"])
    whole = model(x)
    assert relative_error(model(x[:, 2:5]), whole[:, 2:5]) < GOLDEN


def test_frames_are_joint_in_vivit():
    model, x = seeded(SMALL["vivit"]), pixels(SMALL["vivit"])
    changed = x.clone()
    changed[:, -1] = 0
    assert relative_error(model(changed)[:, 0], model(x)[:, 0]) > GOLDEN


@pytest.mark.parametrize("variant", ["languagebind", "dinov2", "vivit", "siglip pooled"])
def test_whole_graph_compiles(variant):
    model, x = seeded(replace(VARIANTS[variant], blocks=1)), pixels(VARIANTS[variant])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), model(x)) < GOLDEN
    compiled(x).square().sum().backward()
    assert model.position.grad is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_and_the_pixels_get_gradients(variant):
    model, x = seeded(VARIANTS[variant]).train(), pixels(VARIANTS[variant]).requires_grad_()
    model(x).square().sum().backward()
    for name, parameter in [*model.named_parameters(), ("pixels", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_of_languagebind_is_that_of_finite_differences():
    config = replace(SMALL["languagebind"], image_size=28, width=8, heads=2, mlp_width=8, blocks=1, num_frames=4)
    config = replace(config, temporal_window=2)
    model, x = seeded(config).double(), pixels(config, videos=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: model(y).sum(2), x, fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_runs_on_pixels_of_any_dtype(variant):
    model, x = seeded(VARIANTS[variant]).bfloat16(), pixels(VARIANTS[variant])
    got = model(x)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    assert torch.equal(got, model(x.bfloat16()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_pixels(variant):
    model, x = seeded(VARIANTS[variant]), pixels(VARIANTS[variant])
    strided = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert torch.equal(model(strided), model(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(variant):
    config = VARIANTS[variant]
    got = seeded(config)(pixels(config)[:0])
    assert got.shape == (0, config.slots, config.tokens_per_slot, config.width)


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        ("dinov2", (8, 3, 56, 56), r"pixels must be \[B, F, 3, 56, 56\], got \[8, 3, 56, 56\]"),
        ("dinov2", (1, 3, 8, 56, 56), r"pixels must be \[B, F, 3, 56, 56\], got \[1, 3, 8, 56, 56\]"),
        ("dinov2", (1, 8, 3, 56, 70), r"pixels must be \[B, F, 3, 56, 56\], got \[1, 8, 3, 56, 70\]"),
        ("dinov2", (1, 0, 3, 56, 56), "frames must be a positive multiple of 1, got 0"),
        ("languagebind", (1, 6, 3, 56, 56), "frames must be a positive multiple of 4, got 6"),
        ("vivit", (1, 15, 3, 64, 64), "frames must be a positive multiple of 2, got 15"),
        ("vivit", (1, 32, 3, 64, 64), "frames must be 16, as positions are, got 32"),
    ],
)
def test_input_errors(family, shape, message):
    with pytest.raises(ValueError, match=message):
        seeded(SMALL[family])(torch.zeros(shape))


def test_attention_makes_no_copies():
    """Heads go to the backend as views of the packed projection."""
    seen = []

    def spy(q, k, v):
        seen.extend((q, k, v))
        return q

    layer = Attention(8, 2)
    layer.attend.compute = spy
    packed = []
    layer.qkv.register_forward_hook(lambda module, inputs, output: packed.append(output))
    layer(torch.randn(3, 5, 8))
    assert [t.shape for t in seen] == [(3, 2, 5, 4)] * 3
    assert all(t.untyped_storage().data_ptr() == packed[0].untyped_storage().data_ptr() for t in seen)


def test_packed_attention_is_multi_head_attention():
    layer, theirs = Attention(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    layer.qkv.weight.data.copy_(theirs.in_proj_weight)
    layer.qkv.bias.data.copy_(theirs.in_proj_bias)
    layer.proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert relative_error(layer(x), theirs(x, x, x)[0]) < FLOAT64
