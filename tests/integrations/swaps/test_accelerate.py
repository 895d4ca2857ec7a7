"""A model with the reference's structure and golden weights, before, while and after it is accelerated."""

import copy
import logging

import pytest
import torch
from torch import nn

from merv_fast import accelerate, explain, restore
from merv_fast.integrations.swaps import tails
from merv_fast.integrations.swaps.encoders import ENCODER
from tests.budgets import FLOAT64, GOLDEN, relative_error
from tests.golden_files import load
from tests.integrations.swaps.reference_modules import AveragePoolingProjector, Merv, dinov2

NAMES = ["model_cross_attention_avg_lq_linear", "model_cross_attention_avg_lq_mlp"]


def videos():
    inputs, _ = load("model_inputs")
    return [inputs[f"video.{index}"] for index in range(4)]


def logits(merv):
    inputs, _ = load("model_inputs")
    return merv(inputs["input_ids"], inputs["attention_mask"], videos())


def attributes(model):
    """What every module holds itself."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@pytest.fixture
def merv():
    return Merv()


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_logits(name, monkeypatch):
    merv, expected = Merv(name), load(name)[0]["logits"]
    calls = []
    op = tails.ops.pool_project_fuse
    monkeypatch.setattr(tails.ops, "pool_project_fuse", lambda *args: calls.append(args) or op(*args))
    with torch.inference_mode():
        before = logits(merv)
        assert relative_error(before, expected) < GOLDEN
        assert accelerate(merv, strict=True) is merv
        assert relative_error(logits(merv), expected) < GOLDEN
        assert len(calls) == 1
        restore(merv)
        assert torch.equal(logits(merv), before)
    assert len(calls) == 1


def test_weights_and_their_names_stay(merv):
    keys, parameters = list(merv.state_dict()), list(merv.parameters())
    values = [parameter.clone() for parameter in parameters]
    with torch.no_grad():
        accelerate(merv), merv.visual(videos())
    assert list(merv.state_dict()) == keys
    assert all(now is then for now, then in zip(merv.parameters(), parameters, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(parameters, values, strict=True))


def test_weights_are_shared(merv):
    with torch.no_grad():
        accelerate(merv), merv.visual(videos())
    theirs = {parameter.untyped_storage().data_ptr() for parameter in merv.parameters()}
    taken = [vars(module)[ENCODER][0].ours() for module in merv.modules() if ENCODER in vars(module)]
    assert len(taken) == 4
    for ours in taken:
        own = {name for name, each in ours.named_parameters() if each.untyped_storage().data_ptr() not in theirs}
        assert own <= {"position", "prefix"}


def test_restoring_leaves_nothing(merv):
    before, storages = attributes(merv), {p.untyped_storage().data_ptr() for p in merv.parameters()}
    assert len(storages) == len(list(merv.parameters()))
    with torch.no_grad():
        accelerate(merv), merv.visual(videos())
    assert attributes(merv) != before
    restore(merv)
    assert attributes(merv) == before
    assert len({p.untyped_storage().data_ptr() for p in merv.parameters()}) == len(storages)


def test_gradients_and_a_step(merv):
    trained = [*merv.projectors.parameters(), merv.feature_fusion.Q, merv.feature_fusion.attention.q_proj_weight]
    for parameter in trained:
        parameter.requires_grad_(True)

    def gradients():
        tokens, weights = merv.visual(videos())
        loss = tokens.sin().sum() + (weights * torch.arange(4)).sum()
        return torch.autograd.grad(loss, trained)

    expected = gradients()
    accelerate(merv)
    for got, right in zip(gradients(), expected, strict=True):
        assert relative_error(got, right) < GOLDEN
    with torch.no_grad():
        before = merv.visual(videos())[0]
        for parameter, gradient in zip(trained, expected, strict=True):
            parameter.sub_(gradient, alpha=1e-3)
        after = merv.visual(videos())[0]
        assert relative_error(after, restore(merv).visual(videos())[0]) < GOLDEN
    assert relative_error(before, after) > GOLDEN


def test_encoders_that_are_trained_run_their_own_code(merv):
    weight = merv.video_backbones[0].featurizer.encoder.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(merv.visual(videos())[0].sin().sum(), weight)
    accelerate(merv)
    (got,) = torch.autograd.grad(merv.visual(videos())[0].sin().sum(), weight)
    assert relative_error(got, expected) < GOLDEN


@pytest.mark.parametrize(
    "part",
    [
        "video_backbones.0.featurizer.encoder.layers.0.self_attn.k_proj.weight",
        "video_backbones.0.featurizer.embeddings.class_embedding",
        "video_backbones.1.featurizer.pos_embed",
        "video_backbones.2.featurizer.embeddings.position_embeddings",
        "video_backbones.3.featurizer.patch_embed.proj.bias",
        "feature_fusion.Q",
        "projectors.2.projector.projector.weight",
    ],
)
@torch.no_grad()
def test_a_weight_that_is_written_to(merv, part):
    accelerate(merv)
    before = merv.visual(videos())[0]
    merv.get_parameter(part).mul_(1.5)
    got = merv.visual(videos())[0]
    assert relative_error(before, got) > GOLDEN
    assert relative_error(got, restore(merv).visual(videos())[0]) < GOLDEN


@torch.no_grad()
def test_moving_to_another_dtype(merv):
    accelerate(merv), merv.visual(videos())
    merv.double()
    wide = [video.double() for video in videos()]
    got = merv.visual(wide)[0]
    assert got.dtype == torch.float64
    assert relative_error(got, restore(merv).visual(wide)[0]) < FLOAT64


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(merv):
    accelerate(merv)
    before = merv.visual(videos())[0]
    other = copy.deepcopy(merv)
    for part in ("projectors", "feature_fusion"):
        for parameter in other.get_submodule(part).parameters():
            parameter.mul_(1.5)
    other.video_backbones[0].featurizer.encoder.layers[0].self_attn.k_proj.weight.mul_(1.5)
    changed = other.visual(videos())[0]
    assert torch.equal(merv.visual(videos())[0], before)
    assert relative_error(changed, before) > GOLDEN
    assert relative_error(changed, restore(other).visual(videos())[0]) < GOLDEN


@torch.no_grad()
def test_whoever_looks_at_projected_tokens_gets_them(merv):
    seen = []
    merv.projectors[2].register_forward_hook(lambda module, args, output: seen.append(output.square()))
    right = merv.visual(videos())
    accelerate(merv)
    got = merv.visual(videos())
    assert relative_error(seen[1], seen[0]) < GOLDEN
    assert all(relative_error(a, b) < GOLDEN for a, b in zip(got, right, strict=True))


@torch.no_grad()
def test_whoever_writes_to_projected_tokens_is_heard(merv):
    def triple(module, args, output):
        output.mul_(3)

    merv.projectors[2].register_forward_hook(triple)
    right = merv.visual(videos())[0]
    assert relative_error(accelerate(merv).visual(videos())[0], right) < GOLDEN


def test_explain_lists_every_part(merv):
    merv.video_backbones[1].featurizer.blocks[1].attn.q_norm = nn.LayerNorm(12)
    would = {choice.part: choice for choice in explain(merv)}
    assert would["feature_fusion"].why.startswith("accelerate would run pool_project_fuse")
    accelerate(merv)
    runs = {choice.part: choice for choice in explain(merv) if "stream" not in choice.runs}
    assert {part: choice.runs for part, choice in runs.items()} == {
        "video_backbones.0": "VisionTransformer",
        "video_backbones.1.featurizer": "as before",
        "video_backbones.2.featurizer": "VisionTransformer",
        "video_backbones.3.featurizer": "VisionTransformer",
        **{f"projectors.{index}": "pool_project_fuse" for index in range(4)},
        "feature_fusion": "pool_project_fuse",
        "llm_backbone": "as before",
    }
    assert runs["video_backbones.1.featurizer"].why == "refused: its SelfAttention has a q_norm"
    assert "no projector, fusion or encoder" in runs["llm_backbone"].why


def test_strict_names_every_refusal_and_changes_nothing(merv):
    merv.video_backbones[1].featurizer.blocks[1].attn.q_norm = nn.LayerNorm(12)
    merv.projectors[0].projector.layernorm = nn.LayerNorm(48)
    before = attributes(merv)
    with pytest.raises(ValueError, match=r"projectors.0: LinearProjector holds .*LayerNorm") as error:
        accelerate(merv, strict=True)
    assert "video_backbones.1.featurizer: its SelfAttention has a q_norm" in str(error.value)
    assert attributes(merv) == before


@torch.no_grad()
def test_without_strict_refusals_are_said(merv, caplog):
    merv.projectors[0].projector.layernorm = nn.LayerNorm(48)
    right = merv.visual(videos())[0]
    with caplog.at_level(logging.WARNING, "merv_fast"):
        accelerate(merv)
    assert "projectors.0: LinearProjector holds" in caplog.text
    assert {choice.runs for choice in explain(merv) if choice.part == "projectors.1"} == {"pool_project"}
    assert relative_error(merv.visual(videos())[0], right) < GOLDEN


def test_errors(caplog):
    with pytest.raises(ValueError, match="every part must be one that can be taken, got no projector"):
        accelerate(nn.Linear(2, 2), strict=True)
    accelerate(nn.Linear(2, 2))
    assert "no projector, fusion or encoder of a known kind" in caplog.text
    with pytest.raises(ValueError, match="restore: model must be accelerated"):
        restore(nn.Linear(2, 2))
    projector = accelerate(AveragePoolingProjector(8, 8, 2, 4))
    with pytest.raises(ValueError, match="must not be accelerated yet"):
        accelerate(projector)
    with pytest.raises(ValueError, match=r"x must be \[B, 4, a square number, C\], got \[1, 4, 15, 8\]"):
        projector(torch.zeros(1, 4, 15, 8))
    with pytest.raises(ValueError, match=r"x must be \[B, 4, a square number, C\], got \[1, 3, 16, 8\]"):
        projector(torch.zeros(1, 3, 16, 8))


def test_frozen_batches_of_another_size():
    backbone = dinov2()
    right, x = backbone, torch.randn(3, 2, 3, 56, 56)
    with torch.no_grad():
        expected = right(x, None)
        assert relative_error(accelerate(backbone)(x, None), expected) < GOLDEN
