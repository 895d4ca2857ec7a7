"""What a finished corpus folder must be like."""

import torch

from merv_fast.integrations.corpus import EncodedCorpus
from merv_fast.integrations.corpus.folder import CorpusFolder
from merv_fast.integrations.corpus.rows import from_parquet
from merv_fast.video import load_frames


def check_once(folder, encoded, failed=()):
    """The manifest has every video once, and every tensor in the folder belongs to one of them."""
    encoded = list(encoded)
    rows, _ = from_parquet(folder / "manifest.parquet")
    assert sorted(row.path for row in rows) == sorted(map(str, [*encoded, *failed]))
    assert {row.path for row in rows if row.status == "ok"} == set(map(str, encoded))
    CorpusFolder(folder).close()
    corpus = EncodedCorpus(folder)
    named = [spec["name"] for row in rows for spec in row.tensors]
    shards = [file.name for file in (folder / "shards").iterdir()]
    assert sorted(named) == sorted(name for shard in shards for name in shard_names(corpus, shard))
    assert not list((folder / "parts").iterdir())
    return corpus


def shard_names(corpus, shard):
    """Names of the tensors in a shard."""
    return list(corpus._shard(shard).keys())


def tokens_in_batch(vidlm, paths):
    """Visual tokens, and weights of encoders, of several videos that are encoded together."""
    model = vidlm.model.video_model
    count = max(vidlm.config.num_frames)
    with torch.inference_mode():
        inputs = [model.prepare(load_frames(path, count).movedim(-1, 1)[None]) for path in paths]
        output = model.fuse(model.encode([torch.cat(parts) for parts in zip(*inputs, strict=True)]))
    return output.pooler_output, [
        dict(zip(model.encoders, row.tolist(), strict=True)) for row in output.encoder_weights
    ]
