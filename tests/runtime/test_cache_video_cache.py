import copy
import hashlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.cache.video_cache import CacheCounts


def key(name):
    return hashlib.sha256(name.encode()).hexdigest()


def make(keys):
    return [{"x": torch.tensor([float(int(k[:4], 16))])} for k in keys]


def refuse(keys):
    raise AssertionError(f"made again: {keys}")


def test_what_is_kept_is_not_made_again():
    cache = VideoCache()
    (first, again, other) = cache.fetch([key("a"), key("a"), key("b")], make)
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], other["x"])
    assert cache.counts == CacheCounts(hits=0, misses=2)
    assert torch.equal(cache.fetch([key("b")], refuse)[0]["x"], other["x"])
    assert cache.counts == CacheCounts(hits=1, misses=2)
    assert str(cache) == "1 hits (0 from disk), 2 misses; 2 in memory, 0.0 of 1073.7 MB"
    cache.clear()
    assert cache.counts == CacheCounts()
    with pytest.raises(AssertionError, match="made again"):
        cache.fetch([key("b")], refuse)


def test_only_what_is_missing_is_made():
    cache, asked = VideoCache(), []
    cache.fetch([key("b")], make)
    got = cache.fetch([key("a"), key("b"), key("c")], lambda keys: asked.append(keys) or make(keys))
    assert asked == [[key("a"), key("c")]]
    assert [entry["x"].item() for entry in got] == [make([key(name)])[0]["x"].item() for name in "abc"]


def test_an_entry_is_the_callers_own():
    cache = VideoCache()
    made = {"x": torch.zeros(3)}
    (first,) = cache.fetch([key("a")], lambda keys: [made])
    for mine in (made, first, cache.fetch([key("a")], refuse)[0]):
        mine["x"].fill_(7)
    assert cache.fetch([key("a")], refuse)[0]["x"].tolist() == [0, 0, 0]


def test_an_entry_holds_no_more_memory_than_its_own():
    cache, batch = VideoCache(), torch.zeros(100, 3)
    cache.fetch([key("a")], lambda keys: [{"x": batch[0]}])
    assert cache.memory.get(key("a"))["x"].untyped_storage().nbytes() == 12


def test_the_disk_outlives_the_memory(tmp_path):
    first = VideoCache(folder=tmp_path)
    expected = first.fetch([key("a")], make)
    second = VideoCache(folder=tmp_path, max_bytes=0)
    for _ in range(2):
        assert torch.equal(second.fetch([key("a")], refuse)[0]["x"], expected[0]["x"])
    assert second.counts == CacheCounts(hits=2, from_disk=2)
    third = VideoCache(folder=tmp_path)
    for _ in range(2):
        third.fetch([key("a")], refuse)
    assert third.counts == CacheCounts(hits=2, from_disk=1)
    assert str(tmp_path) in str(third)


def test_a_copy_has_the_settings_and_the_folder(tmp_path):
    cache = VideoCache(max_bytes=1000, folder=tmp_path, keep="features")
    cache.fetch([key("a")], make)
    for other in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert (other.memory.max_bytes, other.keep, len(other.memory)) == (1000, "features", 0)
        other.fetch([key("a")], refuse)


def test_what_is_no_longer_valid_is_not_kept():
    cache = VideoCache()
    assert len(cache.fetch([key("a"), key("b")], make, lambda k: k == key("b"))) == 2
    cache.fetch([key("b")], refuse)
    with pytest.raises(AssertionError, match="made again"):
        cache.fetch([key("a")], refuse)


def test_threads_share_one_making():
    cache, calls, begun, go = VideoCache(), [], threading.Event(), threading.Event()

    def slow(keys):
        calls.append(keys)
        begun.set()
        assert go.wait(60)
        return make(keys)

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.fetch, [key("a")], slow)
        assert begun.wait(60)
        others = [pool.submit(cache.fetch, [key("a")], slow) for _ in range(7)]
        go.set()
        values = {future.result()[0]["x"].item() for future in [first, *others]}
    assert calls == [[key("a")]]
    assert values == {make([key("a")])[0]["x"].item()}
    assert cache.counts == CacheCounts(hits=7, misses=1)


def test_overlapping_threads_neither_deadlock_nor_work_twice():
    cache, lock, made = VideoCache(), threading.Lock(), []

    def counted(keys):
        with lock:
            made.extend(keys)
        return make(keys)

    def ask(index):
        wanted = [key(str((index + step) % 16)) for step in range(5)]
        if index % 2:
            wanted.reverse()
        got = cache.fetch(wanted, counted)
        return all(torch.equal(entry["x"], want["x"]) for entry, want in zip(got, make(wanted), strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))
    assert len(made) == len(set(made)) == 16


def test_when_a_thread_fails_another_makes_it():
    cache, begun, go = VideoCache(), threading.Event(), threading.Event()

    def fail(keys):
        begun.set()
        assert go.wait(60)
        raise RuntimeError("no luck")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, [key("a")], fail)
        assert begun.wait(60)
        second = pool.submit(cache.fetch, [key("a")], make)
        go.set()
        with pytest.raises(RuntimeError, match="no luck"):
            first.result()
        assert torch.equal(second.result()[0]["x"], make([key("a")])[0]["x"])
    assert cache._under_way == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bytes": -1}, "VideoCache: max_bytes must be an int of at least 0, got -1"),
        ({"max_bytes": 1e9}, "VideoCache: max_bytes must be an int of at least 0, got 1000000000.0"),
        ({"max_disk_bytes": -1}, "VideoCache: max_disk_bytes must be an int of at least 0, got -1"),
        ({"keep": "all"}, "VideoCache: keep must be one of tokens, features, got 'all'"),
    ],
)
def test_says_which_setting_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoCache(**arguments)
