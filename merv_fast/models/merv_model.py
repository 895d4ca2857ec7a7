"""MervModel: the drop-in for the reference's model object, for one video or many."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.processing import MervProcessor
from merv_fast.models.prompts import PROMPT_BUILDERS, PromptBuilder
from merv_fast.models.requests import Answer, VideoSource, VisualTokens, in_new_tokens, is_list, pair, video_key
from merv_fast.models.video_model import MervVideoOutput
from merv_fast.runtime.trace import StageTimer
from merv_fast.video import load_frames

__all__ = ["MervModel"]

logger = logging.getLogger("merv_fast")

WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
"""Names under which transformers saves weights."""


class LLMBackbone(NamedTuple):
    """The language model, its tokenizer, and the class that builds its prompts."""

    llm: nn.Module
    tokenizer: Any
    prompt_builder_fn: type[PromptBuilder]


class MervModel(nn.Module):
    """MERV, called as in the reference's quick start, and with lists.

    Made by ``load_vid``; ``.to(device, dtype=...)`` moves it like any module.

    Args:
        model: the transformers model.
        processor: its processor.

    Example:
        >>> import merv_fast
        >>> vidlm = merv_fast.load_vid("merv-tiny")
        >>> builder = vidlm.get_prompt_builder()
        >>> _ = builder.add_turn(role="human", message="What happens?")
        >>> text = vidlm.generate(merv_fast.sample_clip(), builder.get_prompt(), max_new_tokens=4)
    """

    def __init__(self, model: MervForConditionalGeneration, processor: MervProcessor) -> None:
        super().__init__()
        self.model = model.eval()
        self.processor = processor

    @property
    def config(self) -> Any:
        """The model's ``MervConfig``."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    @property
    def model_id(self) -> str:
        """The model's name."""
        return self.config.model_id

    @property
    def llm_backbone(self) -> LLMBackbone:
        """The language model's parts under the names that the reference's evaluation scripts use."""
        builder = PROMPT_BUILDERS[self.config.prompt_format]
        return LLMBackbone(self.model.language_model, self.tokenizer, builder)

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self.processor.tokenizer

    def get_prompt_builder(self, system_prompt: str | None = None) -> PromptBuilder:
        """A new prompt in the language model's format."""
        return PROMPT_BUILDERS[self.config.prompt_format]("merv", system_prompt=system_prompt)

    def save_pretrained(self, directory: str | Path, **kwargs: Any) -> None:
        """Write model, tokenizer and processor where ``load_vid`` and transformers' Auto classes find them.

        Files are put in place when they are whole, so that a model may be saved over the files it is mapped from;
        weights of an earlier save are removed.

        Args:
            directory: made if need be.
            kwargs: for transformers' ``save_pretrained`` of the model, such as ``max_shard_size``.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained: push_to_hub must be False; save, then upload the directory")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory, prefix=".saving-") as whole:
            self.model.save_pretrained(whole, **kwargs)
            self.processor.save_pretrained(whole)
            files = [file.relative_to(whole) for file in Path(whole).rglob("*") if file.is_file()]
            for file in files:
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                (Path(whole) / file).replace(directory / file)
        for path in directory.iterdir():
            if WEIGHT_FILE.fullmatch(path.name) and Path(path.name) not in files:
                path.unlink()

    @torch.inference_mode()
    def generate(
        self,
        video: VideoSource | Sequence[VideoSource],
        prompt_text: str | Sequence[str],
        num_frames: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Answer: one prompt about one video, or lists of either.

        Args:
            video: path or encoded video; a list of them goes with a list of prompts of the same length, or with one
                prompt that is asked of each. A video that occurs several times is encoded once.
            prompt_text: prompt from ``get_prompt_builder``; a list of them may be asked of one video.
            num_frames: frames for each encoder, as in the model's configuration (accepted for compatibility).
            kwargs: as ``answer`` takes them: clip bounds, ``batch_size``, any argument of transformers' ``generate``.

        Returns:
            The answer, or the answers in order if either argument was a list.
        """
        answers = self.answer(video, prompt_text, num_frames, **kwargs)
        single = not is_list(video) and not is_list(prompt_text)
        return answers[0].answer if single else [answer.answer for answer in answers]

    @torch.inference_mode()
    def answer(
        self,
        video: VideoSource | Sequence[VideoSource],
        prompt_text: str | Sequence[str],
        num_frames: Sequence[int] | None = None,
        *,
        clip_start_sec: float = 0.0,
        clip_end_sec: float | None = None,
        end_frame: int | None = None,
        fps: float | None = None,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> list[Answer]:
        """As ``generate``, with encoder weights and timings.

        Args:
            video: as for ``generate``.
            prompt_text: as for ``generate``.
            num_frames: as for ``generate``.
            clip_start_sec: where the clip starts, in seconds.
            clip_end_sec: where it ends, default the end of the video.
            end_frame: instead of the two, sample from the first frame to this one.
            fps: frames per second of a folder of frames.
            batch_size: prompts that run together.
            kwargs: any argument of transformers' ``generate`` but ``return_dict_in_generate``. ``min_length`` and
                ``max_length`` count the tokens of the prompt but not those of the video, as in the reference. Of
                several returned sequences the first is the answer, also as there.
        """
        if kwargs.get("return_dict_in_generate"):
            raise ValueError("generate: return_dict_in_generate must be False; call .model.generate for its output")
        if num_frames is not None and list(num_frames) != self.config.num_frames:
            raise ValueError(f"generate: num_frames must be {self.config.num_frames}, got {list(num_frames)}")
        if batch_size < 1:
            raise ValueError(f"generate: batch_size must be at least 1, got {batch_size}")
        videos, prompts = pair(video, prompt_text)
        clip = {"clip_start_sec": clip_start_sec, "clip_end_sec": clip_end_sec, "end_frame": end_frame, "fps": fps}
        answers: list[Answer] = []
        encoded: dict[Any, VisualTokens] = {}
        for start in range(0, len(prompts), batch_size):
            timer = StageTimer(self.device)
            batch = videos[start : start + batch_size]
            encoded = {key: value for key, value in encoded.items() if key in map(video_key, batch)}
            self._encode_missing(batch, clip, encoded, timer)
            visual = [encoded[video_key(source)] for source in batch]
            texts = self._generate(visual, prompts[start : start + batch_size], kwargs, timer)
            answers += [
                Answer(text, tokens.encoder_weights, timer.milliseconds, self.model_id, str(self.device))
                for text, tokens in zip(texts, visual, strict=True)
            ]
        return answers

    @torch.inference_mode()
    def encode(
        self,
        video: VideoSource,
        *,
        clip_start_sec: float = 0.0,
        clip_end_sec: float | None = None,
        end_frame: int | None = None,
        fps: float | None = None,
    ) -> VisualTokens:
        """Encode one video, to ask about it later; the arguments are those of ``answer``."""
        clip = {"clip_start_sec": clip_start_sec, "clip_end_sec": clip_end_sec, "end_frame": end_frame, "fps": fps}
        encoded: dict[Any, VisualTokens] = {}
        self._encode_missing([video], clip, encoded, StageTimer(self.device))
        return encoded[video_key(video)]

    def _encode_missing(
        self,
        sources: Sequence[VideoSource],
        clip: dict[str, Any],
        encoded: dict[Any, VisualTokens],
        timer: StageTimer,
    ) -> None:
        """Encode in one batch those of ``sources`` that ``encoded`` lacks."""
        missing: dict[Any, str | PathLike[str] | None] = {}
        for source in sources:
            if isinstance(source, VisualTokens):
                if given := [name for name, value in clip.items() if value]:
                    raise ValueError(f"generate: {given[0]} must be left out for a video already encoded")
                encoded[video_key(source)] = source
            elif video_key(source) not in encoded:
                missing[video_key(source)] = source
        stages = ("decode", "prepare", "encode", "fuse")
        timer.milliseconds |= {name: 0.0 for name in stages if name not in timer.milliseconds}
        if not missing:
            return
        inputs = []
        for source in missing.values():
            with timer.stage("decode"):
                frames = None if source is None else load_frames(source, max(self.config.num_frames), **clip)
            with timer.stage("prepare"):
                inputs.append(self._zeros() if frames is None else self._prepare(frames))
        with timer.stage("encode"):
            features = self.model.video_model.encode([torch.cat(parts) for parts in zip(*inputs, strict=True)])
        with timer.stage("fuse"):
            output = self.model.video_model.fuse(features)
        for index, key in enumerate(missing):
            encoded[key] = VisualTokens(output.pooler_output[index], self._named(output.encoder_weights, index))

    def _prepare(self, frames: Tensor) -> list[Tensor]:
        return self.model.video_model.prepare(frames.movedim(-1, 1)[None])

    def _zeros(self) -> list[Tensor]:
        """What the reference feeds its encoders when there is no video."""
        return [
            torch.zeros(1, config.num_frames, 3, config.recipe.size, config.recipe.size, device=self.device).to(
                self.dtype
            )
            for config in self.config.encoder_configs().values()
        ]

    def _named(self, weights: Tensor | None, index: int) -> dict[str, float] | None:
        if weights is None:
            return None
        row = weights[index if len(weights) > 1 else 0]
        return dict(zip(self.config.encoders, row.float().tolist(), strict=True))

    def _generate(
        self,
        visual: Sequence[VisualTokens],
        prompts: Sequence[str],
        kwargs: dict[str, Any],
        timer: StageTimer,
    ) -> list[str]:
        with timer.stage("generate"):
            inputs = self.processor(
                [self.processor.video_token + prompt for prompt in prompts],
                truncation=True,
                max_length=self.config.max_text_length,
            ).to(self.device)
            self._warn_of_truncation(prompts)
            tokens = torch.stack([item.tokens for item in visual]).to(self.device)
            text_lengths = inputs["attention_mask"].sum(1) - tokens.shape[1]
            ids = self.model.generate(
                **inputs,
                mm_encoder_outputs={"video": MervVideoOutput(pooler_output=tokens)},
                **{"pad_token_id": self.tokenizer.pad_token_id} | in_new_tokens(kwargs, text_lengths.tolist()),
            )
            new = ids[:: len(ids) // len(prompts), inputs["input_ids"].shape[1] :]
            return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        """Say when the end of a prompt, where the answer would begin, is cut off; the reference cuts in silence."""
        longest = max(len(self.tokenizer(prompt).input_ids) for prompt in prompts)
        if longest > self.config.max_text_length:
            logger.warning("a prompt of %d tokens is cut to its first %d", longest, self.config.max_text_length)
