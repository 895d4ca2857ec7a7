"""Streams that only write down who waits for whom, and tell which of two pieces of work is sure to come first."""

from contextlib import contextmanager

import torch


class RecordingStreams:
    """Vector clocks: a stream knows how far every other one was when it last waited for it, or for one that had."""

    def __init__(self):
        self.clocks = {"caller": {}}
        self.active = "caller"
        self.written = {}
        self.kept = set()
        self.waits = []

    def current(self, device):
        return self.active

    def side(self, device, number):
        name = f"{device}/{number}"
        self.clocks.setdefault(name, {})
        return name

    @contextmanager
    def use(self, stream):
        before, self.active = self.active, stream
        try:
            yield
        finally:
            self.active = before

    def wait(self, waiting, awaited):
        self.waits.append((waiting, awaited))
        mine, theirs = self.clocks[waiting], self.clocks[awaited]
        for name, count in theirs.items():
            mine[name] = max(mine.get(name, 0), count)

    def keep(self, tensor, stream):
        self.kept.add((tensor.data_ptr(), stream))

    def write(self, tensor):
        """The active stream makes ``tensor``."""
        clock = self.clocks[self.active]
        clock[self.active] = clock.get(self.active, 0) + 1
        self.written[tensor.data_ptr()] = (self.active, clock[self.active])

    def read(self, tensor):
        """The active stream reads ``tensor``: whoever made it must be done, and its memory must stay."""
        stream, count = self.written[tensor.data_ptr()]
        assert self.clocks[self.active].get(stream, 0) >= count, f"{self.active} does not wait for {stream}"
        if stream != self.active:
            assert (tensor.data_ptr(), self.active) in self.kept, f"memory of {stream} may go while {self.active} reads"


class Recorded(torch.nn.Module):
    """Reads its input and makes its output, as far as ``streams`` can tell; its weights say that they are on a GPU."""

    def __init__(self, streams, factor, cost=1, fails=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(cost))
        self.streams, self.factor, self.fails = streams, factor, fails
        self.ran_on = []

    def forward(self, x):
        self.streams.read(x)
        self.ran_on.append(self.streams.active)
        if self.fails:
            raise RuntimeError("the encoder's own error")
        out = x * self.factor
        self.streams.write(out)
        return out
