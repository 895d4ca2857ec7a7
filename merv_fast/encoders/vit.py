"""One vision transformer for LanguageBind, DINOv2, ViViT and SigLIP, by configuration."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from merv_fast.encoders.config import EncoderConfig
from merv_fast.modules.attention import HeadAttention, attention
from merv_fast.ops import temporal_attention

__all__ = ["VisionTransformer"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer over frames or tubelets, up to the block whose output is wanted.

    Patches are a linear map of their pixels. What checkpoints hold apart but only ever add is one parameter
    here: ``prefix`` is the class token with its position, then the registers; ``position`` is the patches'
    position embedding with the patch projection's bias. ``convert_state_dict`` folds them.

    Source: ViT, arXiv 2010.11929; registers, arXiv 2309.16588; tubelets, arXiv 2103.15691; LanguageBind's
    temporal attention, arXiv 2310.01852; SigLIP's attention pooling, arXiv 2303.15343.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        rows, columns = config.patch_grid
        slots = config.num_frames // config.tubelet if config.attention == "joint" else 1
        self.patch = nn.Linear(3 * config.tubelet * config.patch**2, width, bias=False)
        self.position = nn.Parameter(torch.randn(slots * rows * columns, width) * 0.02)
        prefix = config.prefix_tokens
        self.prefix = nn.Parameter(torch.randn(prefix, width) * 0.02) if prefix else None
        self.embedding_norm = nn.LayerNorm(width, config.eps) if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width, config.eps) if config.final_norm else nn.Identity()
        self.pool = AttentionPool(config) if config.tokens == "pooled" else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens of a batch of videos.

        Args:
            pixels: ``[B, F, 3, S, S]``, any floating dtype (it is cast to that of the weights).

        Returns:
            ``[B, T, N, C]``, as ``config.tokens`` says; not always contiguous.

        Raises:
            ValueError: the shape or the number of frames is not what the configuration takes.
        """
        config = self.config
        if pixels.dim() != 5 or pixels.shape[2:] != (3, config.image_size, config.image_size):
            rule = f"[B, F, 3, {config.image_size}, {config.image_size}]"
            raise ValueError(f"{config.name}: pixels must be {rule}, got {list(pixels.shape)}")
        frames = pixels.shape[1]
        config.check_frames(frames)
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x, frames)
        return self.select(self.norm(x), slots=frames // config.tubelet)

    def embed(self, pixels: Tensor) -> Tensor:
        """``[B, F, 3, S, S]`` -> the stream ``[B * T or B, prefix + patches, C]``."""
        config = self.config
        rows, columns = config.patch_grid
        tubes = pixels.unflatten(4, (columns, config.patch)).unflatten(3, (rows, config.patch))
        tubes = tubes.unflatten(1, (-1, config.tubelet)).permute(0, 1, 4, 6, 3, 2, 5, 7)
        # One pass gathers the patches and casts them.
        tubes = tubes.to(self.patch.weight.dtype, memory_format=torch.contiguous_format)
        x = self.patch(tubes.reshape(-1, self.position.shape[0], self.patch.in_features)) + self.position
        if self.prefix is not None:
            x = torch.cat([self.prefix.to(x.dtype).expand(len(x), -1, -1), x], 1)
        return self.embedding_norm(x)

    def select(self, x: Tensor, slots: int) -> Tensor:
        """The returned tokens ``[B, T, N, C]`` of the stream after the last block and norm."""
        config, prefix = self.config, self.config.prefix_tokens
        # Joint attention: the prefix belongs to the video, which then counts as one slot.
        x = x.unflatten(0, (-1, 1 if config.attention == "joint" else slots))
        patches = x[:, :, prefix:]
        if self.pool is not None:
            return self.pool(patches)
        match config.tokens:
            case "grid":
                if config.attention == "joint":
                    patches = patches.squeeze(1).unflatten(1, (slots, -1))
                return patches[:, :: config.slot_stride]
            case "all":
                return x
            case "class":
                return x[:, :, :1]
            case "mean":
                return x.mean(2, keepdim=True)
            case "class-first":
                return torch.cat([x[:, :, 0].mean(1, keepdim=True), patches.flatten(1, 2)], 1).unsqueeze(1)
            case _:
                return torch.cat([x[:, :, 0], patches.flatten(1, 2)], 1).unsqueeze(1)


class Block(nn.Module):
    """Temporal attention within windows of frames (if any), attention, MLP: normed residual branches."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, self.window = config.width, config.temporal_window
        if self.window is not None:
            self.temporal_embedding = nn.Parameter(torch.randn(self.window, width) * 0.02)
            self.temporal_norm = nn.LayerNorm(width, config.eps)
            self.temporal_attention = Attention(width, config.heads)
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.attention = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.mlp = MLP(width, config.mlp_width, config.activation)
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else None

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """``x [B * T or B, tokens, C]`` of videos of ``frames`` frames -> the same shape."""
        if self.window is not None:
            x = (x.unflatten(0, (-1, self.window)) + self.temporal_embedding.unsqueeze(1)).flatten(0, 1)
            x = x + self.temporal_attention.over_time(self.temporal_norm(x), frames, self.window)
        x = add_branch(x, self.attention(self.norm1(x)), self.scale1)
        return add_branch(x, self.mlp(self.norm2(x)), self.scale2)


def add_branch(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """The residual sum, LayerScale included, in one pass over memory."""
    return x + branch if scale is None else torch.addcmul(x, branch, scale)


class Attention(nn.Module):
    """Multi-head self-attention with query, key and value packed in one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = HeadAttention(width // heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Over the tokens of each row: ``[R, tokens, C]`` -> ``[R, tokens, C]``."""
        # Views all the way: backends read strided heads and write what the transpose makes contiguous again.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def over_time(self, x: Tensor, frames: int, window: int) -> Tensor:
        """Over the frames of each token, within windows: ``[B * F, tokens, C]`` -> the same shape."""
        return self.proj(temporal_attention(self.qkv(x), self.heads, frames, window))


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C]``."""
        return self.fc2(self.activation(self.fc1(x)))


class AttentionPool(nn.Module):
    """One learned query attends over each slot's tokens, then a residual MLP; SigLIP's head.

    ``query`` is the latent after its projection, which no input reaches.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.eps)
        self.mlp = MLP(width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, N, C]`` -> ``[B, T, 1, C]``."""
        k, v = self.kv(x.flatten(0, 1)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query.to(k.dtype).view(self.heads, 1, -1).expand(len(k), -1, -1, -1)
        # One query a slot: no backend could gain by it, so none is chosen.
        pooled = self.proj(attention(q, k, v).transpose(1, 2).flatten(2)).unflatten(0, x.shape[:2])
        return pooled + self.mlp(self.norm(pooled))
