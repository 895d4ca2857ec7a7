"""Where a result comes from: device, versions, commit, date."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from merv_fast.ops._native import native_fault

__all__ = ["commit", "name_device", "name_versions", "processor", "today"]

PACKAGES = ("torch", "triton", "transformers", "numpy", "av", "decord", "pillow")


def today() -> dict[str, str]:
    """What every row of a run says of it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": name_versions(), "commit": commit(), "date": now}


def commit() -> str:
    """That of the checkout; $MERV_FAST_COMMIT where there is no git; else "unknown"."""
    if named := os.environ.get("MERV_FAST_COMMIT"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def name_device(device: str) -> str:
    """The GPU's name, or the processor's and PyTorch's threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        rows = []
    return next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.machine())


@lru_cache(maxsize=1)
def name_versions() -> str:
    """Python, the packages that matter to a time, and where our native kernels serve."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    native = [device for device in ("cpu", "cuda") if native_fault(device) is None]
    return "; ".join([*found, f"native {' and '.join(native) or 'nothing'}"])
