"""Processes that write entries, forked from one that has loaded torch; they print the keys of what they have written.

``python -m tests.runtime.cache_writer together FOLDER COUNT`` starts three at once, which write so many entries each.
``python -m tests.runtime.cache_writer killed FOLDER COUNT`` starts so many, one after another, each of which writes
until it is killed with SIGKILL at some moment of its work. What an entry holds follows from its key.
"""

import hashlib
import itertools
import os
import random
import signal
import sys
import time

import torch

from merv_fast.runtime.cache.disk import DiskTier


def key_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def entry_of(key):
    """Between 4 kB and 1 MB, so that a writer may be killed at any stage of it."""
    size = 1000 + int(key[:8], 16) % 250_000
    return {"tokens": torch.full((size,), int(key[8:12], 16), dtype=torch.int32), "weights": torch.arange(4.0)}


def start(folder, seed, steps):
    """A process that writes, and the pipe from which it can be read what it has written."""
    reader, out = os.pipe()
    if not (child := os.fork()):
        tier, numbers = DiskTier(folder, 2**30), random.Random(seed)
        for _ in steps:
            key = key_of(numbers.randrange(40))
            tier.put(key, entry_of(key))
            os.write(out, f"{key}\n".encode())
        os._exit(0)
    os.close(out)
    return child, os.fdopen(reader)


def together(folder, count):
    writers = [start(folder, seed, range(count)) for seed in range(3)]
    for child, lines in writers:
        sys.stdout.writelines(lines)
        assert os.waitpid(child, 0)[1] == 0


def killed(folder, count):
    chance = random.Random(0)
    for seed in range(count):
        child, lines = start(folder, seed, itertools.count())
        first = [lines.readline() for _ in range(chance.randrange(1, 5))]
        time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        sys.stdout.writelines(line for line in [*first, *lines] if line.endswith("\n"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    {"together": together, "killed": killed}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
