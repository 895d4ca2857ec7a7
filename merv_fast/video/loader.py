"""Decode many videos ahead of the model, in worker processes that may hang or crash without ending the run."""

import contextlib
import math
import mmap
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, reduction
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

import merv_fast.video.pyav
from merv_fast.errors import VideoError
from merv_fast.video.open import clip_indices, open_video
from merv_fast.video.progress import show_progress_in, tick

__all__ = ["VideoItem", "VideoLoader"]

Decode = Callable[[str], tuple[Tensor, list[int]]]
"""From a path to its frames and their numbers in the video."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class VideoItem:
    """What became of one path.

    Attributes:
        path: As it was given.
        frames: uint8 [F, H, W, 3], RGB, on the CPU; None if there was an error.
        indices: The frames' numbers in the video.
        error: Why there are no frames, or None.
    """

    path: str
    frames: Tensor | None
    indices: list[int]
    error: VideoError | None = None


class VideoLoader:
    """Videos in the order of their paths, decoded ahead by worker processes while the caller uses the last one.

    A file that cannot be decoded is an item with an error; so is one whose decoding makes no progress for ``timeout``
    seconds or crashes its process, which is then replaced. Frames cross between processes in shared memory that has no
    name, so nothing is left behind however a process ends. Ending the loop early, by ``break`` or by an exception such
    as Ctrl-C, stops the workers, and so does `close`; use the loader in a ``with`` statement to be sure of the moment.

    As with everything that starts processes, a script must do its work under ``if __name__ == "__main__":``. Workers
    need POSIX, for they hand over open files.

    Args:
        paths: Videos as `open_video` takes them. Each ``for`` loop goes through all of them.
        count: Frames of each, by the rule of `sample_indices`.
        workers: Processes that decode; they share the machine's processors. 0 decodes in the caller, one video at a
            time, when it is asked for; nothing then guards against a hang or a crash.
        ahead: Videos that may be decoded or in decoding beyond the one the caller has; all their frames are in memory.
            Two for each worker if not given.
        timeout: Seconds without a newly read packet or frame after which a video is given up.
        progress: Whether to show a bar on stderr.
        decode: Instead of the default, which reads frames of the clip: from a path to frames uint8 [F, H, W, 3] and
            their indices. It must be picklable, should raise `VideoError`, and may call `merv_fast.video.progress.tick`
            to say that it has not hung.
        clip: ``clip_start_sec``, ``clip_end_sec``, ``end_frame``, ``fps``, ``limits``, ``strict`` as in `load_frames`.

    Raises:
        ValueError: An argument is out of its range.
        RuntimeError: In the loop: a worker process cannot be started.

    >>> import merv_fast
    >>> for item in VideoLoader([merv_fast.sample_clip(), "missing.mp4"], count=8, workers=0):
    ...     print(item.error or tuple(item.frames.shape))
    (8, 240, 320, 3)
    missing.mp4: does not exist
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        count: int = 32,
        *,
        workers: int = 2,
        ahead: int | None = None,
        timeout: float = 60.0,
        progress: bool = False,
        decode: Decode | None = None,
        **clip: Any,
    ) -> None:
        for name, value, least in (("count", count, 1), ("workers", workers, 0), ("ahead", ahead, 1)):
            if value is not None and value < least:
                raise ValueError(f"VideoLoader: {name} must be at least {least}, got {value}")
        if not timeout > 0:
            raise ValueError(f"VideoLoader: timeout must be positive, got {timeout}")
        if decode is not None and clip:
            raise ValueError(f"VideoLoader: {', '.join(clip)} must be left out beside decode")
        if unknown := [name for name in clip if name not in CLIP_OPTIONS]:
            raise ValueError(f"VideoLoader: arguments must be among {', '.join(CLIP_OPTIONS)}, got {unknown[0]}")
        self.paths = [os.fsdecode(path) for path in paths]
        self.workers = workers
        self.ahead = 2 * max(workers, 1) if ahead is None else ahead
        self.timeout = timeout
        self.progress = progress
        self._decode = partial(decode_clip, count=count, **clip) if decode is None else decode
        self._pools: set[Pool] = set()
        # Also when the loader is collected, and before the interpreter ends.
        self.close = weakref.finalize(self, close_all, self._pools)

    def __len__(self) -> int:
        return len(self.paths)

    def __enter__(self) -> "VideoLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[VideoItem]:
        if not self.close.alive:
            raise RuntimeError("VideoLoader: the loader must not be closed")
        items = self._items()
        return show_bar(items, len(self)) if self.progress else items

    def _items(self) -> Iterator[VideoItem]:
        if not self.workers:
            for path in self.paths:
                result = attempt(self._decode, path)
                yield VideoItem(path, None, [], result) if isinstance(result, VideoError) else VideoItem(path, *result)
            return
        pool = Pool(self.paths, self._decode, min(self.workers, len(self.paths)), self.ahead, self.timeout)
        self._pools.add(pool)
        try:
            for number in range(len(self.paths)):
                yield pool.take(number)
        finally:
            pool.close()
            self._pools.discard(pool)


CLIP_OPTIONS = ("clip_start_sec", "clip_end_sec", "end_frame", "fps", "limits", "strict")


def decode_clip(
    path: str,
    count: int,
    clip_start_sec: float | None = 0.0,
    clip_end_sec: float | None = None,
    end_frame: int | None = None,
    **options: Any,
) -> tuple[Tensor, list[int]]:
    """As `load_frames` does it, with the frames' indices."""
    video = open_video(path, **options)
    indices = clip_indices(video, count, clip_start_sec, clip_end_sec, end_frame)
    return video.frames_at(indices), indices


def attempt(decode: Callable[[str], Result], path: str) -> Result | VideoError:
    """What ``decode`` returns, or why it does not."""
    try:
        return decode(path)
    except VideoError as error:
        return error
    except Exception as error:
        return VideoError(path, f"cannot be decoded ({type(error).__name__}: {error})")


def show_bar(items: Iterator[VideoItem], total: int) -> Iterator[VideoItem]:
    """``items``, with a bar on stderr that also counts errors."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with contextlib.closing(items), Progress(*columns, console=Console(stderr=True)) as bar:  # type: ignore[type-var]
        task = bar.add_task("", total=total, failed="")
        failed = 0
        for item in items:
            failed += item.error is not None
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")
            yield item


def close_all(pools: "set[Pool]") -> None:
    """Stop every pool."""
    for pool in list(pools):
        pool.close()


class Pool:
    """Workers, and a thread that hands them paths, collects results and replaces those that hang or die."""

    def __init__(self, paths: list[str], decode: Decode, workers: int, ahead: int, timeout: float) -> None:
        self._paths, self._decode, self._ahead, self._timeout = paths, decode, ahead, timeout
        self._context = process_context()
        self._share = workers
        self._workers: list[Worker] = []
        self._items: dict[int, VideoItem] = {}
        self._given = self._taken = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closed = False
        self._wake, self._waker = self._context.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._run, name="merv_fast video loader", daemon=True)
        self._thread.start()

    def take(self, number: int) -> VideoItem:
        """Wait for the item of a path; room for another one is then made."""
        with self._changed:
            while number not in self._items:
                if self._failure is not None:
                    raise RuntimeError(f"VideoLoader: {self._failure}") from self._failure
                if self._closed:
                    raise RuntimeError("VideoLoader: the loader must not be closed while it is read")
                self._changed.wait()
            self._taken = number + 1
            self._nudge()
            return self._items.pop(number)

    def close(self) -> None:
        """End all workers, at once, and wait for that."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._nudge()
        # The garbage collector may call this from any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _nudge(self) -> None:
        # The thread may be over.
        with contextlib.suppress(OSError):
            self._waker.send(None)

    def _run(self) -> None:
        try:
            for _ in range(self._share):
                self._workers.append(Worker(self._context, self._decode, self._share))
            while not self._closed:
                self._give()
                self._collect()
        except BaseException as error:
            self._failure = error
        finally:
            for worker in self._workers:
                worker.end()
            self._wake.close()
            with self._changed:
                self._changed.notify_all()

    def _give(self) -> None:
        """Hand the next paths to idle workers, as far ahead as is allowed."""
        for worker in self._workers:
            idle = worker.number is None and not worker.starting
            if idle and self._given < min(len(self._paths), self._taken + self._ahead):
                worker.give(self._given, self._paths[self._given])
                self._given += 1

    def _collect(self) -> None:
        """Wait until something happens or a worker is overdue, and deal with it."""
        # A worker that shows progress gets new patience; looking often keeps what it gets close to the timeout.
        wait = self._timeout / 4 if any(worker.number is not None for worker in self._workers) else None
        ready = connection.wait([self._wake, *(worker.connection for worker in self._workers)], wait)
        if self._wake in ready:
            self._wake.recv()
        for place, worker in enumerate(self._workers):
            number, result = worker.number, None
            path = "" if number is None else self._paths[number]
            try:
                if worker.connection in ready:
                    result = worker.receive()
                elif worker.stalled(self._timeout):
                    worker.end()
                    result = VideoError(path, f"was given up: decoding made no progress for {self._timeout:g} s")
            except (EOFError, OSError):
                fate = worker.end(grace=1.0)
                if worker.starting:
                    raise RuntimeError(f"a worker process did not start ({fate})") from None
                result = VideoError(path, f"ended the process that decoded it ({fate})")
            if worker.ended:
                self._workers[place] = Worker(self._context, self._decode, self._share)
            if number is not None and result is not None:
                item = VideoItem(path, None, [], result) if isinstance(result, VideoError) else VideoItem(path, *result)
                with self._changed:
                    self._items[number] = item
                    self._changed.notify_all()


class Worker:
    """One process, and the number of the path that it works on.

    Attributes:
        connection: Becomes ready when there is something to `receive`, or when the process has died.
        number: Of the path in work, or None.
        starting: Whether the process has yet to say that it runs.
        ended: Whether it is gone.
    """

    def __init__(self, context: Any, decode: Decode, share: int) -> None:
        self.connection, theirs = context.Pipe()
        self.number: int | None = None
        self.starting, self.ended = True, False
        self._counter = context.RawValue("Q", 0)
        self._seen, self._since = 0, 0.0
        arguments = (theirs, decode, self._counter, share)
        self._process = context.Process(target=work, args=arguments, name="merv_fast video worker", daemon=True)
        self._process.start()
        # Only the process itself may hold it open, so that its end is seen here.
        theirs.close()

    def give(self, number: int, path: str) -> None:
        """Hand it a path; what happens if it has just died is seen by `receive`."""
        self.number = number
        self._seen, self._since = self._counter.value, time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(path)

    def receive(self) -> tuple[Tensor, list[int]] | VideoError | None:
        """What became of its path, or None for the word that it is running; EOFError or OSError if it died."""
        message = self.connection.recv()
        if self.starting:
            self.starting = False
            return None
        if not isinstance(message, VideoError):
            shape, indices = message
            message = frames_in(reduction.recv_handle(self.connection), shape), indices
        self.number = None
        return message

    def stalled(self, timeout: float) -> bool:
        """Whether it works on a path and has shown no progress for ``timeout`` seconds."""
        if self._counter.value != self._seen:
            self._seen, self._since = self._counter.value, time.monotonic()
        return self.number is not None and time.monotonic() - self._since >= timeout

    def end(self, grace: float = 0.0) -> str:
        """Kill it, and say how it ended; one that is ending by itself has ``grace`` seconds to tell how."""
        if not self.ended:
            self.ended = True
            self._process.join(grace)
            self._process.kill()
            self._process.join()
            self.connection.close()
        code = self._process.exitcode
        return f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name


def process_context() -> Any:
    """How processes start: from a server that has imported what they need, where there is such a thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["merv_fast.video.loader", "av"])
    return context


def work(connection: Connection, decode: Decode, counter: Any, share: int) -> None:
    """Decode the paths that come through ``connection``; the main function of a worker."""
    # Ctrl-C goes to the whole group of processes; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    merv_fast.video.pyav.share_processors(share)
    show_progress_in(counter)
    paths: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=listen, args=(connection, paths), daemon=True).start()
    with contextlib.suppress(OSError):
        connection.send(None)
        while True:
            result = attempt(partial(decode_to_memory, decode), paths.get())
            if isinstance(result, VideoError):
                connection.send(result)
                continue
            file, shape, indices = result
            connection.send((shape, indices))
            reduction.send_handle(connection, file, None)
            os.close(file)


def listen(connection: Connection, paths: "SimpleQueue[str]") -> None:
    """Pass on the paths, and end this process when the parent is gone, whatever hangs here."""
    while True:
        try:
            paths.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def decode_to_memory(decode: Decode, path: str) -> tuple[int, tuple[int, ...], list[int]]:
    """A descriptor of memory that holds the frames, their shape, and their indices."""
    frames, indices = decode(path)
    if frames.dtype != torch.uint8 or not frames.numel():
        raise TypeError(f"frames must be uint8 and not empty, got {frames.dtype} {tuple(frames.shape)}")
    tick()
    # Writing, unlike filling a mapping, fails with an error where memory is short.
    with open(nameless_file(), "wb") as file:
        file.write(frames.contiguous().numpy().data)
        file.flush()
        return os.dup(file.fileno()), tuple(frames.shape), list(map(int, indices))


def nameless_file() -> int:
    """A descriptor of memory that goes when the last process closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("merv_fast frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def frames_in(file: int, shape: tuple[int, ...]) -> Tensor:
    """The frames in a nameless file, without a copy; the tensor holds on to them."""
    try:
        memory = mmap.mmap(file, math.prod(shape))
    finally:
        os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)
