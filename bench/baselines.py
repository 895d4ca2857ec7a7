"""What the reference does where merv_fast has an op, in plain PyTorch: the baselines of every benchmark."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ReferenceTail", "fuse_encoders", "pool_project", "pool_tokens", "temporal_attention", "temporal_stream"]

Grid = tuple[int, int]


def pool_tokens(x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
    """``x [B, T, H*W, C]`` to ``[B, T, h*w, C]``: channels to the front, AdaptiveAvgPool3d, and back."""
    B, T, _, C = x.shape
    volume = x.view(B, T, *grid, C).permute(0, 4, 1, 2, 3)
    return F.adaptive_avg_pool3d(volume, (T, *out_grid)).permute(0, 2, 3, 4, 1).reshape(B, T, -1, C)


def pool_project(x: Tensor, projector: nn.Module, grid: Grid, out_grid: Grid) -> Tensor:
    """``x [B, T, H*W, C]`` to ``[B, T*h*w, D]``."""
    return projector(pool_tokens(x, grid, out_grid).flatten(1, 2))


def fuse_encoders(values: Sequence[Tensor], query: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``values``, E tensors ``[B, S, D]``: stacked, scored by their means, and weighed by a batched product."""
    stack = torch.stack(list(values), 1)
    weights = torch.softmax(stack.mean(2) @ query + bias, 1)
    return weigh(stack, weights[:, None]), weights


def weigh(stack: Tensor, weights: Tensor) -> Tensor:
    """``stack [B, E, S, D]`` by ``weights [B, 1, E]`` to ``[B, S, D]``."""
    B, E, S, D = stack.shape
    return torch.bmm(weights, stack.reshape(B, E, S * D)).view(B, S, D)


class ReferenceTail(nn.Module):
    """The reference's projectors and cross-attention fusion, written plainly.

    The attention's own output is computed and thrown away, as in the reference.

    Args:
        widths: C_e of each encoder.
        grids: (H_e, W_e) of each encoder.
        D: width of the language model.
        query_width: width of the learned query; scores are divided by its root.
        hidden: whether the projectors have a GELU and a second linear layer.
        out_grid: what every grid is pooled to.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[Grid],
        D: int = 4096,
        query_width: int = 3072,
        hidden: bool = False,
        out_grid: Grid = (8, 8),
    ) -> None:
        super().__init__()
        self.grids, self.out_grid = tuple(grids), out_grid
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(width, D), nn.GELU(), nn.Linear(D, D)) if hidden else nn.Linear(width, D)
            for width in widths
        )
        self.query = nn.Parameter(torch.randn(1, 1, query_width))
        self.attention = nn.MultiheadAttention(query_width, 1, kdim=D, vdim=D, batch_first=True)

    def forward(self, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``xs[e] [B, T, H_e*W_e, C_e]`` to tokens ``[B, T*h*w, D]`` and the encoders' weights ``[B, E]``."""
        values = [
            pool_project(x, projector, grid, self.out_grid)
            for x, projector, grid in zip(xs, self.projectors, self.grids, strict=True)
        ]
        stack = torch.stack(values, 1)
        means = stack.mean(2)
        _, weights = self.attention(self.query.expand(len(means), -1, -1), means, means)
        return weigh(stack, weights), weights[:, 0]


def temporal_attention(qkv: Tensor, heads: int, window: int) -> Tensor:
    """``qkv [B*T, N, 3*C]`` to ``[B*T, N, C]``: to sequences of one patch each, attention, and back."""
    rows, N, width = qkv.shape
    sequences = qkv.view(rows // window, window, N, width).transpose(1, 2).reshape(-1, window, width)
    return from_sequences(attend(sequences, heads), N)


def temporal_stream(stream: Tensor, sequences: Tensor, heads: int) -> Tensor:
    """As LanguageBind does: the stream ``[B*T, N, C]`` is transposed, and q, k, v are made from that.

    ``sequences [B*T/w * N, w, 3*C]`` stands for those; the transpose of the stream is made for its time.
    """
    window, N = sequences.shape[1], stream.shape[1]
    stream.view(-1, window, N, stream.shape[2]).transpose(1, 2).contiguous()
    return from_sequences(attend(sequences, heads), N)


def attend(sequences: Tensor, heads: int) -> Tensor:
    """``[R, w, 3*C]`` to ``[R, w, C]``."""
    q, k, v = sequences.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def from_sequences(sequences: Tensor, N: int) -> Tensor:
    """``[B*T/w * N, w, C]`` to ``[B*T, N, C]``."""
    return sequences.unflatten(0, (-1, N)).transpose(1, 2).flatten(0, 1).contiguous()
