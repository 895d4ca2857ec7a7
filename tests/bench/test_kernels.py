"""bench.kernels: what is right gets a row, what is wrong none and exit code 1, and targets are judged."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import cases, kernels
from bench.clock import Timing
from merv_fast.kernels import temporal_attention

ROOT = Path(__file__).parent.parent.parent


def test_every_op_is_checked_on_a_cpu(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "bench.kernels", "--small", "--device", "cpu", "--json", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "MERV_FAST_COMMIT": "abc"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not timed" in done.stdout
    found = json.loads(file.read_text())
    assert found["failures"] == found["left_out"] == []
    assert found["commit"] == "abc"
    assert found["torch"] == torch.__version__
    rows = {(row["op"], row["B"], row["way"]): row for row in found["rows"]}
    for B in cases.SMALL.batches:
        for op in (cases.TAIL, cases.TAIL_MLP, cases.TAIL_TRAINING, "fuse_encoders", "pool_project, linear"):
            assert rows[op, B, "merv_fast"]["flops"] > 0
            assert (op, B, "eager") in rows
        for op in ("temporal_attention_backward", "its GEMM", "its pooling and scores", "resample_frames, bicubic"):
            assert rows[op, B, "merv_fast"]["bytes"] > 0
        assert (cases.TEMPORAL, B, cases.STREAM) in rows
    assert {row["timing"] for row in rows.values()} == {None}
    assert {target["verdict"] for target in found["targets"]} == {"not measured"}
    # Only what has a time is a result.
    assert not file.with_suffix(".csv").exists()


@pytest.fixture
def temporal_only(monkeypatch, device):
    """The cases of temporal attention at batch 1 alone; it needs no GPU."""
    if device == "cuda":
        pytest.skip("checks the way through the interpreter")
    small = cases.SMALL._replace(batches=(1,))
    monkeypatch.setattr(kernels, "SMALL", small)
    monkeypatch.setattr(cases, "cases", cases.temporal_cases)


def off_by_little(out):
    out[0, 0, 0] += 0.02
    return out


def not_written(out):
    return torch.empty_like(out)


def raises(out):
    raise ValueError("no\nsuch kernel")


@pytest.mark.parametrize("wrong", [off_by_little, not_written, raises])
def test_a_wrong_kernel_has_no_number(monkeypatch, temporal_only, tmp_path, capsys, wrong):
    launch = temporal_attention.launch
    monkeypatch.setattr(temporal_attention, "launch", lambda *arguments: wrong(launch(*arguments)))
    file = tmp_path / "found.json"
    assert kernels.main(["--small", "--device", "cpu", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    ways = [(row["op"], row["way"]) for row in found["rows"]]
    assert (cases.TEMPORAL, "merv_fast") not in ways
    assert (cases.TEMPORAL_TRAINING, "merv_fast") not in ways
    assert (cases.TEMPORAL, cases.PACKED) in ways
    assert ("temporal_attention_backward", "merv_fast") in ways
    reason = "ValueError: no" if wrong is raises else "output 0 is off by"
    assert found["failures"][0].startswith(f"{cases.TEMPORAL}, B=1, merv_fast: {reason}")
    assert f"FAILED: {found['failures'][0]}" in capsys.readouterr().out


def test_a_baseline_that_computes_something_else_has_no_number(monkeypatch, temporal_only, capsys):
    right = cases.baselines.temporal_stream
    monkeypatch.setattr(cases.baselines, "temporal_stream", lambda *arguments: right(*arguments) * (1 + 1e-9))
    assert kernels.main(["--small", "--device", "cpu"]) == 1
    assert f"FAILED: {cases.TEMPORAL}, B=1, {cases.STREAM}: output 0 is off by" in capsys.readouterr().out


def test_time_that_runs_out_is_said(temporal_only, capsys):
    assert kernels.main(["--small", "--device", "cpu", "--seconds", "-1"]) == 0
    assert f"not run: {cases.TEMPORAL}, B=1: no time left" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("program", "options"), [("kernels", ["--device", "cuda"]), ("tune", [])])
def test_a_missing_gpu_is_said(program, options, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"bench.{program}").main(options)
    assert caught.value.code == 2
    assert "PyTorch finds no" in capsys.readouterr().err


BARE = """
import importlib.metadata
import sys

sys.modules["av"] = sys.modules["transformers"] = None
found = importlib.metadata.Distribution.from_name.__func__

def without_us(cls, name):
    if name.replace("_", "-") == "merv-fast":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)

importlib.metadata.Distribution.from_name = classmethod(without_us)
import bench.kernels, bench.sanitize, bench.tune, merv_fast.encoders, merv_fast.modules, merv_fast.ops
"""


def test_the_gpu_suite_needs_neither_av_nor_an_installed_package():
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def measured(run, op, B, way, ms, launched=None, size=0):
    spread = Timing(ms, ms, ms)
    launched = Timing(launched, launched, launched) if launched else None
    run.rows.append(kernels.Row(op, B, way, "bfloat16", 1e-3, 0, size, spread, launched))


def test_targets_and_roof():
    run = kernels.Run(cases.Setup("cuda", torch.bfloat16, cases.MERV), bandwidth=4e12)
    for way, ms, launched in (("merv_fast", 0.05, 0.2), ("eager", 0.21, 0.3), ("compiled", 0.09, 0.4)):
        measured(run, cases.TAIL, 1, way, ms, launched)
    measured(run, cases.GEMM, 1, "cuBLAS", 0.04)
    measured(run, cases.TEMPORAL, 1, "merv_fast", 0.02)
    measured(run, cases.TEMPORAL, 1, cases.STREAM, 0.03)
    # 0.1 ms for what takes 0.05 by the bandwidth, and 0.08 ms for the same.
    measured(run, "resample_frames, bicubic", 1, "merv_fast", 0.1, size=200_000_000)
    measured(run, "resample_frames, bilinear", 1, "merv_fast", 0.08, size=200_000_000)
    found = {target.name: target for target in kernels.targets(run)}
    expected = {
        f"{cases.TAIL}, B=1: it over the cuBLAS GEMM": (1.25, "met"),
        f"{cases.TAIL}, B=8: it over the cuBLAS GEMM": (None, "not measured"),
        f"{cases.TAIL}, B=1: eager tail over it, graphs": (4.2, "met"),
        f"{cases.TAIL}, B=1: compiled tail over it, graphs": (1.8, "missed"),
        f"{cases.TAIL}, B=1: eager tail over it, launched": (1.5, "missed"),
        f"{cases.TAIL}, B=1: compiled tail over it, launched": (2.0, "met"),
        f"{cases.TEMPORAL}, B=1: {cases.STREAM} over it": (1.5, "missed"),
        "resample_frames, bicubic, B=1: share of copy bandwidth": (0.5, "missed"),
        "resample_frames, bilinear, B=1: share of copy bandwidth": (0.625, "met"),
    }
    for name, (value, verdict) in expected.items():
        assert found[name].measured == (value if value is None else pytest.approx(value)), name
        assert found[name].verdict == verdict, name
    # 30.1 GFLOP in 0.04 ms; 400 MB at 4 TB/s.
    whole = cases.gemm_cost(cases.MERV, 1, 2)
    assert whole.flops == 2 * 1024 * 3584 * 4096
    assert whole.bytes == 2 * (1024 * 3584 + 3584 * 4096 + 1024 * 4096)
    assert run.roof(kernels.Cost(whole.flops // 2, 0), 1) == pytest.approx(0.02)
    assert run.roof(kernels.Cost(whole.flops // 2, 400_000_000), 1) == pytest.approx(0.1)
    assert run.roof(whole, 2) is None


def test_tables_show_times_in_microseconds(monkeypatch, capsys):
    run = kernels.Run(cases.Setup("cpu", torch.bfloat16, cases.MERV))
    measured(run, cases.TEMPORAL, 1, "merv_fast", 0.0123, launched=0.045)
    run.blocks.append(
        {
            "block": "ViT block",
            "kernels": [{"name": "triton_poi_fused_gelu", "kind": "elementwise", "launches": 1.0, "us": 17.0}],
            "us": {"elementwise": 17.0},
            "elementwise_floor_us": 16.5,
            "gelu_epilogue_saves_at_most_us": 15.7,
            "sum_epilogues_save_at_most_us": 7.8,
        }
    )
    monkeypatch.setattr(kernels, "Console", lambda width: Console(width=150))
    kernels.show(run)
    shown = capsys.readouterr().out
    for text in ("12.3", "45.0", "triton_poi_fused_gelu", "elementwise floor 16.5 us"):
        assert text in shown


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_per_fused_add_native_layer_norm_2", "elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_addmm_1", "elementwise"),
        ("triton_tem_fused_mm_0", "product"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("attend_kernel", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("something", "other"),
    ],
)
def test_kernels_are_sorted_by_name(name, kind):
    assert kernels.kind_of(name) == kind
