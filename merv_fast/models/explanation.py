"""explain: what runs where and why, decided when the model was built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from merv_fast.models.merv_model import MervModel
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.prefix import sharing_obstacle
from merv_fast.models.video_model import MervVideoModel
from merv_fast.modules import attention_choices
from merv_fast.runtime.placement import bytes_copied

__all__ = ["Choice", "Explanation", "explain"]


@dataclass(frozen=True)
class Choice:
    """One line: ``part`` of the model ``runs`` as this, ``where``, and ``why``."""

    part: str
    runs: str
    where: str
    why: str


class Explanation(tuple[Choice, ...]):
    """Choices in the order in which they come into play; ``str`` makes a table of them."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("part", "runs", "where", "why")] + [(c.part, c.runs, c.where, c.why) for c in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def explain(model: MervModel | MervForConditionalGeneration | MervVideoModel) -> Explanation:
    """What runs where and why, for each part of ``model``.

    Example:
        >>> import merv_fast
        >>> choices = merv_fast.explain(merv_fast.load_vid("merv-tiny"))
        >>> choices[0].part
        'prepare'
    """
    if isinstance(model, MervModel):
        return Explanation([*_choices(model.model), *_between_calls(model)])
    return Explanation(_choices(model))


def _choices(model: Any) -> Iterator[Choice]:
    video = model if isinstance(model, MervVideoModel) else model.video_model
    dtype, placement = str(video.dtype).removeprefix("torch."), video.placement
    where = f"{video.device}, {dtype}"
    yield Choice("prepare", "resample_frames, normalise", str(video.device), "frames go to the device once, as uint8")
    for name, config in video.config.encoder_configs().items():
        blocks = "" if not hasattr(config, "blocks") else f"{config.blocks} of {config.depth} blocks, "
        size = f"{config.num_frames} frames -> {config.slots} slots x {config.tokens_per_slot} tokens x {config.width}"
        compiled = ", compiled" if name in video.compiled else ""
        runs, its = f"{blocks}attention: {video.attention[name]}{compiled}", f"{placement.devices[name]}, {dtype}"
        measured = [str(choice) for choice in attention_choices(video.encoders[name]) if choice.milliseconds]
        yield Choice(f"encoder {name}", runs, its, "; ".join([size, *measured]))
    devices = sorted({str(device) for device in placement.devices.values()})
    runs = "side by side, a stream each" if any("cuda" in device for device in devices) else "one after another"
    size = f"{video.videos_at_once()} videos at a time, about {video.bytes_per_video() / 2**20:.0f} MiB each"
    if devices != [str(video.device)]:
        copied = bytes_copied(video.encoder_configs, placement, video.dtype.itemsize) / 2**20
        size += f", {copied:.0f} MiB of each between devices"
    tried = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in video.ways.items())
    why = f"{size}; {placement.reason}{f'; measured for one video: {tried}' if tried else ''}"
    yield Choice("encoders", runs, f"{', '.join(devices)}, {dtype}", why)
    for part, op, reason in video.tail.plan:
        yield Choice(part, op, where, reason)
    yield _graphs(video, where)
    if model is not video:
        llm = model.language_model
        attention = f"attention: {llm.config._attn_implementation}"
        llm_where = f"{llm.device}, {str(llm.dtype).removeprefix('torch.')}"
        yield Choice("language model", f"{type(llm).__name__}, {attention}", llm_where, "transformers' own module")
        obstacle = sharing_obstacle(model, {})
        runs = "each prompt from its start" if obstacle else "what prompts about a video begin with, once"
        yield _room(model, llm_where)
        yield Choice("prefill", runs, llm_where, obstacle or "the language model's cache can be copied and filled up")


def _room(model: MervForConditionalGeneration, where: str) -> Choice:
    """Visual tokens, and how many windows of them a prompt can have."""
    each, positions = model.video_model.num_video_tokens, model.config.get_text_config().max_position_embeddings
    why = f"of {positions} positions: at most {max(positions - 1, 0) // each} windows, less what prompt and answer take"
    return Choice("visual tokens", f"{each} a video, or a window of one", where, why)


def _graphs(video: MervVideoModel, where: str) -> Choice:
    """What is replayed as CUDA graphs."""
    if video.graphs is None:
        return Choice("CUDA graphs", "none", "-", "MervVideoModel.use_graphs was not called")
    graphs, described = video.graphs, str(video.graphs)
    calls = {"from frames to tokens": graphs.whole, "encode": graphs.encode, "fuse": graphs.fuse}
    names = [name for name, call in calls.items() if call.obstacle is None]
    return Choice("CUDA graphs", ", ".join(names) or "none", where, described)


def _between_calls(vidlm: MervModel) -> Iterator[Choice]:
    """What is kept from call to call, and what the last one took."""
    if vidlm.cache is None:
        yield Choice("cache", "none", "-", "MervModel.cache is None")
    else:
        where = "memory" if vidlm.cache.disk is None else "memory and disk"
        yield Choice("cache", f"{vidlm.cache.keep} of each video", where, str(vidlm.cache))
    peaks = ", ".join(f"{stage} {peak / 2**20:.0f} MiB" for stage, peak in vidlm.last_memory.items())
    if peaks:
        what = "the process" if vidlm.host_memory else "tensors"
        why = f"of {what}, with the weights, most at one time in the last call of answer or encode"
    elif vidlm.device.type == "cuda" or vidlm.host_memory:
        why = "neither answer nor encode was called yet"
    else:
        why = "of GPUs only, unless MervModel.host_memory is set"
    yield Choice("peak memory", peaks or "not measured", str(vidlm.device), why)
