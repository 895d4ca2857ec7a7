"""An answer of many tokens."""

import torch

from bench.generating import entries

ENTRIES = list(entries("cuda" if torch.cuda.is_available() else "cpu"))


def test_generating(entry, impl, record):
    record(entry, impl)
