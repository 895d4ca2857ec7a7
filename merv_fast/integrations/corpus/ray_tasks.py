"""What Ray's tasks do, without the weight of models: decode videos, and write encoded ones to shards."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from safetensors.torch import load
from torch import Tensor

from merv_fast.integrations.corpus.folder import write_rows
from merv_fast.integrations.corpus.items import Item
from merv_fast.integrations.corpus.optional import require
from merv_fast.integrations.corpus.rows import Row
from merv_fast.video.loader import VideoLoader, decode_clip
from merv_fast.video.pyav import share_processors

__all__ = ["decode_videos", "write_shards"]


def decode_videos(batch: Any, count: int, clip: dict[str, Any]) -> Iterator[Any]:
    """From items to tables of one row: the item, and its frames or the reason why there are none.

    A process of its own decodes, so that a video which makes it crash or hang is a reason as well.

    Args:
        batch: a table with items as JSON in ``item``.
        count: frames of each.
        clip: arguments of ``load_frames`` that say which part of a video.
    """
    pa = require("pyarrow", "ray")
    items = [Item(**json.loads(text)) for text in batch["item"].to_pylist()]
    # A task has one processor of its machine.
    decode = partial(decode_alone, count=count, processes=os.cpu_count() or 1, clip=clip)
    paths = [item.path for item in items]
    with without_main(), VideoLoader(paths, workers=1, ahead=1, decode=decode) as loader:
        for item, video in zip(items, loader, strict=True):
            shape = None if video.frames is None else list(video.frames.shape)
            columns = {
                "item": pa.array([json.dumps(asdict(item))]),
                "reason": pa.array([video.error and video.error.reason], pa.string()),
                "shape": pa.array([shape], pa.list_(pa.int64())),
                "frames": binary(video.frames),
            }
            yield pa.table(columns)


@contextmanager
def without_main() -> Iterator[None]:
    """Keep processes that are started from importing this one's program, Ray's, which takes longer than to decode."""
    main = vars(sys.modules["__main__"])
    path = main.pop("__file__", None)
    try:
        yield
    finally:
        if path is not None:
            main["__file__"] = path


def decode_alone(path: str, count: int, processes: int, clip: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """As ``VideoLoader`` does it, with one processor's share among ``processes``."""
    share_processors(processes)
    return decode_clip(path, count, **clip)


def binary(frames: Tensor | None) -> Any:
    """A column of one value, the bytes of contiguous frames, which are not copied and may be more than 2 GiB."""
    pa = require("pyarrow", "ray")
    if frames is None:
        return pa.array([None], pa.large_binary())
    offsets = pa.array([0, frames.nbytes], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(frames.numpy())])


def write_shards(batch: Any, folder: str) -> Any:
    """From rows with their tensors, as bytes of a safetensors file, to rows that say in which shard those are now."""
    pa = require("pyarrow", "ray")
    rows = [Row.from_json(text) for text in batch["row"].to_pylist()]
    tensors = [{} if data.as_py() is None else load(data.as_py()) for data in batch["tensors"]]
    written = write_rows(folder, list(zip(rows, tensors, strict=True)))
    return pa.table({"row": pa.array([row.to_json() for row in written], pa.string())})
