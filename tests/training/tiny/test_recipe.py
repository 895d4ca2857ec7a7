"""All stages in order: losses fall, and a run that goes on where it was stopped does nothing twice."""

import numpy as np
import pytest
import torch

from merv_fast.training.tiny import recipe
from merv_fast.training.tiny.aligning import WORDS, words_in
from merv_fast.training.tiny.answering import encode_clips, pack, run_rows, score
from merv_fast.training.tiny.clips import GRID, SIDE, SLOTS, Truth
from merv_fast.training.tiny.pretraining import outlines, pixels_of
from merv_fast.training.tiny.questions import Question, questions_about
from merv_fast.training.tiny.scenes import COLOURS, SHAPES
from merv_fast.video.prepare import prepare_all
from tests.budgets import TRAINING

STAGES = ("clips", "languagebind", "dinov2", "vivit", "siglip", "features", "words", "answers")


def asked_about(clips):
    return [questions_about(scene, np.random.default_rng([1, index])) for index, scene in enumerate(clips.scenes)]


def test_losses_fall(run, learned):
    log = run.log()
    assert set(STAGES) <= set(log)
    for name in (*STAGES[1:5], "words"):
        history = [row["loss"] for row in log[f"{name} history"]]
        assert history[-1] < 0.8 * history[0], (name, history)
    history = log["answers history"]
    assert history[-1] < 0.6 * history[0]


def test_a_run_goes_on_where_it_was_stopped(run, learned, monkeypatch):
    for name in ("make_clips", "pretrain", "encode_clips", "align", "learn_to_answer"):
        monkeypatch.setattr(recipe, name, lambda *args, **kwargs: pytest.fail("done twice"))
    again = run().model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in learned.model.state_dict().items())


def test_pixels_are_those_of_the_model(run, learned):
    video, frames = learned.model.video_model, run.read().frames[:2]
    recipes = [config.recipe for config in video.encoder_configs.values()]
    counts = [config.num_frames for config in video.encoder_configs.values()]
    right = prepare_all(torch.from_numpy(frames[:]), recipes, counts)
    for encoder, pixels in zip(video.encoders.values(), right, strict=True):
        torch.testing.assert_close(pixels_of(frames, encoder), pixels, atol=TRAINING, rtol=0)


def test_questions_in_one_row_do_not_see_each_other(run, learned):
    clips = run.read()
    features = [torch.from_numpy(each[:1]).float() for each in run.features()]
    (questions,) = asked_about(clips)[:1]
    with torch.no_grad():
        together, _ = run_rows(learned.model, pack([questions], learned.model, learned.tokenizer), features)
        alone = [run_rows(learned.model, pack([[q]], learned.model, learned.tokenizer), features)[0] for q in questions]
    torch.testing.assert_close(together, torch.cat(alone), atol=TRAINING, rtol=0)


def test_scores_are_those_of_generated_answers(run, learned):
    clips, asked = run.read(), asked_about(run.read())
    paths = [next((run.folder / "clips").glob(f"3-{index}.*")) for index in range(len(asked))]
    right = {}
    for path, questions in zip(paths, asked, strict=True):
        prompts = []
        for question in questions:
            builder = learned.get_prompt_builder()
            builder.add_turn(role="human", message=question.text)
            prompts.append(builder.get_prompt())
        answers = learned.generate(path, prompts, do_sample=False, max_new_tokens=8) if prompts else []
        for question, answer in zip(questions, answers, strict=True):
            right[question.kind] = right.get(question.kind, 0) + (answer == question.answer)
    found = score(learned.model, learned.tokenizer, asked, encode_clips(learned.model, clips))
    assert {kind: each.right for kind, each in found.items()} == right
    assert sum(right.values()) > 0


def test_an_answer_is_right_only_as_a_whole(run, learned):
    features = run.features()
    text = asked_about(run.read())[0][0].text
    known = learned.tokenizer.eos_token
    given = [torch.from_numpy(each[:1]).float() for each in features]
    rows = pack([[Question("x", text, "red", 0.5)]], learned.model, learned.tokenizer)
    logits, _ = run_rows(learned.model, rows, given)
    first = learned.tokenizer.decode(logits[0].argmax())
    # Its first token is right; what follows in this answer is not what the model goes on with.
    wrong = Question("x", text, f"{first} {known}{first}", 0.5)
    found = score(learned.model, learned.tokenizer, [[wrong]], [each[:1] for each in features])
    assert found["x"].right == 0


def test_words_are_those_of_the_things_in_a_cell():
    truth = torch.zeros(1, len(Truth._fields), SLOTS, GRID, GRID, dtype=torch.int8)
    truth[0, Truth._fields.index("colour"), 1, 2, 5] = 1 + list(COLOURS).index("blue")
    truth[0, Truth._fields.index("shape"), 1, 3, 4] = 1 + SHAPES.index("star")
    found = words_in(truth, 4)
    assert found.shape == (1, SLOTS * 16, len(WORDS))
    # The cell of rows 2 and 3 and of columns 4 and 5.
    assert found.nonzero()[:, 1].unique().tolist() == [16 + 4 * 1 + 2]
    assert [WORDS[place] for place in found.nonzero()[:, 2]] == ["blue", "star"]


def test_projectors_learn_the_words_and_the_fusion_does_not_choose(run, learned):
    log = run.log()["words history"]
    assert log[-1]["loss"] < log[0]["loss"]
    weights = learned.encode(next((run.folder / "clips").glob("3-0.*"))).encoder_weights
    assert all(abs(weight - 0.25) < 0.01 for weight in weights.values())


def test_an_outline_is_of_the_thing_around_a_patch():
    front = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.uint8)
    front[0, 0, 8:20, 8:20] = 2
    front[0, 0, 20:24, 8:16] = 1
    thing = torch.full((1, 1, GRID * GRID), 2)
    windows = outlines(front, thing).view(GRID, GRID, 12, 12)
    # The patch of row 1 and column 1 sees pixels 0, 2, ... 22 both ways.
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:10, 4:10] = True
    assert torch.equal(windows[1, 1], expected)
    assert not windows[5, 5].any()
