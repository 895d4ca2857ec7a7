"""Read an encoder's weights from a local file or folder."""

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from merv_fast.errors import CheckpointError

__all__ = ["WEIGHT_FILES", "read_weights"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""What a folder is searched for, in this order."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, mapped from the file where its format allows.

    Args:
        path: a ``.safetensors`` file, a pickled state dict (read with ``weights_only``), the ``.index.json``
            of a sharded checkpoint, or a folder with one of ``WEIGHT_FILES``.

    Raises:
        CheckpointError: nothing is there, or it cannot be read as a state dict.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"{path}: must hold one of {', '.join(WEIGHT_FILES)}, got none")
        path = file
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only the zip format, which torch has written since 1.6, can be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: must hold a dict of tensors, got {type(tensors).__name__}")
    return dict(tensors)


def _read_shards(path: Path) -> dict[str, Tensor]:
    try:
        shards: dict[str, str] = json.loads(path.read_text())["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: must hold a weight_map from key to file") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{path}: names the shard {name!r}, which is not beside it")
        tensors |= _read_file(file)
    if absent := sorted(shards.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: names keys that its shards lack: {', '.join(absent)}")
    return tensors
