"""The command ``merv-fast``."""

from merv_fast.cli.app import main

__all__ = ["main"]
