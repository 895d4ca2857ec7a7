"""From samples to a batch that ``MervForConditionalGeneration.forward`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merv_fast.models.splice import IGNORE_INDEX, pad
from merv_fast.models.video_model import MervVideoModel
from merv_fast.training.dataset import Sample

__all__ = ["SKIPPED", "Collator"]

SKIPPED = "skipped"
"""Key of a batch under which it says which entries could not be read, and why; no argument of a model."""


@dataclass
class Collator:
    """Rows padded on the right, places for visual tokens after the BOS, and what the encoders are to see.

    A row of text alone has no such places. A batch of such rows gets one more: a black video, without text and all its
    labels -100. It adds nothing to the loss, and gradients of zero; but with it projectors and fusion run in every
    batch on every rank, which have to meet in the collectives of their gradients. The reference runs no encoder then,
    and so relies on a sampler that gives all ranks text at the same time.

    Args:
        video_tokens: visual tokens of a video.
        video_token_id: id of a placeholder.
        pad_token_id: id of what fills a row.
        bos_token_id: the tokenizer's, None where it has none.
        frames: shape of the black video [F, 3, S, S].
        features: shapes [T_e, N_e, C_e] of its features, where batches hold features instead of frames.
    """

    video_tokens: int
    video_token_id: int
    pad_token_id: int
    bos_token_id: int | None
    frames: tuple[int, ...]
    features: Sequence[tuple[int, ...]] | None = None

    @classmethod
    def of(cls, model: MervVideoModel, tokenizer: Any, with_features: bool = False) -> Collator:
        """The collator of a model and its tokenizer."""
        configs = model.encoder_configs.values()
        side = max(config.recipe.size for config in configs)
        shapes = [(config.slots, config.tokens_per_slot, config.width) for config in configs]
        return cls(
            model.num_video_tokens,
            model.config.video_token_id,
            tokenizer.pad_token_id,
            tokenizer.bos_token_id,
            (max(model.config.num_frames), 3, side, side),
            shapes if with_features else None,
        )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` [B, S]; ``pixel_values_videos``, uint8 [V, F, 3, H, W] or,
            where sizes differ, V tensors; or ``mm_encoder_outputs`` with ``features``, E tensors [V, T_e, N_e, C_e];
            and `SKIPPED`, a list of reasons.
        """
        rows = [self._row(sample) for sample in samples]
        frames = [sample.frames for sample in samples if sample.frames is not None]
        features = [sample.features for sample in samples if sample.features is not None]
        if not frames and not features:
            rows.append(self._black_row())
            if self.features is None:
                frames = [torch.zeros(self.frames, dtype=torch.uint8)]
            else:
                features = [[torch.zeros(shape) for shape in self.features]]
        input_ids, attention_mask = pad([ids for ids, _ in rows], self.pad_token_id, side="right")
        labels, _ = pad([labels for _, labels in rows], IGNORE_INDEX, side="right")
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if frames:
            batch["pixel_values_videos"] = stacked(frames)
        else:
            batch["mm_encoder_outputs"] = {"features": [torch.stack(each) for each in zip(*features, strict=True)]}
        batch[SKIPPED] = [reason for sample in samples for reason in sample.skipped]
        return batch

    def _row(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels [S], with places for the visual tokens where there is a video."""
        ids, labels = sample.tokens
        if sample.frames is None and sample.features is None:
            return ids, labels
        # Not every tokenizer that has a BOS begins a text with it.
        at = int(self.bos_token_id is not None and ids[0] == self.bos_token_id)
        places, ignored = [self.video_token_id] * self.video_tokens, [IGNORE_INDEX] * self.video_tokens
        return ids[:at] + places + ids[at:], labels[:at] + ignored + labels[at:]

    def _black_row(self) -> tuple[list[int], list[int]]:
        ids = [self.video_token_id] * self.video_tokens
        return ids, [IGNORE_INDEX] * self.video_tokens


def stacked(videos: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor of videos of the same size, else a list of them."""
    return torch.stack(list(videos)) if len({video.shape for video in videos}) == 1 else list(videos)
