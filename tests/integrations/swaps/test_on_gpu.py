"""A model that was accelerated, on a GPU: kernels, streams and all."""

import pytest
import torch

from merv_fast import accelerate, restore
from tests.budgets import GOLDEN, relative_error
from tests.golden_files import load
from tests.integrations.swaps.reference_modules import DinoSigLip, Merv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@torch.inference_mode()
def test_the_golden_logits_and_a_hundred_runs():
    merv = Merv().cuda()
    inputs, _ = load("model_inputs")
    expected = load("model_cross_attention_avg_lq_linear")[0]["logits"]
    videos = [inputs[f"video.{index}"].cuda() for index in range(4)]
    mask = inputs["attention_mask"].cuda()
    accelerate(merv, strict=True)
    tokens, weights = (each.clone() for each in merv.visual(videos))
    embeds = merv.llm_backbone.llm.get_input_embeddings()(inputs["input_ids"].cuda())
    embeds = torch.cat([embeds[:, :1], tokens, embeds[:, 1:]], 1)
    mask = torch.cat([mask[:, :1], torch.ones(tokens.shape[:2], device="cuda"), mask[:, 1:]], 1)
    assert (
        relative_error(merv.llm_backbone.llm(inputs_embeds=embeds, attention_mask=mask).logits.cpu(), expected) < GOLDEN
    )
    for _ in range(100):
        # Memory that is given away too early would be written over here.
        noise = [torch.full_like(video, float("nan")) for video in videos]
        again = merv.visual(videos)
        assert torch.equal(again[0], tokens)
        assert torch.equal(again[1], weights)
        del noise
    assert relative_error(restore(merv).visual(videos)[0], tokens) < GOLDEN


@torch.inference_mode()
def test_prismatic():
    model = DinoSigLip().cuda()
    pictures = {name: torch.randn(2, 3, 56, 56, device="cuda") for name in ("dino", "siglip")}
    before = model(pictures)
    assert relative_error(accelerate(model)(pictures), before) < GOLDEN
