"""MervModel: the drop-in for the reference's model object, for one video or many."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from merv_fast.models.encoding import VideoEncoding
from merv_fast.models.identity import kept_parts
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.prefix import Prefix, prefilled, sharing_obstacle
from merv_fast.models.prefix import prefill as prefill_prefixes
from merv_fast.models.processing import MervProcessor
from merv_fast.models.prompts import PROMPT_BUILDERS, PromptBuilder
from merv_fast.models.requests import Answer, Source, VideoSource, VisualTokens, in_new_tokens, is_list, pair, video_key
from merv_fast.models.video_model import MervVideoOutput
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.trace import StageTimer

__all__ = ["MervModel"]

logger = logging.getLogger("merv_fast")

WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
"""Names under which transformers saves weights."""

TOKENIZING = Lock()
"""A tokenizer keeps, between the calls that make up one tokenization, how it truncates: threads take turns."""


class LLMBackbone(NamedTuple):
    """The language model, its tokenizer, and the class that builds its prompts."""

    llm: nn.Module
    tokenizer: Any
    prompt_builder_fn: type[PromptBuilder]


class MervModel(nn.Module):
    """MERV, called as in the reference's quick start, and with lists.

    Made by ``load_vid``; ``.to(device, dtype=...)`` moves it like any module. Several threads may call it at once.

    Args:
        model: the transformers model.
        processor: its processor.

    Attributes:
        cache: where encoded videos are kept between calls; None, as at first, for nowhere. Keys hold the contents of
            video and weights, so each is read once more. After a write through ``parameter.data``, which PyTorch does
            not count, call ``eval()``.

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
        self.cache: VideoCache | None = None

    def train(self, mode: bool = True) -> Self:
        """As in torch.nn.Module; the weights' part of the cache's keys is made again."""
        if self.cache is not None:
            self.cache.weights.forget(kept_parts(self.model.video_model, self.cache.keep))
        return super().train(mode)

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
            video: path, decoded frames or encoded video; a list of them goes with a list of prompts of the same length,
                or with one prompt that is asked of each. A video that occurs several times is encoded once.
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
        decoder: str = "auto",
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
            decoder: as for ``open_video``, with the model's device: by "auto" a GPU decodes what it can, which colours
                edges a little differently from "pyav".
            batch_size: prompts that run together. Those of one call that are about the same video share the keys and
                values of what they begin with, the visual tokens above all, where ``sharing_obstacle`` sees none.
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
        prefixes: dict[Any, Prefix] = {}
        sharing = sharing_obstacle(self.model, kwargs) is None
        asked = Counter(map(video_key, videos))
        for start in range(0, len(prompts), batch_size):
            timer = StageTimer(self.device)
            batch = videos[start : start + batch_size]
            encoded = {key: value for key, value in encoded.items() if key in map(video_key, batch)}
            self._encode_missing(batch, clip, decoder, encoded, timer)
            keys = [video_key(source) for source in batch]
            prefixes = {key: prefix for key, prefix in prefixes.items() if key in keys}
            given = ((key, encoded[key].prefix) for key in keys)
            prefixes |= {key: prefix for key, prefix in given if prefix is not None and prefix.fits(self.model)}
            share = sharing and any(asked[key] > 1 or key in prefixes for key in keys)
            texts = self._generate(
                prompts[start : start + batch_size], keys, encoded, kwargs, prefixes if share else None, timer
            )
            answers += [
                Answer(text, encoded[key].encoder_weights, timer.milliseconds, self.model_id, str(self.device))
                for text, key in zip(texts, keys, strict=True)
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
        decoder: str = "auto",
        prefill: bool = False,
    ) -> VisualTokens:
        """Encode one video, to ask about it later.

        Args:
            video: as for ``generate``, like the others.
            clip_start_sec: as for ``answer``, like the next four.
            clip_end_sec: see there.
            end_frame: see there.
            fps: see there.
            decoder: see there.
            prefill: whether to put the visual tokens through the language model too, which every question then spares.
                What is kept of it takes 0.5 MB a token, 537 MB in all, in merv-full in bfloat16.
        """
        clip = {"clip_start_sec": clip_start_sec, "clip_end_sec": clip_end_sec, "end_frame": end_frame, "fps": fps}
        encoded: dict[Any, VisualTokens] = {}
        self._encode_missing([video], clip, decoder, encoded, StageTimer(self.device))
        visual = encoded[video_key(video)]
        if not prefill:
            return visual
        if obstacle := sharing_obstacle(self.model, {}):
            raise ValueError(f"encode: prefill must be False, for {obstacle}")
        with TOKENIZING:
            row = self.processor([self.processor.video_token])["input_ids"][0]
        return replace(visual, prefix=prefill_prefixes(self.model, row, {0: visual.tokens.to(self.device)})[0])

    def _encode_missing(
        self,
        sources: Sequence[VideoSource],
        clip: dict[str, Any],
        decoder: str,
        encoded: dict[Any, VisualTokens],
        timer: StageTimer,
    ) -> None:
        """Encode in one batch those of ``sources`` that ``encoded`` lacks."""
        missing: dict[Any, Source] = {}
        for source in sources:
            given = [name for name, value in clip.items() if value]
            if given and isinstance(source, (Tensor, VisualTokens)):
                state = "encoded" if isinstance(source, VisualTokens) else "decoded"
                raise ValueError(f"generate: {given[0]} must be left out for a video already {state}")
            if isinstance(source, VisualTokens):
                encoded[video_key(source)] = source
            elif video_key(source) not in encoded:
                missing[video_key(source)] = source
        encoding = VideoEncoding(self.model.video_model, clip, decoder, self.cache)
        encoded |= zip(missing, encoding.encode(list(missing.values()), timer), strict=True)

    def _generate(
        self,
        prompts: Sequence[str],
        keys: Sequence[Any],
        encoded: dict[Any, VisualTokens],
        kwargs: dict[str, Any],
        prefixes: dict[Any, Prefix] | None,
        timer: StageTimer,
    ) -> list[str]:
        """Answers to prompts about the videos of ``keys``, which share their ``prefixes`` unless that is None."""
        with timer.stage("generate"):
            with TOKENIZING:
                inputs = self.processor(
                    [self.processor.video_token + prompt for prompt in prompts],
                    truncation=True,
                    max_length=self.config.max_text_length,
                )
                self._warn_of_truncation(prompts)
            tokens = {key: encoded[key].tokens.to(self.device) for key in keys}
            lengths = inputs["attention_mask"].sum(1) - len(tokens[keys[0]])
            kwargs = {"pad_token_id": self.tokenizer.pad_token_id} | in_new_tokens(kwargs, lengths.tolist())
            if prefixes is None:
                visual = MervVideoOutput(pooler_output=torch.stack([tokens[key] for key in keys]))
                given = {**inputs.to(self.device), "mm_encoder_outputs": {"video": visual}}
            else:
                rows = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
                given = prefilled(self.model, rows, keys, tokens, prefixes, self.tokenizer.pad_token_id)
            ids = self.model.generate(**given, **kwargs)
            new = ids[:: len(ids) // len(prompts), given["input_ids"].shape[1] :]
            with TOKENIZING:
                return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        """Say when the end of a prompt, where the answer would begin, is cut off; the reference cuts in silence."""
        longest = max(len(self.tokenizer(prompt).input_ids) for prompt in prompts)
        if longest > self.config.max_text_length:
            logger.warning("a prompt of %d tokens is cut to its first %d", longest, self.config.max_text_length)
