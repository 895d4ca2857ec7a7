"""Decoded frames, and a file, to visual tokens."""

import torch

from bench.front_end import entries

ENTRIES = list(entries("cuda" if torch.cuda.is_available() else "cpu"))


def test_front_end(entry, impl, record):
    record(entry, impl)
