"""Encode a corpus on this machine: processes decode ahead, this one encodes and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import Tensor

from merv_fast.integrations.corpus.encoder import Encoder
from merv_fast.integrations.corpus.folder import write_rows
from merv_fast.integrations.corpus.items import Item
from merv_fast.integrations.corpus.job import Job
from merv_fast.integrations.corpus.rows import Row
from merv_fast.video.loader import VideoLoader

__all__ = ["encode_locally"]

MOST_WORKERS = 16
"""Processes that decode, if nobody says how many: each has the frames of up to three videos in memory."""

Use = Callable[[Sequence[Row]], object]


def encode_locally(job: Job, items: Sequence[Item], encoder: Encoder, commit: Use, report: Use) -> None:
    """Encode ``items``.

    Args:
        job: how.
        items: what.
        encoder: the loaded model.
        commit: called with the rows of each shard once it is written.
        report: called with rows as they are made.
    """
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if job.workers is None else job.workers
    writer = ShardWriter(job, commit, report)
    batch: list[tuple[Item, tuple[int, int], list[Tensor]]] = []

    def encode_batch() -> None:
        for (item, size, _), encoded in zip(batch, encoder.encode([inputs for *_, inputs in batch]), strict=True):
            writer.add(job.encoded(item, size, encoded), encoded.tensors)
        batch.clear()

    with VideoLoader([item.path for item in items], job.count, workers=workers, **job.clip) as loader:
        try:
            for item, video in zip(items, loader, strict=True):
                if video.frames is None:
                    writer.add(job.failed(item, video.error.reason if video.error else "has no frames"))
                    continue
                # What is prepared takes less memory than frames as they were filmed.
                height, width = video.frames.shape[1:3]
                batch.append((item, (height, width), encoder.prepare(video.frames)))
                if len(batch) == job.batch_size:
                    encode_batch()
            if batch:
                encode_batch()
        finally:
            # Also at Ctrl-C: what is encoded need not be encoded again.
            writer.flush()


class ShardWriter:
    """Collects videos until they fill a shard, writes it, and commits its rows with those of failed ones."""

    def __init__(self, job: Job, commit: Use, report: Use) -> None:
        self.job, self.commit, self.report = job, commit, report
        self._waiting: list[tuple[Row, dict[str, Tensor]]] = []

    def add(self, row: Row, tensors: dict[str, Tensor] | None = None) -> None:
        """Take a row, and the tensors of one that is ok."""
        self._waiting.append((row, tensors or {}))
        self.report([row])
        if len(self._waiting) >= self.job.shard_size:
            self.flush()

    def flush(self) -> None:
        """Put on the disk what has been collected."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self.commit(write_rows(self.job.folder, waiting))
