"""Hiera, a video encoder: its configurations, the module, the conversion of the original's checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merv_fast.encoders.hiera_blocks import MASK_UNIT, POOLINGS, Block, to_mask_units
from merv_fast.errors import CheckpointError
from merv_fast.video.prepare import Recipe

__all__ = ["HIERA_ENCODERS", "Hiera", "HieraConfig", "convert_hiera", "hiera_config"]

VIEW_FRAMES = 16
PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING = (3, 7, 7), (2, 4, 4), (1, 3, 3)
VIEW_SLOTS = VIEW_FRAMES // PATCH_STRIDE[0]

SIZES: dict[str, dict[str, Any]] = {
    "base": {"embed_width": 96, "heads": 1, "stages": (2, 3, 16, 3)},
    "base_plus": {"embed_width": 112, "heads": 2, "stages": (2, 3, 16, 3)},
    "large": {"embed_width": 144, "heads": 2, "stages": (2, 6, 36, 4)},
}

HIERA_ENCODERS: dict[str, tuple[str, str]] = {
    "hiera-base-video": ("base", "facebook/hiera_base_16x224.mae_k400_ft_k400"),
    "hiera-base-video-noft": ("base", "facebook/hiera_base_16x224.mae_k400"),
    "hiera-base-plus-video": ("base_plus", "facebook/hiera_base_plus_16x224.mae_k400_ft_k400"),
    "hiera-base-plus-video-noft": ("base_plus", "facebook/hiera_base_plus_16x224.mae_k400"),
    "hiera-large-video": ("large", "facebook/hiera_large_16x224.mae_k400_ft_k400"),
    "hiera-large-video-noft": ("large", "facebook/hiera_large_16x224.mae_k400"),
}
"""Encoder id -> (size, repository of the weights on the hub)."""

# The classifier and the decoder of masked pre-training; the features are taken before the final norm.
UNUSED_KEYS = (
    "norm.",
    "head.",
    "encoder_norm.",
    "decoder_",
    "mask_token",
    "multi_scale_fusion_heads.",
)


@dataclass(frozen=True)
class HieraConfig:
    """Shape of one Hiera video encoder; ``dataclasses.asdict`` makes it JSON.

    Args:
        name: the encoder's id.
        source: repository of its weights on the hub.
        num_frames: frames a video, a multiple of 16; each 16 consecutive ones are an independent view.
        image_size: side of the frames in pixels, a multiple of 32.
        embed_width: width of the first stage; each of the later three stages doubles it.
        heads: heads of the first stage; they double with the width.
        stages: blocks in each of the four stages.
        recipe: how frames become pixels.

    Raises:
        ValueError: a field breaks one of these rules.
    """

    name: str
    source: str
    num_frames: int
    image_size: int
    embed_width: int
    heads: int
    stages: tuple[int, ...]
    recipe: Recipe

    def __post_init__(self) -> None:
        self.check_frames(self.num_frames)
        unit = MASK_UNIT * PATCH_STRIDE[1]
        if self.image_size < unit or self.image_size % unit:
            raise ValueError(f"hiera: image_size must be a positive multiple of {unit}, got {self.image_size}")
        if len(self.stages) != POOLINGS + 1 or min(self.stages) < 1:
            raise ValueError(f"hiera: stages must be {POOLINGS + 1} positive block counts, got {self.stages}")
        if self.heads < 1 or self.embed_width % self.heads:
            raise ValueError(f"hiera: heads must divide embed_width ({self.embed_width}), got {self.heads}")

    def check_frames(self, frames: int) -> None:
        """Raise ``ValueError`` unless a video of so many frames can be encoded."""
        if frames < VIEW_FRAMES or frames % VIEW_FRAMES:
            raise ValueError(f"{self.name}: frames must be a positive multiple of {VIEW_FRAMES}, got {frames}")

    @property
    def family(self) -> str:
        """Whose naming its checkpoints follow."""
        return "hiera"

    @property
    def files(self) -> tuple[str, ...]:
        """File of the repository that holds the weights."""
        return ("model.safetensors",)

    @property
    def width(self) -> int:
        """Channels of a returned token."""
        return self.embed_width * 2**POOLINGS

    @property
    def slots(self) -> int:
        """Temporal slots that are returned for ``num_frames`` frames, two frames each."""
        return self.num_frames // PATCH_STRIDE[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a slot's tokens."""
        side = self.image_size // (MASK_UNIT * PATCH_STRIDE[1])
        return side, side

    @property
    def tokens_per_slot(self) -> int:
        """Tokens of one slot."""
        return self.grid[0] * self.grid[1]


def hiera_config(encoder_id: str, num_frames: int, resize: str = "resize-naive") -> HieraConfig:
    """Configuration of one of ``HIERA_ENCODERS`` for ``num_frames`` frames and a resize strategy.

    Raises:
        ValueError: the id is unknown or ``num_frames`` is not a multiple of 16.
    """
    if encoder_id not in HIERA_ENCODERS:
        raise ValueError(f"hiera: encoder_id must be one of {list(HIERA_ENCODERS)}, got {encoder_id!r}")
    size, source = HIERA_ENCODERS[encoder_id]
    recipe = Recipe(
        size=224,
        short_side=256,
        resize=resize,
        method="bilinear",
        antialias=True,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
    )
    return HieraConfig(
        name=encoder_id,
        source=source,
        num_frames=num_frames,
        image_size=224,
        recipe=recipe,
        **SIZES[size],
    )


class Hiera(nn.Module):
    """Hiera up to its last block, without the final norm and the classifier.

    Three poolings leave one token a mask unit, so the units' (slot, row, column) order is that of the output.
    Parameter names are the original's (facebookresearch/hiera).

    Source: Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles",
    arXiv 2306.00989.
    """

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.embed_width, config.heads
        side = config.image_size // PATCH_STRIDE[1]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING)})
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, side * side, width))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, VIEW_SLOTS, width))
        blocks = []
        for stage, depth in enumerate(config.stages):
            for index in range(depth):
                pools = stage > 0 and index == 0
                # A block that pools still attends over the scope of the stage it leaves.
                blocks.append(Block(width, heads, pools, whole_view=stage - pools >= 2))
                width, heads = blocks[-1].width, blocks[-1].heads
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features after the last block.

        Args:
            pixels: ``[B, F, 3, S, S]``, F a multiple of 16; cast to the dtype of the weights.

        Returns:
            ``[B, F/2, (S/32)^2, width]``, tokens of a slot row by row.

        Raises:
            ValueError: the shape or the number of frames is not what the configuration takes.
        """
        config = self.config
        if pixels.dim() != 5 or pixels.shape[2:] != (3, config.image_size, config.image_size):
            rule = f"[B, F, 3, {config.image_size}, {config.image_size}]"
            raise ValueError(f"{config.name}: pixels must be {rule}, got {list(pixels.shape)}")
        videos, frames = pixels.shape[:2]
        config.check_frames(frames)
        views = pixels.to(self.pos_embed_spatial.dtype).unflatten(1, (frames // VIEW_FRAMES, VIEW_FRAMES))
        x = self.patch_embed["proj"](views.flatten(0, 1).transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        x = x + (self.pos_embed_spatial.unsqueeze(1) + self.pos_embed_temporal.unsqueeze(2))
        x = to_mask_units(x, config.grid)
        for block in self.blocks:
            x = block(x)
        return x.reshape(videos, frames // PATCH_STRIDE[0], config.tokens_per_slot, config.width)


def convert_hiera(config: HieraConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of ``Hiera(config)`` from a state dict of the original, fine-tuned or masked pre-trained.

    The names are the original's; its classifier, final norm and pre-training decoder are dropped.

    Raises:
        CheckpointError: keys are unknown, missing or misshapen; the message lists them.
    """
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in Hiera(config).state_dict().items()}
    kept = {key: value for key, value in tensors.items() if not key.startswith(UNUSED_KEYS)}
    misshapen = [
        f"{key} {list(value.shape)} for {list(expected[key])}"
        for key, value in kept.items()
        if key in expected and tuple(value.shape) != expected[key]
    ]
    problems = {
        "unknown": sorted(kept.keys() - expected.keys()),
        "missing": sorted(expected.keys() - kept.keys()),
        "misshapen": sorted(misshapen),
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"convert_hiera: checkpoint must match {config.name}, got {listed}")
    return kept
