"""What is installed, what it is used for, and what to install for more."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

import torch

from merv_fast.ops._native import native_fault

__all__ = ["Component", "components", "default_device", "default_dtype"]

REQUIRED = {
    "torch": "everything",
    "triton": "kernels on a GPU",
    "transformers": "language models, configuration, processors",
    "safetensors": "checkpoints",
    "av": "decoding on the CPU",
}
OPTIONAL = {
    "nvidia-dali-cuda130": ("dali", "decoding on a GPU"),
    "xformers": ("xformers", "attention of the encoders, where chosen"),
    "flash-attn": ("flash-attn", "attention of the encoders, where chosen"),
    "pyarrow": ("corpus", "the manifest of an encoded corpus"),
    "ray": ("ray", "encoding a corpus on a cluster"),
    "accelerate": ("train", "training, and models on several devices"),
    "vllm": ("vllm", "serving the language model"),
    "lmms-eval": ("lmms-eval", "evaluation"),
}


NATIVE = {
    "cpu": ("native CPU kernels", "resampling, pooling and fusing on the CPU"),
    "cuda": ("native CUDA kernels", "resampling on a GPU"),
}
BUILD = "pip install --no-build-isolation, or csrc/build.py in a checkout"


@dataclass(frozen=True)
class Component:
    """A package or device: its ``version``, or None where it is missing, what it is for, and how to get it."""

    name: str
    version: str | None
    purpose: str
    remedy: str = ""


def components() -> list[Component]:
    """Everything the library uses or could use on this machine."""
    found = [Component("python", platform.python_version(), "")]
    found += [Component(name, _version(name), use, f"pip install {name}") for name, use in REQUIRED.items()]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
            found.append(Component(f"cuda:{index}", f"{properties.name}, {memory}", "runs the model"))
    else:
        found.append(Component("GPU", None, "runs the model", "none seen by torch: the CPU serves"))
    found += native_kernels()
    for name, (extra, use) in OPTIONAL.items():
        found.append(Component(name, _version(name), use, f"pip install 'merv-fast[{extra}]'"))
    return found


def native_kernels() -> list[Component]:
    """The libraries of csrc/ and the compilers that build them; without them PyTorch's operators serve."""
    found = []
    for key, (name, use) in NATIVE.items():
        fault = native_fault(key)
        if key == "cuda" and torch.version.cuda is None:
            remedy = "needs a torch that is built with CUDA"
        else:
            remedy = f"{fault}: {BUILD}"
        found.append(Component(name, None if fault else "built", use, remedy))
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc"))
    found.append(Component("C++ compiler", compiler, "builds native CPU kernels", "g++ or clang++, or set CXX"))
    found.append(Component("nvcc", nvcc, "builds native CUDA kernels", "the CUDA toolkit, or set CUDA_HOME"))
    return found


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
