"""All stages in order: losses fall, and a run that goes on where it was stopped does nothing twice."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merv_fast import load_vid
from merv_fast.training.tiny import recipe
from merv_fast.training.tiny.__main__ import main
from merv_fast.training.tiny.aligning import CODES, EVENTS, WORDS, directions_of, words_in
from merv_fast.training.tiny.answering import score
from merv_fast.training.tiny.clips import GRID, SIDE, SLOTS, Truth
from merv_fast.training.tiny.packing import pack, run_rows
from merv_fast.training.tiny.pretraining import outlines, pixels_of, see
from merv_fast.training.tiny.questions import Question, questions_about
from merv_fast.training.tiny.recipe import Run
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, SHAPES
from merv_fast.video.prepare import prepare_all
from tests.budgets import TRAINING

STAGES = ("clips", "encoders", "languagebind", "dinov2", "vivit", "siglip", "words", "answers")


def asked_about(clips):
    return [questions_about(scene, np.random.default_rng([1, index])) for index, scene in enumerate(clips.scenes)]


def test_losses_fall(run, learned):
    log = run.log()
    assert set(STAGES) <= set(log)
    for name, share in {**dict.fromkeys((*STAGES[2:6], "words"), 0.8), "answers": 0.6}.items():
        history = [row["loss"] for row in log[f"{name} history"]]
        assert history[-1] < share * history[0], (name, history)


def test_a_run_goes_on_where_it_was_stopped(run, learned, monkeypatch):
    for name in ("make_clips", "pretrain", "see", "align", "learn_to_answer"):
        monkeypatch.setattr(recipe, name, lambda *args, **kwargs: pytest.fail("done twice"))
    again = run().model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in learned.model.state_dict().items())


def test_the_command_keeps_weights_in_half_and_computes_in_full(run, learned):
    main(["train", str(run.folder), "--seed", str(run.seed), "--clips", str(run.count)])
    kept = load_file(run.folder / "model" / "model.safetensors")
    given = learned.model.state_dict()
    again = load_vid(run.folder / "model").model.state_dict()
    assert set(again) == set(given)
    assert set(kept) <= set(given)
    for name, value in kept.items():
        assert value.dtype == torch.bfloat16
        assert again[name].dtype == torch.float32
        assert torch.equal(value, given[name].bfloat16())
        assert torch.equal(again[name], value.float())


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
    encoders = learned.model.video_model.encoders
    features = [see(encoder, name, clips) for name, encoder in encoders.items()]
    found = score(learned.model, learned.tokenizer, asked, features)
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
    for field, value in {
        "thing": 1,
        "colour": 1 + list(COLOURS).index("blue"),
        "shape": 1 + SHAPES.index("star"),
        "appears": 1,
        "vanishes": 4,
        "x": 49,
        "y": 20,
    }.items():
        truth[0, Truth._fields.index(field), 1, 2, 5] = truth[0, Truth._fields.index(field), 1, 3, 4] = value
    truth[0, Truth._fields.index("centre"), 1, 3, 4] = 1
    names = (*WORDS, *CODES)
    found = words_in(truth, torch.tensor([CAMERAS.index("zooms in")]), 4)
    assert found.shape == (1, SLOTS * 16, len(names))
    assert all(found[..., names.index(word)].all() for word in ("zooms in", "moving"))
    assert not any(found[..., names.index(word)].any() for word in ("static", "zooms out"))
    things = found[..., [place for place, name in enumerate(names) if name not in (*CAMERAS, "moving")]]
    # The cell of rows 2 and 3 and of columns 4 and 5.
    cell = 16 + 4 * 1 + 2
    assert things.nonzero()[:, 1].unique().tolist() == [cell]
    told = {name for name, true in zip(names, found[0, cell].tolist(), strict=True) if true}
    assert told == {
        *("blue", "star", "top half", "left half", "zooms in", "moving"),
        *("vanishes", "in slot 2 or later", "in slot 3 or later", "centre of a star"),
    }


def test_words_are_those_of_the_scene(run, learned):
    clips = run.read()
    found = words_in(torch.from_numpy(clips.truth[:]), torch.from_numpy(clips.camera), 4).unflatten(1, (SLOTS, 4, 4))
    told = dict(zip((*WORDS, *CODES), found.unbind(-1), strict=True))
    for index, scene in enumerate(clips.scenes):
        for thing in scene.things:
            it = told[thing.colour][index] & told[thing.shape][index]
            alone = it & (sum(told[word][index].int() for word in (*COLOURS, *SHAPES)) == 2)
            if not alone.any() or sum(other.name == thing.name for other in scene.things) > 1:
                continue
            if thing.direction:
                assert told[thing.direction][index][alone].all()
                assert told["faster" if thing.speed == "fast" else "slower"][index][alone].all()
            assert not told["start"][index, 1:].any()
            assert not told["end"][index, :-1].any()
            slots = alone.any(2).any(1).nonzero()[:, 0]
            assert told["appears"][index][alone].all() == told["appears"][index][alone].any() == (thing.appears > 0)
            assert told["vanishes"][index][alone].all() == told["vanishes"][index][alone].any() == (thing.vanishes <= 1)
            later = sum(told[name][index][alone].all().item() for name in EVENTS[2:])
            if thing.appears:
                assert slots.min() >= (later and 1 + later)
            elif thing.vanishes > 1:
                assert later == 0
            else:
                assert slots.max() < max(2, 1 + later)


def test_a_word_of_several_tokens_is_refused(learned):
    class Letters:
        def __call__(self, text, add_special_tokens):
            return learned.tokenizer(" A" * len(text), add_special_tokens=False)

    with pytest.raises(ValueError, match=r"align: each word must be one token of the tokenizer, got more for \['red'"):
        directions_of(learned.model, Letters())


def test_projectors_learn_the_words_and_the_fusion_weighs(run, learned):
    log = run.log()["words history"]
    assert log[-1]["loss"] < log[0]["loss"]
    first, second = (next((run.folder / "clips").glob(f"3-{index}.*")) for index in range(2))
    first, second = (list(learned.encode(clip).encoder_weights.values()) for clip in (first, second))
    assert all(0.1 < weight < 0.4 for weight in first)
    assert max(first) - min(first) > 0.005
    assert first != second


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


def test_two_processes_train_the_same_again(tmp_path):
    """Weights follow from the seed."""
    epochs = dict.fromkeys(("languagebind", "dinov2", "vivit", "siglip"), 1)
    weights = []
    for name in ("one", "other"):
        run = Run(tmp_path / name, seed=5, count=16, pretraining=epochs, word_steps=10, answer_epochs=5, batch=2)
        start, trained = run.start().model.state_dict(), run().model.state_dict()
        moved = {key for key, value in start.items() if not torch.equal(value, trained[key])}
        assert all(any(part in key for key in moved) for part in ("encoders", "tail", "language_model"))
        weights.append(trained)
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
