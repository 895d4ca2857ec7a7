"""Embeddings for vLLM: what they are, what its server takes, and that its answers are ours."""

import base64
import shlex

import pytest
import torch
from typer.testing import CliRunner

from merv_fast import load_vid, sample_clip
from merv_fast.cli.app import app
from merv_fast.integrations.vllm import complete, payload, prompt_embeds
from merv_fast.integrations.vllm.serving import serve_command, write_language_model
from tests.integrations.vllm.server import Engine, Refused, load_embeds, serving

PROMPTS = ["In: What moves?\nOut:", "In: How many things are there, and where do they go?\nOut:"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def tiny():
    return load_vid("merv-tiny")


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    return Engine(write_language_model(tiny, tmp_path_factory.mktemp("llm") / "llm"))


def test_they_are_what_the_language_model_is_given(tiny):
    embeds = prompt_embeds(tiny, sample_clip(), PROMPTS)
    visual = tiny.encode(sample_clip())
    table = tiny.model.get_input_embeddings().weight
    for each, prompt in zip(embeds, PROMPTS, strict=True):
        ids = tiny.tokenizer(prompt).input_ids
        expected = torch.cat([table[ids[:1]], visual.tokens, table[ids[1:]]])
        assert torch.equal(each, expected)
        assert each.is_contiguous()
        assert not each.requires_grad


def test_each_video_is_encoded_once(tiny, monkeypatch):
    calls = []
    encode = type(tiny).encode
    monkeypatch.setattr(
        type(tiny), "encode", lambda self, *args, **kwargs: calls.append(1) or encode(self, *args, **kwargs)
    )
    prompt_embeds(tiny, [sample_clip(), sample_clip()], PROMPTS)
    assert len(calls) == 1


def test_encoded_videos_need_no_encoder(tiny, monkeypatch):
    visual, right = tiny.encode(sample_clip()), prompt_embeds(tiny, sample_clip(), PROMPTS)
    monkeypatch.setattr(tiny.model.video_model, "encode", None)
    got = prompt_embeds(tiny, visual, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def test_windows_bring_more_tokens(tiny):
    (one,) = prompt_embeds(tiny, sample_clip(), PROMPTS[0])
    (two,) = prompt_embeds(tiny, sample_clip(), PROMPTS[0], windows=2)
    assert len(two) == len(one) + tiny.model.video_model.num_video_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_payload_is_read_by_the_rules_of_the_server(dtype):
    embeds = torch.randn(5, 16).to(dtype)
    assert torch.equal(load_embeds(payload(embeds), 16, dtype), embeds)
    with pytest.raises(Refused, match=r"must be \[tokens, 8\]"):
        load_embeds(payload(embeds), 8, dtype)


def test_a_payload_holds_no_more_than_the_prompt():
    whole = torch.randn(4096, 64)
    assert len(base64.b64decode(payload(whole[:2]))) < 4096
    assert torch.equal(load_embeds(payload(whole.T[:, :3]), 3, torch.float32), whole.T[:, :3])


@pytest.mark.parametrize("embeds", [torch.zeros(1, 2, 3), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)])
def test_what_is_no_prompt_is_refused(embeds):
    with pytest.raises(ValueError, match=r"payload: embeds must be floating point \[S, D\]"):
        payload(embeds)


def test_a_server_answers_as_we_do(tiny, engine):
    embeds = prompt_embeds(tiny, sample_clip(), PROMPTS)
    with serving(engine) as url:
        answers = complete(embeds, model="llm", url=url + "/", api_key="secret", max_tokens=8, temperature=0)
    assert answers == tiny.generate(sample_clip(), PROMPTS, **GREEDY)
    path, headers, body = engine.requests[-1]
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("llm", 0)


def test_errors_of_the_client(engine):
    with serving(engine) as url, pytest.raises(RuntimeError, match=r"refused the request \(400\): .*must be \[tokens"):
        complete([torch.zeros(2, 3)], model="llm", url=url, max_tokens=1)
    with pytest.raises(ConnectionError, match="no answer from http://127\\.0\\.0\\.1:9/v1/completions within 5 s"):
        complete([torch.zeros(2, 3)], model="llm", url="http://127.0.0.1:9/v1", timeout=5)
    with pytest.raises(ValueError, match="at least one prompt"):
        complete([], model="llm")
    with pytest.raises(ValueError, match="n must be 1 and stream left out"):
        complete([torch.zeros(2, 3)], model="llm", n=2)


def test_the_language_model_alone(tiny, tmp_path):
    folder = write_language_model(tiny, tmp_path / "llm")
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 4.1 * sum(
        parameter.numel() for parameter in tiny.model.language_model.parameters()
    )
    with pytest.raises(FileExistsError, match="must be a new or empty folder"):
        write_language_model(tiny, folder)


def test_the_command(tiny, tmp_path):
    words = shlex.split(serve_command(tiny, tmp_path / "a b", port=9000, answer_tokens=7))
    assert words[:4] == ["vllm", "serve", str(tmp_path / "a b"), "--enable-prompt-embeds"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    room = tiny.model.video_model.num_video_tokens + tiny.config.max_text_length + 7
    positions = tiny.config.get_text_config().max_position_embeddings
    assert options == {
        "--dtype": "float32",
        "--max-model-len": str(min(room, positions)),
        "--served-model-name": "merv-tiny",
        "--port": "9000",
    }


def test_serve_llm(tmp_path, tiny):
    out = tmp_path / "llm"
    for _ in range(2):  # the second time the folder is there
        done = CliRunner().invoke(app, ["serve-llm", str(out)])
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == serve_command(tiny, out)
    assert (out / "tokenizer.json").is_file()
