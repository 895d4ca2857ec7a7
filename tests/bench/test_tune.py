"""bench.tune: the best candidate that is right wins, and the source is rewritten in one place only."""

import ast
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from bench import cases, kernels, sanitize, tune
from merv_fast.kernels._launch import Cost


def choices_in(file: Path, variable: str) -> dict:
    """The dictionary of a source, each launch as the tuple of its numbers."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == variable:
            return plain(node.value)
    raise AssertionError(variable)


def plain(node):
    if isinstance(node, ast.Dict):
        return {key.value: plain(value) for key, value in zip(node.keys, node.values, strict=True)}
    return tuple(ast.literal_eval(argument) for argument in node.args)


@pytest.mark.parametrize("name", tune.TABLES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_choice_is_written_in_its_place(tmp_path, name, architecture):
    table = tune.TABLES[name]
    source = Path(table.module.__file__)
    copy = Path(shutil.copy(source, tmp_path))
    choice = tuple(range(1, len(table.candidates[0]) + 1))
    assert tune.write(name, architecture, choice, tmp_path) == copy
    expected = choices_in(source, table.variable)
    holder = expected if table.entry is None else expected[architecture]
    assert holder[table.key(architecture)] != choice
    holder[table.key(architecture)] = choice
    assert choices_in(copy, table.variable) == expected
    # One call on one line has changed, and the line is not too long.
    lines = [pair for pair in zip(source.read_text().split("\n"), copy.read_text().split("\n"), strict=True)]
    ((_, changed),) = [pair for pair in lines if pair[0] != pair[1]]
    assert f"Launch({', '.join(map(str, choice))})" in changed
    assert max(len(new) for _, new in lines) <= 120


def test_what_is_not_there_is_not_written():
    source = "LAUNCHES = {90: Launch(1, 2)}\nOTHER = 5\n"
    for variable, architecture, entry in (("OTHER", 90, None), ("LAUNCHES", 80, None), ("LAUNCHES", 90, "large")):
        with pytest.raises(ValueError, match="must hold the launch choice"):
            tune.rewrite(source, variable, architecture, entry, (3, 4))
    # Characters of more than one byte come before the place.
    source = 'Ö = "ü"\nLAUNCHES = {80: Launch(1, 2), 90: Launch(\n    3,\n    4,\n)}\n'
    assert tune.rewrite(source, "LAUNCHES", 90, None, (5, 6)).endswith("{80: Launch(1, 2), 90: Launch(5, 6)}\n")


class Launch(NamedTuple):
    milliseconds: float
    wrong: str = ""


@pytest.fixture
def table(monkeypatch):
    """A table whose choices are the time that its kernel takes."""
    module = SimpleNamespace(Launch=Launch, LAUNCHES={80: Launch(5.0)})

    def call(x):
        if module.LAUNCHES[80].wrong == "raises":
            raise RuntimeError("out of shared memory")
        return x * (3 if module.LAUNCHES[80].wrong else 2)

    def twice(x):
        return x * 2

    def fake_cases(device):
        yield cases.Case("twice", 1, lambda: (torch.ones(3),), twice, [tune.Way("merv_fast", call, [twice])], cost)

    def cost(x):
        return Cost(1, 1)

    def candidates():
        return [(3.0, ""), (1.0, "x"), (2.0, "raises"), (4.0, "")]

    made = tune.Table(module, "LAUNCHES", None, candidates(), fake_cases)
    monkeypatch.setitem(tune.TABLES, "fake", made)
    monkeypatch.setattr(tune, "capability", lambda: 80)

    def measure(calls, device, **how):
        for each in calls:
            each()
        time = module.LAUNCHES[80].milliseconds
        return SimpleNamespace(p50=time)

    monkeypatch.setattr(tune, "measure", measure)
    return made


def test_the_fastest_that_is_right_wins(table, capsys):
    run = kernels.Run(cases.Setup("cpu", torch.float32, cases.SMALL))
    assert tune.tune(run, "fake", 60) == (3.0, "")
    assert table.module.LAUNCHES[80] == Launch(5.0)
    shown = capsys.readouterr().out
    assert "RuntimeError: out of shared memory" in shown
    assert "output 0 is off by" in shown
    assert "1.67 times as fast" in shown


def test_the_present_choice_stays_where_little_is_gained(table):
    run = kernels.Run(cases.Setup("cpu", torch.float32, cases.SMALL))
    table.module.LAUNCHES[80] = Launch(3.05)
    assert tune.tune(run, "fake", 60) is None


def test_time_runs_out_after_the_present_choice(table, capsys):
    run = kernels.Run(cases.Setup("cpu", torch.float32, cases.SMALL))
    assert tune.tune(run, "fake", -1) is None
    assert "no time for 4 candidates" in capsys.readouterr().out


def test_a_gemm_runs_with_the_choice_whatever_its_shape():
    table = tune.TABLES["gemm-large"]
    before, choose = table.module.LAUNCHES[80]["large"], table.module.choose
    with tune.chosen(table, 80, (16, 32, 64, 4, 2)):
        assert table.module.choose(1, 1, 1, torch.float32, True) == (16, 32, 64, 4, 2)
        assert table.module.LAUNCHES[80]["large"] == (16, 32, 64, 4, 2)
    assert table.module.LAUNCHES[80]["large"] == before
    assert table.module.choose is choose


@pytest.mark.parametrize("name", tune.TABLES)
def test_candidates_are_launches_and_cases_reach_the_table(name):
    table = tune.TABLES[name]
    assert len(set(table.candidates)) == len(table.candidates) > 5
    for choice in table.candidates:
        table.module.Launch(*choice)
    assert {case.ways[0].name for case in table.cases("meta")} == {"merv_fast"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is run by compute-sanitizer there")
def test_what_the_sanitizer_runs_is_finite():
    launches = dict(sanitize.launches("cpu"))
    assert len(launches) == 19
    for name in ("pool_tokens with scores, float16", "fuse_encoders, float32", "resample_frames"):
        assert all(out.isfinite().all() for out in cases.tensors_of(launches[name]())), name
