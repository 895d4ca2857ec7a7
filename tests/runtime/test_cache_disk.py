import hashlib
import json
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merv_fast.runtime.cache.disk import DiskTier, pack, unpack

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
SHAPES = st.lists(st.integers(0, 4), max_size=4)


def key(name):
    return hashlib.sha256(name.encode()).hexdigest()


def entry(value, size=1000):
    return {"x": torch.full((size,), value, dtype=torch.uint8)}


def same(got, expected):
    return got.keys() == expected.keys() and all(
        got[name].dtype == x.dtype
        and got[name].shape == x.shape
        and torch.equal(got[name].reshape(-1).view(torch.uint8), x.contiguous().reshape(-1).view(torch.uint8))
        for name, x in expected.items()
    )


@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=3), st.randoms())
def test_a_round_trip_keeps_every_bit(kinds, random):
    tensors = {}
    for index, (dtype, shape) in enumerate(kinds):
        length = torch.Size(shape).numel() * dtype.itemsize
        data = [random.randrange(2 if dtype == torch.bool else 256) for _ in range(length)]
        tensors[str(index)] = torch.tensor(data, dtype=torch.uint8).view(dtype).reshape(shape)
    assert same(unpack(pack(tensors, key("a")), key("a")), tensors)


def test_strides_do_not_matter(tmp_path):
    tier, tensors = DiskTier(tmp_path, 10**6), {"x": torch.arange(12.0).view(3, 4).t()[1:]}
    tier.put(key("a"), tensors)
    assert same(tier.get(key("a")), tensors)


@settings(max_examples=300)
@given(st.data())
def test_no_damaged_entry_is_taken_for_whole(data):
    """Any cut, any bytes overwritten: the same tensors (the change was in what does not matter) or an error."""
    tensors = {"tokens": torch.arange(20.0).view(4, 5), "encoder_weights": torch.rand(4)}
    whole = pack(tensors, key("a"))
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        damaged = whole[:at] + new + whole[at + len(new) :]
    try:
        got = unpack(damaged, key("a"))
    except ValueError:
        return
    assert same(got, tensors)


@pytest.mark.parametrize("position", ["header", "data"])
def test_every_flipped_bit_is_noticed(position):
    tensors = {"x": torch.arange(5.0)}
    whole = pack(tensors, key("a"))
    data_at = 8 + int.from_bytes(whole[:8], "little")
    for at in range(8, data_at) if position == "header" else range(data_at, len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            try:
                got = unpack(bytes(damaged), key("a"))
            except ValueError:
                continue
            assert position == "header"
            assert same(got, tensors)


def test_a_damaged_entry_is_spoken_of_and_made_again(tmp_path, caplog):
    tier, path = DiskTier(tmp_path, 10**6), tmp_path / f"{key('a')}.safetensors"
    whole = pack(entry(1), key("a"))
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"not a safetensors file at all"):
        path.write_bytes(damaged)
        caplog.clear()
        assert tier.get(key("a")) is None
        assert f"{path}: not used, to be made again: is damaged" in caplog.text
        tier.put(key("a"), entry(2))
        assert same(tier.get(key("a")), entry(2))


def test_a_foreign_entry_is_spoken_of(tmp_path, caplog):
    tier, path = DiskTier(tmp_path, 10**6), tmp_path / f"{key('a')}.safetensors"
    save_file(entry(1), path)
    assert tier.get(key("a")) is None
    assert "is not in the format merv_fast.cache.1" in caplog.text
    save_file(entry(1), path, {"format": "pt", "key": key("a")})
    assert tier.get(key("a")) is None
    tier.put(key("b"), entry(1))
    (tmp_path / f"{key('b')}.safetensors").rename(path)
    assert tier.get(key("a")) is None
    assert "was written for another key" in caplog.text


def used(tier, name, seconds_ago):
    then = time.time() - seconds_ago
    os.utime(tier._path(key(name)), (then, then))


def names(tier):
    return {name for name in "abcdef" if tier._path(key(name)).exists()}


def test_the_least_recently_used_leave_and_the_bound_holds(tmp_path):
    size = len(pack(entry(1), key("a")))
    tier = DiskTier(tmp_path, 3 * size)
    for age, name in enumerate("cba"):
        tier.put(key(name), entry(1))
        used(tier, name, seconds_ago=1000 + 10 * age)
    assert names(tier) == set("abc")  # a is the oldest
    assert tier.get(key("a")) is not None  # and now the youngest
    tier.put(key("d"), entry(1))
    assert names(tier) == set("acd")
    assert tier.nbytes == 3 * size
    tier.put(key("e"), entry(1, size=1000 + size))  # as large as two
    assert names(tier) in ({"a", "e"}, {"d", "e"})
    assert tier.nbytes <= 3 * size


def test_what_is_larger_than_the_bound_is_not_written(tmp_path, caplog):
    tier = DiskTier(tmp_path, 2000)
    tier.put(key("a"), entry(1))
    tier.put(key("b"), entry(1, size=2000))
    assert names(tier) == {"a"}
    assert "is not kept in 2000" in caplog.text


def test_files_of_others_are_left_alone(tmp_path):
    for name in ("model.safetensors", "notes.tmp", ".hidden.tmp", "0" * 63 + ".safetensors"):
        (tmp_path / name).write_bytes(bytes(5000))
        os.utime(tmp_path / name, (0, 0))
    tier = DiskTier(tmp_path, 3000)
    for name in "abcdef":
        tier.put(key(name), entry(1))
    assert len(names(tier)) == 2
    assert len(list(tmp_path.iterdir())) == 4 + 2


def test_temporary_files_of_the_dead_are_removed_when_they_are_old(tmp_path):
    tier = DiskTier(tmp_path, 10**6)
    old, young = tier._temporary(key("a")), tier._temporary(key("b"))
    for path in (old, young):
        path.write_bytes(bytes(100))
    os.utime(old, (time.time() - 3700,) * 2)
    DiskTier(tmp_path, 10**6)
    assert (old.exists(), young.exists()) == (False, True)
    assert tier.nbytes == 100
    size = len(pack(entry(1), key("a")))
    DiskTier(tmp_path, size + 50).put(key("a"), entry(1))
    assert young.exists()  # its writer is alive, and room for it was made


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/merv_fast"])
def test_a_folder_that_cannot_be_written_to(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"VideoCache: folder must be a folder that can be written to, got '.*' "):
        DiskTier(tmp_path / where, 10**6)


def test_a_disk_that_fails_costs_nothing_but_the_entry(tmp_path, monkeypatch, caplog):
    tier = DiskTier(tmp_path, 10**6)
    tier.put(key("a"), entry(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    tier.put(key("b"), entry(2))
    assert "could not be written: [Errno 28] No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [f"{key('a')}.safetensors"]


def test_a_folder_that_is_gone(tmp_path, caplog):
    tier = DiskTier(tmp_path / "gone", 10**6)
    (tmp_path / "gone").rmdir()
    assert tier.get(key("a")) is None
    assert tier.nbytes == 0
    tier.put(key("a"), entry(1))
    assert "could not be written" in caplog.text


def test_an_entry_says_what_it_is(tmp_path):
    data = pack(entry(1), key("a"))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert header["format"] == "merv_fast.cache.1"
    assert header["key"] == key("a")
    assert set(header) == {"format", "key", "checksum"}
