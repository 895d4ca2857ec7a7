"""From videos to visual tokens: decoded, prepared, encoded and fused, or found in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merv_fast.models.identity import VideoKeys
from merv_fast.models.requests import Source, VisualTokens
from merv_fast.models.video_model import MervVideoModel, MervVideoOutput
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.memory import Tensors
from merv_fast.runtime.trace import StageTimer, span
from merv_fast.video import load_frames
from merv_fast.video.base import Video
from merv_fast.video.open import clip_indices

__all__ = ["VideoEncoding"]


class VideoEncoding:
    """How the videos of one call are encoded.

    Args:
        model: what encodes.
        clip: arguments of ``load_frames`` that say which part of a video.
        decoder: as ``load_frames`` takes it.
        cache: where results are looked for and kept, or None.
        opened: gives the one video that will be read, opened; None to open each path.
    """

    def __init__(
        self,
        model: MervVideoModel,
        clip: dict[str, Any],
        decoder: str,
        cache: VideoCache | None,
        opened: Callable[[], Video] | None = None,
    ) -> None:
        self.model, self.clip, self.decoder, self.cache, self.opened = model, clip, decoder, cache, opened
        self.count = max(model.config.num_frames)

    def encode(self, sources: Sequence[Source], timer: StageTimer) -> list[VisualTokens]:
        """Visual tokens of several videos, all those that are not kept in one batch.

        With a cache the stage ``cache`` is the time for digests, reading, writing, and waiting for other threads.
        """
        stages = [] if self.cache is None else ["cache"]
        stages += ["decode", "prepare", "encode", "fuse"]
        timer.milliseconds |= {name: 0.0 for name in stages if name not in timer.milliseconds}
        if not sources:
            return []

        def features(sources: Sequence[Source]) -> list[Tensors]:
            return by_video(dict(zip(self.model.encoders, self._features(sources, timer), strict=True)))

        tokens = partial(self._tokens, timer=timer)
        if self.cache is not None and self.cache.keep == "features":
            kept = self._through_cache(self.cache, sources, features, timer)
            batch = [torch.stack([row[name] for row in kept]).to(self.model.device) for name in self.model.encoders]
            entries = self._fuse(batch, timer)
        elif self.cache is not None:
            entries = self._through_cache(self.cache, sources, tokens, timer)
        else:
            entries = tokens(sources)
        return [self._visual_tokens(entry) for entry in entries]

    def _through_cache(
        self,
        cache: VideoCache,
        sources: Sequence[Source],
        make: Callable[[Sequence[Source]], list[Tensors]],
        timer: StageTimer,
    ) -> list[Tensors]:
        """``make(sources)``, but for those which the cache has."""
        started, others = time.perf_counter(), sum(timer.milliseconds.values())
        keys = VideoKeys(self.model, cache, self.clip, self.decoder, self.count)
        named = [(keys.of(source), source) for source in sources]
        by_key = {key: source for key, source in named if key is not None}
        if None in dict(named):
            return make(sources)
        entries = cache.fetch(
            [key for key, _ in named if key is not None],
            lambda missing: make([by_key[key] for key in missing]),
            lambda key: keys.still(key, by_key[key]),
        )
        others = sum(timer.milliseconds.values()) - others
        timer.milliseconds["cache"] += (time.perf_counter() - started) * 1e3 - others
        return entries

    def _tokens(self, sources: Sequence[Source], timer: StageTimer) -> list[Tensors]:
        """As `_fuse` gives them. What one CUDA graph does counts as the stage ``encode``."""
        if len(sources) != 1 or self.model.graphs is None:
            return self._fuse(self._features(sources, timer), timer)
        frames, output = self._frames(sources[0], timer), None
        if frames is not None:
            with timer.stage("encode"):
                output = self.model.replay(frames.movedim(-1, 1)[None])
        if output is not None:
            return entries_of(output, 1)
        return self._fuse(self._encode([self._prepare(frames, timer)], timer), timer)

    def _features(self, sources: Sequence[Source], timer: StageTimer) -> list[Tensor]:
        """E tensors [B, T_e, N_e, C_e]."""
        if len(sources) == 1:
            return self._encode([self._prepare(self._frames(sources[0], timer), timer)], timer)
        with closing(self._decoded_ahead(sources, timer)) as decoded:
            inputs = [self._prepare(frames, timer) for frames in decoded]
        return self._encode(inputs, timer)

    def _decoded_ahead(self, sources: Sequence[Source], timer: StageTimer) -> Generator[Tensor | None]:
        """What `_decode` gives for each; a thread decodes the next while the caller prepares one.

        The stage ``decode`` is what the caller waits for. An error is raised in its turn.
        """
        device = self.model.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def decode(source: Source) -> Tensor | None:
            # Copies to a GPU are in order with what the caller does there.
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                return self._decode(source)

        thread = ThreadPoolExecutor(1, "merv-decode")
        try:
            ahead = thread.submit(decode, sources[0])
            for source in (*sources[1:], None):
                with timer.stage("decode"):
                    frames = ahead.result()
                ahead = thread.submit(decode, source)
                yield frames
        finally:
            thread.shutdown(cancel_futures=True)

    def _prepare(self, frames: Tensor | None, timer: StageTimer) -> list[Tensor]:
        """E tensors [1, F_e, 3, S_e, S_e]."""
        with timer.stage("prepare"):
            return self._zeros() if frames is None else self.model.prepare(frames.movedim(-1, 1)[None])

    def _encode(self, inputs: Sequence[Sequence[Tensor]], timer: StageTimer) -> list[Tensor]:
        with timer.stage("encode"):
            batch = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*inputs, strict=True)]
            return self.model.encode(batch)

    def _frames(self, source: Source, timer: StageTimer) -> Tensor | None:
        """uint8 [F, H, W, 3], as many as the encoder with most frames takes; None of no video."""
        with timer.stage("decode"):
            return self._decode(source)

    def _decode(self, source: Source) -> Tensor | None:
        if isinstance(source, Tensor):
            if source.dtype != torch.uint8 or source.ndim != 4 or len(source) != self.count or source.shape[3] != 3:
                got = f"{source.dtype} {list(source.shape)}"
                raise ValueError(f"generate: frames must be uint8 [{self.count}, H, W, 3], got {got}")
            return source
        if source is None:
            return None
        device = self.model.device if self.model.device.type == "cuda" else None
        if self.opened is None:
            return load_frames(source, self.count, decoder=self.decoder, device=device, **self.clip)
        video = self.opened()
        bounds = {name: value for name, value in self.clip.items() if name != "fps"}
        frames = video.frames_at(clip_indices(video, self.count, **bounds))
        if device is None:
            return frames
        with span("copy"):
            return frames.to(device, non_blocking=video.pinned)

    def _zeros(self) -> list[Tensor]:
        """What the reference feeds its encoders when there is no video."""
        device, dtype = self.model.device, self.model.dtype
        return [
            torch.zeros(1, config.num_frames, 3, config.recipe.size, config.recipe.size, device=device).to(dtype)
            for config in self.model.encoder_configs.values()
        ]

    def _fuse(self, features: Sequence[Tensor], timer: StageTimer) -> list[Tensors]:
        """The `entries_of` what features are fused to."""
        with timer.stage("fuse"):
            return entries_of(self.model.fuse(features), len(features[0]))

    def _visual_tokens(self, entry: Tensors) -> VisualTokens:
        weights = entry.get("encoder_weights")
        named = None if weights is None else dict(zip(self.model.encoders, weights.tolist(), strict=True))
        return VisualTokens(entry["tokens"].to(self.model.device), named)


def entries_of(output: MervVideoOutput, videos: int) -> list[Tensors]:
    """``tokens`` [S, D] of each video and, where the fusion has weights, ``encoder_weights`` [E], float32."""
    batch = {"tokens": output.pooler_output}
    if output.encoder_weights is not None:
        batch["encoder_weights"] = output.encoder_weights.float().expand(videos, -1)
    return by_video(batch)


def by_video(batch: Tensors) -> list[Tensors]:
    """The entries of a batch."""
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
