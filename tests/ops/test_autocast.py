"""Under autocast an op keeps its contract: the dtypes it is given are those it computes in and returns."""

import pytest
import torch

from merv_fast import ops

x = torch.randn(1, 2, 16, 8)
w, b = torch.randn(4, 8), torch.randn(4)
CALLS = {
    "pool_tokens": (lambda x: ops.pool_tokens(x, (4, 4), (2, 2)), x),
    "pool_project": (lambda x: ops.pool_project(x, [w], [b], (4, 4), (2, 2)), x),
    "fuse_encoders": (lambda v: ops.fuse_encoders([v, v + 1], torch.ones(8), torch.zeros(2))[0], x[0]),
    "pool_project_fuse": (
        lambda x: ops.pool_project_fuse([x, x], [w, w], [b, b], b, torch.zeros(2), [(4, 4)] * 2, (2, 2))[0],
        x,
    ),
    "temporal_attention": (lambda qkv: ops.temporal_attention(qkv, 2, 4, 2), torch.randn(8, 3, 24)),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_numbers_and_gradients(name):
    call, given = CALLS[name]
    plain = given.clone().requires_grad_()
    expected = call(plain)
    expected.square().sum().backward()
    cast = given.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = call(cast)
    got.square().sum().backward(retain_graph=True)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(cast.grad, plain.grad)
    loss = got.square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(loss, cast)
    assert torch.equal(inside, plain.grad)
