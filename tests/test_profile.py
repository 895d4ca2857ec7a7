import json
import math
import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import merv_fast
from merv_fast import sample_clip
from merv_fast.cli.app import app, main
from merv_fast.cli.ask import Loader
from merv_fast.models.spans import model_spans
from merv_fast.runtime.timeline import draw_timeline, milliseconds, read_lanes, totals
from merv_fast.runtime.trace import CallSpans, StageTimer, nvtx_ranges, span
from merv_fast.video.drawing import BACKGROUND
from tests.encoders.small_encoders import SMALL, pixels, seeded
from tests.test_probe import read_line

runner = CliRunner()
ROOT = Path(__file__).parent.parent
TOKENS = 4
STAGES = ["decode", "prepare", "encode", "fuse", "generate"]
BLOCKS = {"languagebind": 2, "dinov2": 2, "vivit": 3, "siglip": 2}
GROUPS = [f"encode/{name}/blocks {index}" for name, count in BLOCKS.items() for index in range(count)]
ENCODERS = [f"encode/{name}" for name in BLOCKS]
NAMES = ["answer", *STAGES, *ENCODERS, *GROUPS, "splice", "prefill", "decode_text"]


@pytest.fixture(scope="module")
def vidlm(random_merv):
    return merv_fast.load_vid(random_merv)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, random_merv):
    """What the command printed, the trace, and the picture."""
    folder = tmp_path_factory.mktemp("profile")
    out, png = folder / "trace.json", folder / "timeline.png"
    options = ["--out", str(out), "--png", str(png), "--json", "--max-new-tokens", str(TOKENS), "--device", "cpu"]
    options += ["--model", str(random_merv)]
    done = runner.invoke(app, ["profile", str(sample_clip()), *options])
    assert done.exit_code == 0, done.output
    return SimpleNamespace(printed=json.loads(done.stdout), trace=json.loads(out.read_text()), png=png, out=out)


def ranges_of(trace):
    """Name without prefix -> [(start, end)] in nanoseconds."""
    found = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["name"].startswith("merv/"):
            start = round(event["ts"] * 1000)
            found.setdefault(event["name"][5:], []).append((start, start + round(event["dur"] * 1000)))
    return {name: sorted(spans) for name, spans in found.items()}


def parent_of(name):
    if name.count("/"):
        return name.rpartition("/")[0]
    return "generate" if name in ("splice", "prefill", "decode_text") else "answer"


def test_the_trace_is_one_that_viewers_open(profiled):
    events = profiled.trace["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    ours = [e for e in events if e["ph"] == "X" and e["name"].startswith("merv/")]
    assert {(e["pid"], e["tid"]) for e in ours} <= named
    assert all(isinstance(e["ts"], float | int) and e["dur"] > 0 for e in ours)
    assert {e["cat"] for e in ours} == {"user_annotation"}


def test_every_range_is_there(profiled):
    ranges = ranges_of(profiled.trace)
    assert sorted(ranges) == sorted(NAMES)
    counts = {name: len(spans) for name, spans in ranges.items()}
    assert counts == dict.fromkeys(NAMES, 1) | {"decode_text": TOKENS - 1}


def test_ranges_lie_in_each_other_and_beside_each_other(profiled):
    ranges = ranges_of(profiled.trace)
    siblings = {}
    for name, spans in ranges.items():
        for start, end in spans if name != "answer" else []:
            ((outer_start, outer_end),) = ranges[parent_of(name)]
            assert outer_start <= start < end <= outer_end, name
            siblings.setdefault(parent_of(name), []).append((start, end, name))
    for spans in siblings.values():
        spans.sort()
        assert all(one[1] <= next_one[0] for one, next_one in pairwise(spans))
    assert [name for _, _, name in siblings["answer"]] == STAGES
    assert [name for _, _, name in siblings["encode"]] == ENCODERS
    assert [name for _, _, name in siblings["generate"]] == ["splice", "prefill", *["decode_text"] * (TOKENS - 1)]


def test_ranges_hold_the_work_they_name(profiled):
    ranges = ranges_of(profiled.trace)
    attentions = [
        round(event["ts"] * 1000)
        for event in profiled.trace["traceEvents"]
        if event.get("name") == "aten::scaled_dot_product_attention"
    ]
    for name in [*GROUPS, "prefill", "decode_text"]:
        for start, end in ranges[name]:
            assert any(start < moment < end for moment in attentions), name
    scatter = [e for e in profiled.trace["traceEvents"] if e.get("name") == "aten::masked_scatter"]
    ((start, end),) = ranges["splice"]
    assert [start < e["ts"] * 1000 < end for e in scatter] == [True]
    # SigLIP's pooling and the blocks of the language model are the others.
    inside = [m for m in attentions if any(s < m < e for name in GROUPS for s, e in ranges[name])]
    in_encode = [m for m in attentions if ranges["encode"][0][0] < m < ranges["encode"][0][1]]
    assert len(in_encode) - len(inside) <= 1


def test_the_table_adds_up(profiled):
    ranges = ranges_of(profiled.trace)
    whole = ranges["answer"][0][1] - ranges["answer"][0][0]
    assert [line["name"] for line in profiled.printed["ranges"]][:2] == ["merv/answer", "merv/decode"]
    assert len(profiled.printed["ranges"]) == len(NAMES)
    for line in profiled.printed["ranges"]:
        took = sum(end - start for start, end in ranges[line["name"][5:]])
        assert line["count"] == len(ranges[line["name"][5:]])
        assert math.isclose(line["ms"], took / 1e6)
        assert math.isclose(line["share"], took / whole)
        assert line["gpu_ms"] is None
    shares = {line["name"]: line["share"] for line in profiled.printed["ranges"]}
    assert sum(shares[f"merv/{name}"] for name in STAGES) <= 1
    assert profiled.printed["model"] == "merv-random"
    assert profiled.printed["device"] == "cpu"
    assert (profiled.printed["trace"], profiled.printed["png"]) == (str(profiled.out), str(profiled.png))


def depth_of(name):
    return 0 if name == "answer" else 1 + depth_of(parent_of(name))


def read_at(sheet, top, left, count):
    """Text of two pixels a dot."""
    return read_line(sheet[top::2, left::2], 0, 0, count)


def test_the_picture_shows_bars_names_and_durations(profiled):
    picture = Image.open(profiled.png)
    assert (picture.mode, picture.width) == ("RGB", 1680)
    sheet = np.asarray(picture)
    assert read_at(sheet, 24, 24, 28) == "CLIP.MP4, MERV-RANDOM ON CPU"
    assert read_at(sheet, 70, 24, 4) == "0 MS"
    ranges = ranges_of(profiled.trace)
    origin, last = ranges["answer"][0]
    first_row, row, rows = 24 + 3 * 22 + 22, 28, 4
    table = first_row + rows * row + 11 + 22
    lines = math.ceil(len(NAMES) / 2)
    assert sheet.shape[0] == table + 24 + (lines + 1) * 22
    for index, line in enumerate(profiled.printed["ranges"]):
        top, left = table + (index % lines + 1) * 22, 24 + index // lines * 816
        written = read_at(sheet, top, left + 24, 64)
        name = line["name"].upper()
        assert re.split(" {2,}", written)[0].startswith(name)
        assert written.split(" X ")[0].split()[-1] == str(line["count"])
        assert f" {milliseconds(line['ms']).upper()} " in written
        assert written.endswith(f"{line['share']:.1%}")
        colour = sheet[top, left]
        assert (colour != BACKGROUND).any()
        depth = depth_of(line["name"][5:])
        for start, end in ranges[line["name"][5:]]:
            left, right = (24 + round((moment - origin) / (last - origin) * 1632) for moment in (start, end))
            bar = sheet[first_row + depth * row, left : max(right, left + 1)]
            # The last pixel may be the gap to the next bar.
            assert (bar[: max(len(bar) - 1, 1)] == colour).all() or len(bar) < 3
            assert (sheet[first_row + depth * row + row - 1, left] != colour).any()


def test_for_a_person_and_over_what_is_there(profiled, random_merv):
    before = profiled.out.stat().st_mtime_ns
    environment = dict(os.environ)
    options = ["--out", str(profiled.out), "--max-new-tokens", "2", "--device", "cpu", "--question", "Why?"]
    options += ["--model", str(random_merv)]
    done = runner.invoke(app, ["profile", str(sample_clip()), *options], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    assert all(f"merv/{name}" in done.stdout for name in NAMES)
    assert "100.0%" in done.stdout
    assert f"trace: {profiled.out} (opens in ui.perfetto.dev)" in done.stdout
    assert "timeline" not in done.stdout
    assert profiled.out.stat().st_mtime_ns > before
    assert dict(os.environ) == environment


def test_stderr_stays_quiet_and_other_threads_have_lanes(tmp_path):
    code = """
import sys, threading
from merv_fast import MervModel
from merv_fast.cli import main
from merv_fast.runtime.trace import span

plain = MervModel.answer
def answer(self, *args, **kwargs):
    def work():
        with span("elsewhere"):
            pass
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return plain(self, *args, **kwargs)
MervModel.answer = answer
main()
"""
    out = tmp_path / "t.json"
    arguments = ["profile", str(sample_clip()), "--out", str(out), "--max-new-tokens", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=250, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lanes = read_lanes(json.loads(out.read_text()))
    assert sorted(len(lane.ranges) > 1 for lane in lanes) == [False, True]
    assert [each.name for lane in lanes for each in lane.ranges if len(lane.ranges) == 1] == ["merv/elsewhere"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["CLIP", "--out", "a.txt"], "error: --out must be a .json file, got a.txt"),
        (["CLIP", "--out", "a.json", "--png", "a.jpg"], "error: --png must be a .png file, got a.jpg"),
        (["CLIP", "--out", "nowhere/a.json"], "error: --out must be a file that can be written, got nowhere/a.json"),
        (["CLIP", "--out", "folder.json"], "error: --out must be a file that can be written, got folder.json"),
        (["CLIP", "--out", "a.json", "--png", "nowhere/a.png"], "error: --png must be a file that can be written"),
        (["nowhere.mp4", "--out", "a.json"], "error: nowhere.mp4: does not exist"),
        (["CLIP", "--out", "a.json", "--fps", "3"], "fps must be None unless path is a folder"),
    ],
)
def test_an_error_is_one_line_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.setattr(Loader, "load", lambda self: pytest.fail("loaded"))
    (tmp_path / "folder.json").mkdir()
    stands_for = {"CLIP": str(sample_clip())}
    monkeypatch.setattr(sys, "argv", ["merv-fast", "profile", *[stands_for.get(a, a) for a in arguments]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, len(captured.err.splitlines())) == (1, "", 1)
    assert words in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_out_must_be_given(monkeypatch):
    assert runner.invoke(app, ["profile", str(sample_clip())]).exit_code == 2
    assert "--out" in runner.invoke(app, ["profile", "--help"]).stdout


# Spans


@pytest.fixture
def made(monkeypatch):
    """Names of the profiler ranges that are made."""
    names = []
    plain = torch.autograd.profiler.record_function

    class Counted(plain):
        def __init__(self, name, args=None):
            names.append(name)
            super().__init__(name, args)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", Counted)
    return names


@pytest.fixture
def nvtx(monkeypatch):
    """Per thread: what was pushed in order, and what is open."""
    threads = {}

    def state():
        return threads.setdefault(threading.get_ident(), SimpleNamespace(pushed=[], open=[]))

    def push(name):
        state().pushed.append(name)
        state().open.append(name)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: state().open.pop())
    return threads


def ask(vidlm):
    builder = vidlm.get_prompt_builder()
    builder.add_turn(role="human", message="Why?")
    return vidlm.answer(sample_clip(), builder.get_prompt(), max_new_tokens=2, do_sample=False)


def test_nothing_is_made_while_nobody_looks(vidlm, made, nvtx):
    with model_spans(vidlm):
        ask(vidlm)
    assert [name for name in made if name.startswith("merv/")] == []
    assert nvtx == {}
    assert span("one") is span("another")
    with torch.profiler.profile():
        assert span("one") is not span("another")
        with span("here"):
            pass
    assert made == ["merv/here"]
    assert span("one") is span("another")


def test_nvtx_ranges_are_balanced_after_an_error(vidlm, nvtx, monkeypatch):
    block = vidlm.model.video_model.encoders["dinov2"].blocks[1]

    def fail(x, frames):
        raise KeyError("block")

    monkeypatch.setattr(block, "forward", fail)
    with model_spans(vidlm), nvtx_ranges():
        with pytest.raises(KeyError):
            ask(vidlm)
        (thread,) = nvtx.values()
        assert thread.open == []
    assert thread.pushed[-3:] == ["merv/encode/dinov2", "merv/encode/dinov2/blocks 0", "merv/encode/dinov2/blocks 1"]
    monkeypatch.undo()


def test_nvtx_ranges_are_those_of_the_profiler(vidlm, nvtx, made):
    with model_spans(vidlm), nvtx_ranges(), span("answer"):
        ask(vidlm)
    (thread,) = nvtx.values()
    assert thread.open == []
    assert sorted(set(thread.pushed)) == sorted(f"merv/{name}" for name in NAMES)
    assert [name for name in made if name.startswith("merv/")] == []
    with span("later"):
        pass
    assert "merv/later" not in thread.pushed


def test_hooks_are_gone_afterwards(vidlm):
    def hooks():
        return [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in vidlm.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]

    before = hooks()
    with model_spans(vidlm):
        assert len(hooks()) >= len(before) + len(ENCODERS) + len(GROUPS)
    assert hooks() == before


class Steps(nn.Module):
    """Blocks, of which one may fail."""

    def __init__(self, count, at=None):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(count))
        self.at = at

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index == self.at:
                raise KeyError(index)
            x = block(x)
        return x


def test_an_error_between_two_modules_ends_with_the_call_around_them(nvtx):
    model = Steps(4, at=2)
    with CallSpans() as calls, nvtx_ranges(), span("outside"):
        calls.around(model, "model")
        calls.between(model.blocks[0], model.blocks[3], "blocks")
        for _ in range(2):
            with pytest.raises(KeyError):
                model(torch.ones(1))
            (thread,) = nvtx.values()
            assert thread.open == ["merv/outside"]
        model.at = None
        model(torch.ones(1))
        assert thread.open == ["merv/outside"]
    assert thread.pushed == ["merv/outside", *["merv/model", "merv/blocks"] * 3]


def test_what_nothing_encloses_ends_with_the_hooks(nvtx):
    model = Steps(2, at=1)
    with nvtx_ranges():
        with CallSpans() as calls:
            calls.between(model.blocks[0], model.blocks[1], "blocks")
            with pytest.raises(KeyError):
                model(torch.ones(1))
            (thread,) = nvtx.values()
            assert thread.open == ["merv/blocks"]
        assert thread.open == []


def test_threads_that_share_a_model_have_their_own_spans(nvtx):
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(nn.Module):
        def forward(self, x):
            meeting.wait()
            return x

    model = nn.Sequential(Meeting(), Meeting())
    errors = []

    def work():
        try:
            model(torch.ones(1))
        except Exception as error:
            errors.append(error)

    with CallSpans() as calls, nvtx_ranges():
        calls.around(model, "model")
        calls.around(model[0], "first")
        calls.around(model[1], "second")
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert [state.open for state in nvtx.values()] == [[], []]
    assert [state.pushed for state in nvtx.values()] == [["merv/model", "merv/first", "merv/second"]] * 2


def test_a_gap_begins_and_ends_where_it_says(nvtx):
    first, last = nn.Identity(), nn.Identity()
    seen = []
    first.register_forward_pre_hook(lambda *_: seen.append("before"))
    with CallSpans() as calls, nvtx_ranges():
        calls.gap(first, last, lambda args, kwargs: "gap" if args[0].numel() > 1 else None)
        first(torch.ones(2))
        (thread,) = nvtx.values()
        assert thread.open == ["merv/gap"]
        last(torch.ones(2))
        assert thread.open == []
        first(torch.ones(1))
        last(torch.ones(1))
    assert thread.pushed == ["merv/gap"]


def test_blocks_are_grouped(nvtx):
    encoder = Steps(23)
    model = SimpleNamespace(
        video_model=SimpleNamespace(encoders={"large": encoder}),
        language_model=nn.Identity(),
        get_input_embeddings=lambda: nn.Identity(),
    )
    inside = []
    with model_spans(SimpleNamespace(model=model)), nvtx_ranges():
        for block in encoder.blocks:
            block.register_forward_pre_hook(lambda *_: inside.append(nvtx[threading.get_ident()].open[1:]))
        encoder(torch.ones(1))
    groups = [("0-5", 6), ("6-11", 6), ("12-17", 6), ("18-22", 5)]
    assert inside == [[f"merv/encode/large/blocks {group}"] for group, count in groups for _ in range(count)]


def test_stages_are_spans_and_survive_an_error(nvtx):
    timer = StageTimer(torch.device("cpu"))
    with nvtx_ranges():
        with pytest.raises(KeyError), timer.stage("encode"):
            raise KeyError
        with torch.profiler.profile() as recorded, timer.stage("fuse"):
            pass
    (thread,) = nvtx.values()
    assert (thread.open, thread.pushed) == ([], ["merv/encode", "merv/fuse"])
    assert "merv/fuse" in {event.key for event in recorded.key_averages()}
    assert list(timer.milliseconds) == ["encode", "fuse"]


def counting(graphs):
    """A backend that runs graphs as they are."""

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("family", ["dinov2", "languagebind"])
def test_an_encoder_compiles_whole_and_once(family, hooked):
    torch.compiler.reset()
    encoder, x = seeded(SMALL[family]), pixels(SMALL[family], 1)
    graphs = []
    with CallSpans() as calls, torch.no_grad():
        if hooked:
            calls.around(encoder, "encode")
            calls.between(encoder.blocks[0], encoder.blocks[-1], "encode/blocks")
        expected = encoder(x)
        compiled = torch.compile(encoder, fullgraph=True, backend=counting(graphs))
        assert torch.equal(compiled(x), expected)
        with torch.profiler.profile():
            compiled(x)
    assert len(graphs) == 1


def test_a_span_inside_compiled_code_is_no_break_and_no_reason_to_compile_again():
    torch.compiler.reset()
    graphs = []

    @torch.compile(fullgraph=True, backend=counting(graphs))
    def double(x):
        with span("double"):
            return x * 2

    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    with torch.profiler.profile():
        double(torch.ones(2))
    assert len(graphs) == 1


# Lanes of a GPU, from a trace as PyTorch writes them


def gpu_trace():
    def x(cat, name, tid, ts, dur, pid=1):
        return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur}

    def thread(pid, tid, name):
        return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}

    return {
        "traceEvents": [
            thread(1, 1, "thread 1 (python)"),
            thread(0, 7, "stream 7 "),
            thread(0, 20, "stream 20 "),
            x("user_annotation", "merv/answer", 1, 1000.0, 100.0),
            x("user_annotation", "merv/encode", 1, 1000.0, 40.0),
            x("user_annotation", "ProfilerStep#1", 1, 1000.0, 100.0),
            x("cpu_op", "merv/not_a_range", 1, 1000.0, 5.0),
            x("gpu_user_annotation", "merv/answer", 7, 1010.0, 80.5, 0),
            x("gpu_user_annotation", "merv/encode", 7, 1010.0, 50.0, 0),
            x("kernel", "gemm", 7, 1010.0, 20.0, 0),
            x("gpu_memcpy", "Memcpy HtoD", 7, 1070.0, 20.5, 0),
            x("kernel", "attention", 20, 1015.0, 30.0, 0),
            {"ph": "i", "name": "mark", "pid": 1, "tid": 1, "ts": 1000.0},
            {"ph": "f", "name": "ac2g", "pid": 0, "tid": 7, "ts": 1010.0, "id": 1},
        ]
    }


def test_streams_are_lanes():
    lanes = read_lanes(gpu_trace())
    assert [lane.name for lane in lanes] == ["thread 1 (python)", "GPU 0, stream 7", "GPU 0, stream 20"]
    assert [(each.name, each.depth) for each in lanes[0].ranges] == [("merv/answer", 0), ("merv/encode", 1)]
    assert [(each.name, each.depth) for each in lanes[-2].ranges] == [("merv/answer", 0), ("merv/encode", 1)]
    assert lanes[2].ranges == []
    assert [lane.work for lane in lanes[1:]] == [
        [(1010000, 1030000), (1070000, 1090500)],
        [(1015000, 1045000)],
    ]
    assert [(line.name, line.ms, line.share, line.gpu_ms) for line in totals(lanes)] == [
        ("merv/answer", 0.1, 1.0, 0.0805),
        ("merv/encode", 0.04, 0.4, 0.05),
    ]


def test_ranges_that_touch_lie_beside_each_other():
    events = [
        {"ph": "X", "cat": "user_annotation", "name": f"merv/{name}", "pid": 1, "tid": 1, "ts": ts, "dur": dur}
        for name, ts, dur in (("second", 15.5, 4.5), ("all", 10.0, 10.0), ("first", 10.0, 5.5))
    ]
    (lane,) = read_lanes({"traceEvents": events})
    assert lane.name == "thread 1"
    assert [(each.name, each.depth) for each in lane.ranges] == [("merv/all", 0), ("merv/first", 1), ("merv/second", 1)]


def test_work_is_drawn_below_the_ranges_of_its_stream():
    sheet = draw_timeline("title", read_lanes(gpu_trace())).numpy()
    # Heights: margin, three lines, then of each lane a line, its rows, the work, half a line.
    first = 24 + 3 * 22 + (22 + 2 * 28 + 11) + 22 + 2 * 28
    second = first + 12 + 11 + 22

    def at(share):
        return 24 + round(share * 1632)

    grey = sheet[second, at(0.3)]
    drawn = (sheet[second] == grey).all(-1).nonzero()[0]
    assert (drawn[0], drawn[-1], len(drawn)) == (at(0.15), at(0.45) - 1, at(0.45) - at(0.15))
    drawn = (sheet[first] == grey).all(-1).nonzero()[0]
    assert (drawn[0], drawn[-1]) == (at(0.1), at(0.905) - 1)
    assert len(drawn) == at(0.3) - at(0.1) + at(0.905) - at(0.7)


def test_the_last_time_is_left_out_where_it_has_no_room():
    sheet = draw_timeline("title", read_lanes(gpu_trace())).numpy()
    # 0.1 ms in steps of 0.01: the label of the end would be cut off.
    assert read_at(sheet, 70, 24 + round(0.9 * 1632), 7) == "0.09 MS"
    assert (sheet[70:84, 1656:] == BACKGROUND).all()


# nsys.sh

FAKE_NSYS = """#!{python}
import os, sys

with open(os.environ["LOG"], "a") as log:
    print(*[argument for argument in sys.argv[1:] if "import" not in argument], sep="|", file=log)
    if sys.argv[1] == "stats":
        print("the tables")
        sys.exit()
    (output,) = [argument for argument in sys.argv if argument.startswith("--output=")]
    open(output.partition("=")[2] + ".nsys-rep", "w").close()
    code, arguments = sys.argv[sys.argv.index("-c") + 1], sys.argv[sys.argv.index("-c") + 2 :]
    import torch

    def say(*words):
        print(*words, file=log)

    torch.cuda.synchronize = lambda *_: None
    torch.cuda.profiler.start, torch.cuda.profiler.stop = lambda: say("start"), lambda: say("stop")
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = lambda name: say("push", name), lambda: say("pop")
    torch.cuda.is_available = lambda: os.environ["GPU"] == "1"
    sys.argv = ["-c", *arguments]
    exec(code, {{}})
"""


def run_nsys(tmp_path, *arguments, fake=True, **env):
    folder = tmp_path / "bin"
    folder.mkdir()
    if fake:
        (folder / "nsys").write_text(FAKE_NSYS.format(python=sys.executable))
        (folder / "nsys").chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    env = {"PATH": path, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "LOG": str(tmp_path / "log")} | env
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "nsys.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=tmp_path,
        env=env,
    )


def test_nsys_records_one_answer_and_prints_the_tables(tmp_path, random_merv):
    done = run_nsys(tmp_path, str(sample_clip()), str(random_merv), DEVICE="cpu", TOKENS="2", GPU="1")
    assert done.returncode == 0, done.stderr
    assert "the tables" in done.stdout
    assert (tmp_path / "out" / "nsys.txt").read_text() == "the tables\n"
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0].startswith("profile|--trace=cuda,nvtx,osrt,cudnn,cublas|")
    assert "|--capture-range=cudaProfilerApi|" in log[0]
    assert log[0].endswith(f"|{sample_clip()}|{random_merv}|What happens in this video?|cpu|2")
    reports = "nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum"
    assert re.fullmatch(rf"stats\|.*--report\|{reports}\|.*out/answer.nsys-rep", log[-1])
    assert (log[1], log[2], log[-2]) == ("start", "push merv/answer", "stop")
    assert {line.partition(" ")[2] for line in log if line.startswith("push")} == {f"merv/{name}" for name in NAMES}
    assert sum(line.startswith("push") for line in log) == log.count("pop")


def test_nsys_needs_a_gpu(tmp_path):
    done = run_nsys(tmp_path, str(sample_clip()), DEVICE="cpu", GPU="0")
    assert done.returncode == 1
    assert done.stderr == "nsys.sh: PyTorch finds no CUDA GPU\n"
    assert "the tables" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage: bash bench/nsys.sh VIDEO"),
        (["nowhere.mp4"], 1, "nowhere.mp4 does not exist"),
        ([str(sample_clip())], 127, "nsys was not found"),
    ],
)
def test_nsys_says_what_is_missing(tmp_path, arguments, code, words):
    done = run_nsys(tmp_path, *arguments, fake=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1)
    assert words in done.stderr
