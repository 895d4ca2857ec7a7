"""Tensors by key in a folder that several processes may share."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load, save

from merv_fast.runtime.cache.digests import digest_tensors
from merv_fast.runtime.cache.memory import Tensors

__all__ = ["DiskTier"]

logger = logging.getLogger("merv_fast")

FORMAT = "merv_fast.cache.1"
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}\.tmp")
ABANDONED_SECONDS = 3600.0
"""Age at which a temporary file counts as left behind by a writer that was killed."""


class DiskTier:
    """At most ``max_bytes`` of safetensors files, the least recently read or written leaving first.

    A file gets its name when it is whole and on the disk, so a writer may be killed at any moment, and several
    processes may write the same key. What is read is checked against the checksum it was written with; an entry that
    is damaged or not ours counts as missing, and a warning says so. Files with other names are left alone.

    Processes that write at the same moment may together exceed ``max_bytes`` by what they are writing.

    Args:
        folder: made if need be.
        max_bytes: of all entries together.

    Raises:
        ValueError: ``folder`` cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial = self._temporary("0" * 64)
            write_synced(trial, b"")
            trial.unlink()
        except OSError as error:
            rule = f"a folder that can be written to, got {os.fspath(folder)!r} ({error.strerror})"
            raise ValueError(f"VideoCache: folder must be {rule}") from error
        self._files()

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are there now."""
        return sum(size for _, size, _ in self._files())

    def get(self, key: str) -> Tensors | None:
        """The entry, or None if there is none that is whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            tensors = unpack(data, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: not used, to be made again: %s", path, error)
            return None
        # File systems put off noting that a file was read, or never do.
        with suppress(OSError):
            os.utime(path)
        return tensors

    def put(self, key: str, tensors: Tensors) -> None:
        """Write an entry, in place of what was there; a warning says if that fails."""
        data = pack(tensors, key)
        if len(data) > self.max_bytes:
            logger.warning("%s: an entry of %d bytes is not kept in %d", self.folder, len(data), self.max_bytes)
            return
        temporary = self._temporary(key)
        try:
            self._make_room(len(data))
            write_synced(temporary, data)
            temporary.replace(self._path(key))
            sync_folder(self.folder)
        except OSError as error:
            logger.warning("%s: an entry could not be written: %s", self.folder, error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _temporary(self, key: str) -> Path:
        return self.folder / f".{key}.{uuid4().hex}.tmp"

    def _make_room(self, size: int) -> None:
        """Remove entries, the least recently used first, until ``size`` more bytes fit."""
        files = sorted(self._files())
        total = sum(held for _, held, _ in files)
        for _, held, path in files:
            if total + size <= self.max_bytes:
                return
            if ENTRY.fullmatch(path.name):
                path.unlink(missing_ok=True)
                total -= held

    def _files(self) -> list[tuple[int, int, Path]]:
        """(last use, bytes, path) of our files; temporary ones that were left behind are removed on the way."""
        found: list[tuple[int, int, Path]] = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                is_temporary = TEMPORARY.fullmatch(entry.name)
                if not (is_temporary or ENTRY.fullmatch(entry.name)):
                    continue
                # Another process may have removed it just now.
                with suppress(OSError):
                    status = entry.stat()
                    if is_temporary and time.time() - status.st_mtime > ABANDONED_SECONDS:
                        os.unlink(entry.path)
                    else:
                        found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found


def pack(tensors: Tensors, key: str) -> bytes:
    """A safetensors file whose metadata say what it is, for which key, and the digest of what it holds."""
    metadata = {"format": FORMAT, "key": key, "checksum": digest_tensors(tensors.items())}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def unpack(data: bytes, key: str) -> Tensors:
    """The tensors that `pack` was given.

    Raises:
        ValueError: these are not the bytes that `pack` made for ``key``.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"is damaged ({error})") from error
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"is not in the format {FORMAT}")
    if metadata.get("key") != key:
        raise ValueError("was written for another key")
    if metadata.get("checksum") != digest_tensors(tensors.items()):
        raise ValueError("is damaged (wrong checksum)")
    return tensors


def write_synced(path: Path, data: bytes) -> None:
    """Make a new file, with ``data`` on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
