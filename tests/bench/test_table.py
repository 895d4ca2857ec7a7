"""Tables of results: what is written is read again, and what is no measurement is refused."""

from dataclasses import replace

import pytest

from bench import cases, kernels, table
from bench.clock import Timing
from bench.table import COLUMNS, Row, append, read, read_latest, split_name

ROW = Row(
    op="pool_tokens",
    case="16x16x1024, B=1",
    impl="merv_fast",
    device="a CPU, 2 threads",
    dtype="float32",
    p20=1.0,
    p50=1.25,
    p80=2.0,
    flops=None,
    bytes=41_943_040,
    percent_of_roof=80.5,
    error=2.5e-7,
    versions="torch 2.13.0",
    commit="abc",
    date="2026-11-22T20:00:00+00:00",
)


def test_columns():
    wanted = "op case impl device dtype p20 p50 p80 flops bytes percent_of_roof error versions commit date"
    assert list(COLUMNS) == wanted.split()


def test_rows_come_back(tmp_path):
    file, other = tmp_path / "new" / "r.csv", replace(ROW, impl="eager", percent_of_roof=None, flops=7)
    append(file, [ROW])
    append(file, iter([other]))
    assert read(file) == [ROW, other]


def test_of_several_runs_the_last_counts(tmp_path):
    append(tmp_path / "r.csv", [ROW, replace(ROW, p50=1.5), replace(ROW, dtype="float64")])
    latest = read_latest(tmp_path / "r.csv")
    assert [row.p50 for row in latest.values()] == [1.5, 1.25]


def test_nothing_to_add_makes_no_file(tmp_path):
    append(tmp_path / "r.csv", [])
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p20": 0.0}, "times must be"),
        ({"p20": 1.5}, "times must be"),
        ({"p80": float("inf")}, "times must be"),
        ({"p50": float("nan")}, "times must be"),
        ({"error": float("nan")}, "error must be at least 0"),
        ({"bytes": -1}, "bytes must be at least 0"),
        ({"commit": ""}, "commit must be given"),
        ({"date": "yesterday"}, "yesterday"),
    ],
)
def test_what_is_no_measurement_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ROW, **change)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("op,case", "case,op", "columns must be op, case"),
        (",1.25,", ",fast,", "line 2: .*fast"),
        (",1.25,", ",0.5,", "line 2: Row: times must be"),
        (",1.25,", ",", "line 2: a row must have 15 values"),
        (",abc,", ",abc,abc,", "line 2: a row must have 15 values"),
        (",2.5e-07,", ",,", "line 2"),
    ],
)
def test_a_broken_table_is_neither_read_nor_added_to(tmp_path, old, new, message):
    file = tmp_path / "r.csv"
    append(file, [ROW])
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    for use in (read, lambda file: append(file, [ROW])):
        with pytest.raises(ValueError, match=message):
            use(file)


def test_names():
    assert split_name("pool_tokens, 16x16x1024", 8) == ("pool_tokens", "16x16x1024, B=8")
    assert split_name("GEMM", 1) == ("GEMM", "B=1")
    # Parts of the tail are indented where they are listed.
    assert split_name("  its GEMM", 1) == ("pool_project_fuse", "its GEMM, B=1")


def test_kernels_are_written_in_the_same_form(tmp_path):
    run = kernels.Run(cases.Setup("cpu", kernels.torch.bfloat16, cases.MERV))
    timing, launched = Timing(1.0, 2.0, 3.0), Timing(4.0, 5.0, 6.0)
    run.rows.append(kernels.Row(cases.TEMPORAL, 8, "eager", "bfloat16", 1e-3, 7, 9, timing, launched, roof_ms=0.5))
    run.rows.append(kernels.Row(cases.GEMM, 1, "merv_fast", "bfloat16", 0.0, 7, 9))
    for _ in range(2):
        kernels.write(run, tmp_path / "kernels.json")
    rows = table.read(tmp_path / "kernels.csv")
    assert [(row.op, row.case, row.impl, row.p50) for row in rows] == [
        ("temporal_attention", "B=8", "eager", 2.0),
        ("temporal_attention", "B=8", "eager, launched", 5.0),
    ]
    assert [row.percent_of_roof for row in rows] == [25.0, 10.0]
    assert (rows[0].flops, rows[0].bytes, rows[0].error) == (7, 9, 1e-3)
