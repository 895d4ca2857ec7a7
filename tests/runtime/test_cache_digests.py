import os
import time

import pytest
import torch
from torch import nn

from merv_fast.runtime.cache import digests
from merv_fast.runtime.cache.digests import FileDigests, WeightDigests, digest_tensor


def aged(path, seconds=60):
    """Make a file look as if it had been left alone for a while; only the inode's change time cannot be set."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def reads(monkeypatch):
    """How many files are read."""
    count = []
    file_digest = digests.hashlib.file_digest
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *args: count.append(1) or file_digest(*args))
    return count


def test_a_file_counts_by_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two")
    a, b, c = (FileDigests().file(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_settled_file_is_read_once(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    path, files = tmp_path / "a", FileDigests()
    path.write_bytes(b"one")
    assert files.file(path) == files.file(path)
    assert len(reads) == 1
    before = files.file(path)
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times would
    assert files.file(path) != before
    path.unlink()
    path.write_bytes(b"one")
    assert files.file(path) == before


def test_a_file_that_was_just_written_is_read_again(tmp_path, reads):
    """Another write within the resolution of its time stamps would not show."""
    path, files = tmp_path / "a", FileDigests()
    path.write_bytes(b"one")
    aged(path)
    assert files.file(path) == files.file(path)
    assert len(reads) == 2


def test_only_so_many_files_are_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    files = FileDigests(most=2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        files.file(tmp_path / name)
    files.file(tmp_path / "c")
    assert len(reads) == 3
    files.file(tmp_path / "a")
    assert len(reads) == 4


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(OSError, match=r".+"):
            FileDigests().file(tmp_path / name)


def test_a_folder_counts_by_names_and_bytes(tmp_path):
    files = FileDigests()
    for name in ("1.png", "2.PNG", "note.txt"):
        (tmp_path / name).write_text(name)

    def digest():
        return files.folder(tmp_path, (".png",))

    first = digest()
    (tmp_path / "note.txt").write_text("another")
    assert digest() == first
    (tmp_path / "2.PNG").write_text("another")
    second = digest()
    (tmp_path / "2.PNG").rename(tmp_path / "3.PNG")
    assert len({first, second, digest()}) == 3


def test_a_tensor_counts_by_type_shape_and_elements():
    x = torch.arange(6, dtype=torch.int32)
    variants = [x, x.float(), x.view(2, 3), x.view(3, 2), x + 1, x.view(torch.float32), x[:0], x[:0].view(0, 2), x[0]]
    assert len({digest_tensor(variant) for variant in variants}) == len(variants)
    assert digest_tensor(x.view(2, 3).t()) == digest_tensor(x.view(2, 3).t().contiguous())
    assert digest_tensor(x[::2]) == digest_tensor(x[::2].clone())


@pytest.mark.parametrize("write", ["in place", "step", "load", "cast", "data", "buffer", "name", "replaced"])
def test_weights_that_change_have_another_digest(write):
    module, weights = nn.BatchNorm1d(4), WeightDigests()
    before = weights.module(module)
    assert weights.module(module) == before
    match write:
        case "in place":
            with torch.no_grad():
                module.weight[3] += 2**-20
        case "step":
            module(torch.randn(3, 4)).square().sum().backward()
            torch.optim.SGD(module.parameters(), lr=1.0).step()
        case "load":
            module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
        case "cast":
            module.double()
        case "data":
            module.weight.data = torch.zeros(4)
        case "buffer":
            module.running_mean.add_(1)
        case "name":
            module.other = module._parameters.pop("weight")
        case "replaced":
            module.weight = nn.Parameter(torch.zeros(4))
    assert weights.module(module) != before


def test_the_same_weights_elsewhere_have_the_same_digest():
    torch.manual_seed(0)
    first = nn.Linear(3, 2)
    second = nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert WeightDigests().module(first) == WeightDigests().module(second)


def test_weights_are_read_once(monkeypatch):
    module, weights, calls = nn.Linear(3, 2), WeightDigests(), []
    monkeypatch.setattr(digests, "digest_tensor", lambda tensor: calls.append(1) or digest_tensor(tensor))
    for _ in range(3):
        weights.module(module)
    assert len(calls) == 2
    weights.forget(module)
    weights.module(module)
    assert len(calls) == 4


def test_weights_without_versions_are_read_every_time():
    with torch.inference_mode():
        module, weights = nn.Linear(3, 2), WeightDigests()
        before = weights.module(module)
        module.weight.add_(1)
        assert weights.module(module) != before
