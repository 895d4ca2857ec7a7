"""The cross-attention block of the attentive pooler."""

from torch import Tensor, nn

from merv_fast.modules.attention import attention

__all__ = ["CrossAttentionBlock"]


class CrossAttentionBlock(nn.Module):
    """Queries attend to tokens, then an MLP of ratio 4, each with a shortcut.

    The block of V-JEPA's attentive pooler (arXiv 2404.08471), as the reference uses it: only the tokens are
    normalised before the attention, the queries are not. State-dict names are the reference's.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.xattn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """``queries [1, n, C]`` shared by all of ``tokens [B, N, C] -> [B, n, C]``."""
        y = queries + self.xattn(queries, self.norm1(tokens))
        return y + self.mlp(self.norm2(y))


class CrossAttention(nn.Module):
    """Multi-head attention from queries to tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"CrossAttention: width must be a multiple of heads ({heads}), got {width}")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """``queries [1, n, C]``, ``tokens [B, N, C] -> [B, n, C]``."""
        # The queries are the same for every slot of every video: project them once.
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q.expand(len(tokens), -1, -1, -1), k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., width] -> [..., width]``."""
        return self.fc2(self.act(self.fc1(x)))
