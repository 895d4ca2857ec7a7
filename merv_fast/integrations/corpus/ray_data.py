"""Encode a corpus on a Ray cluster: tasks on CPUs decode ahead of a pool of actors that encode, tasks write shards.

Ray Data moves the videos between the three. It starts tasks again whose process was killed, and no more of them than
the next step keeps up with and the memory for objects has room for. This process only commits what was written, so that
a shard which a task has written twice counts once.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from merv_fast.integrations.corpus.encoder import Encoder, settings_of
from merv_fast.integrations.corpus.items import Item
from merv_fast.integrations.corpus.job import Job
from merv_fast.integrations.corpus.optional import require
from merv_fast.integrations.corpus.ray_tasks import decode_videos, write_shards
from merv_fast.integrations.corpus.rows import Row

__all__ = ["connected", "encode_on_ray"]

MOST_VIDEOS = 32
"""Of a task that decodes: enough that its start does not count, few enough to decode again when it was killed."""

ROUNDS = 4
"""Tasks that decode for each processor, at least, so that all of them have work until the end."""

VIDEO_BYTES = 2**29
"""Of a machine's memory that a task which decodes is reckoned with: 32 frames of 1920 x 1080 take 199 MB, twice."""


@contextmanager
def connected(address: str | None) -> Iterator[str]:
    """A connection to a cluster, or to a new one on this machine; gives the type of device that it encodes on."""
    ray = require("ray", "ray")
    require("ray.data", "ray")
    # Ray itself refuses an address while it is connected.
    ours = address is not None or not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        # Nobody would see a dashboard; of a cluster that is there already Ray wants to hear nothing about it.
        new = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **new)
    try:
        yield "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    finally:
        if ours:
            ray.shutdown()


def encode_on_ray(
    job: Job,
    items: Sequence[Item],
    commit: Callable[[Sequence[Row]], Sequence[Row]],
    report: Callable[[Sequence[Row]], object],
) -> None:
    """Encode ``items``.

    Args:
        job: how.
        items: what.
        commit: called with the rows of shards once they are written; returns those that are new.
        report: called with those.

    Raises:
        RuntimeError: a worker raised.
    """
    ray, data = require("ray", "ray"), require("ray.data", "ray")
    resources = ray.cluster_resources()
    on_gpu = torch.device(job.source.device).type == "cuda"
    gpus = int(resources.get("GPU", 0)) if on_gpu else 0
    tasks = ROUNDS * max(1, int(resources.get("CPU", 1)))
    rows = [{"item": json.dumps(asdict(item) | {"path": os.path.abspath(item.path)})} for item in items]
    with quietly(data):
        videos = (
            data.from_items(rows, override_num_blocks=min(len(rows), max(tasks, -(-len(rows) // MOST_VIDEOS))))
            .map_batches(
                partial(decode_videos, count=job.count, clip=job.clip),
                batch_format="pyarrow",
                compute=data.TaskPoolStrategy(size=job.workers or None),
                # With other resources than encoding takes, Ray does not do both in the actor, one after the other.
                memory=VIDEO_BYTES,
            )
            .map_batches(
                EncodeVideos,
                fn_constructor_args=(job,),
                batch_size=job.batch_size,
                batch_format="pyarrow",
                # One is enough to begin with: the others' GPUs may be taken.
                compute=data.ActorPoolStrategy(min_size=1, max_size=job.actors or gpus or 1),
                num_gpus=1 if on_gpu else 0,
            )
            .map_batches(
                partial(write_shards, folder=job.folder),
                batch_size=job.shard_size,
                batch_format="pyarrow",
                num_cpus=0.25,
            )
        )
        try:
            for block in videos.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                report(commit([Row.from_json(text) for text in block["row"].to_pylist()]))
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"encode: a worker failed: {cause_of(error)}") from error


class EncodeVideos:
    """An actor: loads the model once, and encodes one batch after another.

    Raises:
        RuntimeError: its weights are not those that the run has begun with.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.encoder = Encoder(job.source.load(), job.keep)
        settings = settings_of(self.encoder.model, job.keep, job.clip, job.source.device)
        if differ := [name for name in settings if settings[name] != job.settings.get(name)]:
            raise RuntimeError(f"the model must be the same on all machines, but here differ: {', '.join(differ)}")

    def __call__(self, batch: Any) -> Any:
        """From decoded videos to rows without a shard, each with its tensors as bytes of a safetensors file."""
        pa = require("pyarrow", "ray")
        rows: list[Row] = []
        decoded: list[tuple[Item, tuple[int, int], list[Tensor]]] = []
        for values in zip(*(batch[name] for name in ("item", "reason", "shape", "frames")), strict=True):
            item, shape = Item(**json.loads(values[0].as_py())), values[2].as_py()
            if shape is None:
                rows.append(self.job.failed(item, values[1].as_py()))
                continue
            inputs = self.encoder.prepare(frames_in(values[3].as_buffer(), shape))
            decoded.append((item, (shape[1], shape[2]), inputs))
        encoded = self.encoder.encode([inputs for *_, inputs in decoded]) if decoded else []
        tensors = [None] * len(rows) + [save(one.tensors) for one in encoded]
        rows += [self.job.encoded(item, size, one) for (item, size, _), one in zip(decoded, encoded, strict=True)]
        texts = [row.to_json() for row in rows]
        return pa.table({"row": pa.array(texts, pa.string()), "tensors": pa.array(tensors, pa.large_binary())})


def frames_in(buffer: Any, shape: Sequence[int]) -> Tensor:
    """Frames in memory that is not ours to write to, without a copy."""
    with warnings.catch_warnings():
        # PyTorch knows no read-only tensors, and says so; nothing writes to this one.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(*shape)


def cause_of(error: BaseException) -> str:
    """The error that a worker raised, without the stack of a machine elsewhere."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


@contextmanager
def quietly(data: Any) -> Iterator[None]:
    """Without Ray's own bars and reports, of which ours take the place."""
    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars, context.print_on_execution_start = False, False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])
