"""A whole video model with encoders on other devices gives what it gives on one."""

import logging

import pytest
import torch

import merv_fast
from merv_fast.models import identity
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.video_model import MervVideoModel
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.placement import bytes_copied
from tests.models.random_merv import tiny_config
from tests.runtime.played_gpus import PlayedGpus

CPU, GPU = torch.device("cpu"), [torch.device("cuda", index) for index in range(3)]
SPREAD = {"dinov2": "cuda:1", "vivit": "cuda:2", "siglip": "cuda:1"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MervVideoModel(tiny_config()).eval()


@pytest.fixture
def frames():
    return torch.randint(0, 256, (2, 32, 3, 128, 160), dtype=torch.uint8)


@pytest.fixture
def played(model, monkeypatch):
    """Three GPUs, the model on the first."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPU))
    with PlayedGpus() as gpus, torch.no_grad():
        model.concurrent._streams = gpus
        model.encode_budget = 2**40
        model.to(GPU[0])
        yield gpus


def test_on_the_cpu_bit_for_bit(model, frames):
    with torch.inference_mode():
        before = model(frames)
        placed = model.place({"dinov2": "cpu", "siglip": "cpu"})
        after = model(frames)
    assert placed == model.placement
    assert set(placed.devices.values()) == {CPU}
    assert torch.equal(after.pooler_output, before.pooler_output)
    assert torch.equal(after.encoder_weights, before.encoder_weights)


def test_on_three_gpus_bit_for_bit(model, frames, played):
    inputs = [x.to("cpu") for x in MervVideoModel(tiny_config()).prepare(frames)]
    here = [x.to(GPU[0]) for x in inputs]
    alone = model.fuse(model.encode(here))
    for asked in (SPREAD, "balanced", {"languagebind": "cuda:1"}, {"vivit": "cpu"}, {}):
        model.place(asked)
        played.copies.clear()
        features = model.encode(here)
        between = sum(size for _, _, size in played.copies)
        assert between == 2 * bytes_copied(model.encoder_configs, model.placement, 4)
        spread = model.fuse(features)
        assert (model.device, spread.pooler_output.device) == (GPU[0], GPU[0])
        assert torch.equal(spread.pooler_output.to("cpu"), alone.pooler_output.to("cpu"))
        assert torch.equal(spread.encoder_weights.to("cpu"), alone.encoder_weights.to("cpu"))


def test_in_parts_as_every_device_has_room(model, frames, played):
    whole, one = model.bytes_per_video(), model.bytes_per_video(["languagebind"])
    assert 0 < one < whole
    model.encode_budget = whole
    assert model.videos_at_once() == 1
    model.place({"dinov2": "cuda:1", "vivit": "cuda:2", "siglip": "cuda:2"})
    model.encode_budget = 2 * model.bytes_per_video(["vivit", "siglip"])
    assert model.videos_at_once() == 2
    here = [x.to(GPU[0]) for x in MervVideoModel(tiny_config()).prepare(frames)]
    together = model.encode(here)
    model.encode_budget -= 1
    assert model.videos_at_once() == 1
    played.copies.clear()
    assert all(torch.equal(a.to("cpu"), b.to("cpu")) for a, b in zip(model.encode(here), together, strict=True))
    assert [copy[:2] for copy in played.copies].count((GPU[0], GPU[2])) == 4


def test_the_device_of_the_model_is_that_of_its_tail(played):
    whole = MervForConditionalGeneration(tiny_config()).eval().to(GPU[0])
    first = next(iter(whole.video_model.encoders))
    whole.video_model.place({first: "cuda:1"})
    assert next(whole.parameters()).device == GPU[1]
    assert whole.device == whole.video_model.device == GPU[0]


def test_moving_the_model_ends_a_placement_and_casting_it_does_not(model, played):
    placed = model.place(SPREAD)
    assert list(map(str, placed.devices.values())) == ["cuda:0", "cuda:1", "cuda:2", "cuda:1"]
    model.to(torch.bfloat16)
    assert model.placement is placed
    assert model.dtype == torch.bfloat16
    model.to(GPU[2])
    assert set(model.placement.devices.values()) == {GPU[2]} == {model.device}
    assert model.placement.reason == "where the model is"
    model.encoders["vivit"].to(GPU[1])
    assert model.placement.reason == "moved by other means than place"
    assert model.place({}).devices == dict.fromkeys(model.encoders, GPU[2])


def test_a_state_dict_does_not_show_it(model, played):
    before = {key: value.to("cpu") for key, value in model.state_dict().items()}
    model.place(SPREAD)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value.to("cpu"), before[key]) for key, value in after.items())
    other = {key: value + 1 for key, value in before.items()}
    model.load_state_dict(other)
    assert all(torch.equal(value.to("cpu"), other[key]) for key, value in model.state_dict().items())
    assert model.placement.reason == "as asked for"


def test_saved_and_loaded(model, frames, tmp_path):
    model.place({"dinov2": "cpu"})
    model.save_pretrained(tmp_path)
    loaded = MervVideoModel.from_pretrained(tmp_path).eval()
    assert loaded.placement.reason == "where the model is"
    with torch.inference_mode():
        assert torch.equal(loaded(frames).pooler_output, model(frames).pooler_output)


def test_nothing_to_balance_is_said(model, monkeypatch, caplog):
    for number, words in ((0, "no GPU"), (1, "1 GPU")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=number: number)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "merv_fast"):
            model.place("balanced")
        assert caplog.messages == [f"place: all encoders stay on cpu: nothing to balance, {words} here"]
        (found,) = [choice for choice in merv_fast.explain(model) if choice.part == "encoders"]
        assert found.why.endswith(f"; nothing to balance, {words} here")
    caplog.clear()
    model.place({})
    assert not caplog.messages


def test_explain_says_where(model, played):
    rows = {choice.part: choice for choice in merv_fast.explain(model)}
    assert rows["encoders"].where == "cuda:0, float32"
    assert "between devices" not in rows["encoders"].why
    model.place(SPREAD)
    rows = {choice.part: choice for choice in merv_fast.explain(model)}
    wheres = [rows[f"encoder {name}"].where for name in model.encoders]
    assert wheres == [f"cuda:{index}, float32" for index in (0, 1, 2, 1)]
    assert rows["prepare"].where == "cuda:0"
    assert rows["projectors and fusion"].where == "cuda:0, float32"
    assert rows["encoders"].runs == "side by side, a stream each"
    assert rows["encoders"].where == "cuda:0, cuda:1, cuda:2, float32"
    copied = bytes_copied(model.encoder_configs, model.placement, 4) / 2**20
    assert rows["encoders"].why.endswith(f", {copied:.0f} MiB of each between devices; as asked for")


@pytest.mark.parametrize("keep", ["tokens", "features"])
def test_a_cache_knows_kinds_of_devices_and_not_their_numbers(model, monkeypatch, played, keep):
    monkeypatch.setattr(VideoCache(keep=keep).weights.__class__, "module", lambda self, parts: "the weights")
    kinds = {CPU: "cpu", GPU[0]: "a", GPU[1]: "a", GPU[2]: "b"}
    monkeypatch.setattr(identity, "arithmetic", lambda device, dtype: kinds[device])

    def key(asked):
        model.place(asked)
        return identity.model_identity(model, VideoCache(keep=keep))

    alone = key({})
    assert key({"dinov2": "cuda:1"}) == alone
    assert len({alone, key({"dinov2": "cuda:2"}), key({"siglip": "cuda:2"}), key({"siglip": "cpu"})}) == 4
    together = dict.fromkeys(model.encoders, "cuda:1")
    assert key(together) == alone
    # Where frames are prepared counts too.
    model.to(GPU[2])
    assert key(together) != alone
    model.to(GPU[1])
    assert key({}) == alone


def test_a_tail_without_weights_cannot_say_where_it_is(model):
    model.tail = torch.nn.Identity()
    with pytest.raises(ValueError, match="tail must have weights"):
        model.place({"dinov2": "cpu"})


def test_unknown_encoders_leave_all_as_it_was(model, played):
    placed = model.place(SPREAD)
    with pytest.raises(ValueError, match="encoders must be among"):
        model.place({"siglip": "cuda:0", "dino": "cuda:2"})
    assert model.placement is placed


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("asked", [SPREAD | {"vivit": "cuda:0"}, "balanced"], ids=["named", "balanced"])
def test_on_two_gpus_bit_for_bit(model, frames, asked):
    model.to(GPU[0])
    if len({torch.cuda.get_device_name(gpu) for gpu in GPU[:2]}) > 1:
        pytest.skip("the GPUs are of two kinds")
    with torch.inference_mode():
        alone = model(frames)
        placed = model.place(asked)
        assert len(set(placed.devices.values())) > 1
        for _ in range(20):
            spread = model(frames)
            assert torch.equal(spread.pooler_output, alone.pooler_output)
            assert torch.equal(spread.encoder_weights, alone.encoder_weights)
        model.place({})
        assert torch.equal(model(frames).pooler_output, alone.pooler_output)
