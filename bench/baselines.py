"""What the reference does where merv_fast has its own way, written plainly: the baselines of every benchmark."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merv_fast.encoders import VisionTransformer
from merv_fast.encoders.vit import Attention, Block
from merv_fast.video import Recipe

__all__ = [
    "PILLOW",
    "ReferenceEncoder",
    "ReferenceTail",
    "ask_each",
    "encode",
    "fuse_encoders",
    "load_frames",
    "pool_project",
    "pool_tokens",
    "prepare",
    "run_block",
    "temporal_attention",
    "temporal_stream",
]

Grid = tuple[int, int]

PILLOW = {"bilinear": 2, "bicubic": 3}
"""Values of ``PIL.Image.Resampling``."""


def load_frames(path: str, count: int) -> Tensor:
    """uint8 ``[count, H, W, 3]`` of a whole video, through decord."""
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0))
    numbers = np.linspace(0, len(reader) - 1, count, dtype=int)
    return torch.from_numpy(reader.get_batch(numbers).asnumpy())


def prepare(frames: Tensor, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 ``[F, H, W, 3]``, wider than high, to ``[F, 3, S, S]``: by Pillow, or LanguageBind's way."""
    from PIL import Image

    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    S = recipe.size
    if recipe.antialias:
        pictures = [Image.fromarray(frame.numpy()).resize((S, S), PILLOW[recipe.method]) for frame in frames]
        planes = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).to(dtype).div(255) for p in pictures])
        return (planes - mean) / std
    planes = (frames.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std
    height, width = frames.shape[1:3]
    side = int(width / height * S)
    planes = F.interpolate(planes, size=(S, side), mode="bilinear", align_corners=False)
    left = round((side - S) / 2)
    return planes[..., left : left + S].contiguous()


class ReferenceEncoder(nn.Module):
    """An encoder as the reference runs it, with the weights of ours.

    Patches are a convolution, and every block of the checkpoint runs, though for three of the encoders the last is
    not asked for.

    Args:
        encoder: ours; it returns a grid of patches.
    """

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder, config = encoder, encoder.config
        self.rest = nn.ModuleList(Block(config) for _ in range(config.depth - config.blocks))
        # In LanguageBind's and ViViT's code attention is two products and a softmax; timm calls PyTorch's.
        self.attend = attend_by_products if config.family in ("languagebind", "vivit") else attend_packed

    def forward(self, pixels: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        """``[B, F, 3, S, S]`` to ``[B, T, N, C]``; ``run`` is what runs a block, `run_block` or that, compiled."""
        encoder, frames = self.encoder, pixels.shape[1]
        states = [self.embed(pixels)]
        for block in (*encoder.blocks, *self.rest):
            states.append((run or run_block)(block, states[-1], frames, self.attend))
        x = encoder.norm(states[len(encoder.blocks)])
        return encoder.select(x, slots=frames // encoder.config.tubelet)

    def embed(self, pixels: Tensor) -> Tensor:
        """``[B, F, 3, S, S]`` to the stream ``[B*T or B, prefix + patches, C]``."""
        encoder, config = self.encoder, self.encoder.config
        kernel = encoder.patch.weight.view(-1, 3, config.tubelet, config.patch, config.patch)
        pixels = pixels.to(kernel.dtype)
        if config.tubelet == 1:
            maps = F.conv2d(pixels.flatten(0, 1), kernel[:, :, 0], stride=config.patch)
        else:
            stride = (config.tubelet, config.patch, config.patch)
            maps = F.conv3d(pixels.transpose(1, 2), kernel, stride=stride)
        x = maps.flatten(2).transpose(1, 2) + encoder.position
        if encoder.prefix is not None:
            x = torch.cat([encoder.prefix.expand(len(x), -1, -1), x], 1)
        return encoder.embedding_norm(x)


def run_block(block: Block, x: Tensor, frames: int, attend: Callable[[Attention, Tensor], Tensor]) -> Tensor:
    """A block on ``x [B*T or B, tokens, C]``; LanguageBind transposes the stream to and fro, twice."""
    if block.window is not None:
        tokens = x.shape[1]
        x = in_slots(over_time(x, block.window) + block.temporal_embedding, tokens)
        normed = block.temporal_norm(over_time(x, block.window))
        x = x + in_slots(attend(block.temporal_attention, normed), tokens)
    branch = attend(block.attention, block.norm1(x))
    x = x + (branch if block.scale1 is None else branch * block.scale1)
    branch = block.mlp(block.norm2(x))
    return x + (branch if block.scale2 is None else branch * block.scale2)


def over_time(x: Tensor, window: int) -> Tensor:
    """``[B*T, N, C]`` to ``[B*T/w * N, w, C]``: a sequence of each token in each window."""
    return x.unflatten(0, (-1, window)).transpose(1, 2).reshape(-1, window, x.shape[2])


def in_slots(sequences: Tensor, tokens: int) -> Tensor:
    """``[B*T/w * N, w, C]`` back to ``[B*T, N, C]``."""
    return sequences.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1).contiguous()


def attend_by_products(layer: Attention, x: Tensor) -> Tensor:
    """Attention of ``x [R, N, C]`` with q, k, v made one by one and the N x N weights in memory."""
    layers = zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, *one).unflatten(2, (layer.heads, -1)).transpose(1, 2) for one in layers)
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(2, 3), -1)
    return layer.proj((weights @ v).transpose(1, 2).flatten(2))


def attend_packed(layer: Attention, x: Tensor) -> Tensor:
    """Attention of ``x [R, N, C]`` by PyTorch, from a packed linear layer."""
    return layer.proj(attend(layer.qkv(x), layer.heads))


def encode(encoders: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every encoder's tokens, one encoder after the other, in eager mode."""
    return [encoder(x) for encoder, x in zip(encoders, inputs, strict=True)]


def ask_each(model: Any, video: Any, prompts: Sequence[str], **kwargs: Any) -> list[str]:
    """Answers, with the video decoded and encoded anew for each question."""
    return [model.generate(video, prompt, **kwargs) for prompt in prompts]


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
    return in_slots(attend(over_time(qkv, window), heads), qkv.shape[1])


def temporal_stream(stream: Tensor, sequences: Tensor, heads: int) -> Tensor:
    """As LanguageBind does: the stream ``[B*T, N, C]`` is transposed, and q, k, v are made from that.

    ``sequences [B*T/w * N, w, 3*C]`` stands for those; the transpose of the stream is made for its time.
    """
    over_time(stream, sequences.shape[1])
    return in_slots(attend(sequences, heads), stream.shape[1])


def attend(sequences: Tensor, heads: int) -> Tensor:
    """``[R, w, 3*C]`` to ``[R, w, C]``."""
    q, k, v = sequences.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
