"""The operators at MERV's shapes: on a GPU every kernel, else what serves them on the CPU."""

import torch

from bench import cpu
from bench.cases import MERV, Setup, cases
from bench.comparison import Entry


def on_gpu():
    setup = Setup("cuda", torch.bfloat16, MERV)
    for case in cases(setup):
        product = case.B * MERV.S, sum(MERV.widths), MERV.D
        yield Entry(case, setup, product, graph=True, native=case.op.startswith("resample_"))


ENTRIES = list(on_gpu() if torch.cuda.is_available() else cpu.entries())


def test_ops(entry, impl, record):
    record(entry, impl)
