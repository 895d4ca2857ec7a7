"""The report says what is in the tables, and what is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bench import report
from bench.committed import NO_GPU, batches, read_results, roofs, step_times, waterfall
from bench.figures import FIGURES
from bench.table import append
from bench.waterfall import names
from tests.bench.test_table import ROW

ROOT = Path(__file__).parent.parent.parent
GPU = "NVIDIA H200"


def answers(device, times):
    row = replace(ROW, op="answers", case="three questions, B=1", device=device)
    return [replace(row, impl=impl, p20=time, p50=time, p80=time) for impl, time in zip(names(), times, strict=True)]


def everything(device):
    """Rows for each figure."""
    rows = answers(device, [100.0, 90, 80, 70, 60, 50, 40, 30, 20, 10])
    for impl, time in (("eager", 8.0), ("merv_fast", 4.0)):
        row = replace(ROW, impl=impl, device=device, p20=time, p50=time, p80=time, flops=10**9, bytes=10**6)
        rows += [
            replace(row, op="encoder", case="dinov2, 112 px, B=1"),
            replace(row, op="first token", case="240p, B=1"),
        ]
        rows += [replace(row, op="encoders", case=f"all four, 112 px, B={B}") for B in (1, 4)]
    roof = replace(ROW, op="roof", impl="PyTorch", device=device)
    rows += [replace(roof, case="copy, B=1", p20=1, p50=2, p80=3, bytes=10**8)]
    return [*rows, replace(roof, case="product, B=1", p20=1, p50=2, p80=3, flops=10**9)]


def peaks(device):
    found = [{"way": "eager", "B": B, "peak_bytes": B * 2**20, "results_bytes": 1, "error": 0.0} for B in (1, 4)]
    return {"case": "four", "device": device, "versions": "v", "commit": "c", "date": "2026-11-22", "peaks": found}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def written(folder):
    files = report.write(read_results(folder), folder.parent / "docs")
    assert [file.name for file in files] == ["benchmarks.md", *(f"{name}.png" for name in FIGURES)]
    return files[0].read_text(), [Image.open(file).convert("L") for file in files[1:]]


def ink(picture, box=(0.0, 1.0)):
    """Pixels that are not white, within a part of the width."""
    part = picture.crop((int(box[0] * picture.width), 0, int(box[1] * picture.width), picture.height))
    return part.width * part.height - part.histogram()[255]


def test_a_page_of_everything(folder):
    append(folder / "a.csv", [*everything("a CPU, 2 threads"), *everything(GPU)])
    (folder / "memory.json").write_text(json.dumps(peaks(GPU)))
    text, pictures = written(folder)
    assert NO_GPU not in text
    for line in (
        "| the reference's way | 100 | 100 | 100 | 1.00 | 2e-07 |",
        "| 5. + encode and prefill a video once | 10 | 10 | 10 | 10.00 | 2e-07 |",
        "| whole model | merv_fast | 4 | 4 | 4 | 240p, B=1 |",
        "| eager | 1 | 4 |",
    ):
        assert text.count(line) == (1 if line.startswith("| eager") else 2), line
    assert "- encoders, all four, 112 px, merv_fast, NVIDIA H200: B=1: 250.0 videos/s, B=4: 1000.0 videos/s" in text
    for picture in pictures:
        assert ink(picture, (0.5, 1.0)) > 4000


def test_without_a_gpu_it_says_so(folder):
    append(folder / "a.csv", everything("a CPU, 2 threads"))
    text, pictures = written(folder)
    assert f"**{NO_GPU}**" in text
    assert text.count("Not measured.") == 4
    for picture in pictures:
        # Words only.
        assert 0 < ink(picture, (0.8, 1.0)) < 2000


def test_nothing_at_all(folder):
    text, _ = written(folder)
    assert text.count("Not measured.") == 8


def test_what_counts(folder):
    append(folder / "a.csv", everything(GPU))
    append(folder / "b.csv", answers(GPU, [200.0] * 10))
    results = read_results(folder)
    found = waterfall(results, GPU)
    assert [kind for *_, kind in found.lines] == ["reference", *["alone"] * 5, *["in order"] * 4, "all"]
    # The file that comes last.
    assert {row.p50 for _, row, _ in found.lines} == {200.0}
    assert [label for label, *_ in step_times(results, GPU)] == ["dinov2"] * 2 + ["all four"] * 2 + ["whole model"] * 2
    assert roofs(results, GPU) == (5e11, 5e10)
    assert batches(results, GPU) == {
        ("encoders, all four, 112 px", impl): {1: time, 4: time} for impl, time in (("eager", 8.0), ("merv_fast", 4.0))
    }
    assert waterfall(results, "another") is None
    assert roofs(results, "another") is None


def test_operations(folder):
    found = {
        "projector": {"2D Avg": {"params": 0, "flops": 2097152}},
        "fusion": {"Cross-Attn": {"macs": 1.75e13, "poster": 1.7e13}},
        "alike": {"Cross-Attn": {"every_product": 1.8e13}},
    }
    (folder / "flops.json").write_text(json.dumps(found))
    files = report.write(read_results(folder), folder.parent / "docs")
    assert ink(Image.open(files[-1]).convert("L"), (0.0, 0.5)) > 4000
    assert ink(Image.open(files[-1]).convert("L"), (0.5, 1.0)) > 4000
    text = files[0].read_text()
    assert "| Cross-Attn | 17.00 | 17.5000 | +2.94 |" in text
    assert "| 2D Avg | 0 | 2,097,152 |" in text
    assert "](figures/flops.png)" in text


def test_precisions(folder):
    def outcome(precision, error, right):
        features = {"dinov2": error, "siglip": 2 * error}
        return {"precision": precision, "features": features, "shares": error, "tokens": error} | {
            "milliseconds": 1.25,
            "right": right,
        }

    about = {"device": GPU, "commit": "0123456789abcdef", "date": "2026-11-23T00:00:00+00:00"}
    found = {"random": [outcome("fp8", 0.03, None)], "trained": [outcome("float16", 0.0012345, 11)]}
    (folder / "precision.json").write_text(json.dumps(about | {"precisions": found}))
    text, _ = written(folder)
    assert "trained; NVIDIA H200; commit 0123456789ab, 2026-11-23. Errors against float32, and answers" in text
    assert "| float16 | 0.0012 | 0.0025 | 0.0012 | 0.0012 | 1.2 | 11 |" in text
    assert "| fp8 | 0.03 | 0.06 | 0.03 | 0.03 | 1.2 |\n" in text


def test_a_file_that_is_none(folder):
    (folder / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json"):
        read_results(folder)


def test_the_committed_page_is_that_of_the_committed_results():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page(
        read_results(ROOT / "bench" / "results"), "figures"
    )
