"""The videos of a corpus: what counts as one, and when two are the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from merv_fast.video.images import PICTURES

__all__ = ["Item", "find_items", "item_id"]

# fmt: off
VIDEOS = (
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
)
# fmt: on
"""Names of files that a folder is searched for end so; one that is given by its own path may have any name."""


@dataclass(frozen=True)
class Item:
    """One video to encode.

    Args:
        id: as `item_id` gives it.
        path: as it was given or found.
        size: bytes; of all pictures of a folder of frames; None of what cannot be read.
        mtime_ns: when it was last written to, in nanoseconds, the latest of a folder's pictures; None like ``size``.
    """

    id: str
    path: str
    size: int | None
    mtime_ns: int | None


def find_items(paths: Iterable[str | os.PathLike[str]]) -> list[Item]:
    """The videos under ``paths``, in their order, each once.

    A folder is searched, with all below it but hidden names and linked folders: files with a video's suffix, and
    folders that hold pictures but no videos, each of which is one video. Any other path is one video, also if there is
    nothing: encoding it will say so.

    Raises:
        ValueError: a folder holds no video.
    """
    found: dict[str, Item] = {}
    for path in paths:
        name = os.fsdecode(path)
        videos = list(search(name)) if os.path.isdir(name) else [name]
        if not videos:
            raise ValueError(f"encode: folders must hold a video, got {name!r}")
        for video in videos:
            if (key := item_id(video)) not in found:
                found[key] = Item(key, video, *signature(video))
    return list(found.values())


def item_id(path: str | os.PathLike[str]) -> str:
    """32 hexadecimal digits that stand for a file or folder, by whatever path it is reached."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def search(folder: str) -> Iterator[str]:
    """Paths of the videos in a folder, sorted."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        videos = [name for name in names if name.lower().endswith(VIDEOS)]
        yield from (os.path.join(place, name) for name in videos)
        if not videos and any(name.lower().endswith(PICTURES) for name in names):
            yield place


def signature(path: str) -> tuple[int | None, int | None]:
    """``size`` and ``mtime_ns`` of an item: what changes when the video does."""
    try:
        if not os.path.isdir(path):
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        with os.scandir(path) as entries:
            pictures = [entry.stat() for entry in entries if entry.name.lower().endswith(PICTURES)]
        return sum(each.st_size for each in pictures), max((each.st_mtime_ns for each in pictures), default=0)
    except (OSError, ValueError):
        return None, None
