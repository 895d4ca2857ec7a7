"""Arguments and options that several commands share, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from merv_fast.cli.ask import Loader

VideoArgument = Annotated[
    Path, typer.Argument(help="A video, a gif, a picture, or a folder of frames.", show_default=False)
]
ModelOption = Annotated[
    str,
    typer.Option(
        help="merv-tiny (bundled, knows coloured shapes), merv-full or another published id, a directory, or a hub id."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16.")]
LlmOption = Annotated[
    Path | None,
    typer.Option(help="Folder with the language model's config.json and tokenizer.", show_default=False),
]
EncoderOption = Annotated[
    list[str] | None,
    typer.Option(help="ID=PATH: weights of an encoder, by the reference's id; repeatable.", show_default=False),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="Folder in which encoded videos are kept, 64 GiB at most; made if need be.", show_default=False),
]
StartOption = Annotated[float, typer.Option(help="Where the clip starts, in seconds.")]
FpsOption = Annotated[
    float | None, typer.Option(help="Frames per second of a folder of frames, 3 if not given.", show_default=False)
]
EndOption = Annotated[
    float | None, typer.Option(help="Where it ends, in seconds; the video's end if not given.", show_default=False)
]


def loader(
    model: str, device: str, dtype: str, llm_path: Path | None, encoder: list[str] | None, cache: Path | None = None
) -> Loader:
    """What the options say of a model and where it runs."""
    from merv_fast.cli.ask import Loader

    return Loader(model, device, dtype, llm_path, pairs(encoder), cache)


def clip(start: float, end: float | None, fps: float | None) -> dict[str, float | None]:
    """The options that say which part of a video, as ``load_frames`` takes them."""
    return {"clip_start_sec": start, "clip_end_sec": end, "fps": fps}


def pairs(encoder: list[str] | None) -> dict[str, str]:
    """Paths of the encoders' weights by the reference's encoder id."""
    given = dict(item.partition("=")[::2] for item in encoder or [])
    if wrong := [key for key, value in given.items() if not (key and value)]:
        raise typer.BadParameter(f"--encoder must be ID=PATH, got {wrong[0]!r}")
    return given
