"""What is on the disk, whatever happens to who writes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merv_fast.integrations.corpus import EncodedCorpus
from merv_fast.integrations.corpus.folder import CorpusFolder, write_rows
from merv_fast.integrations.corpus.items import Item
from merv_fast.integrations.corpus.rows import Row, from_parquet, to_parquet

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def row_of(name, value=0.0):
    item = Item(name, f"{name}.mp4", 1, 2)
    spec = {"name": f"{name}/tokens", "dtype": "float32", "shape": [3]}
    return Row.of(item, "ok", tensors=[spec]), {"tokens": torch.full((3,), value)}


def put(folder, *names, value=0.0):
    return folder.commit(write_rows(folder.folder, [row_of(name, value) for name in names]))


def test_killed_writers_lose_and_repeat_nothing(tmp_path):
    """At every step on the disk, and at moments in between: see the program."""
    command = [sys.executable, "-m", "tests.integrations.corpus.writer", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    steps, moments = map(int, done.stdout.split())
    assert steps >= 25
    assert moments >= 3


def test_rows_survive_the_trip(tmp_path):
    weights = {"b": 0.1, "a": 0.9}
    exact = {name: torch.tensor(value).item() for name, value in weights.items()}
    path = "caf\N{LATIN SMALL LETTER E WITH ACUTE}/" + os.fsdecode(b"\xff.mp4")
    rows = [
        Row.of(Item("1", path, None, None), "failed", reason="is bad"),
        Row(
            "2",
            "x",
            2**40,
            2**60,
            "ok",
            None,
            "s",
            [{"name": "2/a", "dtype": "bfloat16", "shape": [3, 4]}],
            exact,
            1,
            2,
        ),
    ]
    (tmp_path / "x").write_bytes(to_parquet(rows, {"key": "value"}))
    assert from_parquet(tmp_path / "x") == (rows, {"key": "value"})
    assert [Row.from_json(row.to_json()) for row in rows] == rows
    assert rows[0].path == "caf\N{LATIN SMALL LETTER E WITH ACUTE}/\\udcff.mp4"
    assert list(from_parquet(tmp_path / "x")[0][1].encoder_weights) == ["b", "a"]


def test_only_one_process_writes(tmp_path):
    with CorpusFolder(tmp_path), pytest.raises(RuntimeError, match="no other process may write to"):
        CorpusFolder(tmp_path)
    CorpusFolder(tmp_path).close()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"encode: out must be a folder that is new, .* with thesis.txt"):
        CorpusFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_settings_are_refused(tmp_path):
    with CorpusFolder(tmp_path) as folder:
        folder.agree({"dtype": "float32", "weights": "a" * 64})
    with CorpusFolder(tmp_path) as folder:
        folder.agree({"dtype": "float32", "weights": "a" * 64})
        with pytest.raises(
            ValueError, match=r"but dtype is 'float32' there, 'bfloat16' now; weights is a{12}... there, b"
        ):
            folder.agree({"dtype": "bfloat16", "weights": "b" * 64})


def test_a_row_that_comes_twice_counts_once(tmp_path):
    with CorpusFolder(tmp_path) as folder:
        folder.agree({"keep": "tokens"})
        assert [row.id for row in put(folder, "a", "b", value=1.0)] == ["a", "b"]
        assert [row.id for row in put(folder, "b", "c", value=2.0)] == ["c"]
        assert put(folder, "a", value=3.0) == []
        folder.finish()
    assert len(list((tmp_path / "shards").iterdir())) == 3
    CorpusFolder(tmp_path).close()
    assert len(list((tmp_path / "shards").iterdir())) == 2
    corpus = EncodedCorpus(tmp_path)
    assert {path: corpus[path].tokens[0].item() for path in corpus} == {"a.mp4": 1, "b.mp4": 1, "c.mp4": 2}


def test_a_later_run_replaces_a_row(tmp_path):
    for value in (1.0, 2.0):
        with CorpusFolder(tmp_path) as folder:
            folder.agree({"keep": "tokens"})
            put(folder, "a", value=value)
            folder.finish()
    (row,) = from_parquet(tmp_path / "manifest.parquet")[0]
    assert EncodedCorpus(tmp_path)["a"].tokens[0] == 2
    assert row.shard is not None


def test_a_part_that_the_manifest_has_is_not_read_again(tmp_path):
    """A run that was killed between the two leaves parts, of which some may go before others."""
    with CorpusFolder(tmp_path) as folder:
        folder.agree({"keep": "tokens"})
        folder.commit([Row.of(Item("a", "a.mp4", 1, 2), "failed", reason="is bad")])
        old = (tmp_path / "parts/00000001.parquet").read_bytes()
        folder.finish()
    with CorpusFolder(tmp_path) as folder:
        put(folder, "a")
        folder.finish()
    (tmp_path / "parts/00000001.parquet").write_bytes(old)
    assert EncodedCorpus(tmp_path).failed == {}
    with CorpusFolder(tmp_path) as folder:
        assert folder.rows["a"].status == "ok"
        assert not list((tmp_path / "parts").iterdir())
        assert put(folder, "b")
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["00000003.parquet"]


def test_what_a_killed_writer_leaves_goes(tmp_path):
    """Also what safetensors leaves, which writes to a hidden file of its own first."""
    with CorpusFolder(tmp_path) as folder:
        folder.agree({"keep": "tokens"})
        put(folder, "a")
        kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    name = f".{'0' * 32}.tmp"
    left = ["shards/.tmpA1b2C3", f"shards/{name}", f"parts/{name}", name, f"shards/{'0' * 32}.safetensors"]
    for place in left:
        (tmp_path / place).touch()
    (tmp_path / "shards/notes.txt").touch()
    CorpusFolder(tmp_path).close()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept | {tmp_path / "shards/notes.txt"}


def test_a_missing_shard_is_made_again(tmp_path, caplog):
    with CorpusFolder(tmp_path) as folder:
        folder.agree({"keep": "tokens"})
        put(folder, "a")
        put(folder, "b")
        lost = folder.rows["a"].shard
    (tmp_path / "shards" / lost).unlink()
    with CorpusFolder(tmp_path) as folder:
        assert list(folder.rows) == ["b"]
    assert "the shards of 1 videos are gone" in caplog.text


def test_what_is_not_a_table_of_videos(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    CorpusFolder(tmp_path).close()
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(ValueError, match=r"manifest.parquet must be a table of encoded videos"):
        CorpusFolder(tmp_path)
    parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "manifest.parquet")
    with pytest.raises(ValueError, match=r"manifest.parquet must be .* got columns \['id'\]"):
        CorpusFolder(tmp_path)
    with pytest.raises(ValueError, match="EncodedCorpus: folder must be one that encode has made"):
        EncodedCorpus(tmp_path / "parts")
