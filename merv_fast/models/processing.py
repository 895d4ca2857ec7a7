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
from transformers.video_utils import VideoMetadata

from merv_fast.models.splice import insert_placeholders, pad
from merv_fast.video import load_frames, open_video, sample_indices

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
        count = self.num_frames if num_frames is None else num_frames
        frames = [
            _sampled(video, count, clip_start_sec=clip_start_sec, clip_end_sec=clip_end_sec, end_frame=end_frame)
            for video in _flat(videos)
        ]
        same_size = len({tuple(video.shape) for video in frames}) == 1
        return BatchFeature({"pixel_values_videos": torch.stack(frames) if same_size else frames})

    def fetch_videos(self, video_url_or_urls: Any, sample_indices_fn: Any = None) -> Any:
        """As in transformers, with our decoder: frames uint8 [F, H, W, 3] and their metadata, or lists of them."""
        if isinstance(video_url_or_urls, list):
            return list(zip(*(self.fetch_videos(item, sample_indices_fn) for item in video_url_or_urls), strict=True))
        video = open_video(video_url_or_urls)
        height, width = video.size
        metadata = VideoMetadata(
            total_num_frames=len(video),
            fps=video.fps,
            width=width,
            height=height,
            duration=video.duration,
            video_backend="merv_fast",
        )
        indices = list(range(len(video))) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
        metadata.frames_indices = indices
        return video.frames_at(indices), metadata


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
            videos: one for each prompt that has a marker, in order, or, where none has one, for each prompt; None
                leaves places at the markers for tokens that are given to the model.
            images: not supported, must be None.
            audio: not supported, must be None.
            padding_side: ``left`` to generate, ``right`` to train as the reference does.
            return_tensors: only ``pt``.
            kwargs: for the tokenizer (``truncation``, ``max_length``, ``add_special_tokens``) and the video processor
                (``num_frames``, ``clip_start_sec``, ...); also as ``text_kwargs`` and ``videos_kwargs``.
        """
        if images is not None or audio is not None:
            raise ValueError("MervProcessor: images and audio must be None: MERV sees videos (a picture is one too)")
        if return_tensors not in ("pt", None):
            raise ValueError(f"MervProcessor: return_tensors must be 'pt', got {return_tensors!r}")
        text_kwargs, videos_kwargs = _split(kwargs)
        padding_side = text_kwargs.pop("padding_side", padding_side)
        data: dict[str, Any] = {}
        if videos is not None:
            data |= self.video_processor(videos, **videos_kwargs)
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            marked = [self.video_token in prompt for prompt in prompts]
            if videos is not None and not any(marked):
                marked = [True] * len(prompts)
            if videos is not None and len(data["pixel_values_videos"]) != sum(marked):
                raise ValueError(
                    f"MervProcessor: videos must be one per prompt with a video ({sum(marked)}), "
                    f"got {len(data['pixel_values_videos'])}"
                )
            rows = [self._ids(*item, **text_kwargs) for item in zip(prompts, marked, strict=True)]
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
        """As in transformers, without its AutoVideoProcessor, which only exists where torchvision is installed.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            kwargs: ``num_frames``, ``chat_template``, ``num_video_tokens`` and ``video_token`` replace what was saved;
                others (``token``, ``cache_dir``, ``revision`` ...) say how to find the files.
        """
        path = str(pretrained_model_name_or_path)
        kwargs.pop("return_unused_kwargs", None)
        frames = {"num_frames": kwargs.pop("num_frames")} if "num_frames" in kwargs else {}
        given = {key: kwargs.pop(key) for key in ("chat_template", "num_video_tokens", "video_token") if key in kwargs}
        values, _ = cls.get_processor_dict(path, **kwargs)
        saved = {key: values[key] for key in ("chat_template", "num_video_tokens", "video_token") if key in values}
        return cls(
            MervVideoProcessor.from_pretrained(path, **kwargs, **frames),
            AutoTokenizer.from_pretrained(path, **kwargs),
            **saved | given,
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


TEXT_KWARGS = ("truncation", "max_length", "add_special_tokens", "padding_side")
PADDING = (True, False, "longest", "do_not_pad")


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of the tokenizer and of the video processor; what neither has a use for is refused."""
    kwargs = dict(kwargs)
    given_text, given_videos = kwargs.pop("text_kwargs", {}), kwargs.pop("videos_kwargs", {})
    text = {key: kwargs.pop(key) for key in TEXT_KWARGS if key in kwargs} | given_text
    videos = {key: kwargs.pop(key) for key in MervVideosKwargs.__annotations__ if key in kwargs} | given_videos
    videos.pop("return_tensors", None)
    for padding in (kwargs.pop("padding", True), text.pop("padding", True)):
        if padding not in PADDING:
            raise ValueError(f"MervProcessor: padding must be True: rows are padded to the longest, got {padding!r}")
    text.pop("return_tensors", None)
    if unknown := [*kwargs, *(text.keys() - set(TEXT_KWARGS))]:
        raise ValueError(f"MervProcessor: arguments must be known ones, got {', '.join(sorted(unknown))}")
    return text, videos


def _flat(videos: Any) -> list[VideoInput]:
    """One video, a sequence or nested sequences as a flat list; a list of pictures is a video."""
    if isinstance(videos, (str, Path)):
        return [videos]
    if isinstance(videos, (np.ndarray, Tensor)):
        return [videos] if videos.ndim == 4 else list(videos)
    if not isinstance(videos, Sequence) or isinstance(videos, bytes):
        raise TypeError(
            f"MervVideoProcessor: a video must be a path, an array, or a list of pictures, got {type(videos).__name__}"
        )
    if videos and all(hasattr(item, "__array_interface__") or isinstance(item, Tensor) for item in videos):
        pictures = [item if isinstance(item, Tensor) else torch.from_numpy(np.array(item)) for item in videos]
        if all(picture.ndim == 3 for picture in pictures):
            return [torch.stack(pictures)]
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
