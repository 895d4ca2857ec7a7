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


def choices_in(file: Path, variable: str, launch: type) -> dict:
    """The dictionary of a source, with its launches."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == variable:
            return eval(compile(ast.Expression(node.value), file, "eval"), {"Launch": launch})
    raise AssertionError(variable)


@pytest.mark.parametrize("name", tune.TABLES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_choice_is_written_in_its_place(tmp_path, name, architecture):
    table = tune.TABLES[name]
    source = Path(table.module.__file__)
    copy = Path(shutil.copy(source, tmp_path))
    launch = table.module.Launch
    choice = tuple(range(1, len(launch._fields) + 1))
    assert tune.write(name, architecture, choice, tmp_path) == copy
    expected = choices_in(source, table.variable, launch)
    holder = expected if table.entry is None else expected[architecture]
    assert holder[table.key(architecture)] != choice
    holder[table.key(architecture)] = choice
    assert choices_in(copy, table.variable, launch) == expected
    # One call on one line has changed, and the line is not too long.
    lines = [pair for pair in zip(source.read_text().split("\n"), copy.read_text().split("\n"), strict=True)]
    ((_, changed),) = [pair for pair in lines if pair[0] != pair[1]]
    assert f"Launch({', '.join(map(str, choice[:2]))}" in changed
    assert max(len(new) for _, new in lines) <= 120


def test_what_has_a_default_is_written_by_its_name_where_it_differs():
    source = "LAUNCHES = {80: Launch(7.0, 'now')}\n"
    for choice, written in (((2.0, ""), "Launch(2.0)"), ((2.0, 1), "Launch(2.0, wrong=1)")):
        assert tune.rewrite(source, "LAUNCHES", 80, None, Launch(*choice)) == f"LAUNCHES = {{80: {written}}}\n"


def test_what_is_not_there_is_not_written():
    source = "LAUNCHES = {90: Launch(1, 2)}\nOTHER = 5\n"
    for variable, architecture, entry in (("OTHER", 90, None), ("LAUNCHES", 80, None), ("LAUNCHES", 90, "large")):
        with pytest.raises(ValueError, match="must hold the launch choice"):
            tune.rewrite(source, variable, architecture, entry, Launch(3))
    # Characters of more than one byte come before the place.
    source = 'Ö = "ü"\nLAUNCHES = {80: Launch(1, 2), 90: Launch(\n    3,\n    4,\n)}\n'
    assert tune.rewrite(source, "LAUNCHES", 90, None, Launch(5)).endswith("{80: Launch(1, 2), 90: Launch(5)}\n")


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
    # With it the tables that follow are measured.
    assert table.module.LAUNCHES[80] == Launch(3.0)
    shown = capsys.readouterr().out
    assert "RuntimeError: out of shared memory" in shown
    assert "output 0 is off by" in shown
    assert "1.67 times as fast" in shown


def test_the_present_choice_stays_where_little_is_gained(table):
    run = kernels.Run(cases.Setup("cpu", torch.float32, cases.SMALL))
    table.module.LAUNCHES[80] = Launch(3.05)
    assert tune.tune(run, "fake", 60) is None
    assert table.module.LAUNCHES[80] == Launch(3.05)


def test_time_runs_out_after_the_present_choice(table, capsys):
    run = kernels.Run(cases.Setup("cpu", torch.float32, cases.SMALL))
    assert tune.tune(run, "fake", -1) is None
    assert "no time for 4 candidates" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "gelu"), [("gemm-large", False), ("gemm-gelu-schedule", True)])
def test_a_gemm_runs_with_the_choice_whatever_its_shape(name, gelu):
    table, choice = tune.TABLES[name], (16, 32, 64, 4, 2, True, False)
    before, choose = table.module.LAUNCHES[80][table.entry], table.module.choose
    other = choose(1, 1, 1, torch.float16, gelu=not gelu)
    with tune.chosen(table, 80, choice):
        assert table.module.choose(1, 1, 1, torch.float32, gelu) == choice
        assert table.module.LAUNCHES[80][table.entry] == choice
        # The rest of a chain runs as ever.
        assert table.module.choose(1, 1, 1, torch.float16, gelu=not gelu) == other
    assert table.module.LAUNCHES[80][table.entry] == before
    assert table.module.choose is choose


def test_schedules_are_tried_with_the_present_tile():
    table = tune.TABLES["gemm-large-schedule"]
    tile = tuple(table.module.LAUNCHES[90]["large"])[:5]
    ways = [(False, False), (False, True), (True, False), (True, True)]
    assert sorted(table.tried(90)) == [(*tile, *way) for way in ways]
    # No launch is dependent before sm_90.
    tile = tuple(table.module.LAUNCHES[80]["large"])[:5]
    assert sorted(table.tried(80)) == [(*tile, False, False), (*tile, True, False)]


def test_tiles_are_tried_with_the_present_schedule(monkeypatch):
    table = tune.TABLES["gemm-large"]
    monkeypatch.setitem(table.module.LAUNCHES[90], "large", table.module.Launch(*tune.LARGE[0], persistent=True))
    assert table.tried(90) == [(*tile, True, False) for tile in tune.LARGE]


@pytest.mark.parametrize("hidden", [False, True])
def test_a_chain_computes_what_the_op_does(hidden):
    run = kernels.Run(cases.Setup("cpu", torch.float32, cases.SMALL))
    case = cases.chain_case(run.setup, 2, hidden)
    kernels.examine(run, case)
    assert not run.failures
    assert [row.way for row in run.rows] == ["merv_fast"]


@pytest.mark.parametrize("name", tune.TABLES)
def test_candidates_are_launches_and_cases_reach_the_table(name):
    table = tune.TABLES[name]
    assert len(set(table.candidates)) == len(table.candidates) > 3
    assert len(table.tried(90)) >= len(table.candidates)
    for choice in table.tried(90):
        table.module.Launch(*choice)
    assert {case.ways[0].name for case in table.cases("meta")} == {"merv_fast"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is run by compute-sanitizer there")
def test_what_the_sanitizer_runs_is_finite():
    launches = dict(sanitize.launches("cpu"))
    assert len(launches) == 27
    shown = ("pool_tokens with scores, float16", "fuse_encoders, float32", "resample_frames")
    for name in (*shown, "GEMM, persistent, float16", "tail, dependent, float16"):
        assert all(out.isfinite().all() for out in cases.tensors_of(launches[name]())), name
