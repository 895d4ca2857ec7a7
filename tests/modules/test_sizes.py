"""Parameter counts and shapes at the sizes of the paper, on the meta device."""

import pytest
import torch

from merv_fast.modules.fusion import build_fusion
from merv_fast.modules.projectors import Projector, build_projector

# Made on import, before the fixtures replace torch.empty: torch.device() redirects the functions it saw when
# first used.
with torch.device("meta"):
    FRAMES = torch.empty(1, 16, 256, 1024)

DEAD_ATTENTION = 3072 * 4096 + 3072 + 3072 * 3072 + 3072
"""The reference's value and output projections, which never matter."""


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(specifier: str, width: int = 1024, llm_width: int = 4096, slots: int = 8, grid: int = 16) -> Projector:
    with torch.device("meta"):
        return build_projector(specifier, width, llm_width, 64, slots, (grid, grid))


def test_resamplers_alone() -> None:
    """The poster's pre-fusion table: one encoder of width 1024."""
    assert count(build("avg+none", llm_width=1024)) == 0
    assert count(build("3davg+none", llm_width=1024)) == 0
    assert count(build("attntv+none", llm_width=1024)) == 12_661_760
    assert count(build("conv+none")) == 237_384_960
    assert count(build("3dconv+none")) == 113_250_304


def test_linear_projectors() -> None:
    assert count(build("avg+linear", width=1024)) == 4_198_400
    assert count(build("3davg+linear", width=768)) == 3_149_824
    assert 2 * count(build("avg+linear", width=1024)) + 2 * count(build("avg+linear", width=768)) == 14_696_448


def test_fusions() -> None:
    with torch.device("meta"):
        assert count(build_fusion("cross_attention_avg_lq", 4, 4096)) == 44_055_552 - DEAD_ATTENTION
        assert count(build_fusion("concat_channel", 4, 4096)) == 67_112_960
        assert count(build_fusion("concat_channel_ln", 4, 4096)) == 67_112_960 + 2 * 4 * 4096
        assert count(build_fusion("scalar", 4, 4096)) == 4
        assert sum(count(build_fusion(name, 4, 4096)) for name in ("concat", "mixed25", "first")) == 0


@pytest.mark.parametrize("resampler", ["avg", "3davg", "attntv", "conv", "3dconv"])
def test_shapes(resampler: str) -> None:
    projector = build(f"{resampler}+linear", slots=16)
    assert projector(FRAMES).shape == (1, 1024, 4096)
