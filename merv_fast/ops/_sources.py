"""A digest of the native sources; also run by ``csrc/build.py``, so only the standard library is used here."""

import hashlib
from pathlib import Path

__all__ = ["digest"]

KINDS = (".cpp", ".cu", ".h", ".cuh", ".py")


def digest(directory: Path) -> str:
    """Of the names and contents of all that a native library is made from."""
    hashed = hashlib.sha256()
    for file in sorted(file for file in directory.rglob("*") if file.suffix in KINDS):
        hashed.update(file.relative_to(directory).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return hashed.hexdigest()
