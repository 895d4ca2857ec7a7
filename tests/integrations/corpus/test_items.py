import os

import pytest

from merv_fast.integrations.corpus.items import find_items, item_id


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"123")


def test_what_a_folder_holds(tmp_path):
    """Videos at any depth, folders of frames, neither single pictures beside videos nor hidden files."""
    make(
        tmp_path,
        "b/1.MP4",
        "b/cover.png",
        "a.webm",
        ".c/2.mp4",
        "b/.3.mp4",
        "frames/x/1.jpg",
        "frames/x/2.jpg",
        "t.txt",
    )
    found = find_items([tmp_path])
    assert [os.path.relpath(item.path, tmp_path) for item in found] == ["a.webm", "b/1.MP4", "frames/x"]
    assert [item.size for item in found] == [3, 3, 6]
    (tmp_path / ".c/d").mkdir()
    with pytest.raises(ValueError, match=r"encode: folders must hold a video, got '.*.c/d'"):
        find_items([tmp_path / ".c/d"])


def test_a_video_is_one_item_by_whatever_path(tmp_path, monkeypatch):
    make(tmp_path, "a.mp4", "b.mp4", "odd name.bin")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    found = find_items(["a.mp4", tmp_path / "a.mp4", "./a.mp4", "link.mp4", tmp_path, "odd name.bin", "none.mp4"])
    assert [item.path for item in found] == ["a.mp4", str(tmp_path / "b.mp4"), "odd name.bin", "none.mp4"]
    assert found[0].id == item_id(tmp_path / "link.mp4") != found[1].id
    assert (found[-1].size, found[-1].mtime_ns) == (None, None)


def test_a_change_shows(tmp_path):
    make(tmp_path, "a.mp4", "frames/1.png")
    before = find_items([tmp_path])
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    (tmp_path / "frames/1.png").write_bytes(b"1234")
    after = find_items([tmp_path])
    assert [item.id for item in before] == [item.id for item in after]
    assert all(old != new for old, new in zip(before, after, strict=True))
