import pytest
import torch

from merv_fast.encoders.positions import resample_positions
from tests.budgets import GOLDEN, relative_error
from tests.golden_files import load


def test_golden():
    tensors, _ = load("pos_embed_resample")
    got = resample_positions(tensors["input"][0], (4, 4))
    assert relative_error(got, tensors["output"][0]) < GOLDEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_dtype_is_computed_in_float32(dtype):
    positions = torch.randn(36, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = resample_positions(positions, (4, 4))
    assert got.dtype == dtype
    assert torch.equal(got, resample_positions(positions.float(), (4, 4)).to(dtype))


def test_same_grid_is_untouched():
    positions = torch.randn(16, 8)
    assert resample_positions(positions, (4, 4)) is positions


def test_rows_and_columns():
    rows = torch.arange(4.0).repeat_interleave(4).unsqueeze(1)
    got = resample_positions(rows, (2, 4)).view(2, 4)
    assert torch.equal(got, got[:, :1].expand(2, 4))
    assert got[0, 0] < got[1, 0]


@pytest.mark.parametrize("shape", [(15, 8), (1, 16, 8), (16,)])
def test_errors(shape):
    with pytest.raises(ValueError, match=r"positions must be \[side \* side, C\], got \["):
        resample_positions(torch.zeros(shape), (4, 4))
