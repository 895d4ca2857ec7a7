"""Processes that write a corpus folder and are killed, forked from one that has loaded torch.

``python -m tests.integrations.corpus.writer FOLDER`` kills a first writer at each step in turn that it takes on the
disk, each time in a new folder, and lets a second one finish; then it kills one after another at some moment, in one
folder, until one finishes. What a video's tensors hold follows from its id.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from merv_fast.integrations.corpus.folder import CorpusFolder, write_rows
from merv_fast.integrations.corpus.items import Item, item_id
from merv_fast.integrations.corpus.reader import EncodedCorpus
from merv_fast.integrations.corpus.rows import Row, from_parquet, to_parquet
from tests.integrations.corpus.reading import shard_names

SETTINGS = {"keep": "tokens", "model": "none"}
ITEMS = [Item(item_id(f"/{number}.mp4"), f"/{number}.mp4", 1, 1) for number in range(5)]


def tokens_of(item):
    return torch.full((50, 4), float(int(item.id[:6], 16)))


def is_bad(item):
    return item.path == "/3.mp4"


def row_of(item):
    if is_bad(item):
        return Row.of(item, "failed", reason="is bad"), {}
    spec = {"name": f"{item.id}/tokens", "dtype": "float32", "shape": [50, 4]}
    return Row.of(item, "ok", tensors=[spec]), {"tokens": tokens_of(item)}


def write(path, out):
    """Two videos a shard, until all are there; a byte to ``out`` for each that is committed."""
    with CorpusFolder(path) as folder:
        folder.agree(SETTINGS)
        waiting = [item for item in ITEMS if item.id not in folder.rows]
        for start in range(0, len(waiting), 2):
            rows = folder.commit(write_rows(path, [row_of(item) for item in waiting[start : start + 2]]))
            os.write(out, b"." * len(rows))
        folder.finish()


def forked(work, *arguments):
    """A process that does ``work``, and the pipe that it gets."""
    reader, out = os.pipe()
    if not (child := os.fork()):
        work(*arguments, out)
        os._exit(0)
    os.close(out)
    return child, reader


def ended(child, reader):
    """Its exit code, and how many videos it has committed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader, "rb") as lines:
        return code, len(lines.read())


def killed_at(path, step, out):
    """Write, until that many calls that change the disk have been made: dead before it takes effect."""
    count = itertools.count()

    def counted(call):
        def counting(*args, **kwargs):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        setattr(owner, name, counted(getattr(owner, name)))
    write(path, out)


def check(path, committed, complete):
    """What was committed is there, and right; when it is complete there is nothing else, and nothing twice."""
    if not (path / "corpus.json").exists():
        assert not committed
        return
    corpus, good = EncodedCorpus(path), [item for item in ITEMS if not is_bad(item)]
    assert len(corpus.rows) >= committed
    assert all(torch.equal(corpus[item.path].tokens, tokens_of(item)) for item in good if item.path in corpus)
    if complete:
        rows = from_parquet(path / "manifest.parquet")[0]
        assert sorted(row.id for row in rows) == sorted(item.id for item in ITEMS)
        assert corpus.failed == {"/3.mp4": "is bad"}
        shards = {row.shard for row in rows if row.shard}
        assert {file.name for file in (path / "shards").iterdir()} == shards
        assert {file.name for file in path.iterdir()} == {".lock", "corpus.json", "manifest.parquet", "shards", "parts"}
        assert not list((path / "parts").iterdir())
        assert sum(len(shard_names(corpus, shard)) for shard in shards) == len(good), "a video was encoded twice"


def steps(folder):
    """How many there are at which a writer was killed."""
    for step in itertools.count():
        path = folder / str(step)
        code, committed = ended(*forked(killed_at, path, step))
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            check(path, len(ITEMS), complete=True)
            return step
        check(path, committed, complete=False)
        code, more = ended(*forked(write, path))
        # One may be committed without having been told of.
        assert (code, more <= len(ITEMS) - committed) == (0, True)
        check(path, len(ITEMS), complete=True)
        shutil.rmtree(path)


def moments(folder):
    """How many were killed before one was not."""
    chance, committed = random.Random(0), 0
    for kills in itertools.count():
        child, reader = forked(write, folder)
        # Long enough, in the end, for one to finish.
        time.sleep(chance.random() * 0.004 * (kills + 2))
        os.kill(child, signal.SIGKILL)
        code, more = ended(child, reader)
        committed += more
        assert committed <= len(ITEMS), "a video was committed twice"
        if code == 0:
            check(folder, len(ITEMS), complete=True)
            return kills
        assert code == -signal.SIGKILL
        check(folder, committed, complete=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # What is imported late is imported here, and not in each process.
    to_parquet([row_of(ITEMS[0])[0]], {})
    print(steps(Path(sys.argv[1], "steps")), moments(Path(sys.argv[1], "moments")))
