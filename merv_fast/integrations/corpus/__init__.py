"""A corpus of videos, encoded once and read ever after.

Names are imported when they are first used: processes that only decode need no models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merv_fast.integrations.corpus.encode import Outcome, encode_corpus
    from merv_fast.integrations.corpus.reader import EncodedCorpus

__all__ = ["EncodedCorpus", "Outcome", "encode_corpus"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'merv_fast.integrations.corpus' has no attribute {name!r}")
    module = "reader" if name == "EncodedCorpus" else "encode"
    return getattr(importlib.import_module(f"merv_fast.integrations.corpus.{module}"), name)
