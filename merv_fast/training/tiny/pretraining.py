"""What each encoder learns by itself, before there is a language model: what, where, which way, and when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, mse_loss, pad

from merv_fast.encoders import VisionTransformer
from merv_fast.training.tiny.clips import FRAMES, GRID, SIDE, SLOTS, Clips, Truth, batches
from merv_fast.training.tiny.learning import Learner
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, SHAPES

__all__ = ["OBJECTIVES", "Heads", "pixels_of", "pretrain", "see"]

CLASSES = {"colour": 7, "shape": 7, "points": 5, "moves": 6, "speed": 3, "appears": SLOTS + 1, "vanishes": SLOTS + 2}
"""Classes of each field of `Truth`, 0 of which is the background."""


@dataclass(frozen=True)
class Objective:
    """What an encoder is to tell.

    Args:
        patches: fields of `Truth` that are told of every patch.
        outline: whether which pixels around a patch are of the same thing, every other one of three patches' width.
        ahead: the same of the slot after: where the thing will be.
        flow: whether how the picture moves at each patch, and which camera's doing that is.
        place: whether where each thing's centre is, and which patch holds it.
        counts: whether how many things of each colour and shape a slot shows, from the mean of its tokens.
    """

    patches: tuple[str, ...]
    outline: bool = False
    ahead: bool = False
    flow: bool = False
    place: bool = False
    counts: bool = False


OBJECTIVES = {
    "languagebind": Objective(("colour", "shape", "appears", "vanishes"), outline=True),
    "dinov2": Objective(("shape", "points"), outline=True, place=True),
    "vivit": Objective(("moves", "speed"), outline=True, ahead=True, flow=True),
    "siglip": Objective(("colour", "shape"), outline=True, counts=True),
}
"""By the encoder's name."""

MUON = 0.02
"""Muon's learning rate."""

OUTLINE = 3 * SIDE // GRID // 2

NOISE = 20.0
"""Square of the step from pixel to pixel that codecs leave in what is flat."""

SHARE = 0.25
"""Weight of a patch of background, of which there are about six for each other."""


class Heads(nn.Module):
    """Linear maps from an encoder's tokens to what it is to tell."""

    def __init__(self, width: int, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.patches = nn.ModuleDict({name: nn.Linear(width, CLASSES[name]) for name in objective.patches})
        self.outline = nn.Linear(width, OUTLINE**2) if objective.outline else None
        self.place = nn.Linear(width, 3) if objective.place else None
        self.counts = nn.Linear(width, len(COLOURS) + len(SHAPES)) if objective.counts else None
        self.ahead = nn.Linear(width, OUTLINE**2) if objective.ahead else None
        self.flow = nn.Linear(width, 2) if objective.flow else None
        self.camera = nn.Linear(width, len(CAMERAS)) if objective.flow else None

    def forward(
        self, tokens: Tensor, truth: Tensor, front: Tensor, flow: Tensor, camera: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, and how much is told rightly.

        Args:
            tokens: [B, T, N, C].
            truth: [B, fields, T, grid, grid].
            front: [B, T, side, side].
            flow: [B, T, N, 2], of `flows`.
            camera: [B].

        Returns:
            The sum of all losses; and of each field the share of right patches, of those where there is something.
        """
        fields = dict(zip(Truth._fields, truth.flatten(3).long().unbind(1), strict=True))
        there = fields["colour"] > 0
        weights = torch.where(there, 1.0, SHARE)
        weights = weights / weights.sum()
        loss, right = tokens.new_zeros(()), {}
        for name, head in self.patches.items():
            told = head(tokens)
            each = cross_entropy(told.flatten(0, 2), fields[name].flatten(), reduction="none")
            loss = loss + (each * weights.flatten()).sum()
            right[name] = told.argmax(-1).eq(fields[name])[there].float().mean().item()
        if self.outline is not None:
            told, true = self.outline(tokens)[there], outlines(front, fields["thing"])[there].float()
            loss = loss + 5 * binary_cross_entropy_with_logits(told, true)
            right["outline"] = (told > 0).eq(true > 0).float().mean().item()
        if self.ahead is not None:
            stays = there[:, :-1]
            told = self.ahead(tokens[:, :-1])[stays]
            true = outlines(front[:, 1:], fields["thing"][:, :-1])[stays].float()
            loss = loss + 5 * binary_cross_entropy_with_logits(told, true)
            right["ahead"] = (told > 0).eq(true > 0).float().mean().item()
        if self.place is not None:
            x, y, centre = self.place(tokens).unbind(-1)
            apart = (x - fields["x"] / 100).square() + (y - fields["y"] / 100).square()
            loss = loss + 10 * apart[there].mean()
            ties = binary_cross_entropy_with_logits(centre, fields["centre"].float(), reduction="none")
            loss = loss + (ties * weights).sum()
            right["place"] = apart[there].detach().sqrt().lt(0.05).float().mean().item()
        if self.counts is not None:
            slots = tokens.mean(2)
            held = fields["centre"].bool()
            counts = [(held & (fields["colour"] == number + 1)).sum(-1) for number in range(len(COLOURS))]
            counts += [(held & (fields["shape"] == number + 1)).sum(-1) for number in range(len(SHAPES))]
            true, told = torch.stack(counts, -1).float(), self.counts(slots)
            loss = loss + mse_loss(told, true)
            right["counts"] = told.round().eq(true).all(-1).float().mean().item()
        if self.flow is not None and self.camera is not None:
            loss = loss + 20 * mse_loss(self.flow(tokens), flow)
            told = self.camera(tokens.mean(2))
            loss = loss + cross_entropy(told.flatten(0, 1), camera.repeat_interleave(told.shape[1]))
            right["camera"] = told.mean(1).argmax(-1).eq(camera).float().mean().item()
            right["moving"] = told.mean(1).argmax(-1).eq(camera)[camera > 0].float().mean().item()
        return loss, right


def flows(frames: NDArray[np.uint8]) -> Tensor:
    """How the picture moves at each patch between the two frames of a slot: [B, T, N, 2] in pixels, x and y.

    By least squares over a patch of what its grey levels tell, each component by itself (Lucas and Kanade, 1981).
    """
    grey = torch.from_numpy(frames).float().mean(-1)
    first, second = grey[:, ::2], grey[:, 1::2]
    across, down = torch.gradient((first + second) / 2, dim=(3, 2))

    def mean(values: Tensor) -> Tensor:
        return avg_pool2d(values, SIDE // GRID).flatten(2)

    change, steep = second - first, mean(across.square() + down.square()) + NOISE
    return -torch.stack([mean(across * change) / steep, mean(down * change) / steep], -1)


def outlines(front: Tensor, thing: Tensor) -> Tensor:
    """Which pixels around a patch are of its thing: [B, T, patches, outline ** 2] from ``front`` [B, T, side, side]."""
    size = SIDE // GRID
    windows = pad(front, [size] * 4).unfold(2, 3 * size, size).unfold(3, 3 * size, size)[..., ::2, ::2]
    return windows.flatten(4).flatten(2, 3) == thing[..., None]


def pixels_of(frames: NDArray[np.uint8], encoder: VisionTransformer) -> Tensor:
    """An encoder's input [B, F, 3, S, S] of frames [B, F', S, S, 3], as `merv_fast.video.prepare` makes it."""
    config = encoder.config
    mean, std = torch.tensor(config.recipe.mean), torch.tensor(config.recipe.std)
    step = max(1, frames.shape[1] // config.num_frames)
    pixels = torch.from_numpy(np.ascontiguousarray(frames[:, ::step])).float() / 255
    return ((pixels - mean) / std).movedim(-1, 2)


def place_patches(encoder: VisionTransformer) -> None:
    """Start from positions that tell how far patches are from each other: sines of slot, row and column."""
    config = encoder.config
    rows, columns = config.patch_grid
    slots = len(encoder.position) // (rows * columns)
    axes = torch.meshgrid(*(torch.arange(size).float() for size in (slots, rows, columns)), indexing="ij")
    axes = axes if slots > 1 else axes[1:]
    each = config.width // len(axes) // 2
    speeds = torch.pi / 2 ** (torch.arange(each) * 4 / each)
    parts = [wave(axis.flatten()[:, None] * speeds) for axis in axes for wave in (torch.sin, torch.cos)]
    with torch.no_grad():
        encoder.position.copy_(pad(torch.cat(parts, 1), (0, config.width - 2 * each * len(axes))))


def pretrain(
    encoder: VisionTransformer,
    name: str,
    clips: Clips,
    epochs: int,
    batch: int = 8,
    rate: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train an encoder on its own objective.

    Args:
        encoder: to be trained.
        name: a key of ``OBJECTIVES``.
        clips: to train on.
        epochs: how often each clip is seen.
        batch: clips of a step; of what sees single frames so many times the slots, of each clip one frame.
        rate: AdamW's learning rate at its peak, for all but the matrices that `Muon` moves.
        seed: of the order of the clips.
        progress: whether to show a bar.

    Returns:
        Loss and shares of right patches, as of `Learner.log`.
    """
    from rich.progress import track

    torch.manual_seed(seed)
    place_patches(encoder)
    heads = Heads(encoder.config.width, OBJECTIVES[name])
    single = sees_frames(encoder)
    shown = moving(clips) if OBJECTIVES[name].flow else np.arange(len(clips.frames))
    size = SLOTS * batch if single else batch
    steps = epochs * (len(shown) // size)
    matrices = [parameter for parameter in encoder.blocks.parameters() if parameter.ndim == 2]
    inside = set(matrices)
    rest = [each for each in (*encoder.parameters(), *heads.parameters()) if each not in inside]
    learner = Learner(name, matrices, rest, steps, (MUON, rate), rising=0.1, falling=0.6)
    encoder.train()
    for chosen in track(batches(len(shown), size, epochs, seed), name, total=steps, disable=not progress):
        chosen = np.sort(shown[chosen])
        frames, truth, front = clips.frames[chosen], clips.truth[chosen], clips.front[chosen]
        if single:
            rows, slots = np.arange(size), torch.randint(SLOTS, [size]).numpy()
            frames, truth = frames[rows, slots * (FRAMES // SLOTS), None], truth[rows, :, slots, None]
            front = front[rows, slots, None]
        tokens = encoder(pixels_of(frames, encoder))
        there, camera = (torch.from_numpy(each) for each in (truth, clips.camera[chosen]))
        flow = flows(frames) if OBJECTIVES[name].flow else tokens
        loss, right = heads(tokens, there, torch.from_numpy(front), flow, camera)
        learner.learn(loss, **right)
    encoder.eval()
    return learner.log


@torch.no_grad()
def see(
    encoder: VisionTransformer, name: str, clips: Clips, batch: int = 16, progress: bool = True
) -> NDArray[np.float16]:
    """What an encoder returns for all clips: [N, T, N_e, C]."""
    from rich.progress import track

    count, config = len(clips.frames), encoder.config
    seen = np.empty((count, config.slots, config.tokens_per_slot, config.width), np.float16)
    for start in track(range(0, count, batch), f"{name} sees", disable=not progress):
        seen[start : start + batch] = encoder(pixels_of(clips.frames[start : start + batch], encoder)).numpy()
    return seen


def moving(clips: Clips) -> NDArray[np.int64]:
    """Places of the clips in which things or the camera move, as a rule."""
    return np.array([place for place, scene in enumerate(clips.scenes) if scene.theme in ("motion", "camera")])


def sees_frames(encoder: VisionTransformer) -> bool:
    """Whether an encoder's frames do not look at each other: then one of a clip teaches as much as all."""
    return encoder.config.attention == "frame" and encoder.config.temporal_window is None
