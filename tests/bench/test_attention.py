"""bench.attention: what is right has a row, what is wrong none and exit code 1, and what is not there a reason."""

import json
from dataclasses import replace

import pytest
import torch

from bench import attention, comparison
from bench.cases import MERV, Setup
from bench.encoders import encoder_configs
from bench.table import read
from merv_fast.encoders import build_encoder
from merv_fast.modules.attention import HeadAttention
from merv_fast.modules.attention_backends import BACKENDS
from tests.modules.attention_packages import MODULES, install, remove

ON_CPU = ["eager", "sdpa", "sdpa_flash"]


@pytest.fixture
def quick(monkeypatch):
    """A tiny DINOv2 and ViViT alone, and hardly any time; packages are missing."""
    monkeypatch.setattr(comparison, "SECONDS", {"cpu": 1e-4})
    monkeypatch.setattr(comparison, "COPIED", {"cpu": 1 << 16})
    configs = encoder_configs("cpu")
    small = {"image_size": 32, "patch": 16, "width": 32, "heads": 2, "mlp_width": 32, "num_frames": 2}
    found = {name: replace(configs[name], **small) for name in ("dinov2", "vivit")}
    monkeypatch.setattr(attention, "encoder_configs", lambda device: found)
    monkeypatch.setattr(attention, "pin_threads", lambda: None)
    for name in MODULES:
        remove(monkeypatch, name)


def test_rows_reasons_and_the_fastest(quick, tmp_path, capsys):
    file = tmp_path / "deeper" / "found.json"
    assert attention.main(["--device", "cpu", "--json", str(file)]) == 0
    found, rows = json.loads(file.read_text()), read(file.with_suffix(".csv"))
    cases = [
        f"{name} tokens, 2 heads of 16, B={B}" for name in ("dinov2, 2 x 9", "vivit, 1 x 5") for B in attention.BATCHES
    ]
    assert [(row.case, row.impl) for row in rows] == [(case, name) for case in cases for name in ON_CPU]
    assert {(row.op, row.dtype) for row in rows} == {("attention", "float32")}
    assert all(0 <= row.error < 1e-5 and row.percent_of_roof > 0 for row in rows)
    # Two products of 2 heads, 16 channels, for each of B x 2 rows of 9 x 9 pairs.
    assert rows[0].flops == 2 * 2 * 2 * 16 * 2 * 9 * 9
    assert rows[0].bytes == 4 * 2 * 9 * 32 * 4
    assert found["failures"] == []
    assert list(found["left_out"]) == [name for name in BACKENDS if name not in ON_CPU]
    assert found["left_out"]["sdpa_cudnn"].endswith("got cpu")
    assert found["left_out"]["xformers"].startswith("xformers must be importable")
    out = capsys.readouterr().out
    assert "not at hand: flash_attention_2: flash-attn must be importable" in out
    for case in cases:
        best = min((row for row in rows if row.case == case), key=lambda row: row.p50)
        assert found["fastest"][case] == best.impl
        marked = [row["impl"] for row in found["rows"] if row["case"] == case and row["fastest"]]
        assert marked == [best.impl]
        assert sum(case in line and f"{best.impl} (fastest)" in line for line in out.splitlines()) == 1


def test_a_wrong_one_fails_and_has_no_row(quick, monkeypatch, capsys):
    def wrong(q, k, v):
        return BACKENDS["eager"].load()(q, k, v) * 1.001

    # Taken for one that serves everywhere, so that it is not found out before.
    monkeypatch.setitem(BACKENDS, "sdpa_flash", BACKENDS["sdpa_flash"]._replace(load=lambda: wrong, dtypes=None))
    assert attention.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED: attention, ") == 4
    assert "sdpa_flash: WrongResult: output 0 is off by" in out
    assert "│ sdpa_flash" not in out


def test_packages_are_measured_where_they_serve(quick, monkeypatch):
    stand_in = install(monkeypatch, "xformers")
    found = attention.measure(Setup("cpu", torch.float32, MERV), batches=(1,))
    assert {row.impl for row in found.rows} == {*ON_CPU, "xformers"}
    assert stand_in.calls[-1][0].stride(1) == 3 * 32


@pytest.mark.parametrize("family", ["languagebind", "dinov2", "vivit", "siglip"])
def test_shapes_are_those_of_the_encoders(family, monkeypatch):
    config = replace(encoder_configs("cuda")[family], blocks=1)
    rows, tokens = attention.sequences(config)
    expected = {"languagebind": (16, 257), "dinov2": (16, 261), "vivit": (1, 3137), "siglip": (16, 196)}
    assert (rows, tokens) == expected[family]
    seen = []
    monkeypatch.setattr(HeadAttention, "forward", lambda self, q, k, v: seen.extend((q, k, v)) or q)
    with torch.device("meta"):
        pixels = torch.zeros(1, config.num_frames, 3, config.image_size, config.image_size)
        build_encoder(config)(pixels)
        (qkv,) = attention.entry(Setup("meta", torch.float32, MERV), config, 1, []).case.make()
    assert {t.shape for t in seen} == {(rows, config.heads, tokens, config.width // config.heads)}
    assert qkv.shape == (rows, tokens, 3 * config.width)
    # What is timed has the strides of what the encoder makes.
    q, k, v = qkv.unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
    assert [t.stride() for t in seen] == [q.stride(), k.stride(), v.stride()]
