"""encode_corpus: all the videos of a corpus that are not encoded yet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import get_args

import torch

from merv_fast.integrations.corpus.encoder import Encoder, Keep, ModelSource, settings_of
from merv_fast.integrations.corpus.folder import CorpusFolder
from merv_fast.integrations.corpus.items import Item, find_items
from merv_fast.integrations.corpus.job import Job
from merv_fast.integrations.corpus.local import encode_locally
from merv_fast.integrations.corpus.optional import require
from merv_fast.integrations.corpus.rows import Row
from merv_fast.runtime.environment import default_device, default_dtype
from merv_fast.video.sampling import clip_bounds

__all__ = ["Outcome", "Progress", "encode_corpus"]

Progress = Callable[[int, int, int], None]
"""Called with how many videos there are to encode, how many of them are encoded by now, and how many have failed."""


@dataclass(frozen=True)
class Outcome:
    """What a run has done.

    Args:
        encoded: videos that it encoded.
        failed: videos that it could not decode; the manifest says why.
        already: videos that were encoded before.
        failed_before: videos that were not tried, for they had failed before.
        folder: where all of it is.
    """

    encoded: int
    failed: int
    already: int
    failed_before: int
    folder: str


def encode_corpus(
    videos: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "merv-tiny",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    llm_path: str | os.PathLike[str] | None = None,
    encoder_paths: Mapping[str, str | os.PathLike[str]] | None = None,
    keep: Keep = "tokens",
    clip_start_sec: float = 0.0,
    clip_end_sec: float | None = None,
    batch_size: int = 8,
    shard_size: int = 64,
    workers: int | None = None,
    retry_failed: bool = False,
    engine: str = "local",
    address: str | None = None,
    actors: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Encode videos into a folder that `EncodedCorpus` reads, each once, however often it is stopped and called again.

    A video that is in the folder is left alone, unless its file has another size or time of writing: it is then encoded
    again. One that cannot be decoded is a row of the manifest with the reason, and is tried again once its file has
    changed, or with ``retry_failed``. Frames are decoded by PyAV, on the CPU.

    Args:
        videos: paths of videos as ``load_frames`` takes them; folders are searched, as `find_items` says.
        out: the folder, made if need be. On a cluster all machines must see it, and the videos, under these paths.
        model: as ``load_vid`` takes it, like ``llm_path`` and ``encoder_paths``.
        device: where to encode; the first GPU if there is one, else the CPU, if not given. With Ray a type of device.
        dtype: of weights and tensors; bfloat16 on a GPU and float32 on a CPU if not given.
        llm_path: see there.
        encoder_paths: see there.
        keep: ``tokens``, what the language model sees, or ``features``, what the encoders return: about three times as
            much, from which projectors and fusion can be trained.
        clip_start_sec: start of the clip of each video, in seconds.
        clip_end_sec: its end; the video's if not given.
        batch_size: videos that are encoded together.
        shard_size: videos of a file of tensors, and most of them that are encoded again after a kill.
        workers: processes that decode, as ``VideoLoader`` takes it; one for each processor, 16 at most, if not given.
            With Ray: tasks that decode at the same time; as many as the cluster has room for, if not given.
        retry_failed: whether to try again what has failed before.
        engine: ``local``, or ``ray`` for Ray Data.
        address: of a Ray cluster; if not given the one that this process is connected to, else that of the environment
            variable ``RAY_ADDRESS``, else a new one on this machine for as long as it takes.
        actors: processes that encode, with Ray; one for each GPU of the cluster, or one on CPUs, if not given.
        progress: called whenever some more are done.

    Raises:
        ValueError: an argument is out of its range, or ``out`` was made with other settings; says which.
        RuntimeError: another process writes to ``out``, or a worker failed in a way that trying again did not mend.
        ImportError: pyarrow, or Ray where it is asked for, is not installed.

    >>> import merv_fast, tempfile
    >>> from merv_fast.integrations.corpus import EncodedCorpus, encode_corpus
    >>> with tempfile.TemporaryDirectory() as out:
    ...     done = encode_corpus([merv_fast.sample_clip(), "missing.mp4"], out, device="cpu", workers=1)
    ...     corpus = EncodedCorpus(out)
    ...     print(done.encoded, list(corpus[merv_fast.sample_clip()].tokens.shape), corpus.failed)
    1 [128, 160] {'missing.mp4': 'does not exist'}
    """
    check_arguments(keep, engine, batch_size=batch_size, shard_size=shard_size, actors=actors)
    require("pyarrow", "corpus")
    items = find_items(videos)
    clip = dict(zip(("clip_start_sec", "clip_end_sec"), clip_bounds(clip_start_sec, clip_end_sec), strict=True))
    paths = {key: str(path) for key, path in (encoder_paths or {}).items()}
    with ExitStack() as stack:
        folder = stack.enter_context(CorpusFolder(out))
        if engine == "ray":
            from merv_fast.integrations.corpus.ray_data import connected, encode_on_ray

            found = stack.enter_context(connected(address))
            device = torch.device(device).type if device else found
        device = device or str(default_device())
        dtype = dtype or default_dtype(torch.device(device))
        source = ModelSource(str(model), device, dtype, None if llm_path is None else str(llm_path), paths).absolute()
        # With Ray this process only needs to know the weights; it may have no GPU.
        video_model = source.load("cpu" if engine == "ray" else device)
        settings = settings_of(video_model, keep, clip, device)
        folder.agree(settings)
        waiting = [item for item in items if is_waiting(item, folder.rows.get(item.id), retry_failed)]
        job = Job(os.path.abspath(out), settings, source, keep, clip, batch_size, shard_size, workers, actors)
        seen: Counter[str] = Counter()

        def report(rows: Sequence[Row]) -> None:
            seen.update(row.status for row in rows)
            if progress is not None:
                progress(len(waiting), seen["ok"], seen["failed"])

        if waiting and engine == "ray":
            del video_model
            encode_on_ray(job, waiting, folder.commit, report)
        elif waiting:
            encode_locally(job, waiting, Encoder(video_model, keep), folder.commit, report)
        folder.finish()
        tried = {item.id for item in waiting}
        counts = Counter(folder.rows[key].status for key in tried)
        skipped = Counter(folder.rows[item.id].status for item in items if item.id not in tried)
    return Outcome(counts["ok"], counts["failed"], skipped["ok"], skipped["failed"], os.fspath(out))


def check_arguments(keep: str, engine: str, **counts: int | None) -> None:
    """Raise ValueError for what is out of its range."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"encode: {name} must be at least 1, got {value}")
    for name, choice, known in (("keep", keep, get_args(Keep)), ("engine", engine, ("local", "ray"))):
        if choice not in known:
            raise ValueError(f"encode: {name} must be one of {', '.join(known)}, got {choice!r}")


def is_waiting(item: Item, row: Row | None, retry_failed: bool) -> bool:
    """Whether an item is to be encoded, given its row if it has one."""
    return row is None or not row.same_file(item) or (retry_failed and row.status == "failed")
