from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.budgets import GOLDEN, relative_error
from tests.encoders.small_encoders import SMALL, encoder, golden

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def tokens(family: str, **changes: object) -> Tensor:
    """Flat tokens [B, T*N, C] of the golden input."""
    pixels, state, _ = golden(family)
    config = replace(SMALL[family], **changes)
    got = encoder(config, state)(pixels)
    assert got.shape == (2, config.slots, config.tokens_per_slot, config.width)
    return got.flatten(1, 2)


def videos(images: Tensor) -> Tensor:
    """[16, n, C] of the file's images -> [2, 8, n, C]."""
    return images.unflatten(0, (2, 8))


@pytest.mark.parametrize("family", SMALL)
def test_features(family):
    _, _, outputs = golden(family)
    expected = outputs["features"].reshape(2, -1, 48)
    assert relative_error(tokens(family), expected) < GOLDEN


@pytest.mark.parametrize("variant", ["all", "mean", "class", "class-first"])
def test_languagebind_variants(variant):
    hidden = golden("languagebind")[2]["hidden"]
    classes, patches = hidden[:, :, 0], hidden[:, :, 1:].flatten(1, 2)
    expected = {
        "all": hidden.flatten(1, 2),
        "mean": hidden.mean(-2),
        "class": classes,
        "class-first": torch.cat([classes.mean(1, keepdim=True), patches], 1),
    }[variant]
    assert relative_error(tokens("languagebind", tokens=variant), expected) < GOLDEN


@pytest.mark.parametrize("variant", ["class-first", "classes-first"])
def test_dinov2_variants(variant):
    outputs = golden("dinov2")[2]
    classes = videos(outputs["prefix"])[:, :, 0]
    patches = videos(outputs["features"]).flatten(1, 2)
    first = classes.mean(1, keepdim=True) if variant == "class-first" else classes
    assert relative_error(tokens("dinov2", tokens=variant), torch.cat([first, patches], 1)) < GOLDEN


def test_dinov2_prefix_tokens():
    got = tokens("dinov2", tokens="all").unflatten(1, (8, -1))
    assert relative_error(got[:, :, :5], videos(golden("dinov2")[2]["prefix"])) < GOLDEN


@pytest.mark.parametrize("variant", ["all", "class", "class-first", "every second slot"])
def test_vivit_variants(variant):
    hidden = golden("vivit")[2]["hidden"]
    expected = {
        "all": hidden,
        "class": hidden[:, :1],
        "class-first": hidden,
        "every second slot": hidden[:, 1:].reshape(2, 8, 4, 4, 48)[:, ::2].reshape(2, -1, 48),
    }[variant]
    change = {"slot_stride": 2} if variant == "every second slot" else {"tokens": variant}
    assert relative_error(tokens("vivit", **change), expected) < GOLDEN
