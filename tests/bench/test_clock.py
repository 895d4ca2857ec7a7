"""The timer: it rotates, warms up, leaves outliers out, and on a GPU replays what it captured."""

import time
from collections import Counter

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
