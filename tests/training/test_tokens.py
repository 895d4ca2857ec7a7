"""Ids and labels against the reference's rules, written down again by hand: `(text of a turn, learned?)`."""

import pytest

from merv_fast.models.prompts import ASSISTANT, PROMPT_BUILDERS, VICUNA
from merv_fast.training import Entry, EntryError, Turn, caption_tokens, conversation_tokens
from tests.models.random_merv import tiny_tokenizer

TURNS = (
    Turn("human", "<image>\nWhat happens? "),
    Turn("gpt", " The ball falls.\n"),
    Turn("human", "Why?"),
    Turn("gpt", "Nobody holds it."),
)

EXPECTED = {
    "pure": ["In: What happens?\nOut:", "The ball falls.</s>", "In: Why?\nOut:", "Nobody holds it.</s>"],
    "llama2-chat": [
        f"<s>[INST] <<SYS>\n{ASSISTANT}\n<</SYS>>\n\nWhat happens? [/INST]",
        "The ball falls.</s>",
        "<s>[INST] Why? [/INST]",
        "Nobody holds it.</s>",
    ],
    "vicuna-v15": [
        f"{VICUNA} USER: What happens? ASSISTANT:",
        "The ball falls.</s>",
        "USER: Why? ASSISTANT:",
        "Nobody holds it.</s>",
    ],
    "llama3.1-chat": [
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat happens? <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>",
        " The ball falls.\n<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        "Nobody holds it.<|eot_id|>",
    ],
    "qwen2.5": [
        "<|im_start|>user\n<image>\nWhat happens? <|im_end|>\n<|im_start|>assistant",
        " The ball falls.\n<|im_end|>",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant",
        "Nobody holds it.<|im_end|>",
    ],
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def entry(*turns):
    return Entry("e", None, tuple(turns))


def by_hand(texts, tokenizer):
    ids, labels = [], []
    for place, text in enumerate(texts):
        own = ([tokenizer.bos_token_id] if place == 0 else []) + tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=False
        ).ids
        ids += own
        labels += [-100] * len(own) if place in (0, 2) else own
    return ids, labels


def test_every_format_is_covered():
    assert EXPECTED.keys() == PROMPT_BUILDERS.keys()


@pytest.mark.parametrize("prompt_format", EXPECTED)
def test_only_answers_are_learned(tokenizer, prompt_format):
    ids, labels = conversation_tokens(entry(*TURNS), tokenizer, prompt_format, 2048)
    expected_ids, expected_labels = by_hand(EXPECTED[prompt_format], tokenizer)
    assert ids == expected_ids
    assert labels == expected_labels
    assert ids.count(tokenizer.bos_token_id) == (3 if prompt_format == "llama2-chat" else 1)
    assert labels[0] == -100


@pytest.mark.parametrize("prompt_format", ["pure", "vicuna-v15"])
def test_what_is_learned_is_to_continue_a_prompt(tokenizer, prompt_format):
    builder = PROMPT_BUILDERS[prompt_format]("merv")
    builder.add_turn("human", TURNS[0].text)
    asked = tokenizer(builder.get_prompt()).input_ids
    ids, labels = conversation_tokens(entry(*TURNS[:2]), tokenizer, prompt_format, 2048)
    assert ids[: len(asked)] == asked
    assert labels == [-100] * len(asked) + ids[len(asked) :]


def test_a_long_conversation_is_cut_at_its_end(tokenizer):
    whole = conversation_tokens(entry(*TURNS), tokenizer, "pure", 2048)
    cut = conversation_tokens(entry(*TURNS), tokenizer, "pure", 20)
    assert cut.ids == whole.ids[:20]
    assert cut.labels == whole.labels[:20]
    with pytest.raises(EntryError, match="nothing of an answer is left in the first 5 tokens"):
        conversation_tokens(entry(*TURNS), tokenizer, "pure", 5)


def test_align_learns_the_caption_alone(tokenizer):
    ids, labels = caption_tokens(entry(*TURNS[:2]), tokenizer, 2048)
    caption = tokenizer.backend_tokenizer.encode("The ball falls.", add_special_tokens=False).ids
    assert ids == [tokenizer.bos_token_id, *caption, tokenizer.eos_token_id]
    assert labels == [-100, *caption, tokenizer.eos_token_id]
    cut = caption_tokens(entry(*TURNS[:2]), tokenizer, 3)
    assert cut.ids == ids[:3]


def test_without_a_bos_the_first_token_is_not_learned_either(tokenizer):
    """As in the reference, whose Qwen so never learns the first token of a caption."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    ids, labels = caption_tokens(entry(*TURNS[:2]), tokenizer, 2048)
    assert ids[0] != tokenizer.bos_token_id
    assert labels == [-100, *ids[1:]]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TURNS, "align takes one question and one answer, got 4 turns"),
        ((TURNS[2], Turn("gpt", "A <video> of")), "the answer must not hold a marker, got <video>"),
    ],
)
def test_what_align_does_not_take(tokenizer, turns, message):
    with pytest.raises(EntryError, match=message):
        caption_tokens(entry(*turns), tokenizer, 2048)
