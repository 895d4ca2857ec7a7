"""transformers' own modules as a second oracle: random weights, float64, outputs and pixel gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VivitConfig,
    VivitForVideoClassification,
    VivitModel,
)

from tests.budgets import FLOAT64, GOLDEN, low_precision, relative_error
from tests.encoders.small_encoders import SMALL, encoder, pixels

SHAPE = {"hidden_size": 48, "num_attention_heads": 4}


def randomise(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.to(dtype).eval()


def dinov2(image_size: int = 56) -> nn.Module:
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            **SHAPE,
            num_hidden_layers=3,
            image_size=image_size,
            patch_size=14,
            num_register_tokens=4,
            mlp_ratio=4,
        )
    )


def siglip() -> nn.Module:
    return SiglipVisionModel(
        SiglipVisionConfig(
            **SHAPE,
            num_hidden_layers=3,
            image_size=64,
            patch_size=16,
            intermediate_size=192,
            hidden_act="gelu",
        )
    )


def vivit(activation: str = "gelu_pytorch_tanh") -> nn.Module:
    return VivitModel(
        VivitConfig(
            **SHAPE,
            num_hidden_layers=3,
            image_size=64,
            num_frames=16,
            intermediate_size=96,
            hidden_act=activation,
        ),
        add_pooling_layer=False,
    )


def per_frame(model: nn.Module, x: Tensor, output: str) -> Tensor:
    """[B, F, N, C] of a model of images."""
    got = getattr(model(x.flatten(0, 1)), output)
    return got.reshape(x.shape[0], x.shape[1], -1, got.shape[-1])


def outputs(case: str, model: nn.Module, x: Tensor) -> Tensor:
    match case:
        case "dinov2 class":
            return per_frame(model, x, "last_hidden_state")[:, :, :1]
        case "dinov2 all":
            return per_frame(model, x, "last_hidden_state")
        case "siglip pooled":
            return per_frame(model, x, "pooler_output")
        case "siglip grid":
            return per_frame(model, x, "last_hidden_state")
    return model(x).last_hidden_state[:, 1:].unflatten(1, (8, 16))


CASES = {
    "dinov2 class": (dinov2, {"tokens": "class", "depth": 3}),
    "dinov2 all": (dinov2, {"tokens": "all", "depth": 3}),
    "siglip pooled": (siglip, {"tokens": "pooled", "blocks": 3}),
    "siglip grid": (siglip, {"blocks": 3}),
    "vivit grid": (vivit, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_pixel_gradients_in_float64(case):
    build, changes = CASES[case]
    theirs = randomise(build())
    config = replace(SMALL[case.split()[0]], final_norm=True, **changes)
    ours = encoder(config, theirs.state_dict())
    x = pixels(config).double().requires_grad_()
    expected, got = outputs(case, theirs, x), ours(x)
    assert got.dtype == torch.float64
    assert relative_error(got, expected) < FLOAT64
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    (gradient,) = torch.autograd.grad((got * weight).sum(), x)
    assert relative_error(gradient, expected_gradient) < FLOAT64


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_as_transformers(case):
    build, changes = CASES[case]
    theirs = randomise(build(), torch.bfloat16)
    config = replace(SMALL[case.split()[0]], final_norm=True, **changes)
    ours = encoder(config, theirs.state_dict())
    x = pixels(config).bfloat16()
    with torch.no_grad():
        low = outputs(case, theirs, x)
        exact = outputs(case, theirs.double(), x.double())
        got = ours(x)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max().item() <= low_precision(low, exact)


def test_gelu_fast():
    theirs = randomise(vivit("gelu_fast"), torch.float32)
    ours = encoder(SMALL["vivit"], theirs.state_dict())
    x = pixels(SMALL["vivit"])
    with torch.no_grad():
        assert relative_error(ours(x), outputs("vivit grid", theirs, x)) < GOLDEN


def test_positions_of_another_grid():
    theirs = randomise(dinov2(image_size=70), torch.float32)
    config = replace(SMALL["dinov2"], tokens="all", depth=3, final_norm=True)
    ours = encoder(config, theirs.state_dict())
    x = pixels(config)
    with torch.no_grad():
        assert relative_error(ours(x), outputs("dinov2 all", theirs, x)) < GOLDEN


@pytest.mark.parametrize("build", [dinov2, siglip, vivit])
def test_saved_names_are_known(build, tmp_path):
    """What save_pretrained writes has other names than the module in memory."""
    from merv_fast.encoders import read_weights

    theirs = randomise(build(), torch.float32)
    theirs.save_pretrained(tmp_path)
    case = f"{build.__name__} {'all' if build is dinov2 else 'grid'}"
    config = replace(SMALL[build.__name__], final_norm=True, **CASES[case][1])
    x = pixels(config)
    with torch.no_grad():
        got = encoder(config, read_weights(tmp_path))(x)
        assert relative_error(got, outputs(case, theirs, x)) < GOLDEN


def test_video_classifier_of_vivit():
    theirs = VivitForVideoClassification(vivit().config)
    state = theirs.state_dict()
    assert any(key.startswith("classifier.") for key in state)
    encoder(SMALL["vivit"], state)
