"""The most memory that is taken at one time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

PROCESS = Path("/proc/self")


class PeakMemory:
    """Bytes of tensors on GPUs, by PyTorch's count; or of this process, by the kernel's. Both counts start anew here.

    Args:
        devices: whose memory counts.
        host: whether the memory of this process counts, files that are mapped and in memory included; Linux only.
    """

    def __init__(self, devices: Sequence[torch.device], *, host: bool = False) -> None:
        self.gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self.host = host

    def start(self) -> None:
        """Count from now on."""
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        if self.host:
            try:
                (PROCESS / "clear_refs").write_text("5")
            except OSError:
                self.host = False

    def read(self) -> int | None:
        """The most since `start`, of all that counts; None where nothing does."""
        found = [torch.cuda.max_memory_allocated(gpu) for gpu in self.gpus]
        if self.host:
            lines = (PROCESS / "status").read_text().splitlines()
            found += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return sum(found) if found else None
