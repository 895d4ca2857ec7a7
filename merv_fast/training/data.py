"""The data format of LLaVA and Video-LLaVA: a JSON list of conversations, each about a video, a picture, or neither."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Entry", "Turn", "read_entries"]

ROLES = ("human", "gpt")


@dataclass(frozen=True)
class Turn:
    """What one side says; ``role`` is "human" or "gpt"."""

    role: str
    text: str


@dataclass(frozen=True)
class Entry:
    """A conversation, and the file that it is about.

    Args:
        name: its ``id``, or its place in the file, for messages.
        video: a video, or a picture, which is a video of one frame; None for text alone.
        turns: by turns "human" and "gpt", "human" first.
    """

    name: str
    video: Path | None
    turns: tuple[Turn, ...]


def read_entries(path: str | Path, media: str | Path | None = None, check_files: bool = True) -> list[Entry]:
    """The entries of a data file, each checked.

    ``[{"id": "v1", "video": "clips/v1.mp4", "conversations": [{"from": "human", "value": "What happens?"},
    {"from": "gpt", "value": "A ball falls."}]}]``: instead of ``video`` an entry may have ``image`` or neither, and it
    may have other keys, which are not looked at.

    Args:
        path: the JSON file.
        media: the folder from which paths in it start; default the folder of the file.
        check_files: whether each video must be there.

    Raises:
        ValueError: what is wrong, and with which entry.
        OSError: the file cannot be read.

    Source: ``TRAINING.md`` and ``AlignVideoDataset`` of the reference.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON ({error})") from error
    if not isinstance(values, list) or not values:
        got = "an empty list" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{path}: must be a list of conversations, got {got}")
    folder = path.parent if media is None else Path(media)
    entries = [_entry(value, f"{path}: entry {index}", folder) for index, value in enumerate(values)]
    if check_files and (absent := list(_absent(entries))):
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise ValueError(f"{path}: entry {absent[0].name}: {absent[0].video} does not exist{more}")
    return entries


def _absent(entries: Iterable[Entry]) -> Iterable[Entry]:
    return (entry for entry in entries if entry.video is not None and not entry.video.exists())


def _entry(value: Any, where: str, folder: Path) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object, got {type(value).__name__}")
    name = str(value.get("id", where.rpartition(" ")[2]))
    where += f" (id {name!r})" if "id" in value else ""
    given = [key for key in ("video", "image") if value.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{where}: must have one of video and image, got both")
    for key in given:
        if not isinstance(value[key], str) or not value[key]:
            raise ValueError(f"{where}: {key} must be one path, got {value[key]!r}")
    turns = value.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        got = f"{len(turns)} turn(s)" if isinstance(turns, list) else type(turns).__name__
        raise ValueError(f"{where}: conversations must be a list of a question and an answer at least, got {got}")
    checked = tuple(_turn(turn, f"{where}: turn {place}", ROLES[place % 2]) for place, turn in enumerate(turns))
    return Entry(name, folder / value[given[0]] if given else None, checked)


def _turn(value: Any, where: str, role: str) -> Turn:
    if not isinstance(value, dict) or not isinstance(value.get("value"), str):
        raise ValueError(f'{where}: must be {{"from": ..., "value": text}}, got {value!r}')
    if value.get("from") != role:
        raise ValueError(f"{where}: from must be {role!r}, for turns alternate, got {value.get('from')!r}")
    return Turn(role, value["value"])
