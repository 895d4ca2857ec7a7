"""From the reference's way to ours, one technique after the other; and a step of the whole model."""

import torch

from bench import steps, waterfall

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRIES = [*waterfall.entries(DEVICE), *steps.entries(DEVICE)]


def test_waterfall(entry, impl, record):
    record(entry, impl)
