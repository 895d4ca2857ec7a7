"""Videos through NVIDIA DALI: by NVDEC on a GPU, and on the CPU where DALI decodes the codec there."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merv_fast.errors import VideoError
from merv_fast.video.base import Put, Video
from merv_fast.video.orientation import Orientation
from merv_fast.video.survey import Survey

__all__ = ["DaliVideo", "decode_together"]


class DaliVideo(Video):
    """A video file whose frames DALI decodes onto ``device``, at the indices asked for.

    Which frames there are, when they are shown and which way up comes from our own `survey`, so that an index means
    the same as to PyAV. Colours are BT.601's, so only files in BT.601 come here (`choose_decoder`). On a GPU chroma is
    interpolated in another way than by libswscale: colour edges differ by more than rounding.

    Args:
        path: The file.
        survey: What is known of it; not damaged, with times.
        device: The CPU or a GPU.
    """

    def __init__(self, path: str, survey: Survey, device: torch.device) -> None:
        self.path = path
        self.device = device
        self._survey = survey
        self.fps, self.duration = survey.fps, survey.duration
        self.size = survey.orientation.size(*survey.coded_size)
        self.decoder = f"DALI ({survey.codec}, {'the CPU' if device.type == 'cpu' else f'NVDEC of {device}'})"

    def __len__(self) -> int:
        return self._survey.frames

    def frames_at(self, indices: Iterable[int]) -> Tensor:
        """Read frames, as `Video.frames_at` does but onto ``device``.

        They lie in DALI's memory, which lives as long as the tensor does, unless they had to be turned, sorted or
        repeated. On a GPU they belong to PyTorch's current stream; work on another stream must be done before the
        tensor is let go.
        """
        return decode_together([self], [indices])[0]

    def _read(self, wanted: list[int], put: Put) -> None:
        for index, frame in zip(wanted, self.frames_at(wanted).cpu().numpy(), strict=True):
            put(index, frame)


def decode_together(videos: Sequence[DaliVideo], indices: Sequence[Iterable[int]]) -> list[Tensor]:
    """Frames of several videos on one device, decoded at the same time: on a GPU by as many engines as it has.

    Args:
        videos: Their devices must be the same.
        indices: For each video F_i frame numbers, in any order, with repeats.

    Returns:
        For each video uint8 [F_i, H_i, W_i, 3] on its device.

    Raises:
        ValueError: An index is not in ``0 .. len - 1``, or the devices differ.
        VideoError: A file cannot be decoded; with several it is not known which, and the first is named.
    """
    if len({video.device for video in videos}) > 1:
        raise ValueError(f"decode_together: videos must be on one device, got {[str(v.device) for v in videos]}")
    wanted = [video._checked(numbers) for video, numbers in zip(videos, indices, strict=True)]
    decoded = decode([(video, sorted(set(numbers))) for video, numbers in zip(videos, wanted, strict=True) if numbers])
    out = []
    for video, numbers in zip(videos, wanted, strict=True):
        if not numbers:
            out.append(torch.empty((0, *video.size, 3), dtype=torch.uint8, device=video.device))
            continue
        frames, distinct = next(decoded), sorted(set(numbers))
        if numbers != distinct:
            place = {number: position for position, number in enumerate(distinct)}
            frames = frames[torch.tensor([place[number] for number in numbers], device=frames.device)]
        out.append(turn(frames, video._survey.orientation))
    return out


def decode(jobs: list[tuple[DaliVideo, list[int]]]) -> Iterator[Tensor]:
    """The stored frames [F, h, w, 3] of each video at ascending, distinct indices."""
    if not jobs:
        return
    import nvidia.dali.experimental.dynamic as ndd

    device = jobs[0][0].device
    encoded = [read_bytes(video.path) for video, _ in jobs]
    numbers = [np.array(distinct, np.int32) for _, distinct in jobs]
    try:
        # In step, so that an error is raised here with its own words and not wrapped by DALI's worker.
        with context(device), ndd.EvalMode.sync_cpu:
            # DALI reads its constant arguments off this very line of source: pad_mode must stay a literal. Any other
            # mode fills frames that it does not find, by default with black, and says nothing.
            batch = ndd.decoders.video(
                ndd.batch(encoded),
                frames=ndd.batch(numbers),
                device="cpu" if device.type == "cpu" else "gpu",
                pad_mode="none",
            )
            frames = [torch.from_dlpack(sample) for sample in batch.tensors]
    except RuntimeError as error:
        reason, _, _ = str(error).partition("\n")
        among = f" (or one of {len(jobs) - 1} files decoded with it)" if len(jobs) > 1 else ""
        raise VideoError(jobs[0][0].path, f"cannot be decoded by DALI{among}: {reason}") from error
    for (video, distinct), tensor in zip(jobs, frames, strict=True):
        expected = (len(distinct), *video._survey.coded_size, 3)
        if tuple(tensor.shape) != expected:
            raise VideoError(video.path, f"DALI gave frames of shape {tuple(tensor.shape)}, expected {expected}")
        yield tensor


def read_bytes(path: str) -> NDArray[np.uint8]:
    """The file; not mapped, because a mapped file that is cut short kills the process."""
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise VideoError(path, f"cannot be read ({error.strerror})") from error


class _Contexts(threading.local):
    """Each thread's contexts: they hold DALI's operators, and no two threads may be in one."""

    processes: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.by_device: dict[torch.device, tuple[Any, Any]] = {}


_contexts = _Contexts()


def context(device: torch.device) -> AbstractContextManager[Any]:
    """DALI's side of ``device`` for this thread: its operators and buffers are used again for the next file.

    On a GPU it works on PyTorch's current stream, so that neither waits for the other.
    """
    import nvidia.dali.experimental.dynamic as ndd

    _contexts.processes.add(os.getpid())
    if len(_contexts.processes) > 1:
        # DALI would wait for its threads for ever.
        raise RuntimeError("its threads do not live on in a forked process; start workers by spawn")
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    known = _contexts.by_device.get(device)
    if known is None or known[0] != stream:
        if stream is None:
            with ndd.device("cpu"):
                known = stream, ndd.EvalContext()
        else:
            known = stream, ndd.EvalContext(device_id=device.index, cuda_stream=stream)
        _contexts.by_device[device] = known
    return known[1]


def turn(frames: Tensor, orientation: Orientation) -> Tensor:
    """Turn [F, h, w, 3]; contiguous."""
    if orientation.transposed:
        frames = frames.transpose(1, 2)
    flipped = [dim for dim, flip in ((1, orientation.flipped_rows), (2, orientation.flipped_columns)) if flip]
    return (frames.flip(flipped) if flipped else frames).contiguous()
