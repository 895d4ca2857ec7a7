"""Compile csrc/*.cpp into merv_fast/_C.so against PyTorch's stable ABI. ``python csrc/build.py``."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parent / "merv_fast" / "_C.so"
TORCH_2_11 = "0x020b000000000000"
"""Oldest torch that the library serves; later ones keep its ABI."""


def build(sources: Sequence[Path], target: Path) -> None:
    """Compile ``sources`` into the shared library ``target`` with ``$CXX`` (default ``c++``)."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in [HERE / "include", *include_paths()]]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++20", "-shared", "-fPIC"]
    command += [f"-DTORCH_TARGET_VERSION={TORCH_2_11}", *includes, *map(str, sources)]
    subprocess.run([*command, *libraries, "-ltorch", "-ltorch_cpu", "-o", str(target)], check=True)


if __name__ == "__main__":
    found = sorted(HERE.glob("*.cpp"))
    if not found:
        sys.exit("csrc: no sources yet, nothing to build")
    build(found, TARGET)
    print(TARGET)
