"""The four encoders, together and one by one, against the reference's way and transformers' own."""

import torch

from bench.encoders import entries

ENTRIES = list(entries("cuda" if torch.cuda.is_available() else "cpu"))


def test_encoders(entry, impl, record):
    record(entry, impl)
