"""Data sets in the reference's layout: what is read, what is asked, what counts as right, what is refused."""

import json

import pytest

from merv_fast.integrations.evaluation.questions import choice_prompt, read_questions

OPEN = {"video_name": "a", "question_id": "0", "question": "what moves?"}
CHOICE = {
    "video_name": "b",
    "num_option": 3,
    "question_id": "c1",
    "options": ["static or shaking", "I don't know", "moving"],
    "question": "Is the camera moving or static?",
    "end_frame": 595,
}


def write(folder, questions, answers, videos=("a.mp4", "b.avi")):
    (folder / "videos").mkdir()
    for name in videos:
        (folder / "videos" / name).touch()
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))
    return folder


def test_what_the_reference_asks():
    asked = (
        "Is the camera moving or static? Select the correct answer from the following options. "
        "Write your answer as only one of A, B, C and nothing else.\n"
        "\n"
        "    A. static or shaking\n"
        "B. I don't know\n"
        "C. moving"
    )
    assert choice_prompt(CHOICE["question"], CHOICE["options"], 3) == asked


def test_reading(tmp_path):
    answers = [{"question_id": "c1", "answer_id": 2, "answer": "moving"}, {"question_id": "0", "answer": "A Dog."}]
    first, second = read_questions(write(tmp_path, [OPEN, CHOICE], answers))
    assert (first.key, first.text, first.answer, first.clip) == ("0", "what moves?", "A Dog.", ())
    assert first.video == tmp_path / "videos/a.mp4"
    assert not first.is_choice
    assert second.is_choice
    assert second.text == choice_prompt(CHOICE["question"], CHOICE["options"], 3)
    assert (second.answer, second.clip) == ("C", (("end_frame", 595),))
    assert second.row["answer"] == "moving"
    assert [first.is_right(text) for text in ("dog", "the dog!", "a dog and a cat", "")] == [True, True, False, False]
    assert [second.is_right(text) for text in ("C", "c. moving", "Moving", "B", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("time", "clip"),
    [
        ([1.5, 4], {"clip_start_sec": 1.5, "clip_end_sec": 4}),
        ([float("nan"), float("nan")], {}),
        ([2, float("nan")], {"clip_start_sec": 2}),
        (None, {}),
    ],
)
def test_bounds(tmp_path, time, clip):
    (question,) = read_questions(write(tmp_path, [OPEN | {"time": time}], [{"question_id": "0", "answer": "x"}]))
    assert dict(question.clip) == clip


def test_names_of_videos(tmp_path):
    questions = [OPEN | {"question_id": str(place), "video_name": name} for place, name in enumerate(["a", "v.1", "f"])]
    answers = [{"question_id": str(place), "answer": "x"} for place in range(3)]
    write(tmp_path, questions, answers, ["a.webm", "a.mp4", "v.1.mp4", "f.mp4"])
    (tmp_path / "videos/f").mkdir()
    found = [question.video.name for question in read_questions(tmp_path)]
    assert found == ["a.mp4", "v.1.mp4", "f"]


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ([OPEN], [], "question 0 must have an answer"),
        ([OPEN, OPEN], [{"question_id": "0", "answer": "x"}], "must be different for each question, got 0 twice"),
        ([OPEN | {"video_name": "z"}], [{"question_id": "0", "answer": "x"}], "question 0 must have its video z in"),
        ([{"question_id": "0", "video_name": "a"}], [{"question_id": "0"}], "question 0 must have question"),
        ([{"question": "x"}], [], "entry 0 must have a question_id"),
        ({}, [], "must hold a list, got dict"),
        ([CHOICE], [{"question_id": "c1"}], "question c1 must have answer_id"),
        ([CHOICE], [{"question_id": "c1", "answer_id": 3}], "answer_id among at most 5 options"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, questions, answers, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path, questions, answers))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"test_q\.json: cannot be read as JSON"):
        read_questions(tmp_path)
    write(tmp_path, [], [])
    (tmp_path / "test_a.json").write_text("[")
    with pytest.raises(ValueError, match=r"test_a\.json: cannot be read as JSON"):
        read_questions(tmp_path)
