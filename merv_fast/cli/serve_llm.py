"""serve-llm: write the language model, say how to serve it."""

from __future__ import annotations

from pathlib import Path

import typer

from merv_fast.cli.ask import parse_dtype, waiting
from merv_fast.integrations.vllm.serving import VLLM_RANGE, serve_command, write_language_model
from merv_fast.models import load_vid

__all__ = ["print_command"]


def print_command(
    model: str, out: Path, dtype: str, port: int, answer_tokens: int, llm_path: Path | None, encoders: dict[str, str]
) -> None:
    """Print the command; everything else goes to stderr, so that a shell can run what is printed."""
    with waiting(f"loading {model}"):
        wanted = None if dtype == "auto" else parse_dtype(dtype)
        vidlm = load_vid(model, dtype=wanted, llm_path=llm_path, encoder_paths=encoders)
    if not (out / "config.json").is_file():
        with waiting(f"writing {out}"):
            write_language_model(vidlm, out)
    typer.echo(f"vLLM {VLLM_RANGE} serves the language model by:", err=True)
    typer.echo(serve_command(vidlm, out, port=port, answer_tokens=answer_tokens))
    typer.echo("Send it what merv_fast.integrations.vllm.prompt_embeds makes, with complete().", err=True)
