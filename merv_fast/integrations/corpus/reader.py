"""EncodedCorpus: what `encode_corpus` has written, for ``MervModel.generate`` and others."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from merv_fast.integrations.corpus.encoder import settings_of
from merv_fast.integrations.corpus.folder import SHARDS, read_rows, read_settings
from merv_fast.integrations.corpus.items import item_id
from merv_fast.integrations.corpus.rows import Row
from merv_fast.models import MervModel, VisualTokens

__all__ = ["EncodedCorpus"]

OPEN_SHARDS = 64
"""Shards that are mapped at the same time, besides those whose tensors somebody holds."""


class EncodedCorpus(Mapping[str, VisualTokens]):
    """Encoded videos by path or id; each is given to ``generate`` in place of the video, and no encoder runs.

    Shards are memory-mapped when they are first needed; tensors are views of them, so do not write to them. What
    another process commits later is not seen. Iterating gives the paths, as they were given, of the videos that were
    encoded; a video is also found by another path that leads to it.

    Args:
        folder: as ``encode_corpus`` had it.
        vidlm: the model that made it, which a corpus of features needs to fuse them; `check` tells whether it is.

    Attributes:
        settings: what decided the tensors, as in ``corpus.json``.
        rows: of all videos, by id.

    Raises:
        ValueError: there is no corpus.

    Example:
        >>> import merv_fast, tempfile
        >>> from merv_fast.integrations.corpus import encode_corpus
        >>> vidlm, clip = merv_fast.load_vid("merv-tiny"), merv_fast.sample_clip()
        >>> with tempfile.TemporaryDirectory() as out:
        ...     _ = encode_corpus([clip], out, device="cpu", workers=1)
        ...     answers = [vidlm.generate(v, "Why?", max_new_tokens=4) for v in (clip, EncodedCorpus(out)[clip])]
        >>> answers[0] == answers[1]
        True
    """

    def __init__(self, folder: str | os.PathLike[str], vidlm: MervModel | None = None) -> None:
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        if settings is None:
            raise ValueError(f"EncodedCorpus: folder must be one that encode has made, got {os.fspath(folder)!r}")
        self.settings: dict[str, Any] = settings
        self.vidlm = vidlm
        self.rows = read_rows(self.folder)[0]
        self._by_path = {row.path: row for row in self.rows.values()}
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to a process."""
        return self.__dict__ | {"_shards": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    @property
    def failed(self) -> dict[str, str]:
        """Why each of the videos that could not be decoded could not, by path."""
        return {row.path: row.reason or "" for row in self.rows.values() if row.status == "failed"}

    def __len__(self) -> int:
        return sum(row.status == "ok" for row in self.rows.values())

    def __iter__(self) -> Iterator[str]:
        return (row.path for row in self.rows.values() if row.status == "ok")

    def __contains__(self, video: object) -> bool:
        row = self._row(video) if isinstance(video, (str, os.PathLike)) else None
        return row is not None and row.status == "ok"

    def __getitem__(self, video: str | os.PathLike[str]) -> VisualTokens:
        """Visual tokens on the CPU; of a corpus of features fused by ``vidlm``, where that is.

        Raises:
            KeyError: the video is not there, or failed.
            ValueError: these are features, and there is no model.
        """
        row, tensors = self.row(video), self.tensors(video)
        if self.settings["keep"] == "tokens":
            return VisualTokens(tensors["tokens"], row.encoder_weights)
        if self.vidlm is None:
            raise ValueError(f"EncodedCorpus: vidlm must be given to fuse the features of {self.folder}, got None")
        return fuse(self.vidlm, tensors)

    def row(self, video: str | os.PathLike[str]) -> Row:
        """What is known of a video that was encoded.

        Raises:
            KeyError: it is not there, or failed.
        """
        row = self._row(video)
        if row is None:
            raise KeyError(f"{os.fspath(video)!r} is not in {self.folder}")
        if row.status == "failed":
            raise KeyError(f"{os.fspath(video)!r} failed: {row.reason}")
        return row

    def tensors(self, video: str | os.PathLike[str]) -> dict[str, Tensor]:
        """What is stored of a video: ``tokens`` [S, D], or the features [T_e, N_e, C_e] of each encoder by its name.

        Raises:
            KeyError: it is not there, or failed.
        """
        row = self.row(video)
        shard = self._shard(str(row.shard))
        return {spec["name"].removeprefix(f"{row.id}/"): shard.get_tensor(spec["name"]) for spec in row.tensors}

    def check(self, vidlm: MervModel) -> None:
        """Raise ValueError, which says what differs, unless ``vidlm`` would make the same; reads all of its weights.

        Where it runs does not matter.
        """
        clip = {name: self.settings[name] for name in ("clip_start_sec", "clip_end_sec")}
        now = settings_of(vidlm.model.video_model, self.settings["keep"], clip, self.settings["device"])
        if differ := [f"{key} {self.settings.get(key)}" for key in now if now[key] != self.settings.get(key)]:
            raise ValueError(f"EncodedCorpus: vidlm must be the model of {self.folder}, which has {', '.join(differ)}")

    def _row(self, video: str | os.PathLike[str]) -> Row | None:
        path = os.fspath(video)
        return self.rows.get(item_id(path)) or self._by_path.get(path) or self.rows.get(path)

    def _shard(self, name: str) -> Any:
        with self._lock:
            if name not in self._shards:
                self._shards[name] = safe_open(self.folder / SHARDS / name, framework="pt")
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(name)
            return self._shards[name]


@torch.inference_mode()
def fuse(vidlm: MervModel, features: Mapping[str, Tensor]) -> VisualTokens:
    """Visual tokens from the features of every encoder, each [T_e, N_e, C_e]."""
    model = vidlm.model.video_model
    output = model.fuse([features[name][None].to(model.device) for name in model.encoders])
    weights = output.encoder_weights
    named = None if weights is None else dict(zip(model.encoders, weights.float().view(-1).tolist(), strict=True))
    return VisualTokens(output.pooler_output[0], named)
