"""A folder of encoded videos, and the one process that writes to it.

    corpus.json         the settings that all of its tensors were made with
    shards/*.safetensors
    parts/*.parquet     rows, in the order of their numbers
    manifest.parquet    all rows up to those of some part; written at the end of a run, which then removes those parts

A shard gets its name when it is whole and on the disk. Its rows are written afterwards, in one part, whose renaming is
the moment from which its videos are done. So a process that is killed leaves files that no row speaks of, which the
next one removes; a video that has a row is never encoded again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor

from merv_fast.integrations.corpus.rows import Row, from_parquet, to_parquet
from merv_fast.integrations.locking import lock
from merv_fast.runtime.cache.disk import sync_folder, write_synced

__all__ = ["CorpusFolder", "read_rows", "read_settings", "write_rows"]

logger = logging.getLogger("merv_fast")

SETTINGS, MANIFEST, LOCK, SHARDS, PARTS = "corpus.json", "manifest.parquet", ".lock", "shards", "parts"
OURS = {SETTINGS, MANIFEST, LOCK, SHARDS, PARTS}
SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")
PART = re.compile(r"(\d{8})\.parquet")
DIGEST = re.compile(r"[0-9a-f]{64}")
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
THROUGH = "merv_fast.through"
"""In a manifest's metadata: number of the last part whose rows it has."""


class CorpusFolder:
    """The folder, open for writing; while it is, no other process can open it so.

    Args:
        folder: made if need be.

    Attributes:
        rows: of each video by id, as they are on the disk.

    Raises:
        ValueError: there are files that are not ours.
        RuntimeError: another process writes to it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.is_dir() and not (self.folder / SETTINGS).exists():
            names = {path.name for path in self.folder.iterdir() if not TEMPORARY.fullmatch(path.name)}
            if others := sorted(names - OURS):
                rule = "new, empty, or one that encode has made"
                raise ValueError(f"encode: out must be a folder that is {rule}, got {self.folder} with {others[0]}")
        for path in (self.folder / SHARDS, self.folder / PARTS):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder / LOCK)
        try:
            self.rows, self._part = read_rows(self.folder)
            self._forget_missing_shards()
            self._remove_leftovers()
        except BaseException:
            self.close()
            raise
        self._done: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write; this one must not any more."""
        os.close(self._lock)

    def agree(self, settings: dict[str, Any]) -> None:
        """Write down the settings of a new folder; of an old one they must be the same.

        Raises:
            ValueError: says which differ.
        """
        there = read_settings(self.folder)
        if there is None:
            replace_synced(self.folder / SETTINGS, json.dumps(settings, indent=1).encode())
            return
        differ = [name for name in settings | there if settings.get(name) != there.get(name)]
        if differ:
            listed = "; ".join(
                f"{name} is {short(there.get(name))} there, {short(settings.get(name))} now" for name in differ
            )
            raise ValueError(f"encode: settings must be those of {self.folder}, but {listed}")

    def commit(self, rows: Iterable[Row]) -> list[Row]:
        """Put rows on the disk, all at once; their shards are there already.

        Returns:
            Those that were new: a video that this process has committed before is left out.
        """
        new = list({row.id: row for row in rows if row.id not in self._done}.values())
        if new:
            self._part += 1
            replace_synced(self.folder / PARTS / f"{self._part:08}.parquet", to_parquet(new, {}))
            self._done |= {row.id for row in new}
            self.rows |= {row.id: row for row in new}
        return new

    def finish(self) -> None:
        """Write the manifest, in place of the parts that it is made from."""
        parts = [path for path in (self.folder / PARTS).iterdir() if PART.fullmatch(path.name)]
        path = self.folder / MANIFEST
        if parts or not path.exists():
            rows = sorted(self.rows.values(), key=lambda row: row.path)
            replace_synced(path, to_parquet(rows, {THROUGH: str(self._part)}))
        for part in parts:
            part.unlink()

    def _forget_missing_shards(self) -> None:
        there = set(os.listdir(self.folder / SHARDS))
        lost = [row.id for row in self.rows.values() if row.shard is not None and row.shard not in there]
        for key in lost:
            del self.rows[key]
        if lost:
            logger.warning("%s: the shards of %d videos are gone; they count as not encoded", self.folder, len(lost))

    def _remove_leftovers(self) -> None:
        """What a process that was killed did not get to name or to write rows of, and parts that a manifest has."""
        needed = {row.shard for row in self.rows.values()}
        for path in (self.folder / SHARDS).iterdir():
            # Hidden are ours, and those that safetensors writes to before it gives them the name that it was told.
            if path.name.startswith(".") or (SHARD.fullmatch(path.name) and path.name not in needed):
                path.unlink(missing_ok=True)
        through = manifest_rows(self.folder)[1]
        for path in (self.folder / PARTS).iterdir():
            number = PART.fullmatch(path.name)
            if TEMPORARY.fullmatch(path.name) or (number and int(number[1]) <= through):
                path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def short(setting: Any) -> str:
    """A setting for people to read: of a digest its beginning, as its end tells nothing."""
    return f"{setting[:12]}..." if isinstance(setting, str) and DIGEST.fullmatch(setting) else repr(setting)


def write_shard(folder: str | os.PathLike[str], tensors: dict[str, Tensor]) -> str:
    """Write tensors on the CPU to a new shard, from any process; its name is returned."""
    shards, name = Path(folder, SHARDS), f"{uuid4().hex}.safetensors"
    temporary = shards / f".{uuid4().hex}.tmp"
    try:
        save_file(tensors, temporary, {"format": "pt"})
        # safetensors makes files that nobody else can read.
        temporary.chmod(Path(folder, LOCK).stat().st_mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(shards / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(shards)
    return name


def write_rows(folder: str | os.PathLike[str], rows: Sequence[tuple[Row, dict[str, Tensor]]]) -> list[Row]:
    """Write the tensors of all rows, by name, to a new shard; the rows that are returned say where they are."""
    named = {f"{row.id}/{name}": tensor for row, tensors in rows for name, tensor in tensors.items()}
    shard = write_shard(folder, named) if named else None
    return [replace(row, shard=shard) if row.tensors else row for row, _ in rows]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What ``corpus.json`` says; None if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return dict(json.loads((folder / SETTINGS).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"encode: {folder / SETTINGS} must hold the settings of a corpus ({error})") from error


def read_rows(folder: Path) -> tuple[dict[str, Row], int]:
    """Rows by id, and the number of the last part; also while another process writes.

    Raises:
        ValueError: a file is not what its name says.
    """
    parts: dict[int, list[Row]] = {}
    with suppress(FileNotFoundError):
        for name in os.listdir(folder / PARTS):
            # Gone by now: its rows are in the manifest, which is read after it.
            with suppress(FileNotFoundError):
                if match := PART.fullmatch(name):
                    parts[int(match[1])] = from_parquet(folder / PARTS / name)[0]
    kept, through = manifest_rows(folder)
    rows = {row.id: row for row in kept}
    for number in sorted(parts):
        if number > through:
            rows |= {row.id: row for row in parts[number]}
    return rows, max([through, *parts])


def manifest_rows(folder: Path) -> tuple[list[Row], int]:
    """Rows of the manifest, and the number of the last part that is in it."""
    try:
        rows, metadata = from_parquet(folder / MANIFEST)
    except FileNotFoundError:
        return [], 0
    return rows, int(metadata.get(THROUGH, 0))


def replace_synced(path: Path, data: bytes) -> None:
    """Give ``path`` new contents, at one moment, which survive a crash from then on."""
    temporary = path.parent / f".{uuid4().hex}.tmp"
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def locked(path: Path) -> int:
    """A descriptor that holds a lock until it is closed, if only by the end of the process.

    Raises:
        RuntimeError: another process holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(handle, f"encode: no other process may write to {path.parent} meanwhile")
    except RuntimeError:
        os.close(handle)
        raise
    return handle
