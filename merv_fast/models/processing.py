"""MervProcessor: videos and prompts to model inputs, through our decoder and MERV's frame sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from merv_fast.models.splice import insert_placeholders, pad
from merv_fast.video import load_frames, sample_indices

__all__ = ["MervProcessor", "MervVideoProcessor", "VideoInput"]

VideoInput = str | Path | np.ndarray | Tensor
"""A path, or frames already decoded: uint8 [F, H, W, 3] or [F, 3, H, W]."""


class MervVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of ``MervVideoProcessor`` beyond those every video processor of transformers takes."""

    clip_start_sec: float
    clip_end_sec: float | None
    end_frame: int | None


class MervVideoProcessor(BaseVideoProcessor):
    """Decodes and samples videos into one canonical tensor of frames; resizing is the model's, on its device.

    Args:
        num_frames: frames sampled from each video: the largest number that any encoder is given.
    """

    model_input_names = ["pixel_values_videos"]  # noqa: RUF012
    valid_kwargs = MervVideosKwargs

    def __init__(self, num_frames: int = 32, **kwargs: Any) -> None:
        super().__init__(num_frames=num_frames, **kwargs)
        self.num_frames = num_frames

    def preprocess(
        self,
        videos: VideoInput | Sequence[Any],
        num_frames: int | None = None,
        clip_start_sec: float = 0.0,
        clip_end_sec: float | None = None,
        end_frame: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Sample each video by MERV's rule.

        Args:
            videos: one video or a (nested) sequence of them.
            num_frames: overrides the number of frames a video.
            clip_start_sec: where the clip starts, seconds; for files only, like the next two.
            clip_end_sec: where it ends, seconds, default the end of the video.
            end_frame: instead of the two, sample from the first frame to this one.
            kwargs: arguments of other video processors, without meaning here.

        Returns:
            ``pixel_values_videos``: uint8 [B, F, 3, H, W], or a list of [F, 3, H_i, W_i] where sizes differ.
        """
        count = num_frames or self.num_frames
        frames = [
            _sampled(video, count, clip_start_sec=clip_start_sec, clip_end_sec=clip_end_sec, end_frame=end_frame)
            for video in _flat(videos)
        ]
        same_size = len({tuple(video.shape) for video in frames}) == 1
        return BatchFeature({"pixel_values_videos": torch.stack(frames) if same_size else frames})


class MervProcessor(ProcessorMixin):
    """Videos and prompts to ``input_ids``, ``attention_mask`` and ``pixel_values_videos``.

    The visual tokens of a video stand where the reference splices them: after the BOS, or first where the tokenizer
    has none. A video marker may also stand elsewhere in a prompt; the tokens then stand there.

    Args:
        video_processor: a ``MervVideoProcessor``.
        tokenizer: the language model's.
        chat_template: Jinja template, see ``merv_fast.models.chat_templates``.
        num_video_tokens: visual tokens of each video.
        video_token: the marker, a special token of the tokenizer.
    """

    def __init__(
        self,
        video_processor: MervVideoProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_video_tokens: int = 1024,
        video_token: str = "<|video_pad|>",
        **kwargs: Any,
    ) -> None:
        super().__init__(video_processor, tokenizer, chat_template=chat_template)
        self.num_video_tokens = num_video_tokens
        self.video_token = video_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: VideoInput | Sequence[Any] | None = None,
        images: None = None,
        audio: None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            text: a prompt or several, each with or without a video marker at its start.
            videos: as many as prompts, in order; None leaves places for tokens that are given to the model.
            images: not supported, must be None.
            audio: not supported, must be None.
            padding_side: ``left`` to generate, ``right`` to train as the reference does.
            return_tensors: only ``pt``.
            kwargs: for the tokenizer (``truncation``, ``max_length``, ``add_special_tokens``) and the video processor
                (``num_frames``, ``clip_start_sec``, ...); also as ``text_kwargs`` and ``videos_kwargs``.
        """
        if images is not None or audio is not None:
            raise ValueError("MervProcessor: images and audio must be None: MERV sees videos (a picture is one too)")
        if return_tensors != "pt":
            raise ValueError(f"MervProcessor: return_tensors must be 'pt', got {return_tensors!r}")
        text_kwargs, videos_kwargs = self._split(kwargs)
        data: dict[str, Any] = {}
        if videos is not None:
            data |= self.video_processor(videos, **videos_kwargs)
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if videos is not None and len(data["pixel_values_videos"]) != len(prompts):
                raise ValueError(
                    f"MervProcessor: videos must be one per prompt ({len(prompts)}), "
                    f"got {len(data['pixel_values_videos'])}"
                )
            rows = [self._ids(prompt, with_video=videos is not None, **text_kwargs) for prompt in prompts]
            data["input_ids"], data["attention_mask"] = pad(rows, self.tokenizer.pad_token_id, padding_side)
        return BatchFeature(data)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """As in transformers, without its registry of video processors, which needs torchvision."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, MervVideoProcessor):
            kind = type(argument).__name__
            raise TypeError(f"MervProcessor: video_processor must be a MervVideoProcessor, got {kind}")
        return MervVideoProcessor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MervProcessor:
        """As in transformers, without its AutoVideoProcessor, which only exists where torchvision is installed."""
        path = str(pretrained_model_name_or_path)
        values, _ = cls.get_processor_dict(path, **kwargs)
        return cls(
            MervVideoProcessor.from_pretrained(path, **kwargs),
            AutoTokenizer.from_pretrained(path, **kwargs),
            chat_template=values.get("chat_template"),
            num_video_tokens=values["num_video_tokens"],
            video_token=values["video_token"],
        )

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int = 0, **kwargs: Any) -> str:
        """The text that stands for a video: its markers."""
        return self.video_token * self.num_video_tokens

    def _get_num_multimodal_tokens(
        self, video_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens of videos of given sizes: the same for all."""
        return MultiModalData(num_video_tokens=[self.num_video_tokens] * len(video_sizes or []))

    def _ids(self, prompt: str, with_video: bool, **kwargs: Any) -> list[int]:
        """Token ids with placeholders; the rest is tokenised as if there were no video, as in the reference."""
        leading = prompt.startswith(self.video_token)
        ids = self.tokenizer(prompt.removeprefix(self.video_token), **kwargs).input_ids
        markers = ids.count(self.video_token_id)
        if leading + markers > 1:
            raise ValueError(f"MervProcessor: text must hold one {self.video_token} at most, got {leading + markers}")
        if markers:
            at = ids.index(self.video_token_id)
            return ids[:at] + [self.video_token_id] * self.num_video_tokens + ids[at + 1 :]
        if not (leading or with_video):
            return ids
        has_bos = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        row, _, _ = insert_placeholders(
            torch.tensor([ids], dtype=torch.int64), self.num_video_tokens, self.video_token_id, int(has_bos)
        )
        return row[0].tolist()

    def _split(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sort keyword arguments by whose they are, dropping those that only other processors have."""
        names = set(MervVideosKwargs.__annotations__)
        text = {key: kwargs[key] for key in ("truncation", "max_length", "add_special_tokens") if key in kwargs}
        videos = {key: value for key, value in kwargs.items() if key in names}
        return {**text, **kwargs.get("text_kwargs", {})}, {**videos, **kwargs.get("videos_kwargs", {})}


def _flat(videos: Any) -> list[VideoInput]:
    """One video, a sequence or nested sequences as a flat list; a 5-d array is a batch."""
    if isinstance(videos, (str, Path)):
        return [videos]
    if isinstance(videos, (np.ndarray, Tensor)):
        return [videos] if videos.ndim == 4 else list(videos)
    return [video for item in videos for video in _flat(item)]


def _sampled(video: VideoInput, count: int, **clip: Any) -> Tensor:
    """[count, 3, H, W] uint8 of a path or of decoded frames."""
    if isinstance(video, (str, Path)):
        return load_frames(video, count, **clip).movedim(-1, 1)
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[-1]):
        raise ValueError(f"MervVideoProcessor: a video must be [F, H, W, 3] or [F, 3, H, W], got {list(frames.shape)}")
    if any(value for value in clip.values()):
        raise ValueError("MervVideoProcessor: clip bounds must be left out for frames already decoded")
    frames = frames if frames.shape[1] == 3 else frames.movedim(-1, 1)
    return frames if len(frames) == count else frames[sample_indices(len(frames), 1.0, count)]
