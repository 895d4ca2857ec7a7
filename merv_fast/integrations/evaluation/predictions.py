"""Predictions of a run, in files that a killed run leaves whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merv_fast.integrations.locking import lock

__all__ = ["Predictions"]

SETTINGS = "settings.json"


class Predictions:
    """The folder of a run: one file of lines for each part that a process works on, all of which count.

    Args:
        folder: made if need be.
        part: (number, parts) of this process, which alone writes that file.
        settings: of the run, which a folder has once.

    Raises:
        ValueError: the folder holds predictions made with other settings.
        RuntimeError: another process works on this part.
    """

    def __init__(self, folder: str | Path, part: tuple[int, int], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep_settings(dict(settings))
        number, parts = part
        self.path = self.folder / f"pred_{parts}_{number}.jsonl"
        self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            lock(self._file.fileno(), f"{self.path}: another process must not be writing to it")
        except RuntimeError:
            self._file.close()
            raise
        self._drop_torn_line()

    def _keep_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        if not path.exists():
            # Processes that start together write the same.
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
            temporary.replace(path)
        kept = json.loads(path.read_text())
        if other := sorted(name for name in kept.keys() | settings.keys() if kept.get(name) != settings.get(name)):
            was = ", ".join(f"{name} {kept.get(name)!r}" for name in other)
            raise ValueError(f"{self.folder}: a run must keep its settings, there are predictions with {was}")

    def _drop_torn_line(self) -> None:
        """A process that was killed may have left part of a line."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.truncate(len(whole.encode()))
        self._file.seek(0, os.SEEK_END)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the prediction of one question."""
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Everything that this and other processes have written."""
        for path in sorted(self.folder.glob("pred_*.jsonl")):
            # What comes after the last end of a line others may still be writing; a text may hold other ends of lines.
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                yield json.loads(line)

    def done(self) -> dict[str, dict[str, Any]]:
        """Rows by question; of a question that failed and was then answered, the answer."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.rows():
            key = str(row["question_id"])
            if key not in found or "error" in found[key]:
                found[key] = row
        return found

    def close(self) -> None:
        """Let others work on this part."""
        self._file.close()
