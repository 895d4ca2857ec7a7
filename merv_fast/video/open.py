"""Open whatever counts as a video, and read the frames of a clip from it."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from merv_fast.errors import VideoError
from merv_fast.spans import span
from merv_fast.video.base import DEFAULT_LIMITS, Video, VideoLimits, check_file
from merv_fast.video.choice import check_device, choose_decoder
from merv_fast.video.dali import DaliVideo
from merv_fast.video.images import PICTURES, FolderVideo, PictureVideo
from merv_fast.video.pyav import PyAVVideo
from merv_fast.video.sampling import clip_bounds, sample_indices

__all__ = ["clip_indices", "load_frames", "open_video"]

FOLDER_FPS = 3.0
"""Rate of a folder of frames if none is given: that of VLEP, the data set which comes as folders."""


def open_video(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
    strict: bool = False,
    decoder: str = "auto",
    device: torch.device | str | None = None,
) -> Video:
    """Open a local video file, GIF, picture, or folder of frames.

    Args:
        path: A video file or .gif; a .jpg, .jpeg or .png picture, which is a video of one repeated frame; or
            a folder of such pictures, in natural order of their names.
        fps: Frames per second of a folder; 3 (VLEP's) if not given. Other kinds know their own.
        limits: Sizes to refuse.
        strict: Raise, rather than log a warning, if frames are missing.
        decoder: "pyav", "dali", or "auto": DALI for what it decodes on a GPU, PyAV for the rest, as
            `merv_fast.video.choice.choose_decoder` has it.
        device: Where frames are wanted. DALI decodes there; PyAV's frames are on the CPU in any case, in page-locked
            memory if they are wanted on a GPU. None is the CPU.

    Returns:
        A `Video`: ``len``, ``fps``, ``size``, ``duration``, ``decoder`` and ``frames_at``.

    Raises:
        VideoError: The path cannot be opened as a video; the reason says why. Playlists, scripts and URLs,
            also ones hidden in a file with a video's name, are refused. Or DALI was asked for and cannot decode it.
        ValueError: ``fps`` is not positive, or given for something other than a folder; there is no such decoder or
            device.
        RuntimeError: DALI was asked for and is not installed.
    """
    path = os.fsdecode(path)
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"open_video: fps must be positive and finite, got {fps}")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        # Two letters at least, so that C: stays a drive.
        url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path)
        raise VideoError(path, "is a URL; only local files are read" if url else "does not exist") from None
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be read ({error.strerror if isinstance(error, OSError) else error})") from error
    if not os.path.isdir(path):
        if fps is not None:
            raise ValueError(f"open_video: fps must be None unless path is a folder of frames, got {fps}")
        check_file(path, limits)
    choice = choose_decoder(path, decoder, device, limits)
    video: Video
    if os.path.isdir(path):
        video = FolderVideo(path, FOLDER_FPS if fps is None else fps, limits)
    elif Path(path).suffix.lower() in PICTURES:
        video = PictureVideo(path, limits)
    elif choice.survey is not None:
        return DaliVideo(path, choice.survey, choice.device)
    else:
        video = PyAVVideo(path, limits, strict)
    video.pinned = check_device(device).type == "cuda"
    return video


def load_frames(
    path: str | os.PathLike[str],
    count: int,
    *,
    clip_start_sec: float | None = 0.0,
    clip_end_sec: float | None = None,
    end_frame: int | None = None,
    fps: float | None = None,
    limits: VideoLimits = DEFAULT_LIMITS,
    strict: bool = False,
    decoder: str = "auto",
    device: torch.device | str | None = None,
) -> Tensor:
    """Read ``count`` evenly spaced frames of a clip, by the rule of `sample_indices`.

    A clip must start inside the video and end after its start; an end past the video's counts as the
    video's. With ``end_frame >= 0``, and for a single picture, the bounds in seconds are not looked at.
    A whole GIF is sampled from its first frame to its last.

    Args:
        path: As `open_video` takes it.
        count: Frames to return, at least 1.
        clip_start_sec: Start of the clip in seconds; None or NaN for the video's.
        clip_end_sec: End of the clip in seconds; None or NaN for the video's.
        end_frame: Last frame of a clip that starts at frame 0; negative or None for none.
        fps: As in `open_video`.
        limits: As in `open_video`.
        strict: As in `open_video`.
        decoder: As in `open_video`.
        device: Where the frames come to lie, whatever decodes them; None is the CPU. To a GPU they are copied by its
            current stream, which the caller need not wait for.

    Returns:
        uint8 [count, H, W, 3], RGB, on ``device``.

    Raises:
        VideoError: The video cannot be read, or the bounds lie outside it.
        ValueError: ``count`` or ``fps`` is out of its range; or as `open_video`.
        RuntimeError: As `open_video`.
    """
    if count < 1:
        raise ValueError(f"load_frames: count must be at least 1, got {count}")
    video = open_video(path, fps=fps, limits=limits, strict=strict, decoder=decoder, device=device)
    frames = video.frames_at(clip_indices(video, count, clip_start_sec, clip_end_sec, end_frame))
    if device is None:
        return frames
    with span("copy"):
        return frames.to(device, non_blocking=video.pinned)


def clip_indices(
    video: Video,
    count: int,
    clip_start_sec: float | None = 0.0,
    clip_end_sec: float | None = None,
    end_frame: int | None = None,
) -> list[int]:
    """The frames of ``video`` that `load_frames` reads.

    Raises:
        VideoError: The bounds lie outside the video.
        ValueError: ``count`` is not positive.
    """
    if not video.fps:
        return [0] * count
    if end_frame is None or end_frame < 0:
        start, end = clip_bounds(clip_start_sec, clip_end_sec)
        if not start and end is None and Path(video.path).suffix.lower() == ".gif":
            # The reference counts a GIF's frames; its rate, rounded, could miss the last.
            return sample_indices(len(video), video.fps, count, end_frame=len(video) - 1)
        if not 0 <= start < video.duration or (end is not None and end <= start):
            clip = f"{start} s to {'its end' if end is None else f'{end} s'}"
            raise VideoError(
                video.path, f"clip bounds {clip} lie outside the video, which lasts {video.duration:.3f} s"
            )
    return sample_indices(len(video), video.fps, count, clip_start_sec, clip_end_sec, end_frame)
