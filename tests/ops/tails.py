"""Random projectors and fusions, and what they compute, one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {  # B, T_e, grids, (h, w), t, widths of each encoder without D, D
    "merv": (
        2,
        (3,) * 4,
        ((16, 16), (16, 16), (14, 14), (14, 14)),
        (8, 8),
        None,
        ((12,), (12,), (9,), (9,)),
        20,
    ),
    "one-oblong-encoder": (2, (2,), ((5, 7),), (2, 3), None, ((769,),), 33),
    "two-layers": (1, (2, 2), ((3, 4), (4, 4)), (2, 2), None, ((6, 10), (5, 7)), 9),
    "three-layers-fewer-slots": (2, (4, 6), ((2, 3), (3, 3)), (2, 2), 4, ((3, 8, 5), (4, 6, 5)), 6),
    "eight": (1, (1,) * 8, ((2, 2),) * 8, (1, 2), None, ((4,),) * 8, 5),
}


def one_after_the_other(xs, weights, biases, query, bias, grids, out_grid, out_slots) -> tuple[Tensor, Tensor]:
    """Each encoder's projected tokens, stacked, then weighed: what the op never forms."""
    L, values = len(weights) // len(xs), []
    for e, x in enumerate(xs):
        maps = x.unflatten(2, grids[e]).permute(0, 4, 1, 2, 3)
        tokens = F.adaptive_avg_pool3d(maps, (out_slots or x.shape[1], *out_grid)).flatten(2).transpose(1, 2)
        for layer in range(L):
            tokens = (F.gelu(tokens) if layer else tokens) @ weights[e * L + layer].T + biases[e * L + layer]
        values.append(tokens)
    stack = torch.stack(values, 1)
    encoder_weights = torch.softmax(stack.mean(2) @ query + bias, -1)
    return torch.einsum("be,besd->bsd", encoder_weights, stack), encoder_weights


def case(shape, dtype=torch.float64, requires_grad=False):
    B, slots, grids, out_grid, t, widths, D = shape
    torch.manual_seed(0)
    wide = {"dtype": torch.float64}
    xs = [torch.randn(B, T, g[0] * g[1], w[0], **wide) for T, g, w in zip(slots, grids, widths, strict=True)]
    sizes = [pair for w in widths for pair in zip(w, (*w[1:], D), strict=True)]
    weights = [torch.randn(n, m, **wide) / m**0.5 for m, n in sizes]
    biases = [torch.randn(n, **wide) for _, n in sizes]
    query, bias = torch.randn(D, **wide) / D**0.5, torch.randn(len(xs), **wide)
    return to((xs, weights, biases, query, bias, grids, out_grid, t), dtype, requires_grad)


def to(case_, dtype, requires_grad=False):
    def cast(tensor):
        return tensor.detach().to(dtype).requires_grad_(requires_grad)

    xs, weights, biases, query, bias, *how = case_
    return [*map(cast, xs)], [*map(cast, weights)], [*map(cast, biases)], cast(query), cast(bias), *how


def tensors_of(case_) -> list[Tensor]:
    xs, weights, biases, query, bias, *_ = case_
    return [*xs, *weights, *biases, query, bias]


def flat(case_):
    """The operator's own arguments: grids side by side, the number of slots given."""
    xs, weights, biases, query, bias, grids, out_grid, t = case_
    return (
        xs,
        weights,
        biases,
        query,
        bias,
        [side for grid in grids for side in grid],
        out_grid,
        t or xs[0].shape[1],
    )
