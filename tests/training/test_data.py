"""The data format: what is read, and what is said of an entry that does not fit."""

import json
from pathlib import Path

import pytest

from merv_fast.training import Turn, read_entries
from tests.training.small import conversation, write_data

GOOD = conversation("A ball.", video="v.mp4")


def test_entries_with_a_video_a_picture_and_neither(tmp_path):
    values = [
        conversation("A ball.", video="clips/v.mp4", id="first", source="elsewhere"),
        conversation("A box.", image="p.jpg"),
        conversation("Yes.", question="Is it?"),
    ]
    first, second, third = read_entries(write_data(tmp_path, values), check_files=False)
    assert (first.name, first.video) == ("first", tmp_path / "clips/v.mp4")
    assert (second.name, second.video) == ("1", tmp_path / "p.jpg")
    assert (third.name, third.video) == ("2", None)
    assert third.turns == (Turn("human", "Is it?"), Turn("gpt", "Yes."))


def test_media_is_where_paths_start(tmp_path):
    data = write_data(tmp_path, [GOOD, conversation("A box.", video="/else/w.mp4")])
    entries = read_entries(data, "/media", check_files=False)
    assert [entry.video for entry in entries] == [Path("/media/v.mp4"), Path("/else/w.mp4")]


def test_files_must_be_there(tmp_path):
    (tmp_path / "v.mp4").touch()
    values = [GOOD, conversation("A box.", video="w.mp4", id="second"), conversation("A box.", image="x.png")]
    data = write_data(tmp_path, values)
    with pytest.raises(ValueError, match=r"entry second: .*w\.mp4 does not exist \(and 1 more\)"):
        read_entries(data)
    assert len(read_entries(data, check_files=False)) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("words", r"entry 1: must be an object, got str"),
        (GOOD | {"image": "p.jpg"}, r"entry 1: must have one of video and image, got both"),
        (GOOD | {"id": "x", "video": ["a", "b"]}, r"entry 1 \(id 'x'\): video must be one path, got \['a', 'b'\]"),
        (GOOD | {"video": ""}, r"entry 1: video must be one path, got ''"),
        ({"video": "v.mp4"}, r"entry 1: conversations must be a list .* got NoneType"),
        (GOOD | {"conversations": GOOD["conversations"][:1]}, r"a question and an answer at least, got 1 turn"),
        (GOOD | {"conversations": GOOD["conversations"][::-1]}, r"turn 0: from must be 'human', .* got 'gpt'"),
        (GOOD | {"conversations": GOOD["conversations"] * 2}, None),
        (GOOD | {"conversations": [*GOOD["conversations"], {"from": "gpt", "value": "x"}]}, r"turn 2: from must be"),
        (GOOD | {"conversations": [GOOD["conversations"][0], {"from": "gpt", "value": 3}]}, r"turn 1: must be"),
        (GOOD | {"conversations": [GOOD["conversations"][0], "x"]}, r"turn 1: must be .* got 'x'"),
    ],
)
def test_what_is_wrong_with_which_entry(tmp_path, value, message):
    data = write_data(tmp_path, [GOOD, value])
    if message is None:
        assert len(read_entries(data, check_files=False)) == 2
        return
    with pytest.raises(ValueError, match=message) as caught:
        read_entries(data, check_files=False)
    assert str(caught.value).startswith(str(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "must be JSON"), ("{}", "must be a list of conversations, got dict"), ("[]", "got an empty list")],
)
def test_what_is_wrong_with_the_file(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_entries(tmp_path / "data.json")


def test_text_is_utf_8(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(json.dumps([conversation("Ein Bär läuft.")], ensure_ascii=False).encode())
    assert read_entries(path)[0].turns[1].text == "Ein Bär läuft."
