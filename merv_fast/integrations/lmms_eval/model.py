"""MERV as a model of lmms-eval. Imported by lmms-eval alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms
from rich.progress import track
from torch import Tensor

from merv_fast.errors import VideoError
from merv_fast.integrations.evaluation.run import prompt_of
from merv_fast.models import MervModel, load_vid
from merv_fast.runtime.environment import default_device, default_dtype
from merv_fast.video import sample_indices

__all__ = ["Merv"]

logger = logging.getLogger("merv_fast")

SETTINGS = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")
"""Of a task's ``generation_kwargs``, those that go to ``generate``."""


class Merv(lmms):
    """Answers questions about videos, pictures or lists of pictures, which count as frames.

    A video that cannot be read is answered by an empty text, and a warning says why.

    Args:
        pretrained: as ``load_vid`` takes it.
        device: "auto", or as PyTorch names it; with several processes "auto" is a GPU for each.
        dtype: "auto" (bfloat16 on a GPU, else float32), or a name of PyTorch's.
        batch_size: questions that are asked together.
        llm_path: as ``load_vid`` takes it.
        max_batch_size: lmms-eval gives it to every model; not looked at.

    Raises:
        TypeError: another argument.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "merv-full",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        llm_path: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        on_gpus = device == "auto" and torch.cuda.is_available()
        default = f"cuda:{self.accelerator.local_process_index}" if on_gpus else default_device()
        self._device = torch.device(default if device == "auto" else device)
        kind = default_dtype(self._device) if dtype == "auto" else getattr(torch, dtype)
        self.vidlm: MervModel = load_vid(pretrained, llm_path=llm_path).to(self._device, dtype=kind)
        self.batch_size = int(batch_size)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, in order."""
        asked = [self._request(index, *request.args) for index, request in enumerate(requests)]
        answers = [""] * len(asked)
        # Those with the same settings together, and those about one video side by side.
        asked.sort(key=lambda each: (repr(each[3]), str(each[1]) if isinstance(each[1], str) else "", each[0]))
        batches = [
            list(group)[start : start + self.batch_size]
            for _, alike in groupby(asked, key=lambda each: repr(each[3]))
            for group in [list(alike)]
            for start in range(0, len(group), self.batch_size)
        ]
        for batch in track(batches, "asking", disable=self._rank != 0):
            for (index, _, _, settings), text in zip(batch, self._answers(batch), strict=True):
                answers[index] = cut(text, settings.get("until") or ())
        return answers

    def _request(
        self, index: int, context: str, settings: dict[str, Any], doc_to_visual: Any, doc_id: Any, task: str, split: str
    ) -> tuple[int, str | Tensor, str, dict[str, Any]]:
        video = one_video(doc_to_visual(self.task_dict[task][split][doc_id]), max(self.vidlm.config.num_frames))
        return index, video, prompt_of(self.vidlm, context), settings

    def _answers(self, batch: Sequence[tuple[int, str | Tensor, str, dict[str, Any]]]) -> list[str]:
        """Of one batch; if a video in it is bad, of one request after the other."""
        settings = batch[0][3]
        kwargs = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
        kwargs.setdefault("do_sample", bool(kwargs.get("temperature")))
        if not kwargs["do_sample"]:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("temperature", "top_p")}
        kwargs.setdefault("max_new_tokens", 512)
        try:
            texts = self.vidlm.generate(
                [video for _, video, _, _ in batch],
                [prompt for _, _, prompt, _ in batch],
                batch_size=len(batch),
                **kwargs,
            )
        except VideoError as error:
            if len(batch) > 1:
                return [text for each in batch for text in self._answers([each])]
            logger.warning("lmms_eval: answered by nothing: %s", error)
            return [""]
        return list(texts)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not there: MERV is asked, not measured."""
        raise NotImplementedError("merv_fast: tasks must be of generate_until, got loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there: the reference answers one question at a time."""
        raise NotImplementedError("merv_fast: tasks must be of generate_until, got generate_until_multi_round")


def one_video(visuals: Sequence[Any], frames: int) -> str | Tensor:
    """The path of a video; or the pictures, as so many frames."""
    if len(visuals) == 1 and isinstance(visuals[0], str):
        return visuals[0]
    if not visuals or any(isinstance(visual, str) or not hasattr(visual, "convert") for visual in visuals):
        kinds = [type(visual).__name__ for visual in visuals]
        raise ValueError(f"merv_fast: visuals must be one video, or pictures, got {kinds}")
    size = visuals[0].size
    pictures = [np.asarray(visual.convert("RGB").resize(size)) for visual in visuals]
    return torch.from_numpy(np.stack([pictures[index] for index in sample_indices(len(pictures), 1.0, frames)]))


def cut(text: str, until: str | Sequence[str]) -> str:
    """``text`` up to the first of the strings at which an answer ends."""
    for end in [until] if isinstance(until, str) else until:
        text = text.partition(end)[0] if end else text
    return text
