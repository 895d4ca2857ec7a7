"""bench.compare: a slowdown is caught, noise is not called one, and what stands alone is said."""

from dataclasses import replace

import pytest

from bench.compare import main
from bench.table import append
from tests.bench.test_table import ROW


@pytest.fixture
def compared(tmp_path, capsys):
    """(exit code, what was printed) of comparing two lists of rows."""

    def run(before, after, *options):
        files = tmp_path / "before.csv", tmp_path / "after.csv"
        for file, rows in zip(files, (before, after), strict=True):
            append(file, rows)
        code = main([*map(str, files), *options])
        return code, capsys.readouterr().out

    return run


def scaled(row, factor):
    return replace(row, p20=row.p20 * factor, p50=row.p50 * factor, p80=row.p80 * factor)


QUIET = replace(ROW, p20=9.9, p50=10.0, p80=10.2)


@pytest.mark.parametrize(
    ("factor", "options", "code", "verdict"),
    [
        (1.0, [], 0, None),
        (1.09, [], 0, None),
        (1.2, [], 1, "slower"),
        (1.2, ["--share", "0.3"], 0, None),
        (1.05, ["--share", "0.02"], 1, "slower"),
        (0.8, [], 0, "faster"),
    ],
)
def test_a_slowdown_over_the_share_is_an_error(compared, factor, options, code, verdict):
    got, text = compared([QUIET], [scaled(QUIET, factor)], *options)
    assert got == code
    assert f"{factor:.2f}" in text
    for word in ("slower ", "faster ", "unclear "):
        assert (word in text.split("rows in both")[0]) == (word.strip() == verdict), text


def test_a_median_that_moved_within_the_spread_is_unclear(compared):
    noisy = replace(ROW, p20=8.0, p50=10.0, p80=14.0)
    code, text = compared([noisy], [scaled(noisy, 1.5)])
    assert code == 0
    assert "unclear" in text
    assert "0.86-2.62" in text
    code, text = compared([noisy], [scaled(noisy, 2.0)])
    assert code == 1


def test_one_slow_row_among_many(compared):
    rows = [replace(QUIET, case=f"B={B}") for B in range(5)]
    after = [*rows[:3], scaled(rows[3], 2.0), rows[4]]
    code, text = compared(rows, after)
    assert code == 1
    assert "5 rows in both, 1 slower by more than 10%" in text
    # The slowest comes first.
    assert text.index("B=3") < text.index("B=0")


def test_rows_of_one_file_only_are_named(compared):
    gone, new = replace(QUIET, impl="compiled"), replace(QUIET, dtype="float64")
    code, text = compared([QUIET, gone], [QUIET, new])
    assert code == 0
    lines = [line.replace("\n", "") for line in text.splitlines() if line.startswith("only in")]
    assert lines[0].endswith("before.csv: pool_tokens, 16x16x1024, B=1, compiled, a CPU, 2 threads, float32")
    assert lines[1].endswith("after.csv: pool_tokens, 16x16x1024, B=1, merv_fast, a CPU, 2 threads, float64")


def test_files_with_nothing_in_common_are_an_error(compared):
    code, text = compared([QUIET], [replace(QUIET, device="a GPU")])
    assert code == 2
    assert "must share a row" in text


def test_the_last_run_in_a_file_counts(compared):
    assert compared([scaled(QUIET, 3.0), QUIET], [QUIET, scaled(QUIET, 2.0)])[0] == 1


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n"])
def test_what_is_no_table_is_said(tmp_path, capsys, content):
    if content:
        (tmp_path / "x.csv").write_text(content)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "x.csv"), str(tmp_path / "x.csv")])
    assert caught.value.code == 2
    assert "x.csv" in capsys.readouterr().err
