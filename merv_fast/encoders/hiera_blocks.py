"""Blocks of Hiera: attention within mask units or over a whole view, with query pooling.

V views, U mask units a view, n tokens a unit. The tokens of a view are kept as ``[V, U, n, C]``: units in
(slot, row, column) order, tokens of a unit in pooling order, so that pooling is a maximum over one dimension.
"""

from torch import Tensor, nn
from torch.nn.functional import gelu

from merv_fast.modules.attention import HeadAttention

__all__ = ["MASK_UNIT", "POOLINGS", "Block", "to_mask_units"]

# A mask unit is the 8 x 8 patches of one slot that three poolings of 2 x 2 turn into one token.
MASK_UNIT, POOLINGS, POOL = 8, 3, 4
MLP_RATIO = 4
EPS = 1e-6


class Block(nn.Module):
    """Pre-norm block; one that pools doubles width and heads and keeps a quarter of the tokens."""

    def __init__(self, in_width: int, in_heads: int, pools: bool, whole_view: bool) -> None:
        super().__init__()
        width, heads = (2 * in_width, 2 * in_heads) if pools else (in_width, in_heads)
        self.width, self.heads = width, heads
        self.norm1 = nn.LayerNorm(in_width, eps=EPS)
        self.attn = MaskUnitAttention(in_width, width, heads, pools, whole_view)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width)
        self.proj = nn.Linear(in_width, width) if pools else None

    def forward(self, x: Tensor) -> Tensor:
        """``x [V, U, n, in_width]`` -> ``[V, U, n or n/4, width]``."""
        normed = self.norm1(x)
        if self.proj is not None:
            x = pool_units(self.proj(normed))
        x = x + self.attn(normed)
        return x + self.mlp(self.norm2(x))


class MaskUnitAttention(nn.Module):
    """Attention within each mask unit or over the whole view, with queries pooled by their maximum."""

    def __init__(self, in_width: int, width: int, heads: int, pools: bool, whole_view: bool) -> None:
        super().__init__()
        self.heads, self.pools, self.whole_view = heads, pools, whole_view
        self.attend = HeadAttention(width // heads)
        self.qkv = nn.Linear(in_width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [V, U, n, in_width]`` -> ``[V, U, n or n/4, width]``."""
        views, units, _, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(3)
        if self.pools:
            q = pool_units(q)
        tokens = q.shape[2]
        merged = 1 if self.whole_view else 0
        q, k, v = (t.flatten(merged, merged + 1).transpose(1, 2) for t in (q, k, v))
        out = self.attend(q, k, v).transpose(1, 2)
        return self.proj(out.reshape(views, units, tokens, self.proj.in_features))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> ``[..., width]``."""
        return self.fc2(gelu(self.fc1(x)))


def to_mask_units(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches ``[V, T, 8h*8w, C]`` in (row, column) order -> ``[V, T*h*w, 64, C]``, ``grid = (h, w)``.

    Inside a unit the 2 x 2 patches that the first pooling joins differ in the slowest index.
    """
    views, slots, _, width = x.shape
    x = x.reshape(views, slots, grid[0], 2, 2, 2, grid[1], 2, 2, 2, width)
    # A row is (unit, third, second, first pooling), and so is a column.
    x = x.permute(0, 1, 2, 6, 5, 9, 4, 8, 3, 7, 10)
    return x.reshape(views, slots * grid[0] * grid[1], MASK_UNIT * MASK_UNIT, width)


def pool_units(x: Tensor) -> Tensor:
    """Maximum over the 2 x 2 neighbours: ``[V, U, n, ...]`` -> ``[V, U, n/4, ...]``."""
    return x.unflatten(2, (POOL, x.shape[2] // POOL)).amax(2)
