"""Lists of any videos, windows and prompts, in batches of any size: the answers of one by one."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.test_merv_model import prompt

GREEDY = {"do_sample": False, "max_new_tokens": 5}
WORDS = (
    "Which",
    "way",
    "does",
    "the",
    "red",
    "ball",
    "move",
    "and",
    "how",
    "many",
    "shapes",
    "are",
    "there",
    "at",
    "the",
    "end",
)


@pytest.fixture(scope="module")
def videos(tiny):
    """Frames of three sizes, no video, and two that were encoded before, one of them in two windows."""
    generator = torch.Generator().manual_seed(0)
    count = max(tiny.config.num_frames)
    made = [
        torch.randint(0, 256, (frames, height, 48, 3), dtype=torch.uint8, generator=generator)
        for frames, height in ((count, 32), (count, 48), (count, 64), (count, 40), (2 * count, 40))
    ]
    return [*made[:3], None, tiny.encode(made[3], prefill=True), tiny.encode(made[4], windows=2)]


@pytest.fixture(scope="module")
def alone(tiny, videos):
    """The answer to so many words about a video, asked by itself."""

    @cache
    def answer(video, words):
        return tiny.generate(videos[video], prompt(tiny, " ".join(WORDS[:words])), **GREEDY)

    return answer


@given(
    asked=st.lists(st.tuples(st.integers(0, 5), st.integers(1, len(WORDS))), min_size=1, max_size=6),
    batch_size=st.integers(1, 6),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_those_of_one_by_one(tiny, videos, alone, asked, batch_size):
    prompts = [prompt(tiny, " ".join(WORDS[:words])) for _, words in asked]
    answers = tiny.generate([videos[video] for video, _ in asked], prompts, batch_size=batch_size, **GREEDY)
    assert answers == [alone(video, words) for video, words in asked]
