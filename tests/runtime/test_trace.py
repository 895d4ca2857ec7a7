import time

import pytest
import torch

from merv_fast.runtime.environment import components, default_dtype
from merv_fast.runtime.trace import StageTimer


def test_a_stage_adds_up():
    timer = StageTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.stage("nap"):
            time.sleep(0.02)
    with timer.stage("nothing"):
        pass
    assert list(timer.milliseconds) == ["nap", "nothing"]
    assert timer.milliseconds["nap"] >= 40
    assert timer.milliseconds["nothing"] < 20


def test_a_stage_that_fails_is_timed_and_raises():
    timer = StageTimer(torch.device("cpu"))
    with pytest.raises(KeyError), timer.stage("broken"):
        raise KeyError
    assert timer.milliseconds["broken"] > 0


def test_stages_are_profiler_ranges():
    timer = StageTimer(torch.device("cpu"))
    with torch.profiler.profile() as profile, timer.stage("encode"):
        torch.ones(4).sum()
    assert "merv/encode" in {event.key for event in profile.key_averages()}


def test_components_say_what_is_missing_and_how_to_get_it():
    parts = {part.name: part for part in components()}
    assert parts["torch"].version.startswith(torch.__version__.split("+")[0])
    missing = [part for part in parts.values() if part.version is None]
    assert all(part.remedy for part in missing)
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
    assert default_dtype(torch.device("cpu")) == torch.float32
