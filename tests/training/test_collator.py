"""Batches: places for the visual tokens, rows without a video, and the row that keeps all processes in step."""

import pytest
import torch

from merv_fast.models.splice import insert_placeholders
from merv_fast.training import Collator, Sample, Tokens
from tests.budgets import float32_sum
from tests.training.small import small_model

TEXT = Tokens([1, 9, 10, 11], [-100, -100, 10, 11])
LONG = Tokens([1, 9, 10, 11, 12, 13], [-100, -100, -100, 11, 12, 13])
NEVER_LEARNED = "fusion.k_proj.bias"
"""The same for each encoder, which a softmax over them does not see."""


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def collator(small):
    return Collator.of(small.model.video_model, small.tokenizer)


def video(height=32, width=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (8, 3, height, width), dtype=torch.uint8, generator=generator)


def loss_of(small, batch, **kwargs):
    batch = {key: value for key, value in batch.items() if key != "skipped"}
    return small.model(**batch, **kwargs).loss


def test_a_row_is_what_the_reference_splices(small, collator):
    batch = collator([Sample(TEXT, frames=video())])
    expected = insert_placeholders(
        torch.tensor([TEXT.ids]), 16, 3, bos_token_length=1, labels=torch.tensor([TEXT.labels])
    )
    assert torch.equal(batch["input_ids"], expected[0])
    assert torch.equal(batch["attention_mask"], expected[1])
    assert torch.equal(batch["labels"], expected[2])
    assert batch["input_ids"][0, 0] == 1
    assert (batch["input_ids"][0, 1:17] == 3).all()


def test_a_tokenizer_without_bos_has_the_video_first(collator):
    without = Collator(**vars(collator) | {"bos_token_id": None})
    assert without([Sample(TEXT, frames=video())])["input_ids"][0, :17].tolist() == [3] * 16 + [1]


def test_rows_are_padded_on_the_right_and_padding_is_not_learned(collator):
    batch = collator([Sample(TEXT, frames=video()), Sample(LONG, frames=video(seed=1)), Sample(TEXT)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (3, 22)
    assert batch["attention_mask"].sum(1).tolist() == [20, 22, 4]
    assert (batch["input_ids"] == 3).sum(1).tolist() == [16, 16, 0]
    for mask, ids, labels in zip(batch["attention_mask"], batch["input_ids"], batch["labels"], strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (ids[mask == 0] == 0).all()
        assert (labels[mask == 0] == -100).all()
    assert batch["pixel_values_videos"].shape == (2, 8, 3, 32, 48)


def test_frames_of_several_sizes(small, collator):
    samples = [Sample(TEXT, frames=video()), Sample(LONG, frames=video(40, 24, seed=1))]
    batch = collator(samples)
    assert [tuple(each.shape[2:]) for each in batch["pixel_values_videos"]] == [(32, 48), (40, 24)]
    alone = [loss_of(small, collator([sample])).detach() for sample in samples]
    learned = torch.tensor([2.0, 3.0])
    expected = (torch.stack(alone) * learned).sum() / 5
    assert torch.isclose(loss_of(small, batch), expected, rtol=0, atol=float32_sum(torch.ones(64) * expected / 64))


def test_a_row_of_text_is_what_the_language_model_makes_of_it_alone(small, collator):
    batch = collator([Sample(LONG), Sample(TEXT, frames=video())])
    with torch.no_grad():
        arguments = {key: value for key, value in batch.items() if key not in ("skipped", "labels")}
        together = small.model(**arguments).logits[0, : len(LONG.ids)]
        alone = small.model.language_model(input_ids=torch.tensor([LONG.ids])).logits[0]
    assert torch.allclose(together, alone, rtol=0, atol=float32_sum(torch.ones(64) * alone.abs().max() / 64))


@pytest.mark.parametrize("with_features", [False, True])
def test_a_batch_of_text_runs_everything_and_changes_nothing(small, with_features):
    collator = Collator.of(small.model.video_model, small.tokenizer, with_features)
    batch = collator([Sample(LONG), Sample(TEXT)])
    assert len(batch["input_ids"]) == 3
    assert (batch["labels"][2] == -100).all()
    assert ("mm_encoder_outputs" in batch) == with_features
    small.model.zero_grad()
    loss = loss_of(small, batch)
    loss.backward()
    tail = dict(small.model.video_model.tail.named_parameters())
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tail.values())
    alone = {key: batch[key][:2] for key in ("input_ids", "attention_mask", "labels")}
    expected = small.model(**alone).loss
    assert torch.isclose(loss, expected, rtol=0, atol=float32_sum(torch.ones(64) * expected.detach() / 64))


def test_the_tail_learns_from_a_video(small, collator):
    """What the test above would be worth nothing without."""
    small.model.zero_grad()
    loss_of(small, collator([Sample(LONG), Sample(TEXT, frames=video())])).backward()
    tail = dict(small.model.video_model.tail.named_parameters())
    assert [name for name, tensor in tail.items() if not tensor.grad.any()] in ([], [NEVER_LEARNED])


def test_reasons_go_along(collator):
    batch = collator([Sample(TEXT, skipped=("a", "b")), Sample(LONG, skipped=("c",))])
    assert batch["skipped"] == ["a", "b", "c"]
