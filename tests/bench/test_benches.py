"""``pytest bench/``: once each as tests, with --benchmark timed; what is wrong fails and has no number.

Time is a counter here: a read of the clock takes 50 ms, our kernel as many as PLANTED_MS says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare
from bench.table import read

ROOT = Path(__file__).parent.parent.parent

PLANTED = """
import os
from types import SimpleNamespace

import torch

from bench import cases, clock

now = 0.0
right = cases.REFERENCES["pool_project_fuse"]

def passed(seconds):
    global now
    now += seconds
    return now

def kernel(*arguments):
    passed(1e-3 * float(os.environ["PLANTED_MS"]))
    tokens, weights = right(*arguments)
    return tokens * float(os.environ["PLANTED_FACTOR"]), weights

clock.time = SimpleNamespace(perf_counter=lambda: passed(50e-3))
library = torch.library.Library("merv_fast", "IMPL")
library.impl("pool_project_fuse", kernel, "CPU", allow_override=True)
"""

BARE = """
import sys

sys.modules["av"] = sys.modules["decord"] = None
"""

CASE = ["bench/test_ops.py", "-k", "pool_project_fuse and MLP"]


@pytest.fixture
def benches(tmp_path):
    """Run pytest on the benches in another process, with a plugin."""

    def run(*options, plugin="", ms=20.0, factor=1.0):
        (tmp_path / "plugged.py").write_text(plugin)
        path = os.pathsep.join([str(ROOT), str(tmp_path)])
        environment = os.environ | {"PYTHONPATH": path, "PLANTED_MS": str(ms), "PLANTED_FACTOR": str(factor)}
        # One thread: what is timed is a counter, and other tests run beside this one.
        environment |= {"OMP_NUM_THREADS": "1"}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-p", "plugged", "-p", "no:cacheprovider", *options]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture(autouse=True)
def on_a_cpu(device):
    if device == "cuda":
        pytest.skip("plants what the CPU runs")


def test_without_the_flag_they_run_once_and_have_no_times(benches):
    done = benches("bench/", "-k", "load_frames or (encoder and siglip)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout or "4 passed, 1 skipped" in done.stdout
    assert "p50" not in done.stdout


def test_with_the_flag_they_are_timed(benches, tmp_path):
    table, report = tmp_path / "r.csv", tmp_path / "r.json"
    options = ["--benchmark", "--append", str(table), "--benchmark-json", str(report)]
    done = benches(*CASE, *options, plugin=PLANTED)
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, first, second = read(table)
    ours, eager = rows
    assert (ours.impl, eager.impl) == ("merv_fast", "eager")
    assert (ours.op, ours.case) == ("pool_project_fuse", "MLP, 4 slots, D=1024, B=1")
    # A read of the clock is in each.
    assert (ours.p20, ours.p50, ours.p80) == pytest.approx((70.0, 70.0, 70.0))
    assert eager.p50 == pytest.approx(50.0)
    assert 0 < ours.error < 1e-5
    assert {first.op, second.op} == {"roof"}
    assert (first.case, second.case) == ("copy of 128 MiB, B=1", "product 256x3584x1024, B=1")
    # Either roof took 50 ms by this clock.
    roof = 50 * max(ours.flops / (2 * 256 * 3584 * 1024), ours.bytes / 2**28)
    assert ours.percent_of_roof == pytest.approx(100 * roof / 70)
    assert {row.versions for row in rows} == {first.versions}
    benchmarks = json.loads(report.read_text())["benchmarks"]
    shown = {each["extra_info"]["impl"]: each for each in benchmarks}
    assert shown.keys() == {"merv_fast", "eager"}
    assert shown["merv_fast"]["stats"]["median"] == pytest.approx(70e-3)
    assert shown["eager"]["stats"]["median"] == pytest.approx(50e-3)
    assert shown["merv_fast"]["stats"]["rounds"] >= 10
    assert shown["merv_fast"]["extra_info"]["p50"] == ours.p50
    assert len({each["group"] for each in benchmarks}) == 1
    for text in ("merv_fast", "p50", f"4 rows in {table}"):
        assert text in done.stdout

    slow = tmp_path / "slow.csv"
    done = benches(*CASE, "--benchmark", "--append", str(slow), plugin=PLANTED, ms=40.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert compare.main([str(table), str(slow)]) == 1
    assert compare.main([str(slow), str(table)]) == 0


def test_a_wrong_result_fails_and_has_no_number(benches, tmp_path):
    table, report = tmp_path / "r.csv", tmp_path / "r.json"
    options = ["--benchmark", "--append", str(table), "--benchmark-json", str(report)]
    done = benches(*CASE, *options, plugin=PLANTED, factor=1.0001)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "WrongResult: output 0 is off by" in done.stdout
    assert {row.impl for row in read(table) if row.op != "roof"} == {"eager"}
    assert [each["extra_info"]["impl"] for each in json.loads(report.read_text())["benchmarks"]] == ["eager"]


def test_every_bench_is_found_and_none_begun_without_time(benches):
    done = benches("bench/", "--seconds", "0", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert " skipped" in last
    assert "passed" not in last
    assert "no time left of 0 s" in done.stdout


def test_what_is_missing_is_skipped_and_said(benches):
    done = benches("bench/", "-k", "bundled", "-rs", plugin=BARE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "19 skipped" in done.stdout
    assert "av is not installed" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--append", "r.csv"], "--append: it must be given with --benchmark"),
        (["--benchmark", "-n", "2"], "--benchmark: it must run in one process, got -n 2"),
    ],
)
def test_options_that_do_not_go_together(benches, options, message):
    done = benches("bench/test_clip.py", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr
