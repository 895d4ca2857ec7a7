"""A whole model in 16 bits: how far features, tokens and shares are from float32, and that it answers."""

import copy

import pytest
import torch

from tests.budgets import relative_error
from tests.models.test_merv_model import QUESTIONS, prompt

STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of one rounding."""


@pytest.mark.parametrize("dtype", STEP, ids=str)
@torch.inference_mode()
def test_a_model_in_16_bits(tiny, dtype):
    count = max(tiny.config.num_frames)
    frames = torch.randint(0, 256, (count, 40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rounded = copy.deepcopy(tiny).to(dtype)
    assert rounded.dtype == dtype
    exact, video = tiny.encode(frames), rounded.encode(frames)
    assert video.tokens.dtype == dtype
    error = relative_error(video.tokens, exact.tokens)
    # Something is rounded, and errors of the blocks' sums do not grow.
    assert STEP[dtype] / 8 < error < 8 * STEP[dtype]
    assert video.encoder_weights == pytest.approx(exact.encoder_weights, abs=8 * STEP[dtype])
    texts = rounded.generate(frames, [prompt(rounded, q) for q in QUESTIONS], do_sample=False, max_new_tokens=4)
    assert len(texts) == len(QUESTIONS)
    assert all(isinstance(text, str) for text in texts)
