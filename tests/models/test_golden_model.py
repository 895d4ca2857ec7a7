"""Whole models against the reference's logits, loss and greedy ids."""

import pytest
import torch

from merv_fast import load_vid
from merv_fast.models.splice import insert_placeholders
from merv_fast.models.video_model import MervVideoOutput
from tests.budgets import GOLDEN, relative_error
from tests.golden_files import load
from tests.models.golden_run import MODELS, write_run


@pytest.fixture(scope="module", params=MODELS)
def golden(request, tmp_path_factory):
    """A loaded model with the inputs and outputs of the reference."""
    vidlm = load_vid(**write_run(tmp_path_factory.mktemp(request.param), request.param))
    inputs, _ = load("model_inputs")
    expected, _ = load(request.param)
    inputs["video.0"] = inputs["video.0"].transpose(1, 2)
    return vidlm.model, [inputs[f"video.{index}"] for index in range(4)], inputs, expected


def visual(model, videos):
    return model.video_model.fuse(model.video_model.encode(videos))


@torch.no_grad()
def test_logits_and_loss(golden):
    model, videos, inputs, expected = golden
    ids, mask, labels = insert_placeholders(
        inputs["input_ids"],
        model.video_model.num_video_tokens,
        model.config.video_token_id,
        1,
        inputs["attention_mask"],
        inputs["labels"],
    )
    output = model(
        input_ids=ids, attention_mask=mask, labels=labels, mm_encoder_outputs={"video": visual(model, videos)}
    )
    seen = mask.bool()
    assert relative_error(output.logits[seen], expected["logits"][seen]) <= GOLDEN
    assert relative_error(output.loss, expected["loss"][0]) <= GOLDEN


@torch.no_grad()
def test_placeholders_equal_the_splice(golden):
    """The reference concatenates embeddings; we replace those of placeholders: the same logits to the bit."""
    model, videos, inputs, _ = golden
    tokens = visual(model, videos).pooler_output
    text = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    spliced = model.language_model(
        inputs_embeds=torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1),
        attention_mask=torch.cat([mask[:, :1], mask.new_ones(tokens.shape[:2]), mask[:, 1:]], dim=1),
    )
    ids, mask, _ = insert_placeholders(
        inputs["input_ids"], tokens.shape[1], model.config.video_token_id, 1, inputs["attention_mask"]
    )
    placed = model(
        input_ids=ids,
        attention_mask=mask,
        mm_encoder_outputs={"video": MervVideoOutput(pooler_output=tokens)},
    )
    assert torch.equal(placed.logits, spliced.logits)


@torch.no_grad()
def test_greedy_ids(golden):
    model, videos, inputs, expected = golden
    prompt = inputs["input_ids"][:1]
    ids, mask, _ = insert_placeholders(prompt, model.video_model.num_video_tokens, model.config.video_token_id, 1)
    output = visual(model, [video[:1] for video in videos])
    new = expected["greedy_ids"].shape[1] - prompt.shape[1]
    got = model.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_encoder_outputs={"video": output},
        max_new_tokens=new,
        do_sample=False,
    )
    assert got[0, ids.shape[1] :].tolist() == expected["greedy_ids"][0, prompt.shape[1] :].tolist()
