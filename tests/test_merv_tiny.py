"""merv-tiny gives the right answers about the bundled clips, whichever way it is run."""

import pytest
import torch
from transformers import pipeline
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

import merv_fast
from merv_fast import ops
from merv_fast.assets import examples
from merv_fast.cli import demo
from merv_fast.cli.app import app
from merv_fast.encoders import vit
from merv_fast.runtime.cache import VideoCache

EXAMPLES = examples()
ANSWERS = [example.answer for example in EXAMPLES]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def vidlm():
    return merv_fast.load_vid("merv-tiny")


def prompt(vidlm, example):
    builder = vidlm.get_prompt_builder()
    builder.add_turn(role="human", message=example.question)
    return builder.get_prompt()


def answers(vidlm, **given):
    prompts = [prompt(vidlm, example) for example in EXAMPLES]
    return vidlm.generate([example.clip for example in EXAMPLES], prompts, **GREEDY | given)


def test_one_by_one(vidlm):
    assert [vidlm.generate(each.clip, prompt(vidlm, each), **GREEDY) for each in EXAMPLES] == ANSWERS


@pytest.mark.parametrize("batch_size", [4, 16])
def test_together(vidlm, batch_size):
    assert answers(vidlm, batch_size=batch_size) == ANSWERS


def test_by_the_reference_operators(vidlm, monkeypatch):
    def reference(xs, weights, biases, query, bias, grids, out_grid, out_slots=None):
        values = [
            ops.pool_project(x, [weight], [bias], grid, out_grid)
            for x, weight, bias, grid in zip(xs, weights, biases, grids, strict=True)
        ]
        return ops.fuse_encoders(values, query, bias)

    monkeypatch.setattr(ops, "pool_project_fuse", reference)
    assert answers(vidlm) == ANSWERS


def test_by_the_triton_kernels(device, monkeypatch):
    """In the interpreter where there is no GPU."""
    from merv_fast.kernels import pool_project_fuse, temporal_attention

    launched = set()

    def fused(xs, weights, biases, query, bias, grids, out_grid, out_slots=None):
        launched.add("pool_project_fuse")
        flat = [side for grid in grids for side in grid]
        slots = out_slots or xs[0].shape[1]
        return pool_project_fuse.launch(xs, weights, biases, query, bias, flat, out_grid, slots)

    def over_time(qkv, heads, frames, window):
        launched.add("temporal_attention")
        return temporal_attention.launch(qkv, heads, window)

    monkeypatch.setattr(ops, "pool_project_fuse", fused)
    monkeypatch.setattr(vit, "temporal_attention", over_time)
    vidlm = merv_fast.load_vid("merv-tiny").to(device, dtype=torch.float32)
    assert answers(vidlm, batch_size=16) == ANSWERS
    assert launched == {"pool_project_fuse", "temporal_attention"}


def test_compiled():
    vidlm = merv_fast.load_vid("merv-tiny")
    vidlm.model.video_model.use_compile(backend="aot_eager")
    assert answers(vidlm, batch_size=16) == ANSWERS


def test_cached(tmp_path):
    vidlm = merv_fast.load_vid("merv-tiny")
    vidlm.cache = VideoCache(folder=tmp_path)
    assert answers(vidlm) == ANSWERS
    vidlm.model.video_model.encode = None  # not called again
    assert answers(vidlm) == ANSWERS


def test_saved_and_loaded(vidlm, tmp_path):
    vidlm.save_pretrained(tmp_path)
    assert answers(merv_fast.load_vid(tmp_path)) == ANSWERS


def test_in_half_precision():
    assert answers(merv_fast.load_vid("merv-tiny").to("cpu", dtype=torch.bfloat16), batch_size=16) == ANSWERS


def test_by_transformers(vidlm):
    example = EXAMPLES[0]
    inputs = vidlm.processor(text=prompt(vidlm, example), videos=str(example.clip))
    output = vidlm.model.generate(**inputs, **GREEDY)
    text = vidlm.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == example.answer


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers has this pipeline only with torchvision")
def test_by_the_pipeline_of_transformers(vidlm, tmp_path):
    vidlm.save_pretrained(tmp_path)
    answering = pipeline("any-to-any", model=str(tmp_path))
    for example in EXAMPLES:
        content = [{"type": "video", "path": str(example.clip)}, {"type": "text", "text": example.question}]
        (answered,) = answering(
            text=[{"role": "user", "content": content}], max_new_tokens=8, generate_kwargs={"do_sample": False}
        )
        assert answered["generated_text"][-1]["content"] == example.answer


def test_the_demo_shows_them():
    done = CliRunner().invoke(app, ["demo"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert f"{len(EXAMPLES)} of {len(EXAMPLES)} answers are right" in done.stdout


def test_the_demo_fails_if_an_answer_is_wrong(monkeypatch):
    shown = [EXAMPLES[0], EXAMPLES[1]._replace(answer="no answer")]
    monkeypatch.setattr(demo, "examples", lambda: shown)
    done = CliRunner().invoke(app, ["demo"], env={"COLUMNS": "120"})
    assert done.exit_code == 1
    assert "1 of 2 answers are right" in done.stdout
