"""Streams and graphs that only write down who waits for whom, and tell which of two pieces of work comes first."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves, tree_map


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


class RecordingGraphs(RecordingStreams):
    """Graphs that do when replayed what was captured; before that, their outputs hold nothing.

    Beside what streams check: that nothing is written while it may still be read, that a graph is captured alone, that
    it reads weights where they were captured, and that it is dropped only when the host knows its replays to be done.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.reads, self.host = [], {}, {}
        self.modules, self.live, self.pools = [], [], []
        self.captures = self.replays = self.size = self.growth = 0
        # What PyTorch keeps of temporary memory; a capture cannot have it.
        self.cached = 0
        self.in_capture = False
        self.before_capture = lambda: None

    def serves(self, device):
        return True

    def capturing(self):
        return self.in_capture

    def write(self, tensor):
        for stream, count in self.reads.pop(tensor.data_ptr(), []):
            assert self.clocks[self.active].get(stream, 0) >= count, f"{self.active} writes while {stream} may read"
        super().write(tensor)
        if not self.in_capture:
            self.cached = 1 << 20
        # An address stands for one tensor.
        self.alive.append(tensor)

    def read(self, tensor):
        assert tensor.data_ptr() in self.written, f"{self.active} reads what nothing has written"
        super().read(tensor)
        clock = self.clocks[self.active]
        clock[self.active] = clock.get(self.active, 0) + 1
        self.reads.setdefault(tensor.data_ptr(), []).append((self.active, clock[self.active]))

    def copy(self, target, source):
        self.read(source)
        for dim, stride in enumerate(target.stride()):
            if not stride:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        target.copy_(source)
        self.write(target)

    def synchronise(self, device):
        """For one stream: for all of a device CUDA does not wait while a graph is captured."""
        for name, count in self.clocks[self.active].items():
            self.host[name] = max(self.host.get(name, 0), count)

    def trim(self):
        self.cached = 0

    def pool(self):
        self.pools.append([])
        return self.pools[-1]

    def capture(self, call, pool):
        assert not self.in_capture, "two captures at once"
        assert not self.cached, "memory is kept that the capture may need"
        assert not pool or any(graph in self.live for graph in pool), "a pool is used again whose graphs are gone"
        self.before_capture()
        self.in_capture, self.captures = True, self.captures + 1
        try:
            outputs = call()
        finally:
            self.in_capture = False
        for y in tree_leaves(outputs):
            self.read(y)
        outputs = tree_map(lambda y: torch.full((span_of(y),), float("nan")).as_strided(y.shape, y.stride()), outputs)
        graph = SimpleNamespace(call=call, outputs=outputs, weights=self.addresses(), last=None)
        self.size += self.growth
        pool.append(graph)
        self.live.append(graph)
        return graph, outputs

    def replay(self, graph):
        assert graph in self.live, "a graph is replayed that was dropped"
        assert graph.weights == self.addresses(), "weights are read where they were"
        self.replays += 1
        for target, source in zip(tree_leaves(graph.outputs), tree_leaves(graph.call()), strict=True):
            self.copy(target, source)
        graph.last = self.active, self.clocks[self.active].get(self.active, 0)

    def release(self, graph):
        if graph.last is not None:
            stream, count = graph.last
            assert self.host.get(stream, 0) >= count, "a graph is dropped whose replay may be under way"
        self.live.remove(graph)

    def reserved(self, device):
        return self.size + self.cached

    def addresses(self):
        return [weight.data_ptr() for module in self.modules for weight in module.parameters()]


def span_of(x):
    """Elements from the first to the last of ``x`` in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
