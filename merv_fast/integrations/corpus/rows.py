"""What became of each video, as rows of Parquet files."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merv_fast.integrations.corpus.items import Item
from merv_fast.integrations.corpus.optional import require

__all__ = ["Row", "from_parquet", "to_parquet"]


@dataclass(frozen=True)
class Row:
    """One video: where its tensors are, or why there are none.

    Args:
        id: as in `Item`, like ``size`` and ``mtime_ns``, which tell whether the file has changed since.
        path: as it was given; bytes that are not UTF-8 are written as ``\\udcXX``.
        size: see there.
        mtime_ns: see there.
        status: ``ok`` or ``failed``.
        reason: why it failed.
        shard: name of the file in ``shards`` that holds the tensors.
        tensors: ``name`` in the shard (``<id>/tokens``, or ``<id>/<encoder>`` of features), ``dtype`` and ``shape``.
        encoder_weights: share of each encoder in the tokens, float32; None of features, or where there are no weights.
        height: of the video's frames, in pixels.
        width: of the video's frames.
        model: id of the model.
        encoding: digest of all settings: weights, configuration, frames that are read; see ``corpus.json``.
    """

    id: str
    path: str
    size: int | None
    mtime_ns: int | None
    status: str
    reason: str | None = None
    shard: str | None = None
    tensors: list[dict[str, Any]] = field(default_factory=list)
    encoder_weights: dict[str, float] | None = None
    height: int | None = None
    width: int | None = None
    model: str = ""
    encoding: str = ""

    @classmethod
    def of(cls, item: Item, status: str, **more: Any) -> Row:
        """The row of an item."""
        path = item.path.encode("utf-8", "backslashreplace").decode()
        return cls(item.id, path, item.size, item.mtime_ns, status, **more)

    def same_file(self, item: Item) -> bool:
        """Whether the file is as it was."""
        return (self.size, self.mtime_ns) == (item.size, item.mtime_ns)

    def to_json(self) -> str:
        """For a trip between processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Row:
        """What `to_json` was given."""
        return cls(**json.loads(text))


def schema() -> Any:
    """Columns and their types; those of `Row`."""
    pa = require("pyarrow", "corpus")
    tensor = pa.struct([("name", pa.string()), ("dtype", pa.string()), ("shape", pa.list_(pa.int64()))])
    return pa.schema(
        [
            ("id", pa.string()),
            ("path", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
            ("status", pa.string()),
            ("reason", pa.string()),
            ("shard", pa.string()),
            ("tensors", pa.list_(tensor)),
            ("encoder_weights", pa.map_(pa.string(), pa.float32())),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("model", pa.string()),
            ("encoding", pa.string()),
        ]
    )


def to_parquet(rows: list[Row], metadata: dict[str, str]) -> bytes:
    """A Parquet file with ``metadata`` of its own."""
    pa, parquet = require("pyarrow", "corpus"), require("pyarrow.parquet", "corpus")
    columns = schema()
    values = [asdict(row) for row in rows]
    for value in values:
        if value["encoder_weights"] is not None:
            value["encoder_weights"] = list(value["encoder_weights"].items())
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(values, columns.with_metadata(metadata)), file)
    return file.getvalue()


def from_parquet(path: Path) -> tuple[list[Row], dict[str, str]]:
    """What `to_parquet` was given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of these.
    """
    pa, parquet = require("pyarrow", "corpus"), require("pyarrow.parquet", "corpus")
    data = io.BytesIO(path.read_bytes())
    try:
        table = parquet.ParquetFile(data).read()
    except pa.ArrowException as error:
        raise ValueError(f"encode: {path} must be a table of encoded videos ({error})") from error
    if not table.schema.equals(schema()):
        raise ValueError(f"encode: {path} must be a table of encoded videos, got columns {table.column_names}")
    values = table.to_pylist()
    for value in values:
        if value["encoder_weights"] is not None:
            value["encoder_weights"] = dict(value["encoder_weights"])
    metadata = {key.decode(): text.decode() for key, text in (table.schema.metadata or {}).items()}
    return [Row(**value) for value in values], metadata
