"""The native kernels of csrc/, where they have been built; without them the PyTorch references serve."""

from pathlib import Path

import torch

__all__ = ["load_native"]

LIBRARY = Path(__file__).parent.parent / "_C.so"


def load_native() -> None:
    """Load the library that ``csrc/build.py`` makes, if it is there."""
    if LIBRARY.exists():
        torch.ops.load_library(str(LIBRARY))
