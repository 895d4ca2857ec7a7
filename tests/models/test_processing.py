import numpy as np
import pytest
import torch
from PIL import Image

from merv_fast import load_frames, open_video
from merv_fast.models.splice import IGNORE_INDEX, insert_placeholders, pad
from tests.models.golden_run import byte_tokenizer


@pytest.fixture
def processor(tiny):
    return tiny.processor


def test_visual_tokens_follow_the_bos(processor):
    inputs = processor(text="In: a\nOut:", videos=np.zeros((32, 8, 8, 3), np.uint8))
    ids = inputs["input_ids"][0].tolist()
    text = processor.tokenizer("In: a\nOut:").input_ids
    assert ids == text[:1] + [processor.video_token_id] * 256 + text[1:]
    assert inputs["attention_mask"].tolist() == [[1] * len(ids)]


def test_a_marker_in_front_changes_nothing(processor):
    with_marker, without = (
        processor(text=t, videos=np.zeros((32, 8, 8, 3), np.uint8)) for t in ("<|video_pad|>In: a", "In: a")
    )
    assert torch.equal(with_marker["input_ids"], without["input_ids"])


def test_a_marker_elsewhere_stays_there(processor):
    ids = processor(text="In: <|video_pad|>a")["input_ids"][0].tolist()
    before = processor.tokenizer("In: ").input_ids
    assert ids[: len(before)] == before
    assert ids[len(before) : len(before) + 256] == [processor.video_token_id] * 256


def test_a_text_alone_stays_alone(processor):
    assert processor(text="In: a")["input_ids"][0].tolist() == processor.tokenizer("In: a").input_ids


def test_without_bos_the_visual_tokens_come_first(processor, monkeypatch):
    """As Qwen-2.5's tokenizer, which has none."""
    tokenizer = byte_tokenizer(320)
    tokenizer._tokenizer.post_processor = None
    tokenizer.bos_token = None
    monkeypatch.setattr(processor, "tokenizer", tokenizer)
    ids = processor(text="<|video_pad|>ab")["input_ids"][0].tolist()
    assert ids == [processor.video_token_id] * 256 + tokenizer("ab").input_ids


def test_ragged_prompts_are_padded_on_the_left(processor):
    inputs = processor(text=["In: a", "In: a longer one"])
    first, second = inputs["attention_mask"].sum(1).tolist()
    assert first < second == inputs["input_ids"].shape[1]
    assert inputs["attention_mask"][0].tolist() == [0] * (second - first) + [1] * first
    assert processor(text=["In: a", "In: a longer one"], padding_side="right")["attention_mask"][0, 0] == 1


def test_videos_of_one_size_are_stacked_and_others_listed(processor, clips):
    frames = processor(videos=[str(clips[0]), clips[0]])["pixel_values_videos"]
    assert frames.shape == (2, 32, 3, 96, 128)
    assert frames.dtype == torch.uint8
    assert torch.equal(frames[0].movedim(1, -1), load_frames(clips[0], 32))
    listed = processor(videos=clips)["pixel_values_videos"]
    assert [tuple(video.shape) for video in listed] == [(32, 3, 96, 128), (32, 3, 128, 96), (32, 3, 64, 64)]


def test_decoded_frames_are_sampled_like_files(processor):
    frames = np.arange(50, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    got = processor(videos=frames)["pixel_values_videos"][0, :, 0, 0, 0].tolist()
    assert got == np.linspace(0, 49, 32, dtype=int).tolist()
    first = processor(videos=torch.from_numpy(frames).movedim(-1, 1), num_frames=16)["pixel_values_videos"]
    assert first.shape == (1, 16, 3, 4, 4)
    assert processor(videos=frames[None].repeat(2, 0))["pixel_values_videos"].shape == (2, 32, 3, 4, 4)


def test_chat_with_a_video(processor, clips, tiny):
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(clips[0])}, {"type": "text", "text": "Why?"}],
        }
    ]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = processor(text="In: Why?\nOut:", videos=str(clips[0]))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    ids = tiny.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text == tiny.generate(clips[0], "In: Why?\nOut:", max_new_tokens=8, do_sample=False)


def test_a_batch_may_mix_prompts_with_and_without_a_video(processor):
    video = np.zeros((32, 8, 8, 3), np.uint8)
    inputs = processor(text=["<|video_pad|>In: a", "In: b"], videos=[video])
    assert (inputs["input_ids"] == processor.video_token_id).sum(1).tolist() == [256, 0]
    chats = [
        [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "b"}]}],
    ]
    mixed = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    assert (mixed["input_ids"] == processor.video_token_id).sum(1).tolist() == [256, 0]


def test_a_list_of_pictures_is_a_video(processor):
    frames = np.random.default_rng(0).integers(0, 256, (32, 8, 9, 3), dtype=np.uint8)
    expected = processor(videos=frames)["pixel_values_videos"]
    for pictures in (list(frames), [Image.fromarray(frame) for frame in frames], list(torch.from_numpy(frames))):
        assert torch.equal(processor(videos=pictures)["pixel_values_videos"], expected)
        assert torch.equal(processor(videos=[pictures])["pixel_values_videos"], expected)
    with pytest.raises(TypeError, match="a video must be a path, an array, or a list of pictures, got bytes"):
        processor(videos=b"clip.mp4")


def test_the_padding_side_may_come_with_the_text_arguments(processor):
    texts = ["In: a", "In: a longer one"]
    right = processor(text=texts, padding_side="right")
    assert torch.equal(processor(text=texts, text_kwargs={"padding_side": "right"})["input_ids"], right["input_ids"])


def test_fetch_videos_decodes_like_the_rest(processor, clips):
    frames, metadata = processor.video_processor.fetch_videos(str(clips[0]), lambda metadata, **_: [0, 7])
    assert torch.equal(frames, open_video(clips[0]).frames_at([0, 7]))
    assert (metadata.total_num_frames, metadata.fps, metadata.height, metadata.width) == (40, 10.0, 96, 128)
    videos, _ = processor.video_processor.fetch_videos([str(clips[0]), str(clips[2])])
    assert [len(video) for video in videos] == [40, 20]


def test_what_was_saved_can_be_replaced(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path, num_frames=8, chat_template="x", num_video_tokens=9)
    assert (again.video_processor.num_frames, again.chat_template, again.num_video_tokens) == (8, "x", 9)


def test_saved_and_loaded(processor, tmp_path):
    from transformers import AutoProcessor

    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert again.chat_template == processor.chat_template
    assert again.video_processor.num_frames == 32
    assert torch.equal(again(text="<|video_pad|>In: a")["input_ids"], processor(text="<|video_pad|>In: a")["input_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<|video_pad|><|video_pad|>a"}, r"text must hold one <\|video_pad\|> at most, got 2"),
        (
            {"text": ["a", "b"], "videos": np.zeros((32, 8, 8, 3), np.uint8)},
            r"videos must be one per prompt with a video \(2\), got 1",
        ),
        ({"text": "a", "images": []}, "images and audio must be None"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors must be 'pt', got 'np'"),
        (
            {"videos": np.zeros((32, 8, 8, 4), np.uint8)},
            r"a video must be \[F, H, W, 3\] or \[F, 3, H, W\], got \[32, 8, 8, 4\]",
        ),
        (
            {"videos": np.zeros((32, 8, 8, 3), np.uint8), "clip_end_sec": 1.0},
            "clip bounds must be left out for frames",
        ),
        ({"text": "a", "nonsense": 3}, "arguments must be known ones, got nonsense"),
        ({"text": "a", "padding": "max_length"}, "padding must be True: rows are padded to the longest, got 'max_l"),
    ],
)
def test_says_what_is_wrong(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_vllm_can_ask_how_many_tokens(processor):
    assert processor._get_num_multimodal_tokens(video_sizes=[[32, 8, 8], [32, 9, 9]]).num_video_tokens == [
        256,
        256,
    ]
    assert processor.replace_video_token({}) == "<|video_pad|>" * 256


def test_labels_are_ignored_where_the_video_is():
    ids, mask, labels = insert_placeholders(
        torch.tensor([[1, 5, 6], [1, 7, 0]]),
        2,
        99,
        1,
        torch.tensor([[1, 1, 1], [1, 1, 0]]),
        torch.tensor([[-100, 5, 6], [-100, 7, -100]]),
    )
    assert ids.tolist() == [[1, 99, 99, 5, 6], [1, 99, 99, 7, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert labels.tolist() == [
        [-100, IGNORE_INDEX, IGNORE_INDEX, 5, 6],
        [-100, IGNORE_INDEX, IGNORE_INDEX, 7, -100],
    ]


def test_pad_says_what_is_wrong():
    with pytest.raises(ValueError, match="pad: side must be 'left' or 'right', got 'top'"):
        pad([[1]], 0, "top")
