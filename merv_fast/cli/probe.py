"""probe: what a video holds, what decodes it and why, and which of its frames each encoder gets."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merv_fast.cli.ask import parse_device
from merv_fast.encoders import AnyEncoderConfig, encoder_config
from merv_fast.models.configuration import MervConfig, encoder_names
from merv_fast.models.loading import ASSETS, TINY, available_models
from merv_fast.models.reference import CONFIG, is_run_directory, read_run_config
from merv_fast.models.sources import HUB_REPO, MODELS, Sources
from merv_fast.video import Recipe, Video, every, open_video
from merv_fast.video.base import DEFAULT_LIMITS
from merv_fast.video.choice import choose_decoder, not_a_stream, read_header
from merv_fast.video.drawing import png
from merv_fast.video.open import clip_indices
from merv_fast.video.orientation import Orientation
from merv_fast.video.sheet import Row, contact_sheet, seen_frames
from merv_fast.video.survey import survey

__all__ = ["Report", "probe_video", "show_report"]

QUARTER_TURNS = {
    Orientation(False, False, False): 0,
    Orientation(True, True, False): 90,
    Orientation(False, True, True): 180,
    Orientation(True, False, True): 270,
}
"""Degrees counter-clockwise."""


@dataclass(frozen=True)
class Report:
    """What ``probe`` prints; with ``--json`` as it stands.

    Attributes:
        codec: FFmpeg's names of codec, profile and pixel format are None for pictures.
        rotation: Degrees counter-clockwise by which stored frames are turned to be shown.
        mirrored: Whether they are then mirrored left to right.
        fps: 0 for a picture.
        duration: Seconds, None for a picture.
        encoders: For each encoder its frames and how it sees them.
        sheet: Where the contact sheet was written.
    """

    path: str
    codec: str | None
    profile: str | None
    pixel_format: str | None
    width: int
    height: int
    rotation: int
    mirrored: bool
    fps: float
    frames: int
    duration: float | None
    decoder: str
    reason: str
    model: str
    encoders: dict[str, dict[str, Any]]
    sheet: str | None


def probe_video(path: Path, model: str, decoder: str, device: str, clip: dict[str, Any], sheet: Path | None) -> Report:
    """Look at ``path`` and, if asked to, draw the contact sheet; frames are decoded only for that."""
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet must be a .png file, got {sheet}")
    wanted_on = parse_device(device)
    video = open_video(path, fps=clip["fps"], decoder=decoder, device=wanted_on)
    choice = choose_decoder(path, decoder, wanted_on)
    configs = encoders_of(model)
    count = max(config.num_frames for config in configs.values())
    indices = clip_indices(video, count, clip["clip_start_sec"], clip["clip_end_sec"])
    shares = {name: every(torch.tensor(indices), config.num_frames).tolist() for name, config in configs.items()}
    if sheet is not None:
        sheet.write_bytes(png(draw(video, configs, indices, shares)))
    header, orientation = None, Orientation()
    if not not_a_stream(video.path):
        header = read_header(video.path, DEFAULT_LIMITS)
        orientation = survey(video.path, DEFAULT_LIMITS).orientation
    rotation, mirrored = turns(orientation)
    return Report(
        path=video.path,
        codec=None if header is None else header.codec,
        profile=None if header is None else header.profile,
        pixel_format=None if header is None else header.pixel_format,
        width=video.size[1],
        height=video.size[0],
        rotation=rotation,
        mirrored=mirrored,
        fps=video.fps,
        frames=len(video),
        duration=video.duration if math.isfinite(video.duration) else None,
        decoder=video.decoder,
        reason=choice.reason,
        model=model,
        encoders={
            name: {"frames": shares[name], "size": config.recipe.size, "resize": resizing(config.recipe)}
            for name, config in configs.items()
        },
        sheet=None if sheet is None else str(sheet),
    )


def encoders_of(model: str) -> dict[str, AnyEncoderConfig]:
    """The encoders of a model, by whatever ``load_vid`` takes; only its configuration is read."""
    path = Path(model)
    published = next((model_id for model_id, title in MODELS.items() if model in (model_id, title)), None)
    if path.is_dir() and is_run_directory(path):
        run = read_run_config(path / CONFIG)
    elif published is not None and not path.is_dir():
        run = read_run_config(Sources().download(HUB_REPO, f"{published}/{CONFIG}"))
    elif path.is_dir() or model == TINY or (model.count("/") == 1 and model[0] not in "./~"):
        return MervConfig.from_pretrained(ASSETS / TINY if model == TINY else model).encoder_configs()
    else:
        raise ValueError(
            f"--model must be a directory, a hub id or one of {', '.join(available_models())}, got {model!r}"
        )
    configs = [
        encoder_config(encoder_id, frames, run["image_resize_strategy"])
        for encoder_id, frames in zip(run["video_backbone_ids"], run["num_frames"], strict=True)
    ]
    return dict(zip(encoder_names(configs), configs, strict=True))


def draw(
    video: Video, configs: dict[str, AnyEncoderConfig], indices: list[int], shares: dict[str, list[int]]
) -> torch.Tensor:
    """The contact sheet, uint8 [H, W, 3]."""
    recipes = [config.recipe for config in configs.values()]
    counts = [config.num_frames for config in configs.values()]
    rows = [
        Row(name, f"{len(seen)} frames, {recipe.size}x{recipe.size}, {resizing(recipe)}", seen, shares[name])
        for name, recipe, seen in zip(
            configs, recipes, seen_frames(video.frames_at(indices), recipes, counts), strict=True
        )
    ]
    return contact_sheet(f"{os.path.basename(video.path)}, {length(video)}", rows)


def resizing(recipe: Recipe) -> str:
    """How frames become squares; without antialias there is only one way."""
    return recipe.resize if recipe.antialias else "resize-crop"


def length(video: Video) -> str:
    """Size, frames and rate for a person."""
    height, width = video.size
    frames = f"{len(video)} frame{'s' * (len(video) > 1)}"
    return f"{width}x{height}, {frames}" + (f" at {video.fps:g}/s" if video.fps else "")


def turns(orientation: Orientation) -> tuple[int, bool]:
    """Degrees counter-clockwise, and whether a mirroring left to right follows."""
    transposed, rows, columns = orientation.transposed, orientation.flipped_rows, orientation.flipped_columns
    mirrored = (transposed + rows + columns) % 2 == 1
    return QUARTER_TURNS[Orientation(transposed, rows, columns ^ mirrored)], mirrored


def show_report(report: Report) -> None:
    """The report for a person."""
    console = Console()
    facts = Table(title=escape(os.path.basename(report.path)), title_justify="left", show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    if report.codec:
        facts.add_row("codec", ", ".join(filter(None, (report.codec, report.profile, report.pixel_format))))
    facts.add_row("size", f"{report.width}x{report.height}")
    if report.duration is not None:
        facts.add_row("rate", f"{report.fps:g}/s")
    facts.add_row("frames", f"{report.frames}" + ("" if report.duration is None else f" in {report.duration:.3f} s"))
    turned = f"{report.rotation} degrees counter-clockwise" if report.rotation else "none"
    facts.add_row("rotation", turned + ", then mirrored" * report.mirrored)
    facts.add_row("decoder", escape(report.decoder))
    facts.add_row("why", escape(report.reason))
    console.print(facts)
    table = Table(title=f"frames that {escape(report.model)} sees", title_justify="left")
    table.add_column("encoder", no_wrap=True)
    table.add_column("sees")
    table.add_column("frames", overflow="fold")
    for name, encoder in report.encoders.items():
        size = f"{len(encoder['frames'])} x {encoder['size']}x{encoder['size']}, {encoder['resize']}"
        table.add_row(name, size, " ".join(map(str, encoder["frames"])))
    console.print(table)
    if report.sheet:
        console.print(f"contact sheet: {escape(report.sheet)}", highlight=False)
