"""The poster's tables: every cell, every part against its formula, parts against the whole counted in one go."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import flops, poster
from bench.counting import Count, count
from merv_fast.encoders import EncoderConfig
from merv_fast.models.configuration import MervConfig
from merv_fast.models.modeling import MervForConditionalGeneration

ROOT = Path(__file__).parent.parent.parent

PROJECTORS = {
    "2D Avg": (0, 2_097_152, "0", "2.1M"),
    "2D Avg*": (0, 4_194_304, "0", "4.2M"),
    "2D Attn": (12_661_760, 9_663_676_416, "12.7M", "9.7G"),
    "2D Conv": (237_384_960, 241_153_605_632, "237M", "241G"),
    "3D Avg*": (0, 4_194_304, "0", "4.2M"),
    "3D Conv": (113_250_304, 231_928_233_984, "113M", "232G"),
}
"""Parameters, FLOPs, and both as the poster prints them."""
FUSIONS = {
    "Cross-Attn": 17.19e12,
    "Concat (Seq.)": 43.09e12,
    "Concat (Ch.)": 16.29e12,
    "Learnable W": 16.24e12,
    "25%-Mixed": 16.39e12,
}
TEXT = 886.7


@pytest.fixture(scope="module")
def projectors() -> list[poster.Projector]:
    return [poster.count_projector(row) for row in poster.PROJECTORS]


@pytest.fixture(scope="module")
def model() -> poster.Model:
    return poster.count_model()


@pytest.fixture(scope="module")
def found(projectors, model) -> dict:
    return json.loads(json.dumps(flops.as_json(projectors, model)))


def test_projectors_match_to_every_printed_digit(found):
    assert list(found["projector"]) == list(PROJECTORS)
    for name, (params, operations, printed_params, printed_flops) in PROJECTORS.items():
        assert found["projector"][name] == {"params": params, "flops": operations}
        assert flops.as_printed(params, printed_params) == printed_params
        assert flops.as_printed(operations, printed_flops) == printed_flops


def test_queries_are_projected_once(found):
    """64 queries of 1024 for one frame instead of eight, and the attention's own products counted."""
    theirs = PROJECTORS["2D Attn"][1]
    products = 8 * 2 * 64 * 256 * 1024
    assert found["projector_merv_fast"]["2D Attn"] == {"macs": theirs - 7 * 64 * 1024**2 + products, "pooled": 0}
    assert found["projector_merv_fast"]["2D Avg"] == {"macs": 0, "pooled": 2_097_152}


def test_fusions_are_near(found, model):
    assert {name: row["poster"] for name, row in found["fusion"].items()} == FUSIONS
    assert list(found["fusion"]["Cross-Attn"]) == ["macs", "poster"]
    for strategy in model.strategies:
        name = strategy.row.name
        off = abs(found["fusion"][name]["macs"] - FUSIONS[name])
        assert off < flops.NEAR * FUSIONS[name]
        assert off < 2 * strategy.noise
    assert flops.NEAR == 0.01


def test_no_one_rule_brings_all_rows_near(found):
    for rule in ("without_llm_attention", "with_llm_attention"):
        off = [abs(found["alike"][name][rule] / macs - 1) for name, macs in FUSIONS.items()]
        assert max(off) > 5 * flops.NEAR


def vit(slots: int, tokens: int, patches: int, pixels: int, width: int, blocks: int) -> tuple[int, int]:
    """Linear layers and attention of a transformer with an MLP of ratio 4 over ``slots`` rows of ``tokens``."""
    linear = blocks * slots * tokens * 12 * width**2 + slots * patches * pixels * width
    return linear, blocks * slots * 2 * tokens**2 * width


def languagebind(blocks: int, frames: int = 16) -> tuple[int, int]:
    """With a second attention of four square matrices in each block, over windows of eight frames."""
    linear, attention = vit(frames, 257, 256, 3 * 14 * 14, 1024, blocks)
    return linear + blocks * frames * 257 * 4 * 1024**2, attention + blocks * frames * 257 * 2 * 8 * 1024


def test_encoders_follow_their_formulas(found):
    expected = {
        "languagebind": (languagebind(24), languagebind(23), True),
        "dinov2": (vit(16, 261, 256, 588, 1024, 24), vit(16, 261, 256, 588, 1024, 23), False),
        "vivit": (vit(1, 3137, 3136, 1536, 768, 12), vit(1, 3137, 3136, 1536, 768, 12), True),
        "siglip": (vit(16, 196, 196, 768, 768, 12), vit(16, 196, 196, 768, 768, 11), False),
    }
    for name, (whole, used, seen) in expected.items():
        assert found["encoders"][name]["every_product"] == sum(whole)
        assert found["encoders"][name]["merv_fast"] == sum(used)
        assert found["encoders"][name]["poster"] == (sum(whole) if seen else whole[0])


def test_the_rest_follows_its_formulas(found):
    n = 1024 + TEXT
    linear, cross = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064, found["parts"]["Cross-Attn"]
    assert found["collapsed"]["merv_fast"]["gemm"] == [1024, 2 * (1024 + 768), 4096]
    assert cross["projectors"] == 1024 * (1024 + 1024 + 768 + 768) * 4096
    # The query, the keys and values of four encoders, what is thrown away, four scores twice, the weighed sum.
    mha = 3072**2 + 2 * 4 * 4096 * 3072 + 3072**2 + 2 * 4 * 3072
    assert cross["fusion"] == mha + 4 * 1024 * 4096
    assert found["parts"]["Concat (Ch.)"]["fusion"] == 1024 * 4 * 4096 * 4096
    assert found["parts"]["Learnable W"]["fusion"] == 4 * 4096
    # At a mean that lies between two whole numbers of tokens, rounded to a MAC.
    assert abs(cross["llm"] - linear * n) <= 1
    between = 32 * 2 * 4096 * (0.3 * (n - 0.7) ** 2 + 0.7 * (n + 0.3) ** 2)
    # Where transformers multiplies 64 rotary frequencies with the positions, that is a batched product, too.
    rotary = round(cross["llm_attention"] - between)
    assert rotary in (0, round(64 * n))
    assert found["parts"]["Concat (Seq.)"]["llm_attention"] > 6 * cross["llm_attention"]
    assert found["visual_tokens"] == dict.fromkeys(FUSIONS, 1024) | {"Concat (Seq.)": 4096}


def test_totals_are_the_sums_of_their_parts(found):
    unseen = sum(encoder["every_product"] - encoder["poster"] for encoder in found["encoders"].values())
    for name, parts in found["parts"].items():
        assert found["fusion"][name]["macs"] == sum(parts.values())
        alike = found["alike"][name]
        assert alike["without_llm_attention"] == sum(parts.values()) - parts["llm_attention"]
        assert alike["every_product"] == alike["with_llm_attention"] + unseen
        counted = parts["llm_attention"] > 0
        assert counted == (name in ("Cross-Attn", "Concat (Seq.)"))
        assert sum(parts.values()) == alike["with_llm_attention" if counted else "without_llm_attention"]
        assert found["conventions"]["fusion"][name].endswith("counted" if counted else "left out")


def test_the_whole_counted_in_one_go_is_the_sum(model):
    with torch.device("meta"):
        merv = MervForConditionalGeneration(MervConfig())
        inputs = [torch.empty(1, c.num_frames, 3, 224, 224) for c in merv.video_model.encoder_configs.values()]
        text, mask = torch.empty(1, 887, 4096), torch.empty(1, 1, 1911, 1911)

    def run() -> None:
        tokens = merv.video_model.fuse(merv.video_model.encode(inputs)).pooler_output
        embeds = torch.cat([tokens, text], 1)
        merv.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)

    cross = model.strategies[0]
    parts = [encoder.merv_fast for encoder in model.encoders.values()] + [cross.tail, cross.folding]
    llm = poster.count_llm(merv.language_model, 1911)
    whole = count(run)[1]
    assert whole == sum([*parts, llm], Count())
    # The mean lies three tenths of a token below.
    assert abs(whole.linear - 0.3 * cross.llm_token.linear - sum([*parts, cross.llm], Count()).linear) <= 1


def test_a_collapsed_tail_needs_one_product_and_the_scores(found):
    collapsed = found["collapsed"]
    reference, ours = collapsed["reference"], collapsed["merv_fast"]
    assert reference["last_layers"] == ours["last_layers"] == 15_032_385_536
    # A score vector for each encoder and one product with its mean; the biases with the query and with the weights.
    assert ours["weighing"] == 3584 * 4096 + 3584 + 4 * 4096 + 4 * 4096
    assert ours["weighing"] < reference["weighing"]
    assert ours["folding_once"] == 3072**2 + 3072 * 4096 + 3072
    alike = found["alike"]
    saved = sum(encoder["every_product"] - encoder["merv_fast"] for encoder in found["encoders"].values())
    for name in ("Cross-Attn", "Learnable W"):
        tail = found["parts"][name]["projectors"] + found["parts"][name]["fusion"]
        ours_in_all = ours["last_layers"] + ours["weighing"]
        assert alike[name]["every_product"] - alike[name]["merv_fast"] == saved + tail - ours_in_all


def test_parameters(found):
    projectors = found["params"]["projectors"]
    assert projectors == {"languagebind": 4_198_400, "dinov2": 4_198_400, "vivit": 3_149_824, "siglip": 3_149_824}
    assert sum(projectors.values()) == 14_696_448
    fusion, used = found["params"]["fusion"], found["params"]["used_of_fusion"]
    assert list(fusion.values()) == [44_055_552, 0, 67_112_960, 4, 0]
    dead = 3072 * 4096 + 3072 + 3072**2 + 3072
    assert used == fusion | {"Cross-Attn": 44_055_552 - dead}
    # Its embedding has 64 rows more than LLaMA-2's 6,738,415,616 parameters come with.
    assert found["params"]["llm"] == 6_738_415_616 + 64 * 2 * 4096


def encoders() -> dict[str, EncoderConfig]:
    return MervConfig().encoder_configs()


def test_frames_and_blocks_change_the_count():
    config = encoders()["languagebind"]
    _, whole = poster.count_encoder(config)
    _, half = poster.count_encoder(replace(config, num_frames=8))
    assert half.reference * 2 == whole.reference
    _, shorter = poster.count_encoder(replace(config, blocks=22))
    assert shorter.reference == whole.reference
    one = (whole.merv_fast.linear - shorter.merv_fast.linear, whole.merv_fast.attention - shorter.merv_fast.attention)
    assert one == tuple(more - fewer for more, fewer in zip(languagebind(23), languagebind(22), strict=True))
    row = poster.PROJECTORS[0]
    assert poster.count_projector(replace(row, frames=16)).reference.pooled == 2 * 2_097_152


BROKEN = {
    "frames": lambda row: replace(row, frames=row.frames + 1),
    "resampler": lambda row: replace(row, resampler="conv" if row.resampler != "conv" else "3dconv", out_width=4096),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_cell_that_is_off_is_named(model, broken):
    counted = [poster.count_projector(broken(row)) for row in poster.PROJECTORS]
    named = {line.split(":")[0] for line in flops.misses(counted, model)}
    assert named == set(PROJECTORS)


def test_a_row_that_is_off_is_named(projectors, model):
    assert flops.misses(projectors, model) == []
    encoder = model.encoders["languagebind"]
    broken = replace(model, encoders=model.encoders | {"languagebind": encoder._replace(reference=Count())})
    assert [line.split(":")[0] for line in flops.misses(projectors, broken)] == list(FUSIONS)
    strategies = [
        replace(strategy, row=replace(strategy.row, llm_attention=not strategy.row.llm_attention))
        for strategy in model.strategies
    ]
    off = flops.misses(projectors, replace(model, strategies=strategies))
    assert [line.split(":")[0] for line in off] == list(FUSIONS)
    assert off[0] == "Cross-Attn: 16.3349 T MACs are not within 1% of 17.19 T"


@pytest.fixture
def counted(monkeypatch, projectors, model) -> None:
    """The command without its counting."""
    rows = dict(zip(poster.PROJECTORS, projectors, strict=True))
    monkeypatch.setattr(flops, "count_projector", rows.get)
    monkeypatch.setattr(flops, "count_model", lambda: model)


def test_json_alone(counted, capsys, found):
    assert flops.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_tables(counted, capsys, tmp_path, found):
    file = tmp_path / "flops.json"
    assert flops.main(["--json", str(file)]) == 0
    assert json.loads(file.read_text()) == found
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    text = " ".join(out.split())
    for said in (*PROJECTORS, *FUSIONS, "9,663,676,416", "241G", "17.2919", "43.09", "15,047,101,952", "44,055,552"):
        assert said in text
    for said in ("886.7 +- 9.5", "the mean is a constant", "input elements", "left out"):
        assert said in text


def test_a_miss_is_an_error(counted, capsys, monkeypatch):
    monkeypatch.setattr(flops, "NEAR", 1e-6)
    assert flops.main(["--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fusion"]
    assert printed.err.count("missed: ") == 5


@pytest.mark.slow
def test_the_command_needs_little_memory():
    """LLaMA-2-7B alone would be 13 GB."""
    command = [
        sys.executable,
        "-c",
        "import resource, sys; from bench.flops import main; code = main(['--json']);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)",
    ]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert set(FUSIONS) == set(json.loads(done.stdout)["fusion"])
    assert int(done.stderr.splitlines()[-1]) * 1024 < 4e9
