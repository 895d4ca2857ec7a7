"""An answer of many tokens, greedy: how far each is from reading the language model's weights once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import MERV, OURS, Case, Setup, Way
from bench.clip import prompts
from bench.comparison import Entry
from bench.waterfall import LLM, build, model_sizes
from merv_fast import MervModel
from merv_fast.kernels._launch import Cost
from merv_fast.models.video_model import MervVideoOutput

__all__ = ["ANSWER", "entries"]

ANSWER = "answer"
STATIC = "merv_fast, static cache, compiled"
LENGTH = {"cpu": 16, "cuda": 128}
"""Tokens; that what comes before the first of them is little of the time."""


def entries(device: str) -> Iterator[Entry]:
    setup = Setup(device, torch.bfloat16 if device == "cuda" else torch.float32, MERV)
    llm = LLM[device]
    # Of the prefill, beside which only the bytes of the weights count.
    product = (MERV.S, llm["hidden_size"], llm["intermediate_size"])
    yield Entry(answering(setup), setup, product, least=5)


def answering(setup: Setup) -> Case:
    """One video, encoded before; prefill included."""
    length = LENGTH[setup.device]

    def make() -> tuple:
        vidlm, _ = build(setup)
        return vidlm, setup.rand(vidlm.model.video_model.num_video_tokens, LLM[setup.device]["hidden_size"])

    def ours(vidlm: MervModel, tokens: Tensor) -> tuple:
        return vidlm, tokens, answer(vidlm, tokens, length)

    def static(vidlm: MervModel, tokens: Tensor) -> tuple:
        return vidlm, tokens, answer(vidlm, tokens, length, cache_implementation="static")

    def shown(result: tuple) -> Tensor:
        return greed(*result)

    def cost(vidlm: MervModel, tokens: Tensor) -> Cost:
        """The weights once for each token."""
        llm = vidlm.model.language_model
        looked_up = llm.get_input_embeddings().weight
        weights = sum(p.numel() for p in llm.parameters()) - looked_up.numel()
        return Cost(2 * weights * (len(tokens) + length), length * weights * looked_up.element_size())

    def low(vidlm: MervModel, tokens: Tensor) -> Tensor:
        return greed(vidlm, tokens, answer(vidlm, tokens, length, use_cache=False))

    def right(vidlm: MervModel, tokens: Tensor) -> Tensor:
        return torch.ones(length, dtype=tokens.dtype)

    ways = [Way(OURS, ours, [low], shown)]
    if setup.device == "cuda":
        ways.append(Way(STATIC, static, [low], shown))
    return Case(f"{ANSWER}, {length} tokens, {model_sizes(setup)}", 1, make, right, ways, cost)


def answer(vidlm: MervModel, tokens: Tensor, length: int, **kwargs: object) -> Tensor:
    """Ids ``[1, P + length]`` of a prompt and its answer."""
    asked = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False}
    inputs = vidlm.processor([vidlm.processor.video_token + prompts(vidlm)[0]]).to(tokens.device)
    return vidlm.model.generate(**inputs, mm_encoder_outputs=visual(tokens), **asked, **kwargs)


def greed(vidlm: MervModel, tokens: Tensor, ids: Tensor) -> Tensor:
    """For each token of an answer the logit, all at once, over the largest, both from the least: 1 if it is greedy."""
    length = LENGTH["cuda" if tokens.is_cuda else "cpu"]
    logits = vidlm.model(input_ids=ids, mm_encoder_outputs=visual(tokens)).logits[0, -length - 1 : -1].double()
    chosen = logits.gather(1, ids[0, -length:, None])[:, 0]
    least, most = logits.aminmax(dim=1)
    return (chosen - least) / (most - least)


def visual(tokens: Tensor) -> dict[str, MervVideoOutput]:
    return {"video": MervVideoOutput(pooler_output=[tokens])}
