"""Packages that not everyone needs."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["require"]


def require(name: str, extra: str) -> Any:
    """A module of a package that an extra brings.

    Raises:
        ImportError: it is not installed; the message says how it will be.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"encode: {package} must be installed: pip install 'merv-fast[{extra}]' ({error})", name=package
        ) from error
