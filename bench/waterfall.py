"""Three questions about the bundled clip: the reference's way, each of our techniques alone, and all of them in order.

The model is MERV with random weights. On a GPU its encoders have their full size and the language model the width of
LLaMA-2-7B with a fourth of its layers; on a CPU both are small.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from bench import baselines
from bench.baselines import ReferenceEncoder
from bench.cases import EAGER, MERV, OURS, Case, Setup, Way
from bench.clip import CLIP, FRAMES, GREEDY, LENGTH, closest, letters, no_cost, prompts, sampled
from bench.comparison import Entry
from bench.encoders import encoder_configs, place, sizes
from merv_fast import MervModel, load_frames, load_vid
from merv_fast.models.configuration import MervConfig, MervEncoderConfig
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.requests import VisualTokens
from merv_fast.training.tiny.model import tiny_processor
from merv_fast.video import every

__all__ = ["ANSWERS", "TECHNIQUES", "Steps", "build", "entries", "model_sizes", "names"]

TECHNIQUES = ("decode", "prepare", "encode", "fuse", "once")
"""In the order in which they are added: frames that are needed, and no others; resampling for all encoders on the
device; the blocks that matter, side by side; one matrix product; one encoding and one visual prefill a video."""

ANSWERS = "answers"

LLM = {
    "cpu": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 6},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32},
}

Chosen = frozenset[str]


def names() -> dict[str, Chosen]:
    """The techniques that each way has: none, each alone, then in order one more at a time."""
    alone = {each: frozenset({each}) for each in TECHNIQUES}
    ordered = {" + ".join(TECHNIQUES[:count]): frozenset(TECHNIQUES[:count]) for count in range(2, len(TECHNIQUES))}
    return {EAGER: frozenset[str]()} | alone | ordered | {OURS: frozenset(TECHNIQUES)}


def entries(device: str) -> Iterator[Entry]:
    setup = Setup(device, torch.bfloat16 if device == "cuda" else torch.float32, MERV)
    theirs = {"decode": ["decord"], "prepare": ["PIL"]}
    needs = {
        name: ["av", *(package for each, packages in theirs.items() if each not in chosen for package in packages)]
        for name, chosen in names().items()
    }
    yield Entry(answering(setup), setup, needs=needs, least=5)


def answering(setup: Setup) -> Case:
    """The answers, and the visual tokens for each question."""

    @lru_cache(maxsize=1)
    def right(vidlm: MervModel, wholes: nn.ModuleList) -> list[Tensor]:
        return comparable(Steps(vidlm, wholes, Chosen()).answer(sampled(all_frames())), setup)

    ways = [way(name, chosen, setup, right) for name, chosen in names().items()]
    name = f"{ANSWERS}, three questions about the bundled clip, {model_sizes(setup)}"
    return Case(name, 1, partial(build, setup), right, ways, no_cost)


def way(name: str, chosen: Chosen, setup: Setup, right: Callable[..., Any]) -> Way:
    def call(vidlm: MervModel, wholes: nn.ModuleList) -> tuple:
        steps = Steps(vidlm, wholes, chosen)
        return steps, *steps.answer()

    def shown(result: tuple) -> list[Tensor]:
        steps, frames, *rest = result
        if "decode" not in chosen:
            # Another FFmpeg may round their colours otherwise: it goes on with the frames to which they are nearest.
            frames, *rest = steps.answer(closest(frames, all_frames()))
        return comparable((frames, *rest), setup)

    return Way(name, call, [right], shown)


def comparable(result: tuple[Tensor, list[Tensor], list[str]], setup: Setup) -> list[Tensor]:
    """The visual tokens for each question; and the answers, where rounding does not decide them."""
    _, tokens, texts = result
    each = tokens * (len(texts) // len(tokens))
    return [torch.stack(each), *(letters(texts) if setup.dtype == torch.float32 else [])]


@cache
def all_frames() -> Tensor:
    return load_frames(CLIP, LENGTH)


@dataclass(frozen=True)
class Steps:
    """The steps of an answer: those that are ``chosen`` our way, the others the reference's.

    Args:
        vidlm: ours.
        wholes: the reference's encoders, with the weights of ours.
        chosen: some of `TECHNIQUES`.
    """

    vidlm: MervModel
    wholes: nn.ModuleList
    chosen: Chosen

    def answer(self, frames: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[str]]:
        """Frames, the visual tokens of every encoding, and the answers; of ``frames`` nothing is decoded."""
        model, questions = self.vidlm, prompts(self.vidlm)
        if "once" in self.chosen:
            frames, tokens = self.encode(frames)
            return frames, [tokens], model.generate(VisualTokens(tokens, None), questions, **GREEDY)
        found = [self.encode(frames) for _ in questions]
        pairs = zip(found, questions, strict=True)
        texts = [model.generate(VisualTokens(tokens, None), question, **GREEDY) for (_, tokens), question in pairs]
        return found[0][0], [tokens for _, tokens in found], texts

    def encode(self, frames: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frames and visual tokens ``[S, D]`` of the clip."""
        model = self.vidlm.model.video_model
        if frames is None:
            frames = (load_frames if "decode" in self.chosen else baselines.load_frames)(CLIP, FRAMES)
        inputs = model.prepare(frames.movedim(-1, 1)[None]) if "prepare" in self.chosen else self.prepare(frames)
        features = model.encode(inputs) if "encode" in self.chosen else baselines.encode(self.wholes, inputs)
        tokens = model.fuse(features).pooler_output if "fuse" in self.chosen else self.fuse(features)
        return frames, tokens[0]

    def prepare(self, frames: Tensor) -> list[Tensor]:
        """On the CPU, for one encoder after the other."""
        model = self.vidlm.model.video_model
        dtype = torch.promote_types(model.dtype, torch.float32)
        inputs = [
            baselines.prepare(every(frames, config.num_frames), config.recipe, dtype)
            for config in model.encoder_configs.values()
        ]
        return [x[None].to(model.device, model.dtype) for x in inputs]

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Pooled, projected, stacked and weighed."""
        tail: Any = self.vidlm.model.video_model.tail
        values = [
            baselines.pool_project(x, projector.projector, projector.grid, projector.out_grid)
            for x, projector in zip(features, tail.projectors, strict=True)
        ]
        return baselines.fuse_encoders(values, *tail.fusion.folded(values[0].dtype))[0]


def model_sizes(setup: Setup) -> str:
    """Of what `build` makes, for people to read."""
    llm = LLM[setup.device]
    encoders = sizes(encoder_configs(setup.device)["dinov2"])
    return f"{encoders}, {llm['num_hidden_layers']} layers of {llm['hidden_size']}"


def build(setup: Setup) -> tuple[MervModel, nn.ModuleList]:
    """MERV with random weights and merv-tiny's tokenizer, and its encoders as the reference runs them."""
    encoders = encoder_configs(setup.device)
    tokenizer = load_vid("merv-tiny").tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **special, **LLM[setup.device])
    config = MervConfig(
        encoders=list(encoders),
        text_config=text,
        projector_token_length=16 if setup.device == "cpu" else 64,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        **{f"{name}_config": MervEncoderConfig.from_encoder(encoder) for name, encoder in encoders.items()},
    )
    with torch.device(setup.device):
        model = place(setup, MervForConditionalGeneration(config))
    wholes = nn.ModuleList(ReferenceEncoder(encoder) for encoder in model.video_model.encoders.values())
    return MervModel(model, tiny_processor(model, tokenizer)), place(setup, wholes)
