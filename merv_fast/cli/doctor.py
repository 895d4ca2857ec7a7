"""doctor: what is here and what is missing."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merv_fast.runtime.environment import components, default_device, default_dtype
from merv_fast.video.choice import has_dali

__all__ = ["show_components"]


def show_components() -> None:
    """One row for each part that is used or could be."""
    console = Console()
    table = Table(title="merv_fast on this machine", title_justify="left")
    for column in ("part", "version", "used for", "to get it"):
        table.add_column(column, overflow="fold")
    for part in components():
        missing = part.version is None
        table.add_row(
            part.name,
            "missing" if missing else part.version,
            part.purpose,
            escape(part.remedy) if missing else "",
        )
    console.print(table)
    device = default_device()
    dtype = str(default_dtype(device)).removeprefix("torch.")
    console.print(f"models run on {device} in {dtype} unless told otherwise; videos are decoded by {decoders(device)}")


def decoders(device: torch.device) -> str:
    """What decodes videos for a model on ``device``."""
    if device.type == "cuda" and has_dali():
        return "NVDEC through DALI where it takes them, else by PyAV on the CPU"
    return "PyAV on the CPU"
