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
from merv_fast.models.remote import write_auto_map
from merv_fast.models.requests import (
    Answer,
    Source,
    VideoSource,
    VisualTokens,
    ended_on_error,
    in_new_tokens,
    is_list,
    most_new_tokens,
    pair,
    video_key,
)
from merv_fast.models.splice import resize_placeholders
from merv_fast.models.video_model import MervVideoOutput
from merv_fast.models.windows import check_room, check_windows, encode_windows
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
        last_memory: most bytes of tensors on GPUs during each stage of the call of ``answer`` or ``encode`` that ended
            last, those of other threads among them.
        host_memory: whether the memory of the process counts in it as well, weights that are mapped included; on Linux,
            whose own count of the peak then starts anew at each stage.

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
        self.last_memory: dict[str, int] = {}
        self.host_memory = False

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
        weights of an earlier save are removed. The directory can be uploaded to the hub as it is: transformers finds
        our classes by its ``auto_map`` with ``trust_remote_code=True``.

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
            write_auto_map(whole)
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
            kwargs: as ``answer`` takes them: clip bounds, ``windows``, ``batch_size``, any argument of transformers'
                ``generate``.

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
        windows: int = 1,
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
            windows: for long videos: into how many successive windows of equal length each clip is cut. Each is encoded
                as a video of its own, with as many frames and tokens, and the language model sees the tokens of all of
                them in order. Of frames already decoded each window takes its share, in order.
            batch_size: prompts that run together. Those of one call that are about the same video share the keys and
                values of what they begin with, the visual tokens above all, where ``sharing_obstacle`` sees none.
            kwargs: any argument of transformers' ``generate`` but ``return_dict_in_generate``. ``min_length`` and
                ``max_length`` count the tokens of the prompt but not those of the video, as in the reference. Of
                several returned sequences the first is the answer, also as there. A ``streamer`` goes with one prompt,
                and is told of the end also if an error is raised. An answer that ``stop_strings`` end includes the one
                that it ends with.
        """
        with ended_on_error(kwargs.get("streamer")):
            videos, prompts = self._checked(video, prompt_text, num_frames, windows, batch_size, kwargs)
            clip = {"clip_start_sec": clip_start_sec, "clip_end_sec": clip_end_sec, "end_frame": end_frame, "fps": fps}
            answers: list[Answer] = []
            encoded: dict[Any, VisualTokens] = {}
            prefixes: dict[Any, Prefix] = {}
            sharing = sharing_obstacle(self.model, kwargs) is None
            asked = Counter(map(video_key, videos))
            memory: dict[str, int] = {}
            for start in range(0, len(prompts), batch_size):
                timer = self._timer()
                batch, asking = videos[start : start + batch_size], prompts[start : start + batch_size]
                encoded = {key: value for key, value in encoded.items() if key in map(video_key, batch)}
                self._encode_missing(batch, clip, decoder, windows, encoded, timer)
                keys = [video_key(source) for source in batch]
                prefixes = {key: prefix for key, prefix in prefixes.items() if key in keys}
                given = ((key, encoded[key].prefix) for key in keys)
                prefixes |= {key: prefix for key, prefix in given if prefix is not None and prefix.fits(self.model)}
                share = sharing and any(asked[key] > 1 or key in prefixes for key in keys)
                # What is shared holds all visual tokens of each prompt, equally many, and leaves it text of its own.
                share = share and all(asking) and len({len(encoded[key].tokens) for key in keys}) == 1
                texts = self._generate(asking, keys, encoded, kwargs, prefixes if share else None, timer)
                for text, visual in zip(texts, [encoded[key] for key in keys], strict=True):
                    weights, device = visual.encoder_weights, str(self.device)
                    answers.append(Answer(text, weights, timer.milliseconds, self.model_id, device, visual.windows))
                memory |= {name: max(peak, memory.get(name, 0)) for name, peak in timer.peak_bytes.items()}
            self.last_memory = memory
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
        windows: int = 1,
        prefill: bool = False,
    ) -> VisualTokens:
        """Encode one video, to ask about it later.

        Args:
            video: as for ``generate``, like the others.
            clip_start_sec: as for ``answer``, like the next five.
            clip_end_sec: see there.
            end_frame: see there.
            fps: see there.
            decoder: see there.
            windows: see there.
            prefill: whether to put the visual tokens through the language model too, which every question then spares.
                What is kept of it takes 0.5 MB a token, 537 MB in all, in merv-full in bfloat16.
        """
        clip = {"clip_start_sec": clip_start_sec, "clip_end_sec": clip_end_sec, "end_frame": end_frame, "fps": fps}
        encoded: dict[Any, VisualTokens] = {}
        check_windows(windows)
        self._check_room([video], [""], windows, {})
        timer = self._timer()
        self._encode_missing([video], clip, decoder, windows, encoded, timer)
        self.last_memory = timer.peak_bytes
        visual = encoded[video_key(video)]
        if not prefill:
            return visual
        if obstacle := sharing_obstacle(self.model, {}):
            raise ValueError(f"encode: prefill must be False, for {obstacle}")
        with TOKENIZING:
            inputs = self.processor([self.processor.video_token])
        video_id, pad_id = self.config.video_token_id, self.tokenizer.pad_token_id
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids, _ = resize_placeholders(ids, mask, [len(visual.tokens)], video_id, pad_id)
        return replace(visual, prefix=prefill_prefixes(self.model, ids[0], {0: visual.tokens.to(self.device)})[0])

    def _timer(self) -> StageTimer:
        encoders = self.model.video_model.placement.devices.values()
        return StageTimer(self.device, list(encoders), host_memory=self.host_memory)

    def _checked(
        self,
        video: VideoSource | Sequence[VideoSource],
        prompt_text: str | Sequence[str],
        num_frames: Sequence[int] | None,
        windows: int,
        batch_size: int,
        kwargs: dict[str, Any],
    ) -> tuple[list[VideoSource], list[str]]:
        """Videos and prompts in pairs, if the request can be met as far as one can see without opening a video."""
        if kwargs.get("return_dict_in_generate"):
            raise ValueError("generate: return_dict_in_generate must be False; call .model.generate for its output")
        if num_frames is not None and list(num_frames) != self.config.num_frames:
            raise ValueError(f"generate: num_frames must be {self.config.num_frames}, got {list(num_frames)}")
        if batch_size < 1:
            raise ValueError(f"generate: batch_size must be at least 1, got {batch_size}")
        check_windows(windows)
        videos, prompts = pair(video, prompt_text)
        if kwargs.get("streamer") is not None and len(prompts) != 1:
            raise ValueError(f"generate: streamer must be left out unless there is one prompt, got {len(prompts)}")
        self._check_room(videos, prompts, windows, kwargs)
        return videos, prompts

    def _encode_missing(
        self,
        sources: Sequence[VideoSource],
        clip: dict[str, Any],
        decoder: str,
        windows: int,
        encoded: dict[Any, VisualTokens],
        timer: StageTimer,
    ) -> None:
        """Encode those of ``sources`` that ``encoded`` lacks: in one batch, but windows one after another."""
        missing: dict[Any, Source] = {}
        for source in sources:
            given = [name for name, value in clip.items() if value]
            if isinstance(source, VisualTokens) and windows > 1:
                given.append("windows")
            if given and isinstance(source, (Tensor, VisualTokens)):
                state = "encoded" if isinstance(source, VisualTokens) else "decoded"
                raise ValueError(f"generate: {given[0]} must be left out for a video already {state}")
            if isinstance(source, VisualTokens):
                encoded[video_key(source)] = source
            elif video_key(source) not in encoded:
                missing[video_key(source)] = source
        if windows == 1:
            encoding = VideoEncoding(self.model.video_model, clip, decoder, self.cache)
            encoded |= zip(missing, encoding.encode(list(missing.values()), timer), strict=True)
            return
        for key, source in missing.items():
            encoded[key] = encode_windows(self.model.video_model, source, windows, clip, decoder, self.cache, timer)

    def _check_room(
        self, videos: Sequence[VideoSource], prompts: Sequence[str], windows: int, kwargs: dict[str, Any]
    ) -> None:
        """Raise ValueError, before anything takes time, if windows do not fit into the language model's positions."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        each = self.model.video_model.num_video_tokens
        counts = [len(v.tokens) // each if isinstance(v, VisualTokens) else windows for v in videos]
        for count, prompt in zip(counts, prompts, strict=True):
            if count < 2 or positions is None:
                continue
            with TOKENIZING:
                text = min(len(self.tokenizer(prompt).input_ids), self.config.max_text_length)
            new = most_new_tokens(kwargs, self.model.generation_config, text)
            check_room(positions, count, each, text, new)

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
            each = self.processor.num_video_tokens
            lengths = inputs["attention_mask"].sum(1) - each
            kwargs = {"pad_token_id": self.tokenizer.pad_token_id} | in_new_tokens(kwargs, lengths.tolist())
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            counts = [len(tokens[key]) for key in keys]
            if set(counts) != {each}:
                video_id, pad_id = self.config.video_token_id, self.tokenizer.pad_token_id
                ids, mask = resize_placeholders(ids, mask, counts, video_id, pad_id)
            if self._stops_at_strings(kwargs):
                kwargs = {"tokenizer": self.tokenizer} | kwargs
            given: dict[str, Any]
            if prefixes is None:
                visual = MervVideoOutput(pooler_output=[tokens[key] for key in keys])
                given = {"mm_encoder_outputs": {"video": visual}}
                given |= {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
            else:
                rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
                given = prefilled(self.model, rows, keys, tokens, prefixes, self.tokenizer.pad_token_id)
            ids = self.model.generate(**given, **kwargs)
            new = ids[:: len(ids) // len(prompts), given["input_ids"].shape[1] :]
            with TOKENIZING:
                return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _stops_at_strings(self, kwargs: dict[str, Any]) -> bool:
        """Whether ``generate`` will look for strings in the answer, for which it needs the tokenizer."""
        config = kwargs.get("generation_config") or self.model.generation_config
        return bool(kwargs.get("stop_strings", getattr(config, "stop_strings", None)))

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        """Say when the end of a prompt, where the answer would begin, is cut off; the reference cuts in silence."""
        longest = max(len(self.tokenizer(prompt).input_ids) for prompt in prompts)
        if longest > self.config.max_text_length:
            logger.warning("a prompt of %d tokens is cut to its first %d", longest, self.config.max_text_length)
