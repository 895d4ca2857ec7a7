"""Which commit a result was measured at."""

import os
import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str:
    """That of the checkout; $MERV_FAST_COMMIT where there is no git; else "unknown"."""
    if named := os.environ.get("MERV_FAST_COMMIT"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
