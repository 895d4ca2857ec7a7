"""The names that stand for a backend: which one they become, at what cost, and when they are refused."""

import copy
import pickle
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from merv_fast.encoders import build_encoder
from merv_fast.encoders.hiera import hiera_config
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.modules import attention_choice
from merv_fast.modules.attention import (
    AttentionChoice,
    HeadAttention,
    _shapes,
    attention_choices,
    attention_of,
    attention_shapes,
    attention_versions,
    check_attention,
    set_attention,
)
from merv_fast.modules.attention_backends import BACKENDS, discrepancy
from merv_fast.modules.attention_choice import HeadShapes, View, choose_fastest, choose_flash_attention
from tests.encoders.small_encoders import SMALL
from tests.models.random_merv import build_tiny
from tests.modules.attention_packages import MODULES, StandIn, install, remove

# Heads of 16: packages take multiples of 8.
CONFIGS = {name: replace(config, heads=3, blocks=2, depth=3) for name, config in SMALL.items()}
CONFIGS["siglip pooled"] = replace(CONFIGS["siglip"], tokens="pooled", final_norm=True)
CONFIGS["hiera"] = replace(
    hiera_config("hiera-base-video", 16), image_size=64, embed_width=16, heads=2, stages=(1, 1, 2, 1)
)
CPU = torch.device("cpu")
FLASH = ["flash_attention_4", "flash_attention_3", "flash_attention_2"]
MISSING = {name: f"{BACKENDS[name].package} must be importable" for name in MODULES}


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """No package is installed, and nothing was measured before."""
    monkeypatch.setattr(attention_choice, "FOUND", {})
    for name in MODULES:
        remove(monkeypatch, name)


def installed(monkeypatch, *names: str, on_cpu: bool = True) -> dict[str, StandIn]:
    """Stand-ins for packages."""
    # What is installed for 4 takes the place of 2, which is in the folder above.
    return {name: install(monkeypatch, name, on_cpu) for name in sorted(names, reverse=True)}


def made(name: str = "dinov2", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(CONFIGS[name]).eval().to(dtype)


def pixels(name: str) -> Tensor:
    config = CONFIGS[name]
    return torch.zeros(1, config.num_frames, 3, config.image_size, config.image_size)


class Clock:
    """Backends on a CPU that take the seconds they are said to, and a clock that goes by them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.now = monkeypatch, 0.0
        self.calls: Counter[str] = Counter()
        monkeypatch.setattr(attention_choice, "perf_counter", lambda: self.now)
        for name in BACKENDS:
            if name != "eager":
                monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(dtypes={"cuda": ()}))

    def serve(self, name: str, seconds, attend=scaled_dot_product_attention, dtypes=(torch.float32, torch.bfloat16)):
        """``seconds``: a number, or one for each call by the shape of q."""

        def timed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.now += seconds(q.shape) if callable(seconds) else seconds
            self.calls[name] += 1
            return attend(q, k, v)

        backend = BACKENDS[name]._replace(load=lambda: timed, dtypes={"cpu": dtypes}, head_sizes=None)
        self.patch.setitem(BACKENDS, name, backend)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (["flash_attention_2"], "flash_attention_2"),
        (["flash_attention_3"], "flash_attention_3"),
        (["flash_attention_4"], "flash_attention_4"),
        (["flash_attention_2", "flash_attention_3"], "flash_attention_3"),
        (["flash_attention_2", "flash_attention_4"], "flash_attention_4"),
        (["flash_attention_2", "flash_attention_3", "flash_attention_4"], "flash_attention_4"),
    ],
)
def test_the_newest_that_imports(monkeypatch, there, expected):
    stand_ins = installed(monkeypatch, *there)
    encoder = made(dtype=torch.bfloat16)
    set_attention(encoder, "flash_attention")
    # The name is that of what runs, wherever a choice is told.
    assert attention_of(encoder) == expected
    assert attention_versions(encoder)[0].split()[0] == expected
    (choice,) = attention_choices(encoder)
    assert choice.name == str(choice) == expected
    assert list(choice.left_out) == FLASH[: FLASH.index(expected)]
    for name, reason in choice.left_out.items():
        assert reason.startswith(MISSING[name])
    before = {name: len(stand_in.calls) for name, stand_in in stand_ins.items()}
    encoder(pixels("dinov2"))
    after = {name: len(stand_in.calls) - before[name] for name, stand_in in stand_ins.items()}
    assert after == dict.fromkeys(there, 0) | {expected: 2}


def test_one_that_does_not_serve_gives_way_to_an_older_one(monkeypatch):
    stand_ins = installed(monkeypatch, "flash_attention_2", "flash_attention_3", "flash_attention_4")
    stand_ins["flash_attention_4"].scale = 1.1
    narrow = BACKENDS["flash_attention_3"]._replace(head_sizes=range(64, 65, 8))
    monkeypatch.setitem(BACKENDS, "flash_attention_3", narrow)
    encoder = made(dtype=torch.bfloat16)
    set_attention(encoder, "flash_attention")
    assert attention_of(encoder) == "flash_attention_2"
    left_out = attention_choices(encoder)[0].left_out
    assert left_out["flash_attention_4"].startswith("result of flash_attention_4 must be right for heads of 16")
    assert left_out["flash_attention_3"].startswith("head size of flash_attention_3 must be")


def test_without_any_all_reasons_are_told(monkeypatch):
    encoder = made(dtype=torch.bfloat16)
    rule = rf"^attention: flash_attention must be one of {', '.join(FLASH)} that serves here \(or choose sdpa\), got "
    four, three, two = (f"{name}: {MISSING[name]} for {name} .*Error: .*" for name in FLASH)
    for call in (check_attention, set_attention):
        with pytest.raises(ImportError, match=f"{rule}{four}; {three}; {two}"):
            call(encoder, "flash_attention")
    assert attention_of(encoder) == "sdpa"
    # Where one could be imported, the error is what is wrong with it.
    installed(monkeypatch, "flash_attention_2", on_cpu=False)
    with pytest.raises(ValueError, match=f"{rule}{four}; {three}; flash_attention_2: tensors .*, got cpu$"):
        set_attention(encoder, "flash_attention")
    installed(monkeypatch, "flash_attention_3")["flash_attention_3"].scale = 1.1
    with pytest.raises(RuntimeError, match=r"flash_attention_3: result of .* got an error of .*; flash_attention_2: "):
        set_attention(encoder, "flash_attention")
    assert attention_of(encoder) == "sdpa"


def test_it_must_serve_for_all_heads(monkeypatch):
    installed(monkeypatch, "flash_attention_2", "flash_attention_3")
    narrow = BACKENDS["flash_attention_3"]._replace(head_sizes=range(16, 17, 8))
    monkeypatch.setitem(BACKENDS, "flash_attention_3", narrow)
    assert choose_flash_attention([16], CPU, torch.bfloat16).name == "flash_attention_3"
    for sizes in ([16, 32], [32, 16]):
        assert choose_flash_attention(sizes, CPU, torch.bfloat16).name == "flash_attention_2"


@pytest.mark.parametrize("where", ["meta", "not placed"])
def test_before_weights_are_placed_the_import_decides(monkeypatch, where):
    stand_in = installed(monkeypatch, "flash_attention_2", on_cpu=False)["flash_attention_2"]
    encoder = made()
    if where == "meta":
        encoder.to("meta")
        set_attention(encoder, "flash_attention")
    else:
        set_attention(encoder, "flash_attention", placed=False)
        with pytest.raises(ValueError, match=r"tensors of flash_attention_2 must be on cuda .*, got cpu"):
            encoder(pixels("dinov2"))
    assert attention_of(encoder) == "flash_attention_2"
    assert stand_in.calls == []


def test_what_was_decided_stays_when_the_model_changes(monkeypatch):
    installed(monkeypatch, "flash_attention_2")
    encoder = made(dtype=torch.bfloat16)
    set_attention(encoder, "flash_attention")
    installed(monkeypatch, "flash_attention_3")
    encoder.float()
    assert attention_of(encoder) == "flash_attention_2"
    with pytest.raises(ValueError, match=r"tensors of flash_attention_2 must be float16 or bfloat16 .*, got float32"):
        encoder(pixels("dinov2"))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"sdpa": 2e-3, "sdpa_cudnn": 1e-3, "xformers": 3e-3}, "sdpa_cudnn"),
        ({"sdpa": 3e-3, "sdpa_cudnn": 2e-3, "xformers": 1e-3}, "xformers"),
        ({"sdpa": 1e-3, "sdpa_cudnn": 2e-3, "xformers": 3e-3}, "sdpa"),
        ({"sdpa": 1.029e-3, "sdpa_flash": 1e-3}, "sdpa"),
        ({"sdpa": 1.031e-3, "sdpa_flash": 1e-3}, "sdpa_flash"),
        ({"sdpa": 9e-3, "flash_attention_3": 1.01e-3, "flash_attention_4": 1e-3}, "flash_attention_4"),
    ],
)
def test_the_fastest_is_chosen(clock, seconds, expected):
    for name, each in seconds.items():
        clock.serve(name, each)
    encoder = made()
    set_attention(encoder, "fastest")
    assert attention_of(encoder) == expected
    (choice,) = attention_choices(encoder)
    assert choice.name == expected
    # Of two blocks.
    assert choice.milliseconds == pytest.approx({name: 2e3 * each for name, each in seconds.items()})
    assert choice.left_out.keys() == BACKENDS.keys() - {"eager"} - seconds.keys()
    assert choice.where == f"cpu with {torch.get_num_threads()} threads, float32"
    times = sorted(seconds, key=seconds.get)
    shown = ", ".join(f"{name} {2e3 * seconds[name]:.2f} ms" for name in times)
    assert str(choice) == f"{expected}: {shown} a video on {choice.where}"


def test_the_definition_is_not_a_candidate(clock):
    clock.serve("sdpa", 1e-3)
    clock.serve("eager", 1e-6)
    encoder = made()
    set_attention(encoder, "fastest")
    assert attention_of(encoder) == "sdpa"


def test_a_slow_call_or_two_do_not_decide(clock):
    # The median: of the calls that are timed a third takes a hundred times as long.
    clock.serve("sdpa", 2e-3)
    clock.serve("xformers", lambda shape: 1e-1 if clock.calls["xformers"] % 3 == 0 else 1e-3)
    encoder = made()
    set_attention(encoder, "fastest")
    assert attention_of(encoder) == "xformers"


@pytest.mark.parametrize("each", [1e-6, 1e-4, 1e-2, 1.0])
def test_measuring_is_short(clock, each):
    for name in ("sdpa", "xformers"):
        # But for the small attention on which each is tried first.
        clock.serve(name, lambda shape: each if shape[2] != 67 else 0)
    choose_fastest(attention_shapes(made()), CPU, torch.float32)
    # A fifth of a second a shape, but where a few calls take longer: compared, warmed up, and the fewest repeats.
    assert clock.now <= max(0.2, 1.01 * 5 * 2 * each)
    # In turns, tried first.
    assert 6 <= clock.calls["sdpa"] == clock.calls["xformers"] <= 202


def test_it_is_decided_once(clock):
    clock.serve("sdpa", 2e-3)
    clock.serve("xformers", 1e-3)
    first = made()
    set_attention(first, "fastest")
    calls = clock.calls.total()
    assert calls
    # The same one again, another of its shape, and one whose blocks are more.
    set_attention(first, "fastest")
    check_attention(first, "fastest")
    set_attention(made(), "fastest")
    deeper = build_encoder(replace(CONFIGS["dinov2"], blocks=3)).eval()
    set_attention(deeper, "fastest")
    assert clock.calls.total() == calls
    assert attention_of(deeper) == "xformers"
    assert attention_choices(deeper)[0].milliseconds == pytest.approx({"sdpa": 6, "xformers": 3})

    def measured_again(change) -> bool:
        before = clock.calls.total()
        change()
        return clock.calls.total() > before

    # Another dtype, shape, number of threads or candidate.
    assert measured_again(lambda: set_attention(made(dtype=torch.bfloat16), "fastest"))
    assert measured_again(lambda: set_attention(made("siglip"), "fastest"))
    assert not measured_again(lambda: set_attention(first, "fastest"))
    clock.serve("xformers", 3e-3)
    assert measured_again(lambda: set_attention(first, "fastest"))
    assert attention_of(first) == "sdpa"
    clock.serve("sdpa_flash", 1e-3)
    assert measured_again(lambda: set_attention(first, "fastest"))
    assert attention_of(first) == "sdpa_flash"


def test_threads_measure_once(clock, monkeypatch):
    clock.serve("sdpa", 1e-3)
    real, begun = attention_choice.measure, []
    together = threading.Barrier(3)

    def slow(*given):
        begun.append(threading.get_ident())
        threading.Event().wait(0.05)
        return real(*given)

    monkeypatch.setattr(attention_choice, "measure", slow)
    encoders = [made() for _ in range(3)]
    attention_shapes(encoders[0])

    def choose(encoder):
        together.wait()
        set_attention(encoder, "fastest")

    threads = [threading.Thread(target=choose, args=(encoder,)) for encoder in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1


def test_what_is_wrong_or_fails_at_this_shape_is_left_out(clock):
    """A small attention of 67 tokens, on which each is tried first, is right."""

    def wrong(q, k, v):
        return scaled_dot_product_attention(q, k, v) * (1 if q.shape[2] == 67 else 1.1)

    def fails(q, k, v):
        if q.shape[2] != 67:
            raise RuntimeError("no kernel for such a shape")
        return scaled_dot_product_attention(q, k, v)

    clock.serve("sdpa", 5e-3)
    clock.serve("sdpa_cudnn", 1e-3, wrong)
    clock.serve("flash_attention_4", 1e-3, fails)
    clock.serve("flash_attention_2", 1e-3, lambda q, k, v: scaled_dot_product_attention(q, k, v) * 1.1)
    clock.serve("xformers", 4e-3)
    encoder = made()
    set_attention(encoder, "fastest")
    (choice,) = attention_choices(encoder)
    assert choice.name == "xformers"
    assert list(choice.milliseconds) == ["sdpa", "xformers"]
    assert choice.left_out["sdpa_cudnn"].startswith("an error of ")
    assert choice.left_out["flash_attention_4"] == "RuntimeError: no kernel for such a shape"
    assert choice.left_out["flash_attention_2"].startswith("result of flash_attention_2 must be right for heads of 16")
    assert choice.left_out["sdpa_efficient"].startswith("tensors of sdpa_efficient must be on cuda")
    assert choice.left_out["flash_attention_3"].startswith(MISSING["flash_attention_3"])
    # Also from what is remembered.
    again = made()
    set_attention(again, "fastest")
    assert attention_choices(again) == [choice]


def test_a_missing_package_is_left_out(monkeypatch):
    encoder = made()
    set_attention(encoder, "fastest")
    (choice,) = attention_choices(encoder)
    assert set(choice.milliseconds) == {"sdpa", "sdpa_flash"}
    assert all(0 < ms < 1e3 for ms in choice.milliseconds.values())
    for name, reason in MISSING.items():
        assert choice.left_out[name].startswith(reason)


def test_without_any_that_is_right(clock):
    clock.serve("sdpa", 1e-3, lambda q, k, v: scaled_dot_product_attention(q, k, v) * (1 if q.shape[2] == 67 else 2))
    encoder = made()
    with pytest.raises(RuntimeError, match=r"fastest must be a backend that serves here, got sdpa: an error of .*; "):
        set_attention(encoder, "fastest")


def test_all_blocks_count(clock):
    # Hiera: what is best where there are most tokens is slow where there are few, in fewer blocks.
    shapes = attention_shapes(made("hiera"))
    assert len(shapes) > 3
    often = {heads.q.shape: blocks for heads, blocks in shapes}
    clock.serve("sdpa", 2e-3)
    clock.serve("xformers", lambda shape: 1e-3 if often.get(tuple(shape)) == 2 else 2.9e-3)
    choice = choose_fastest(shapes, CPU, torch.float32)
    twos = sum(blocks for blocks in often.values() if blocks == 2)
    ones = sum(blocks for blocks in often.values() if blocks == 1)
    assert choice.milliseconds == pytest.approx({"sdpa": 2 * (twos + ones), "xformers": twos + 2.9 * ones})


def test_one_wrong_shape_is_enough(clock):
    shapes = attention_shapes(made("hiera"))
    last = shapes[-1][0].q.shape

    def wrong(q, k, v):
        return scaled_dot_product_attention(q, k, v) * (1.1 if tuple(q.shape) == last else 1)

    clock.serve("sdpa", 2e-3)
    clock.serve("xformers", 1e-3, wrong)
    choice = choose_fastest(shapes, CPU, torch.float32)
    assert (choice.name, list(choice.milliseconds)) == ("sdpa", ["sdpa"])
    assert choice.left_out["xformers"].startswith("an error of ")


def test_encoders_in_one_module_have_winners_of_their_own(clock):
    few = pixels("siglip").shape[1], 3, 16, 16
    clock.serve("sdpa", 2e-3)
    clock.serve("xformers", lambda shape: 1e-3 if tuple(shape) == few else 3e-3)
    encoders = nn.ModuleDict({"siglip": made("siglip"), "vivit": made("vivit")})
    set_attention(encoders, "fastest")
    assert [attention_of(encoder) for encoder in encoders.values()] == ["xformers", "sdpa"]
    assert [choice.name for choice in attention_choices(encoders)] == ["xformers", "sdpa"]
    # None is changed if one cannot be.
    set_attention(encoders, "eager")
    encoders["vivit"].to("meta")
    with pytest.raises(ValueError, match="got some not placed yet"):
        set_attention(encoders, "fastest")
    assert attention_of(encoders) == "eager"


def test_it_needs_weights_in_their_place():
    encoder = made()
    rule = r"attention: weights must be where and in the dtype in which they will run for fastest, .*move and cast"
    with pytest.raises(ValueError, match=rule):
        set_attention(encoder, "fastest", placed=False)
    with pytest.raises(ValueError, match=rule):
        set_attention(encoder.to("meta"), "fastest")
    assert attention_of(encoder) == "sdpa"


def test_it_needs_encoders():
    with pytest.raises(ValueError, match=r"module must be an encoder, .* for fastest, got Sequential"):
        set_attention(nn.Sequential(made(), nn.Linear(2, 2), HeadAttention(16)), "fastest")
    with pytest.raises(ValueError, match="module must hold attention, got Linear"):
        set_attention(nn.Linear(2, 2), "fastest")


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"fastest must be measured on cuda or cpu \(choose sdpa\), got xpu"):
        choose_fastest(attention_shapes(made()), torch.device("xpu"), torch.float32)


def test_unknown_names_are_told_all():
    message = rf"backend must be one of fastest, flash_attention, {', '.join(BACKENDS)}, got 'quickest'"
    with pytest.raises(ValueError, match=message):
        set_attention(made(), "quickest")


def test_the_dtype_is_that_of_autocast(clock):
    seen = set()

    def watch(q, k, v):
        seen.add((q.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return scaled_dot_product_attention(q, k, v)

    clock.serve("sdpa", 1e-3, watch)
    with torch.autocast("cpu", torch.bfloat16):
        set_attention(made(), "fastest")
    assert seen == {(torch.bfloat16, False, False)}
    assert next(iter(attention_choice.FOUND))[0].endswith("bfloat16")


def test_results_gradients_and_random_numbers_are_left_alone():
    encoder = made()
    expected, state = encoder(pixels("dinov2")), torch.random.get_rng_state()
    _shapes.cache_clear()
    set_attention(encoder, "fastest")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.allclose(encoder(pixels("dinov2")), expected, atol=1e-6)


def test_a_choice_goes_with_copies(monkeypatch):
    installed(monkeypatch, "flash_attention_3")
    encoder = made(dtype=torch.bfloat16)
    set_attention(encoder, "flash_attention")
    choices = attention_choices(encoder)
    assert attention_choices(copy.deepcopy(encoder)) == choices
    assert pickle.loads(pickle.dumps(choices)) == choices
    set_attention(encoder, "eager")
    assert attention_choices(encoder) == [AttentionChoice("eager")]
    assert attention_choices(made()) == [AttentionChoice("sdpa")]


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_a_video(monkeypatch, name):
    encoder, seen = made(name), Counter()
    real = HeadAttention.forward

    def forward(self, q, k, v):
        seen[HeadShapes(*map(View.of, (q, k, v)))] += 1
        return real(self, q, k, v)

    found = attention_shapes(encoder)
    monkeypatch.setattr(HeadAttention, "forward", forward)
    encoder(pixels(name))
    assert found == list(seen.items())
    assert sum(blocks for _, blocks in found) == len(encoder.blocks)
    # The encoder itself was not touched.
    assert attention_of(encoder) == "sdpa"
    assert not any(p.is_meta for p in encoder.parameters())


def test_heads_lie_as_a_packed_layer_has_them(monkeypatch):
    R, tokens, H, d = 2, 5, 3, 16
    qkv = torch.zeros(R, tokens, 3 * H * d)
    views = qkv.unflatten(-1, (3, H, d)).permute(2, 0, 3, 1, 4).unbind(0)
    numbers, counts = attention_choice.numbers, []
    monkeypatch.setattr(attention_choice, "numbers", lambda *given: counts.append(given[0]) or numbers(*given))
    made = HeadShapes(*map(View.of, views)).fill(CPU, torch.bfloat16)
    assert counts == [qkv.numel()]
    start = made[0].data_ptr()
    for index, (one, view) in enumerate(zip(made, views, strict=True)):
        assert (one.shape, one.stride(), one.dtype) == (view.shape, view.stride(), torch.bfloat16)
        assert one.data_ptr() - start == 2 * index * H * d
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(made[one], made[other])


@pytest.mark.parametrize("place", [(0, 0, 0), (-1, 0, 0), (0, -1, 0), (-1, -1, -1)])
def test_faults_at_the_ends_of_many_rows_and_queries_are_seen(place):
    q, k, v = HeadShapes(*[View((40, 2, 300, 16), (9600, 4800, 16, 1), 0)] * 3).fill(CPU, torch.float32)
    assert discrepancy(scaled_dot_product_attention, q, k, v) is None

    def wrong(q, k, v):
        out = scaled_dot_product_attention(q, k, v).clone()
        row, query, head = place
        out[row, head, query] *= 1.1
        return out

    assert discrepancy(wrong, q, k, v).startswith("an error of ")


def test_keys_that_are_left_out_are_seen():
    q, k, v = HeadShapes(*[View((1, 2, 300, 16), (9600, 4800, 16, 1), 0)] * 3).fill(CPU, torch.float32)
    fewer = discrepancy(lambda q, k, v: scaled_dot_product_attention(q, k[:, :, :299], v[:, :, :299]), q, k, v)
    assert fewer.startswith("an error of ")


class Gpu:
    """What of `torch.cuda` is used: work takes its time after it was launched, and is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.host = 0.0
        self.waited = -1.0
        self.capturing, self.current, self.log = False, "cuda:0", []
        empty, autocast = torch.empty, torch.autocast

        def memory(*shape, device=None, **kwargs):
            if device is None or device.type != "cuda":
                return empty(*shape, device=device, **kwargs)
            assert (kwargs, self.current) == ({"dtype": torch.int8}, str(device))
            self.log.append(("memory", *shape))
            return SimpleNamespace(zero_=lambda: self.work("zero", 1.0))

        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                gpu.log.append("record")
                self.at = gpu.now

            def elapsed_time(self, end):
                assert end.at <= gpu.waited, "not ready"
                return 1e3 * (end.at - self.at)

        class Device:
            def __init__(self, device):
                self.device = str(device)

            def __enter__(self):
                self.before, gpu.current = gpu.current, self.device

            def __exit__(self, *error):
                gpu.current = self.before

        def synchronize():
            gpu.waited = gpu.now

        def perf_counter():
            self.host += 1e-3
            return self.host

        fakes = {
            "Event": Event,
            "device": Device,
            "current_stream": lambda: SimpleNamespace(synchronize=synchronize),
            "is_current_stream_capturing": lambda: self.capturing,
            "get_device_name": lambda device: "NVIDIA H200",
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50 * 2**20),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        numbers = attention_choice.numbers
        monkeypatch.setattr(torch, "empty", memory)
        monkeypatch.setattr(torch, "autocast", lambda kind, enabled: autocast("cpu", enabled=enabled))
        monkeypatch.setattr(attention_choice, "perf_counter", perf_counter)
        monkeypatch.setattr(attention_choice, "numbers", lambda count, device, dtype: numbers(count, CPU, dtype))
        for name in BACKENDS:
            monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(dtypes={"cpu": ()}))
        self.patch = monkeypatch

    def work(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.now += seconds

    def serve(self, name: str, seconds: float) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert self.current == "cuda:1"
            self.work(name, seconds)
            return scaled_dot_product_attention(q, k, v)

        self.patch.setitem(BACKENDS, name, BACKENDS[name]._replace(load=lambda: attend, dtypes=None))


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_a_gpu_is_timed_by_events_with_a_cold_cache(gpu):
    shapes = attention_shapes(made())
    gpu.serve("sdpa", 2e-3)
    gpu.serve("flash_attention_3", 1e-3)
    choice = choose_fastest(shapes, torch.device("cuda", 1), torch.float32)
    # What fills the time until a launch is not counted.
    assert choice.milliseconds == pytest.approx({"sdpa": 4.0, "flash_attention_3": 2.0})
    assert (choice.name, choice.where) == ("flash_attention_3", "NVIDIA H200, float32")
    assert gpu.current == "cuda:0"
    # Compared first, and then in turns, each as if it came after other work.
    assert gpu.log[:3] == ["sdpa", "flash_attention_3", ("memory", 4 * 50 * 2**20)]
    one = [["zero", "record", name, "record"] for name in ("sdpa", "flash_attention_3")]
    timed = gpu.log[3:]
    assert timed == (one[0] + one[1]) * (len(timed) // 8)
    assert 10 < len(timed) // 8 <= 200
    # A GPU of this kind is known now.
    gpu.log.clear()
    assert choose_fastest(shapes, torch.device("cuda", 1), torch.float32) == choice
    assert gpu.log == []
    assert choose_fastest(shapes, torch.device("cuda", 0), torch.float32) == choice
    gpu.patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    assert choose_fastest(shapes, torch.device("cuda", 1), torch.float32).where == "NVIDIA B200, float32"
    assert gpu.log


def test_a_small_cache_still_leaves_time_to_launch(gpu):
    gpu.patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
    gpu.serve("sdpa", 1e-3)
    choose_fastest(attention_shapes(made()), torch.device("cuda", 1), torch.float32)
    assert ("memory", 2**26) in gpu.log


def test_never_while_a_graph_is_captured(gpu):
    shapes = attention_shapes(made())
    gpu.serve("sdpa", 1e-3)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="fastest must be chosen before a CUDA graph is captured, got a capture"):
        choose_fastest(shapes, torch.device("cuda", 1), torch.float32)
    assert gpu.log == []
    assert gpu.current == "cuda:0"
    gpu.capturing = False
    choose_fastest(shapes, torch.device("cuda", 1), torch.float32)


ENCODERS = ["languagebind", "dinov2", "vivit", "siglip"]


@pytest.fixture
def video():
    return build_tiny().model.eval().video_model


def said(model) -> dict[str, str]:
    """What the configuration says."""
    return {name: getattr(model.config, f"{name}_config")._attn_implementation for name in ENCODERS}


def serve_tiny(monkeypatch, *names: str) -> None:
    """merv-tiny has heads of 12 and, on a CPU, float32."""
    for name in names:
        limits = {"dtypes": {"cpu": (torch.float32,)}, "head_sizes": None}
        backend = BACKENDS[name]._replace(load=lambda: scaled_dot_product_attention, **limits)
        monkeypatch.setitem(BACKENDS, name, backend)


def test_a_model_says_what_was_decided(video, monkeypatch):
    serve_tiny(monkeypatch, "flash_attention_2", "flash_attention_3")
    video.set_attention({"dinov2": "flash_attention", "siglip": "eager"})
    expected = dict.fromkeys(ENCODERS, "sdpa") | {"dinov2": "flash_attention_3", "siglip": "eager"}
    assert video.attention == expected
    assert said(video)["dinov2"] == "flash_attention_3"
    video.set_attention("flash_attention")
    assert video.attention == said(video) == dict.fromkeys(ENCODERS, "flash_attention_3")


def test_a_model_s_encoders_are_measured_one_by_one(video, clock):
    clock.serve("sdpa", 2e-3)
    # ViViT has one sequence a video.
    clock.serve("xformers", lambda shape: 3e-3 if shape[0] == 1 else 1e-3)
    video.set_attention("fastest")
    assert video.attention == said(video) == dict.fromkeys(ENCODERS, "xformers") | {"vivit": "sdpa"}
    calls = clock.calls.total()
    for name in ENCODERS:
        (choice,) = attention_choices(video.encoders[name])
        assert choice.name == video.attention[name]
        assert set(choice.milliseconds) == {"sdpa", "xformers"}
    video.set_attention("sdpa")
    video.set_attention({"vivit": "fastest", "siglip": "fastest"})
    assert video.attention == said(video) == dict.fromkeys(ENCODERS, "sdpa") | {"siglip": "xformers"}
    assert clock.calls.total() == calls
    # The module itself takes the name too.
    set_attention(video, "fastest")
    assert video.attention == dict.fromkeys(ENCODERS, "xformers") | {"vivit": "sdpa"}


def test_a_model_changes_all_or_none(video, clock):
    clock.serve("sdpa", 2e-3)
    clock.serve("sdpa_flash", 1e-3)
    for failing in ("flash_attention", "xformers", "quickest"):
        with pytest.raises((ValueError, ImportError)):
            video.set_attention({"dinov2": "fastest", "siglip": failing})
        assert video.attention == dict.fromkeys(ENCODERS, "sdpa")
    video.set_attention({"dinov2": "fastest"})
    assert said(video)["dinov2"] == "sdpa_flash"


def test_transformers_own_way(clock):
    model = build_tiny().model.eval()
    clock.serve("sdpa", 2e-3)
    clock.serve("sdpa_flash", 1e-3)
    clock.serve("flash_attention_2", 3e-3)
    model.set_attn_implementation({"dinov2_config": "flash_attention", "siglip_config": "fastest"})
    expected = dict.fromkeys(ENCODERS, "sdpa") | {"dinov2": "flash_attention_2", "siglip": "sdpa_flash"}
    assert model.video_model.attention == expected
    assert (said(model)["dinov2"], said(model)["siglip"]) == ("flash_attention_2", "sdpa_flash")
    assert model.language_model.config._attn_implementation == "sdpa"
    # The language model has no such names.
    with pytest.raises(ValueError, match=r'attn_implementation="fastest"` is not supported'):
        model.set_attn_implementation("fastest")
    assert model.video_model.attention == expected


def test_from_pretrained(random_merv, monkeypatch):
    def load(name: str) -> dict[str, str]:
        given = {"vivit_config": name}
        model = MervForConditionalGeneration.from_pretrained(random_merv, attn_implementation=given)
        return model.video_model.attention

    with pytest.raises(ImportError, match=r"flash_attention must be one of .*flash_attention_4: .* must be importable"):
        load("flash_attention")
    serve_tiny(monkeypatch, "flash_attention_2")
    assert load("flash_attention") == dict.fromkeys(ENCODERS, "sdpa") | {"vivit": "flash_attention_2"}
    with pytest.raises(ValueError, match=r"weights must be where .* for fastest, .*\(move and cast the model first\)"):
        load("fastest")
