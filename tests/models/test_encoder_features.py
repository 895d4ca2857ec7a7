"""``mm_encoder_outputs={"features": ...}``: what the encoders return, given instead of frames."""

import pytest
import torch

from merv_fast.models.video_model import MervVideoOutput
from tests.training.small import small_model

PROMPTS = ["What happens in this video?", "Is there a ball?"]


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def frames():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 8, 3, 48, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def text(small, frames):
    batch = small.processor(text=PROMPTS, videos=list(frames), padding_side="right")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def features_of(small, frames):
    video = small.model.video_model
    with torch.no_grad():
        return video.encode(video.prepare(frames))


def test_they_give_the_logits_and_gradients_of_the_frames(small, frames, text):
    model = small.model
    model.requires_grad_(False)
    model.video_model.tail.requires_grad_(True)
    results = []
    for given in (
        {"pixel_values_videos": frames},
        {"mm_encoder_outputs": {"features": features_of(small, frames)}},
    ):
        model.zero_grad()
        output = model(**text, **given, labels=text["input_ids"])
        output.loss.backward()
        gradients = [tensor.grad.clone() for tensor in model.video_model.tail.parameters()]
        results.append([output.logits.detach(), output.encoder_weights.detach(), *gradients])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    # The bias of the keys is the same for each encoder, which a softmax over them does not see.
    names = [name for name, _ in model.video_model.tail.named_parameters()]
    seen = [g.abs().max() for name, g in zip(names, gradients, strict=True) if name != "fusion.k_proj.bias"]
    assert min(seen) > 0


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_generate_takes_them(small, frames, text, more):
    arguments = {"max_new_tokens": 6, "do_sample": False} | more
    torch.manual_seed(0)
    expected = small.model.generate(**text, pixel_values_videos=frames, **arguments)
    torch.manual_seed(0)
    got = small.model.generate(**text, mm_encoder_outputs={"features": features_of(small, frames)}, **arguments)
    assert torch.equal(got, expected)


def test_they_come_in_any_type(small, frames, text):
    features = features_of(small, frames)
    expected = small.model(**text, mm_encoder_outputs={"features": features}).logits
    wide = [each.double() for each in features]
    assert torch.equal(small.model(**text, mm_encoder_outputs={"features": wide}).logits, expected)


def test_errors(small, frames, text):
    features = features_of(small, frames)
    with pytest.raises(ValueError, match=r"features must be one per encoder \(2\), got 1"):
        small.model(**text, mm_encoder_outputs={"features": features[:1]})
    with pytest.raises(ValueError, match="pixel_values_videos must be left out with mm_encoder_outputs"):
        small.model(**text, pixel_values_videos=frames, mm_encoder_outputs={"features": features})
    with pytest.raises(ValueError, match="features must be left out with video or inputs_embeds, got both"):
        small.model(**text, mm_encoder_outputs={"features": features, "video": MervVideoOutput()})
