"""8-bit layers: what they compute, how far it may be off, and that they stay what they are."""

import pytest
import torch
from torch import nn

from merv_fast.encoders import VisionTransformer
from merv_fast.modules.fp8 import FP8, Fp8Linear, to_fp8
from tests.encoders.small_encoders import SMALL, pixels

DTYPES = [torch.float32, torch.bfloat16]


def layer(rows=40, inputs=64, outputs=48, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    # Rows of very different sizes: each has its scale.
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    return linear, x.to(dtype)


def steps(x):
    """How far apart 8-bit numbers are at most from ``x``: half a step of three bits, or of the smallest numbers."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_within_what_rounding_to_8_bits_does(dtype, bias):
    linear, x = layer(dtype=dtype, bias=bias)
    with torch.no_grad():
        got = Fp8Linear(linear)(x)
        wide = nn.Linear(64, 48, bias=bias, dtype=torch.float64)
        wide.load_state_dict(linear.state_dict())
        exact = wide(x.double())
    assert got.dtype == dtype
    dx, dw = steps(x.double()), steps(wide.weight.detach())
    products = dx @ wide.weight.detach().abs().mT + x.double().abs() @ dw.mT + dx @ dw.mT
    # Then sums in float32, and one rounding of the bias and one of the result.
    final = torch.finfo(dtype).eps * (exact.abs() + products + 1)
    error = (got.double() - exact).abs()
    assert (error <= 1.01 * products + final).all()
    # It is no other precision: some of it is really off.
    assert error.max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_product_of_the_rounded(dtype):
    linear, x = layer(dtype=dtype)
    eight = Fp8Linear(linear)
    scale = x.float().abs().amax(1, keepdim=True) / 448
    rows = (x.float() / scale).to(FP8).double() * scale.double()
    exact = rows @ (eight.weight.double() * eight.scale.double()).mT + linear.bias.detach().double()
    got = eight(x).double()
    size = (rows.abs() @ (eight.weight.double() * eight.scale.double()).abs().mT) + 1
    assert ((got - exact).abs() <= 2 * torch.finfo(dtype).eps * size).all()


def test_zeros_and_no_rows():
    linear, x = layer()
    eight = Fp8Linear(linear)
    x[3] = 0
    assert torch.equal(eight(x)[3], linear.bias)
    assert eight(x[:0]).shape == (0, 48)
    linear.weight.data[5] = 0
    assert torch.equal(Fp8Linear(linear)(x)[:, 5], linear.bias[5].expand(40))


def test_a_row_does_not_depend_on_others():
    linear, x = layer()
    eight = Fp8Linear(linear)
    torch.testing.assert_close(eight(x)[7:9], eight(x[7:9]), rtol=1e-5, atol=1e-5)
    assert torch.equal(eight(x.view(5, 8, 64)), eight(x).view(5, 8, 48))


def test_casting_and_moving_keep_the_8_bits():
    linear, x = layer()
    eight = nn.Sequential(Fp8Linear(linear))
    before = eight(x)
    state = {name: value.clone() for name, value in eight.state_dict().items()}
    assert state["0.weight"].dtype == FP8
    eight.to(torch.bfloat16)
    assert eight[0].weight.dtype == FP8
    assert eight[0].scale.dtype == torch.float32
    assert eight[0].bias.dtype == torch.bfloat16
    eight.to(torch.float32).half().float()
    eight[0].bias.data.copy_(state["0.bias"])
    assert torch.equal(eight(x), before)
    assert eight.to("meta")[0].weight.device.type == "meta"


@pytest.mark.parametrize("family", SMALL)
def test_encoders(family):
    torch.manual_seed(0)
    encoder, x = VisionTransformer(SMALL[family]).eval(), pixels(SMALL[family])
    with torch.no_grad():
        exact = encoder(x)
        names = to_fp8(encoder)
        got = encoder(x)
    each = 4 + 2 * (SMALL[family].temporal_window is not None)
    assert len([name for name in names if name.startswith("blocks.")]) == each * SMALL[family].blocks
    assert not any(isinstance(part, nn.Linear) for part in encoder.blocks.modules())
    assert isinstance(encoder.patch, nn.Linear)
    error = ((got - exact).norm() / exact.norm()).item()
    # Measured: 0.019 to 0.033 with these weights.
    assert 0 < error < 0.06


def test_compiles_in_one_graph():
    linear, x = layer()
    eight = Fp8Linear(linear)
    assert torch.equal(torch.compile(eight, fullgraph=True, backend="aot_eager")(x), eight(x))


def test_refusals():
    linear, x = layer()
    with pytest.raises(ValueError, match="must not want gradients"):
        Fp8Linear(linear)(x.requires_grad_())
    with pytest.raises(ValueError, match=r"must be bfloat16 \(or, on a CPU, float32\), got torch.float64 on cpu"):
        Fp8Linear(linear)(x.detach().double())
    with pytest.raises(ValueError, match="must hold linear layers named fc9, got none"):
        to_fp8(nn.ModuleDict({"fc1": linear}), ["fc9"])
    odd = nn.ModuleDict({"fc1": linear, "fc2": nn.Linear(64, 24)})
    with pytest.raises(ValueError, match=r"sizes of fc2 must be multiples of 16, got 64 and 24"):
        to_fp8(odd)
    assert odd["fc1"] is linear


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs sm_89")
    linear, x = layer(dtype=torch.bfloat16)
    exact = Fp8Linear(linear)(x)
    got = Fp8Linear(linear.cuda())(x.cuda()).cpu()
    assert torch.allclose(got, exact, rtol=2**-6, atol=2**-6 * exact.abs().max().item() * 2**-4)
    with pytest.raises(ValueError, match="must be bfloat16"):
        Fp8Linear(linear.cuda())(x.cuda().float())
