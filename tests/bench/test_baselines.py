"""The reference's way, written plainly: the same numbers as ours, and all of the work that ours leaves out."""

from types import SimpleNamespace

import pytest
import torch

from bench import baselines
from tests.budgets import FLOAT64, relative_error
from tests.encoders.small_encoders import SMALL, pixels, seeded


@pytest.mark.parametrize("family", SMALL)
def test_encoders(family, monkeypatch):
    config = SMALL[family]
    ours, x = seeded(config).double(), pixels(config).double()
    whole = baselines.ReferenceEncoder(ours).double().eval()
    run_block, blocks = baselines.run_block, []
    monkeypatch.setattr(baselines, "run_block", lambda *given: blocks.append(given[0]) or run_block(*given))
    with torch.no_grad():
        (tokens,) = baselines.encode([whole], [x])
        assert relative_error(tokens, ours(x)) < FLOAT64
    # Every block of the checkpoint, also the last, which three of the encoders do not need.
    assert len(blocks) == len(set(blocks)) == config.depth
    assert blocks[: config.blocks] == list(ours.blocks)


def test_a_video_is_encoded_for_each_question():
    asked = []
    model = SimpleNamespace(generate=lambda video, prompt, **kwargs: asked.append((video, prompt, kwargs)) or prompt)
    assert baselines.ask_each(model, "a.mp4", ["b", "c"], do_sample=False) == ["b", "c"]
    assert asked == [("a.mp4", "b", {"do_sample": False}), ("a.mp4", "c", {"do_sample": False})]
