"""The timer: it rotates, warms up, leaves outliers out, and on a GPU replays what it captured."""

import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench import clock


def test_percentiles():
    assert clock.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_calls_take_turns_and_the_first_ones_do_not_count(monkeypatch):
    calls, times, spread = Counter(), [], clock.spread
    monkeypatch.setattr(clock, "spread", lambda found: times.extend(found) or spread(found))

    def call(name):
        calls[name] += 1
        # Slow as long as it is new, as what compiles at its first call.
        time.sleep(0.05 if calls[name] == 1 else 0.002)

    timing = clock.measure([lambda: call("a"), lambda: call("b"), lambda: call("c")], "cpu", seconds=0.12)
    assert max(calls.values()) - min(calls.values()) <= 1 + 1
    assert 2.0 <= timing.p20 <= timing.p50 <= timing.p80
    assert max(times) < 50.0


def test_repeats_fill_the_time_within_bounds():
    assert clock.repeats_in(1.0, 10.0) == clock.LEAST
    assert clock.repeats_in(1.0, 0.02) == 50
    assert clock.repeats_in(1.0, 1e-9) == clock.MOST
    assert clock.repeats_in(1.0, 100.0, least=3) == 3


def test_ways_are_run_in_turns(monkeypatch):
    """Each way gets its own times, each is first in some turns, and a machine that slows down slows both."""
    now, order = [0.0], []
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(name, seconds):
        order.append(name)
        # Twice as slow from the twelfth round on.
        now[0] += seconds * (1 + (len(order) > 24))

    fast, slow = (lambda name=name, each=each: call(name, each) for name, each in (("a", 0.01), ("b", 0.03)))
    times = clock.take_turns([[fast], [slow]], "cpu", seconds=0.02)
    turns = list(zip(order[::2], order[1::2], strict=True))
    assert set(turns) == {("a", "b"), ("b", "a")}
    assert len(times[0]) == len(times[1]) == clock.LEAST
    for quick, long in zip(*times, strict=True):
        assert (quick, long) in (pytest.approx((10.0, 30.0)), pytest.approx((20.0, 60.0)))


def test_threads_are_pinned_to_different_cores(monkeypatch):
    given = []
    monkeypatch.setattr(clock.torch, "set_num_threads", given.append)
    monkeypatch.setattr(clock.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 6}, raising=False)
    monkeypatch.setattr(clock.os, "sched_setaffinity", lambda pid, cpus: given.append(cpus), raising=False)
    monkeypatch.setattr(clock, "siblings", lambda cpu: f"{cpu // 2}")
    clock.pin_threads(2)
    clock.pin_threads(4)
    assert given == [2, [0, 2], 4, [0, 2, 6, 1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    xs = [torch.randn(4096, 4096, device="cuda") for _ in range(2)]
    sums = [torch.zeros(4096, 4096, device="cuda") for _ in xs]
    calls = [lambda x=x, total=total: total.add_(x) for x, total in zip(xs, sums, strict=True)]
    replay = clock.capture(calls[0])
    before = sums[0].clone()
    replay()
    assert torch.equal(sums[0], before + xs[0])
    for graph in (False, True):
        timing = clock.measure(calls, "cuda", graph=graph)
        # 201 MB of traffic: no GPU takes less than 10 us.
        assert 0.01 < timing.p20 <= timing.p50 <= timing.p80
    properties = torch.cuda.get_device_properties()
    assert clock.larger_than_cache().nbytes > properties.L2_cache_size
