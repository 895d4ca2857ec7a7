"""Compile the native kernels into merv_fast/: ``python csrc/build.py``. The one place that knows the compilers.

``_C.so`` is made where there is a C++ compiler ($CXX, else c++), ``_C_cuda.so`` where torch is also built for CUDA
and there is an nvcc ($NVCC, else that of $CUDA_HOME or of the path). Both use only PyTorch's stable ABI, so that one
binary serves later versions of torch.
"""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "merv_fast"
TORCH_2_11 = "0x020b000000000000"
"""Oldest torch that the libraries serve; later ones keep its ABI."""

FLAGS = ["-O3", "-fno-trapping-math", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
"""Nobody reads floating-point exceptions; GCC, told so, vectorises sums behind a condition too."""

EXACT = "-ffp-contract=off"
"""A fused multiply-add would change the last bit of resampling coefficients."""

ARCHITECTURES = ("80", "90a", "100")
"""Compute capabilities that CUDA kernels are compiled for; later ones take the PTX of the last."""


def compiler() -> str | None:
    """Path of the C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "c++")


def nvcc() -> str | None:
    """Path of the CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc"))


def missing(cuda: bool) -> str | None:
    """What keeps this machine from building the CPU library (or the CUDA one), or None."""
    if find_spec("torch") is None:
        return "no torch beside the build"
    if sys.platform != "linux":
        return "they are built on Linux only"
    if compiler() is None:
        return "no C++ compiler"
    if cuda:
        import torch

        if torch.version.cuda is None:
            return "torch is built without CUDA"
        if nvcc() is None:
            return "no nvcc"
    return None


def sources(cuda: bool) -> list[Path]:
    """The files that are compiled into the CPU library, or into the CUDA one."""
    return [*sorted(HERE.glob("*.cu")), HERE / "sources.cpp"] if cuda else sorted(HERE.glob("*.cpp"))


def torch_flags() -> list[str]:
    """Where our headers and torch's are, and the version of its ABI."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("csrc: torch must be installed to build against it")
    include = Path(spec.origin).parent / "include"
    return [f"-I{HERE / 'include'}", "-isystem", str(include), f"-DTORCH_TARGET_VERSION={TORCH_2_11}"]


def build(files: list[Path], target: Path) -> None:
    """Compile C++ ``files`` into the shared library ``target``, which appears only when it is whole."""
    command = [compiler() or "c++", *FLAGS, EXACT, *torch_flags(), stamp(), "-shared", *map(str, files)]
    _link(command, target, ["torch_cpu"])


def build_cuda(files: list[Path], target: Path) -> None:
    """Compile CUDA ``files`` into the shared library ``target``."""
    host = ["-Xcompiler", f"-fPIC,-fvisibility=hidden,{EXACT}", "-ccbin", compiler() or "c++"]
    known = subprocess.run([nvcc() or "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wanted = [arch for arch in ARCHITECTURES if f"compute_{arch.rstrip('a')}" in known.split()]
    command = [nvcc() or "nvcc", "-O3", "-std=c++20", *host, *gencode(wanted), *torch_flags(), "-DUSE_CUDA", stamp()]
    _link([*command, "-shared", *map(str, files)], target, ["torch_cpu", "torch_cuda"])


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's options for machine code of each architecture and PTX of the last."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    return [*flags, f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]


def stamp() -> str:
    """The option that puts the digest of csrc/ into a library, where ``merv_fast.ops._native`` looks for it."""
    digest = runpy.run_path(str(PACKAGE / "ops" / "_sources.py"))["digest"]
    return f"-DMERV_FAST_SOURCES={digest(HERE)}"


def _link(command: list[str], target: Path, libraries: list[str]) -> None:
    import torch

    partial = target.with_name(f"{target.name}.{os.getpid()}")
    found = f"-L{Path(torch.__file__).parent / 'lib'}"
    try:
        # No path to torch in the library: it is loaded into a process that has torch already.
        subprocess.run([*command, found, *(f"-l{name}" for name in libraries), "-o", str(partial)], check=True)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    if reason := missing(cuda=False):
        sys.exit(f"csrc: nothing built: {reason}")
    build(sources(cuda=False), PACKAGE / "_C.so")
    print(PACKAGE / "_C.so")
    if reason := missing(cuda=True):
        print(f"csrc: no CUDA kernels: {reason}")
    else:
        build_cuda(sources(cuda=True), PACKAGE / "_C_cuda.so")
        print(PACKAGE / "_C_cuda.so")
