"""What is installed, what it is used for, and what to install for more."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

__all__ = ["Component", "components", "default_device", "default_dtype"]

REQUIRED = {
    "torch": "everything",
    "triton": "nothing yet (kernels on a GPU)",
    "transformers": "language models, configuration, processors",
    "safetensors": "checkpoints",
    "av": "decoding on the CPU",
}
OPTIONAL = {
    "nvidia-dali-cuda130": ("dali", "nothing yet (decoding on the GPU)"),
    "xformers": ("xformers", "nothing yet (attention kernels)"),
    "flash-attn": ("flash-attn", "nothing yet (attention kernels)"),
    "ray": ("ray", "nothing yet (encoding a corpus)"),
    "vllm": ("vllm", "nothing yet (serving the language model)"),
}


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
    for name, (extra, use) in OPTIONAL.items():
        found.append(Component(name, _version(name), use, f"pip install 'merv-fast[{extra}]'"))
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
