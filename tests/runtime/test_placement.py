"""What is placed where, and that encoders on several GPUs, here played ones, read nothing too early."""

import pytest
import torch

from bench.counting import count
from merv_fast.encoders import build_encoder, encoder_config
from merv_fast.models.configuration import MERV_BASE
from merv_fast.runtime import placement
from merv_fast.runtime.concurrent import ConcurrentEncoders
from merv_fast.runtime.placement import bytes_copied, choose_devices, encoder_flops, move_encoders
from tests.runtime.played_gpus import Played, PlayedGpus

CPU, GPU = torch.device("cpu"), [torch.device("cuda", index) for index in range(4)]
BASE = {config.family: config for config in (encoder_config(name, frames) for name, frames in MERV_BASE.items())}


@pytest.fixture
def gpus(monkeypatch):
    """So many GPUs, as far as PyTorch tells."""

    def there(number):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: number - 1)

    there(4)
    return there


def test_named_encoders_go_where_it_is_said_and_others_stay(gpus):
    asked = {"dinov2": "cuda:1", "siglip": torch.device("cpu", 0), "vivit": "cuda"}
    chosen = choose_devices(asked, BASE, GPU[2])
    assert chosen.devices == {"languagebind": GPU[2], "dinov2": GPU[1], "vivit": GPU[3], "siglip": CPU}
    assert (list(chosen.devices), chosen.tail) == (list(BASE), GPU[2])
    assert "dinov2 on cuda:1" in str(chosen)
    assert "the rest on cuda:2: as asked for" in str(chosen)


@pytest.mark.parametrize(
    ("asked", "tail", "words"),
    [
        ({"dino": "cpu", "vit": "cpu"}, CPU, "encoders must be among languagebind, dinov2, .*, got dino, vit"),
        ({"dinov2": "cuda:2"}, CPU, "devices must be among cpu, cuda:0, cuda:1, got 'cuda:2'"),
        ({"dinov2": "meta"}, CPU, "devices must be among cpu, cuda:0, cuda:1, got 'meta'"),
        ({"dinov2": "mps"}, CPU, "devices must be among cpu, cuda:0, cuda:1, got 'mps'"),
        ({"dinov2": "gpu1"}, CPU, "devices must be among cpu, cuda:0, cuda:1, got 'gpu1'"),
        ("auto", CPU, "placement must be 'balanced' or a device for each encoder, got 'auto'"),
        ("balanced", CPU, "model must be on a GPU for its encoders to be balanced over several, got cpu"),
        ({}, torch.device("meta"), "model must have weights, got one on the meta device"),
    ],
)
def test_says_what_is_wrong(gpus, asked, tail, words):
    gpus(2)
    with pytest.raises(ValueError, match=words):
        choose_devices(asked, BASE, tail)


def test_without_gpus_there_is_only_the_cpu(gpus):
    gpus(0)
    with pytest.raises(ValueError, match="devices must be among cpu, got 'cuda'"):
        choose_devices({"dinov2": "cuda"}, BASE, CPU)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(2, [0, 1, 1, 0]), (3, [0, 1, 2, 2]), (4, [0, 1, 2, 3]), (8, [0, 1, 2, 3])],
)
def test_balanced_is_the_largest_first_to_the_least_loaded(gpus, number, expected):
    gpus(number)
    chosen = choose_devices("balanced", BASE, torch.device("cuda", 0))
    assert list(chosen.devices.values()) == [torch.device("cuda", index) for index in expected]
    assert list(chosen.devices) == list(BASE)
    assert chosen.reason.startswith("balanced, TFLOPs a video: cuda:0 3.")
    assert chosen.reason.count("cuda:") == min(number, len(BASE))


def test_the_largest_is_where_the_tail_is(gpus):
    chosen = choose_devices("balanced", BASE, GPU[2])
    assert chosen.devices == {"languagebind": GPU[2], "dinov2": GPU[0], "vivit": GPU[1], "siglip": GPU[3]}
    assert chosen.tail == GPU[2]


@pytest.mark.parametrize(("number", "tail", "words"), [(0, CPU, "no GPU"), (1, GPU[0], "1 GPU"), (1, CPU, "1 GPU")])
def test_with_nothing_to_balance_all_stay(gpus, number, tail, words):
    gpus(number)
    chosen = choose_devices("balanced", BASE, tail)
    assert chosen.devices == dict.fromkeys(BASE, tail)
    assert chosen.reason == f"nothing to balance, {words} here"


@pytest.mark.parametrize("config", [*BASE.values(), encoder_config("hiera-base-video", 16)], ids=lambda c: c.family)
def test_flops_are_all_products_but_those_over_frames(config):
    with torch.device("meta"):
        encoder, pixels = build_encoder(config), torch.empty(1, config.num_frames, 3, 224, 224)
    over_frames = 0
    if getattr(config, "temporal_window", None):
        tokens = config.num_frames * (config.prefix_tokens + 16 * 16)
        over_frames = config.blocks * 2 * tokens * config.temporal_window * config.width
    assert encoder_flops(config) == 2 * (count(encoder, pixels)[1].macs - over_frames)


def test_bytes_between_devices(gpus):
    """As the docstring has them."""
    sent, back = {}, {}
    for name, config in BASE.items():
        both = bytes_copied(BASE, choose_devices({name: "cuda:1"}, BASE, GPU[0]), 2)
        sent[name] = config.num_frames * 3 * 224 * 224 * 2
        back[name] = both - sent[name]
    assert [round(value / 1e6, 1) for value in sent.values()] == [4.8, 4.8, 9.6, 4.8]
    assert [round(value / 1e6, 1) for value in back.values()] == [8.4, 8.4, 4.8, 4.8]
    assert bytes_copied(BASE, choose_devices({}, BASE, GPU[0]), 2) == 0


class Moved(torch.nn.Linear):
    """A module that counts as being where it was last moved to; ``full`` devices have no room."""

    def __init__(self, full=()):
        super().__init__(1, 1)
        self.full, self.calls = full, []

    def to(self, device):
        self.calls.append(device)
        if device in self.full:
            raise torch.OutOfMemoryError("no room")
        return self


def test_if_one_does_not_fit_none_is_moved():
    encoders = torch.nn.ModuleDict({"a": Moved(), "b": Moved(), "c": Moved(full=[GPU[1]]), "d": Moved()})
    with pytest.raises(torch.OutOfMemoryError):
        placement.move_encoders(encoders, {"a": GPU[0], "b": CPU, "c": GPU[1], "d": GPU[1]})
    calls = [encoder.calls for encoder in encoders.values()]
    # What was not moved is left alone; the one that failed may have been moved in part.
    assert calls == [[GPU[0], CPU], [], [GPU[1], CPU], [CPU]]


def test_attention_is_checked_where_an_encoder_has_come(monkeypatch):
    def refuse(encoder, backend):
        raise ValueError(f"{backend} does not serve")

    encoders = torch.nn.ModuleDict({"a": Moved(), "b": Moved()})
    monkeypatch.setattr(placement, "attention_of", lambda encoder: "xformers")
    monkeypatch.setattr(placement, "check_attention", refuse)
    with pytest.raises(ValueError, match="xformers does not serve"):
        move_encoders(encoders, {"a": CPU, "b": GPU[1]})
    assert [encoder.calls for encoder in encoders.values()] == [[], [GPU[1], CPU]]


@pytest.fixture
def played():
    with PlayedGpus() as gpus, torch.no_grad():
        yield gpus


def layers(gpus, devices, **kwargs):
    """Encoders on ``devices``, the first with most weights, what they take, and what they give."""
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(4, 64 - place), torch.nn.GELU()) for place in range(len(devices))]
    inputs = [torch.randn(3, 4) for _ in devices]
    expected = [module(x) for module, x in zip(modules, inputs, strict=True)]
    modules = [module.to(device) for module, device in zip(modules, devices, strict=True)]
    return ConcurrentEncoders(modules, streams=gpus, **kwargs), inputs, expected


def check(gpus, outputs, expected, device):
    for y, e in zip(outputs, expected, strict=True):
        assert y.device == device
        # Read where the caller works, as whatever comes next does.
        assert torch.equal((y + 0).to("cpu"), e)


PLACES = {
    "each its own": GPU[:4],
    "two together": [GPU[1], GPU[0], GPU[1], GPU[2]],
    "all elsewhere": [GPU[1]] * 4,
    "one on the CPU": [GPU[2], CPU, GPU[0], GPU[2]],
}


@pytest.mark.parametrize("devices", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("home", [GPU[0], CPU], ids=str)
@pytest.mark.parametrize("lanes", [None, 1])
def test_on_several_gpus_nothing_is_read_too_early(played, devices, home, lanes):
    encoders, inputs, expected = layers(played, devices, lanes=lanes)
    for _ in range(2):
        check(played, encoders([x.to(home) for x in inputs]), expected, home)


def test_inputs_may_be_on_several_gpus(played):
    encoders, inputs, expected = layers(played, [GPU[0], GPU[1], GPU[1]], lanes=1)
    places = [GPU[1], GPU[2], GPU[0]]
    outputs = encoders([x.to(device) for x, device in zip(inputs, places, strict=True)])
    for y, e, device in zip(outputs, expected, places, strict=True):
        check(played, [y], [e], device)


@pytest.mark.parametrize("devices", list(PLACES.values())[:3], ids=list(PLACES)[:3])
def test_no_encoder_waits_for_another(played, devices):
    encoders, inputs, _ = layers(played, devices)
    inputs = [x.to(GPU[0]) for x in inputs]
    played.ran.clear()
    encoders(inputs)
    assert len(set(played.ran)) == 4
    assert all(not played.awaited(stream) for stream in set(played.ran))
    # The caller waits for all.
    assert played.awaited(played.current(GPU[0])) == set(played.ran)


def test_inputs_are_sent_before_anything_is_computed_and_once(played):
    encoders, inputs, expected = layers(played, [GPU[1], GPU[1], GPU[0]], lanes=1)
    inputs = [x.to(GPU[0]) for x in inputs]
    played.copies.clear()
    outputs = encoders(inputs)
    there, back = (GPU[0], GPU[1]), (GPU[1], GPU[0])
    assert [copy[:2] for copy in played.copies] == [there, there, back, back]
    assert [copy[2] for copy in played.copies] == [48, 48, *(4 * expected[place].numel() for place in (0, 1))]
    check(played, outputs, expected, GPU[0])


@pytest.mark.parametrize("failing", range(3))
def test_after_an_error_callers_wait_for_all_that_was_started(played, failing):
    encoders, inputs, _ = layers(played, [GPU[0], GPU[1], GPU[2]])
    inputs = [x.to(GPU[0]) for x in inputs]
    played.ran.clear()

    def fail(module, args, output):
        raise RuntimeError("the encoder's own error")

    encoders.modules()[failing].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the encoder's own error"):
        encoders(inputs)
    lanes = set(played.ran)
    assert len(lanes) == failing + 1
    assert all(lane in played.awaited(played.current(lane[0])) for lane in lanes)
    assert set(played.now.values()) == {"caller"}


def test_the_checker_sees_what_is_forgotten(played, monkeypatch):
    for forgotten, words in (("wait", "does not wait"), ("keep", "may go")):
        encoders, inputs, expected = layers(played, [GPU[0], GPU[1]])
        inputs = [x.to(GPU[0]) for x in inputs]
        with monkeypatch.context() as patch:
            patch.setattr(played, forgotten, lambda *args: None)
            with pytest.raises(AssertionError, match=words):
                check(played, encoders(inputs), expected, GPU[0])
    x = Played(torch.ones(1), GPU[0], played)
    with pytest.raises(AssertionError, match="on several devices"):
        x + torch.ones(1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_hundred_runs_on_two_gpus_are_those_on_one():
    torch.manual_seed(0)
    sizes = (512, 1024, 2048)
    alone = [torch.nn.Sequential(*[torch.nn.Linear(n, n, dtype=torch.bfloat16)] * 8).to(GPU[0]) for n in sizes]
    spread = [torch.nn.Sequential(*[torch.nn.Linear(n, n, dtype=torch.bfloat16)] * 8) for n in sizes]
    for one, other, device in zip(alone, spread, (GPU[1], GPU[0], GPU[1]), strict=True):
        other.load_state_dict(one.state_dict())
        other.to(device)
    encoders = ConcurrentEncoders(spread)
    with torch.inference_mode():
        for _ in range(200):
            inputs = [torch.randn(256, n, device=GPU[0]).bfloat16() for n in sizes]
            outputs = encoders(inputs)
            expected = [module(x) for module, x in zip(alone, inputs, strict=True)]
            assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
            del inputs, outputs
