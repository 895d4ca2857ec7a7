"""The native kernels of csrc/, where they have been built; without them the PyTorch references serve."""

import logging
from pathlib import Path

import torch

from merv_fast.ops._sources import digest

__all__ = ["load_native", "native_fault"]

PACKAGE = Path(__file__).parent.parent
LIBRARIES = {"cpu": PACKAGE / "_C.so", "cuda": PACKAGE / "_C_cuda.so"}
SOURCES = PACKAGE.parent / "csrc"

logger = logging.getLogger("merv_fast")
_faults: dict[str, str] = {}


def load_native() -> None:
    """Load the libraries that ``csrc/build.py`` makes, if they are there.

    One that cannot be loaded, or was built from other sources than those of this checkout, is left out with a
    warning: its kernels could disagree with the schemas of the ops, while the references are right in any case.
    """
    for name, library in LIBRARIES.items():
        if not library.exists() or (name == "cuda" and torch.version.cuda is None):
            _faults[name] = "not built"
        elif _stale(library):
            _faults[name] = "built from other sources"
            logger.warning("%s was built from other sources than csrc/ and is not used: run csrc/build.py", library)
        else:
            try:
                torch.ops.load_library(str(library))
            except OSError as error:
                _faults[name] = f"cannot be loaded ({error})"
                logger.warning("%s cannot be loaded and is not used: %s", library, error)


def native_fault(name: str) -> str | None:
    """Why the native kernels for "cpu" or "cuda" do not serve; None where they do."""
    return _faults.get(name)


def _stale(library: Path) -> bool:
    """Whether there is a csrc/ beside the package that the library was not built from."""
    if not (SOURCES / "include" / "merv_fast").is_dir():
        return False
    return digest(SOURCES).encode() not in library.read_bytes()
