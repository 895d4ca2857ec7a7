import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merv_fast.encoders import read_weights
from merv_fast.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}


def write(path: Path, tensors: dict[str, Tensor] = TENSORS) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def write_index(folder: Path, name: str, files: dict[str, str]) -> Path:
    index = folder / name
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def same(got: dict[str, Tensor]) -> bool:
    return got.keys() == TENSORS.keys() and all(torch.equal(got[key], TENSORS[key]) for key in got)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
)
def test_file_and_folder(tmp_path, name):
    path = write(tmp_path / name)
    assert same(read_weights(path))
    assert same(read_weights(str(tmp_path)))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = {key: f"{stem}-{n}.{suffix}" for n, key in enumerate(TENSORS)}
    for key, file in files.items():
        write(tmp_path / file, {key: TENSORS[key]})
    index = write_index(tmp_path, f"{stem}.{suffix}.index.json", files)
    assert same(read_weights(index))
    assert same(read_weights(tmp_path))


def test_safetensors_come_first(tmp_path):
    write(tmp_path / "model.safetensors")
    write(tmp_path / "pytorch_model.bin", {"c": torch.zeros(1)})
    assert same(read_weights(tmp_path))


def test_pickles_are_mapped(tmp_path, monkeypatch):
    load, seen = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k) or load(*a, **k))
    path = write(tmp_path / "pytorch_model.bin")
    read_weights(path)
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert same(read_weights(path))
    assert [(k["weights_only"], k["mmap"]) for k in seen] == [(True, True), (True, False)]


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def test_pickles_cannot_run_code(tmp_path):
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read as weights"):
        read_weights(tmp_path)
    assert not Evil.ran


def test_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold one of model.safetensors, .*, got none"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent.bin: no such file"):
        read_weights(tmp_path / "absent.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read as weights"):
            read_weights(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="must hold a dict of tensors, got list"):
        read_weights(tmp_path / "list.bin")


def test_index_errors(tmp_path):
    name = "model.safetensors.index.json"
    (tmp_path / name).write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a weight_map"):
        read_weights(tmp_path)
    write_index(tmp_path, name, {"a": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"shard 'model-1.safetensors', which is not beside it"):
        read_weights(tmp_path)
    write(tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match="keys that its shards lack: a"):
        read_weights(tmp_path)
    folder = tmp_path / "inner"
    folder.mkdir()
    write_index(folder, name, {"b": "../model-1.safetensors"})
    with pytest.raises(CheckpointError, match="which is not beside it"):
        read_weights(folder)
