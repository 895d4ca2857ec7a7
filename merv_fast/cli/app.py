"""Commands, options and errors; what a command does is in the module of its name."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import merv_fast
from merv_fast.cli.options import (
    CacheOption,
    DeviceOption,
    DtypeOption,
    EncoderOption,
    EndOption,
    FpsOption,
    LlmOption,
    ModelOption,
    StartOption,
    VideoArgument,
    clip,
    loader,
    pairs,
)

app = typer.Typer(
    help="MERV, the multi-encoder video language model: ask questions about videos.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"merv-fast {merv_fast.__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
]


@app.callback()
def options(version: VersionOption = False) -> None:
    """MERV, the multi-encoder video language model: ask questions about videos."""


@app.command()
def ask(
    video: VideoArgument,
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    model: ModelOption = "merv-tiny",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    start: StartOption = 0.0,
    end: EndOption = None,
    fps: FpsOption = None,
    windows: Annotated[
        int, typer.Option(min=1, help="For a long video: encode so many windows of it, one after another.")
    ] = 1,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
    cache: CacheOption = None,
) -> None:
    """Answer a question about a video."""
    from merv_fast.cli.ask import answer_json, answer_question, show_answer

    if stream and as_json:
        raise typer.BadParameter("--stream must be left out with --json")
    loading = loader(model, device, dtype, llm_path, encoder, cache)
    answer, note = answer_question(video, question, loading, max_new_tokens, clip(start, end, fps), windows, stream)
    if as_json:
        typer.echo(answer_json(answer))
    else:
        show_answer(answer, streamed=stream)
    if note:
        typer.echo(note, err=True)


@app.command()
def explain(
    video: VideoArgument,
    model: ModelOption = "merv-tiny",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    start: StartOption = 0.0,
    end: EndOption = None,
    fps: FpsOption = None,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
    cache: CacheOption = None,
) -> None:
    """Show the weight of each encoder for a video, and what runs where and why."""
    from merv_fast.cli.ask import show_explanation

    show_explanation(video, loader(model, device, dtype, llm_path, encoder, cache), clip(start, end, fps))


@app.command()
def probe(
    video: VideoArgument,
    model: ModelOption = "merv-tiny",
    sheet: Annotated[
        Path | None,
        typer.Option(help="PNG file to draw the frames into, as each encoder sees them.", show_default=False),
    ] = None,
    decoder: Annotated[str, typer.Option(help="auto, pyav or dali.")] = "auto",
    device: Annotated[
        str, typer.Option(help="Where frames are wanted: auto (as ask and explain have it), cpu, cuda, cuda:1, ...")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    start: StartOption = 0.0,
    end: EndOption = None,
    fps: FpsOption = None,
) -> None:
    """Show what a video holds, what decodes it and why, and which frames each encoder gets."""
    from merv_fast.cli.probe import probe_video, show_report

    report = probe_video(video, model, decoder, device, clip(start, end, fps), sheet)
    if as_json:
        typer.echo(json.dumps(report.__dict__, ensure_ascii=False))
    else:
        show_report(report)


@app.command()
def profile(
    video: VideoArgument,
    out: Annotated[Path, typer.Option(help="JSON file for the trace; ui.perfetto.dev opens it.", show_default=False)],
    png: Annotated[
        Path | None, typer.Option(help="PNG file to draw the timeline into, a lane for each thread and GPU stream.")
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask.")] = "What happens in this video?",
    model: ModelOption = "merv-tiny",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 16,
    start: StartOption = 0.0,
    end: EndOption = None,
    fps: FpsOption = None,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Show where the time of an answer goes: a trace, a picture of it, and a table."""
    from merv_fast.cli.profile import profile_answer, show_profile

    loading = loader(model, device, dtype, llm_path, encoder)
    result = profile_answer(video, question, loading, max_new_tokens, clip(start, end, fps), out, png)
    if as_json:
        typer.echo(json.dumps(asdict(result), ensure_ascii=False))
    else:
        show_profile(result)


@app.command()
def encode(
    out: Annotated[Path, typer.Option(help="Folder for tensors and manifest; run again to go on.", show_default=False)],
    videos: Annotated[
        list[str] | None,
        typer.Argument(help="Videos, folders to search, or - for lines of stdin.", show_default=False),
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", help="Text file of more of them, one path a line.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for Ray Data.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; one on this machine if not given.", show_default=False)
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that encode, with Ray; one for each GPU if not given.", show_default=False),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="tokens, what the language model sees, or features, what the encoders return.")
    ] = "tokens",
    model: ModelOption = "merv-tiny",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Videos that are encoded together.")] = 8,
    shard_size: Annotated[int, typer.Option(min=1, help="Videos of a file of tensors.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that decode; one for each processor if not given.", show_default=False),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    start: StartOption = 0.0,
    end: EndOption = None,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Encode a corpus of videos, once, into files that need no encoders to be asked about."""
    from merv_fast.cli.encode import encode_videos, given_paths, show_outcome

    if address is not None and engine != "ray":
        raise typer.BadParameter("--address must be left out without --engine ray")
    options: dict[str, object] = {"actors": actors, "address": address, "workers": workers, "keep": keep}
    options |= {"batch_size": batch_size, "shard_size": shard_size, "retry_failed": retry_failed}
    options |= {"clip_start_sec": start, "clip_end_sec": end}
    loading = loader(model, device, dtype, llm_path, encoder)
    outcome = encode_videos(given_paths(videos or [], listed), out, loading, engine, **options)
    show_outcome(outcome, as_json)


@app.command()
def convert(
    run_dir: Annotated[
        str, typer.Argument(help="A run directory of the reference, or a published id.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Where to write ours.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")] = "auto",
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Write a reference checkpoint as a directory that merv_fast and transformers load."""
    from merv_fast.cli.convert import convert_run

    convert_run(run_dir, out, dtype, llm_path, pairs(encoder))


@app.command()
def train(
    stage: Annotated[
        str,
        typer.Argument(
            help="align (projectors and fusion), finetune (the language model too), full (the encoders too).",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Argument(help="JSON list of conversations, as LLaVA and Video-LLaVA have it.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Directory for the model and its checkpoints.", show_default=False)],
    model: ModelOption = "merv-tiny",
    media: Annotated[
        Path | None, typer.Option(help="Folder of the videos; that of the data if not given.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder to keep what frozen encoders return, so that they run once.", show_default=False),
    ] = None,
    cache_gib: Annotated[float, typer.Option(help="What it may take, in GiB.")] = 64.0,
    on_error: Annotated[str, typer.Option(help="What to do about a video that cannot be read: raise, skip.")] = "raise",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the directory.")] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE: global_batch_size, or an argument of transformers' TrainingArguments; repeatable.",
            show_default=False,
        ),
    ] = None,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Train a model on videos and conversations; with torchrun on several GPUs."""
    from merv_fast.cli.train import parse_settings, show_report, train_model

    settings, encoders = parse_settings(setting), pairs(encoder)
    options = {"cache": cache, "cache_gib": cache_gib, "on_error": on_error, "resume": resume}
    show_report(train_model(stage, data, out, model, media, settings, llm_path, encoders, **options), out)


@app.command(name="eval")
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Data set in the reference's layout: test_q.json, test_a.json, videos/.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the predictions; a run goes on where it was.", show_default=False)
    ],
    model: ModelOption = "merv-tiny",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are asked together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    num_chunks: Annotated[int, typer.Option(min=1, help="Processes that share the questions.")] = 1,
    chunk_idx: Annotated[int, typer.Option(min=0, help="Which of them this is.")] = 0,
    questions: Annotated[str, typer.Option(help="Name of the file of questions.")] = "test_q",
    answers: Annotated[str, typer.Option(help="Name of the file of answers.")] = "test_a",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
    cache: CacheOption = None,
) -> None:
    """Answer the questions of a data set, open-ended or of multiple choice, and print the accuracy."""
    from merv_fast.cli.evaluate import evaluate_folder

    loading = loader(model, device, dtype, llm_path, encoder, cache)
    part, names = (chunk_idx, num_chunks), (questions, answers)
    evaluate_folder(folder, loading, out, part, batch_size, max_new_tokens, names, as_json)


@app.command()
def serve_llm(
    out: Annotated[Path, typer.Argument(help="Folder for the language model; written if empty.", show_default=False)],
    model: ModelOption = "merv-tiny",
    dtype: Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")] = "auto",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8000,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer that must fit.")] = 512,
    llm_path: LlmOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Write the language model by itself and print the command by which vLLM serves it."""
    from merv_fast.cli.serve_llm import print_command

    print_command(model, out, dtype, port, answer_tokens, llm_path, pairs(encoder))


@app.command()
def demo(device: DeviceOption = "auto", dtype: DtypeOption = "auto") -> None:
    """Ask merv-tiny about the bundled clips, and show answers and right answers; exit code 1 if one is wrong."""
    from merv_fast.cli.demo import show_demo

    if not show_demo(loader("merv-tiny", device, dtype, None, None, None)):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Show what is installed, what will be used, and what to install for more."""
    from merv_fast.cli.doctor import show_components

    show_components()


def main() -> None:
    """Run the command line; an expected error is one line on stderr and exit code 1."""
    from merv_fast.errors import MervFastError

    try:
        app()
    except (MervFastError, ValueError, TypeError, OSError, RuntimeError) as error:
        message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        typer.echo(f"error: {message or type(error).__name__}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
