"""VideoCache: what was computed of a video is computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, get_args

from merv_fast.runtime.cache.digests import FileDigests, WeightDigests
from merv_fast.runtime.cache.disk import DiskTier
from merv_fast.runtime.cache.memory import MemoryTier, Tensors

__all__ = ["CacheCounts", "VideoCache"]

Keep = Literal["tokens", "features"]


@dataclass(frozen=True)
class CacheCounts:
    """How often an entry was found (``hits``, of which ``from_disk``) and had to be made (``misses``)."""

    hits: int = 0
    from_disk: int = 0
    misses: int = 0


class VideoCache:
    """Encoded videos by content, in memory and, if there is a ``folder``, on disk; safe under threads and processes.

    Give one to ``MervModel.cache``; several models may share it. What comes out is, to the bit, what the first
    encoding gave. A key that one thread is computing is waited for by the others.

    Args:
        max_bytes: of tensors held in the CPU's memory; the least recently used leave first. A video takes 8.4 MB as
            visual tokens of merv-full in bfloat16, 26.4 MB as features.
        folder: where entries outlive the process, made if need be; None for nowhere.
        max_disk_bytes: of files in ``folder``, the least recently used leave first.
        keep: ``tokens`` keeps what the language model sees, and each encoder's weight. ``features`` keeps what the
            encoders return, three times as much: projectors and fusion run again, so entries outlive their training.

    Raises:
        ValueError: a limit is negative, ``keep`` is neither, or ``folder`` cannot be written to.

    >>> import merv_fast
    >>> from merv_fast.runtime.cache import VideoCache
    >>> vidlm = merv_fast.load_vid("merv-tiny")
    >>> vidlm.cache = VideoCache(max_bytes=2**28)
    >>> for _ in range(3):
    ...     _ = vidlm.encode(merv_fast.sample_clip())
    >>> vidlm.cache.counts
    CacheCounts(hits=2, from_disk=0, misses=1)
    """

    def __init__(
        self,
        max_bytes: int = 2**30,
        folder: str | os.PathLike[str] | None = None,
        max_disk_bytes: int = 2**36,
        keep: Keep = "tokens",
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_disk_bytes", max_disk_bytes)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"VideoCache: {name} must be an int of at least 0, got {value!r}")
        if keep not in get_args(Keep):
            raise ValueError(f"VideoCache: keep must be one of {', '.join(get_args(Keep))}, got {keep!r}")
        self.keep = keep
        self.memory = MemoryTier(max_bytes)
        self.disk = None if folder is None else DiskTier(folder, max_disk_bytes)
        self.files = FileDigests()
        self.weights = WeightDigests()
        self.counts = CacheCounts()
        self._settings = (max_bytes, folder, max_disk_bytes, keep)
        self._lock = Lock()
        self._under_way: dict[str, Future[Tensors]] = {}

    def __str__(self) -> str:
        counts, memory = self.counts, self.memory
        text = f"{counts.hits} hits ({counts.from_disk} from disk), {counts.misses} misses; "
        text += f"{len(memory)} in memory, {memory.nbytes / 1e6:.1f} of {memory.max_bytes / 1e6:.1f} MB"
        if self.disk is not None:
            text += f"; {self.disk.nbytes / 1e6:.1f} of {self.disk.max_bytes / 1e6:.1f} MB in {self.disk.folder}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this process or another, has the same settings and folder, and nothing in memory."""
        return type(self), self._settings

    def fetch(
        self,
        keys: Sequence[str],
        make: Callable[[list[str]], Sequence[Tensors]],
        valid: Callable[[str], bool] = lambda key: True,
    ) -> list[Tensors]:
        """The entries of ``keys``, on the CPU, the caller's own; those that are nowhere are made.

        Args:
            keys: SHA-256 in hexadecimal, of everything that decides the entry.
            make: from keys to their entries, called once, in this thread, with those that no other thread is making.
            valid: whether a key, after ``make``, still stands for what was made; else the entry is not kept.

        Raises:
            Exception: what ``make`` raises; other threads that wait for the same key then make it themselves.
        """
        found: dict[str, Tensors] = {}
        while wanted := [key for key in dict.fromkeys(keys) if key not in found]:
            mine, others = self._claim(wanted)
            # Our own before waiting, so that two threads never wait for each other.
            found |= self._serve(mine, make, valid)
            for key, future in others.items():
                if future.exception() is None:
                    found[key] = future.result()
                    self._count(hits=1)
        return [copied(found[key]) for key in keys]

    def clear(self) -> None:
        """Forget what is in memory and set the counts to zero; files stay."""
        self.memory.clear()
        with self._lock:
            self.counts = CacheCounts()

    def _claim(self, keys: Sequence[str]) -> tuple[list[str], dict[str, Future[Tensors]]]:
        """Keys that are now this thread's to serve, and the results that other threads owe."""
        with self._lock:
            others = {key: self._under_way[key] for key in keys if key in self._under_way}
            mine = [key for key in keys if key not in others]
            self._under_way |= {key: Future() for key in mine}
        return mine, others

    def _serve(
        self, keys: list[str], make: Callable[[list[str]], Sequence[Tensors]], valid: Callable[[str], bool]
    ) -> dict[str, Tensors]:
        """Find or make the entries of claimed keys, keep them, and hand them to the threads that wait for them."""
        shared: dict[str, Tensors] = {}
        try:
            shared |= {key: entry for key in keys if (entry := self._look_up(key)) is not None}
            if not (missing := [key for key in keys if key not in shared]):
                return dict(shared)
            made = {key: on_cpu(entry) for key, entry in zip(missing, make(missing), strict=True)}
            self._count(misses=len(made))
            for key in filter(valid, missing):
                self.memory.put(key, made[key])
                if self.disk is not None:
                    self.disk.put(key, made[key])
                shared[key] = made[key]
            return shared | made
        finally:
            for key in keys:
                with self._lock:
                    future = self._under_way.pop(key)
                if key in shared:
                    future.set_result(shared[key])
                else:
                    future.set_exception(RuntimeError("not made"))

    def _look_up(self, key: str) -> Tensors | None:
        if (entry := self.memory.get(key)) is not None:
            self._count(hits=1)
        elif self.disk is not None and (entry := self.disk.get(key)) is not None:
            self.memory.put(key, entry)
            self._count(hits=1, from_disk=1)
        return entry

    def _count(self, hits: int = 0, from_disk: int = 0, misses: int = 0) -> None:
        with self._lock:
            now = self.counts
            self.counts = CacheCounts(now.hits + hits, now.from_disk + from_disk, now.misses + misses)


def on_cpu(tensors: Tensors) -> Tensors:
    """A copy that holds no more memory than its own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def copied(tensors: Tensors) -> Tensors:
    """A copy that may be written to."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
