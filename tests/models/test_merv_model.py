import re

import pytest
import torch

import merv_fast
import merv_fast.video.choice
from merv_fast import VisualTokens, load_vid
from merv_fast.video import VideoLoader

QUESTIONS = ["What happens?", "Which way does the red ball move, and how many shapes are there?", "Why?"]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def prompt(vidlm, question):
    builder = vidlm.get_prompt_builder()
    builder.add_turn(role="human", message=question)
    return builder.get_prompt()


@pytest.fixture
def prompts(tiny):
    return [prompt(tiny, question) for question in QUESTIONS]


@pytest.fixture
def encodings(tiny, monkeypatch):
    """How many videos each call of the encoders was given."""
    batches = []
    encode = tiny.model.video_model.encode
    monkeypatch.setattr(
        tiny.model.video_model, "encode", lambda inputs: batches.append(len(inputs[0])) or encode(inputs)
    )
    return batches


def test_the_quick_start_of_the_reference(golden_run, clips):
    """Line by line, but for the import and the paths."""
    vidlm = load_vid(**golden_run)
    vidlm.to(torch.device("cpu"), dtype=torch.float32)
    prompt_builder = vidlm.get_prompt_builder()
    prompt_builder.add_turn(role="human", message="Describe what is happening in this video.")
    prompt_text = prompt_builder.get_prompt()
    torch.manual_seed(0)
    generated_text = vidlm.generate(
        str(clips[0]),
        prompt_text,
        num_frames=[8, 8, 16, 8],
        do_sample=True,
        temperature=0.4,
        max_new_tokens=16,
        min_length=1,
    )
    assert isinstance(generated_text, str)
    assert generated_text


def test_saved_and_loaded_again_it_answers_the_same(golden_run, clips, tmp_path):
    vidlm = load_vid(**golden_run)
    asked = prompt(vidlm, QUESTIONS[0])
    expected = vidlm.generate(clips[0], asked, **GREEDY)
    vidlm.save_pretrained(tmp_path)
    assert load_vid(tmp_path).generate(clips[0], asked, **GREEDY) == expected


def test_through_the_auto_classes_it_answers_the_same(golden_run, clips, tmp_path):
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    vidlm = load_vid(**golden_run)
    asked = prompt(vidlm, QUESTIONS[0])
    expected = vidlm.generate(clips[0], asked, **GREEDY)
    vidlm.save_pretrained(tmp_path)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=asked, videos=str(clips[0]))
    ids = model.generate(**inputs, **GREEDY)
    text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text[0].strip() == expected


def test_a_ragged_list_answers_as_one_by_one(tiny, clips, prompts, encodings):
    one_by_one = [tiny.generate(clip, text, **GREEDY) for clip, text in zip(clips, prompts, strict=True)]
    assert len(set(one_by_one)) == 3
    encodings.clear()
    assert tiny.generate(clips, prompts, **GREEDY) == one_by_one
    assert encodings == [3]
    assert tiny.generate(clips, prompts, batch_size=2, **GREEDY) == one_by_one


def test_questions_about_one_video_encode_it_once(tiny, clips, prompts, encodings):
    expected = [tiny.generate(clips[0], text, **GREEDY) for text in prompts]
    encodings.clear()
    assert tiny.generate(clips[0], prompts, **GREEDY) == expected
    assert encodings == [1]
    encodings.clear()
    assert tiny.generate([clips[0], str(clips[0]), clips[0]], prompts, batch_size=2, **GREEDY) == expected
    assert encodings == [1]


def test_an_encoded_video_can_be_asked_again(tiny, clips, prompts, encodings):
    visual = tiny.encode(clips[1])
    assert isinstance(visual, VisualTokens)
    assert visual.tokens.shape == (256, 96)
    encodings.clear()
    assert tiny.generate(visual, prompts, **GREEDY) == tiny.generate(clips[1], prompts, **GREEDY)
    assert encodings == [1]


def test_an_encoded_video_has_no_bounds_left_to_choose(tiny, clips, prompts):
    with pytest.raises(ValueError, match="generate: clip_end_sec must be left out for a video already encoded"):
        tiny.generate(tiny.encode(clips[1]), prompts[0], clip_end_sec=1.0)


def test_one_prompt_for_several_videos(tiny, clips, prompts):
    expected = [tiny.generate(clip, prompts[0], **GREEDY) for clip in clips]
    assert tiny.generate(clips, prompts[0], **GREEDY) == expected


def test_an_answer_has_weights_and_timings(tiny, clips, prompts):
    (answer,) = tiny.answer(clips[0], prompts[0], **GREEDY)
    assert answer.answer == tiny.generate(clips[0], prompts[0], **GREEDY)
    assert list(answer.encoder_weights) == ["languagebind", "dinov2", "vivit", "siglip"]
    assert sum(answer.encoder_weights.values()) == pytest.approx(1)
    assert list(answer.timings_ms) == ["decode", "prepare", "encode", "fuse", "generate"]
    assert all(value > 0 for value in answer.timings_ms.values())
    assert (answer.model, answer.device) == ("merv-random", "cpu")


def test_clip_bounds_reach_the_decoder(tiny, clips, prompts):
    whole, part = tiny.encode(clips[0]), tiny.encode(clips[0], clip_start_sec=2.0, clip_end_sec=3.0)
    first = tiny.encode(clips[0], end_frame=9)
    assert not torch.equal(whole.tokens, part.tokens)
    assert not torch.equal(part.tokens, first.tokens)


def test_the_choice_of_decoder_reaches_the_video(tiny, clips, prompts, monkeypatch):
    with pytest.raises(ValueError, match="decoder must be one of auto, pyav, dali, got 'decord'"):
        tiny.generate(clips[0], prompts[0], decoder="decord")
    monkeypatch.setattr(merv_fast.video.choice, "has_dali", lambda: False)
    with pytest.raises(RuntimeError, match="decoder 'dali' needs NVIDIA DALI"):
        tiny.encode(clips[0], decoder="dali")
    assert torch.equal(tiny.encode(clips[0], decoder="pyav").tokens, tiny.encode(clips[0]).tokens)


def test_frames_already_decoded(tiny, clips, prompts, encodings):
    loader = VideoLoader(clips, 32, workers=0)
    frames = [item.frames for item in loader]
    expected = tiny.generate(clips, prompts, **GREEDY)
    assert tiny.generate(frames, prompts, **GREEDY) == expected
    encodings.clear()
    assert tiny.generate(frames[0], prompts, **GREEDY)[0] == expected[0]
    assert encodings == [1]
    with pytest.raises(ValueError, match="generate: clip_end_sec must be left out for a video already decoded"):
        tiny.generate(frames[0], prompts[0], clip_end_sec=1.0)
    for wrong in (frames[0][:31], frames[0].float(), frames[0].movedim(-1, 1), frames[0][0]):
        got = re.escape(f"got {wrong.dtype} {list(wrong.shape)}")
        with pytest.raises(ValueError, match=rf"generate: frames must be uint8 \[32, H, W, 3\], {got}"):
            tiny.encode(wrong)


def test_without_a_video_the_encoders_see_zeros(tiny, prompts):
    configs = tiny.config.encoder_configs().values()
    zeros = [torch.zeros(1, c.num_frames, 3, c.recipe.size, c.recipe.size) for c in configs]
    with torch.no_grad():
        expected = tiny.model.video_model.fuse(tiny.model.video_model.encode(zeros)).pooler_output[0]
    assert torch.equal(tiny.encode(None).tokens, expected)
    assert isinstance(tiny.generate(None, prompts[0], **GREEDY), str)


def test_lengths_count_the_text_and_not_the_video(tiny, clips, prompts):
    text_length = len(tiny.tokenizer(prompts[0]).input_ids)
    seen = []
    generate = tiny.model.generate
    try:
        tiny.model.generate = lambda **kwargs: seen.append(kwargs) or generate(**kwargs)
        tiny.generate(clips[0], prompts[0], do_sample=False, max_length=text_length + 3, min_length=text_length + 2)
        assert seen[0]["max_new_tokens"] == 3
        assert seen[0]["min_new_tokens"] == 2
    finally:
        del tiny.model.generate
    with pytest.raises(ValueError, match="generate: min_length must be given as min_new_tokens for prompts of diff"):
        tiny.generate(clips[0], prompts, do_sample=False, min_length=100)


def test_beams_and_returned_sequences_keep_their_video(tiny, clips, prompts):
    beams = tiny.generate(clips, prompts, num_beams=3, do_sample=False, max_new_tokens=8)
    alone = [
        tiny.generate(c, p, num_beams=3, do_sample=False, max_new_tokens=8) for c, p in zip(clips, prompts, strict=True)
    ]
    assert beams == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_frames": [8, 8, 8, 8]},
            r"generate: num_frames must be \[16, 16, 32, 16\], got \[8, 8, 8, 8\]",
        ),
        ({"batch_size": 0}, "generate: batch_size must be at least 1, got 0"),
        ({"prompt_text": ["a", "b"]}, "generate: videos and prompts must be equally many, got 3 and 2"),
    ],
)
def test_says_what_is_wrong(tiny, clips, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(clips, **{"prompt_text": "In: a\nOut:"} | arguments)


def test_a_bad_video_is_named(tiny, tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(merv_fast.VideoError, match=r"empty\.mp4: "):
        tiny.generate(tmp_path / "empty.mp4", "In: a\nOut:")


def test_explain_lists_every_part(tiny):
    explanation = merv_fast.explain(tiny)
    parts = [choice.part for choice in explanation]
    assert parts[:5] == [
        "prepare",
        "encoder languagebind",
        "encoder dinov2",
        "encoder vivit",
        "encoder siglip",
    ]
    assert "pool_project_fuse" in str(explanation)
    assert "LlamaForCausalLM" in str(explanation)
    of_videos = parts[: parts.index("language model")]
    assert [choice.part for choice in merv_fast.explain(tiny.model.video_model)] == of_videos


def test_of_several_sequences_the_first_counts(tiny, clips, prompts):
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    expected = tiny.generate(clips, prompts, **beams)
    assert tiny.generate(clips, prompts, num_return_sequences=2, **beams) == expected
    with pytest.raises(ValueError, match="generate: return_dict_in_generate must be False"):
        tiny.generate(clips, prompts, return_dict_in_generate=True)


def test_a_question_may_say_video(tiny, clips):
    """As the reference's evaluation scripts do; there it is plain text."""
    assert isinstance(tiny.generate(clips[0], "In: Why?\n<video>\nOut:", **GREEDY), str)
    ids = tiny.processor(text="In: <video>")["input_ids"]
    assert tiny.config.video_token_id not in ids


def test_names_that_the_evaluation_scripts_use(tiny):
    builder = tiny.llm_backbone.prompt_builder_fn(model_family="merv")
    builder.add_turn(role="human", message="Why?")
    assert builder.get_prompt() == prompt(tiny, "Why?")
    assert tiny.llm_backbone.tokenizer is tiny.tokenizer
    assert tiny.llm_backbone.llm is tiny.model.language_model


def test_a_prompt_that_is_cut_is_spoken_of(tiny, clips, caplog):
    tiny.generate(clips[0], "In: " + "word " * 3000 + "\nOut:", **GREEDY)
    assert "is cut to its first 2048" in caplog.text


def test_a_prompt_that_fits_is_not(tiny, clips, prompts, caplog):
    tiny.generate(clips[0], prompts[0], **GREEDY)
    assert "is cut" not in caplog.text


@pytest.mark.parametrize(
    ("video", "text", "message"),
    [
        (b"clip.mp4", "a", "video must be a path, frames, VisualTokens, None, or a list of them, got bytes"),
        ([["clip.mp4"]], "a", "video must be a path, frames, VisualTokens, None, or a list of them, got list"),
        ("clip.mp4", None, "prompt_text must be a str or a list of them, got NoneType"),
        ("clip.mp4", ["a", 3], "prompt_text must be a str or a list of them, got int"),
    ],
)
def test_says_which_type_is_wrong(tiny, video, text, message):
    with pytest.raises(TypeError, match=message):
        tiny.generate(video, text)
