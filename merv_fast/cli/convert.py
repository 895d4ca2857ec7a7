"""convert: a run directory of the reference becomes a directory of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from merv_fast.cli.ask import parse_dtype, waiting
from merv_fast.models import load_vid

__all__ = ["convert_run"]


def convert_run(run_dir: str, out: Path, dtype: str, llm_path: Path | None, encoder_paths: Mapping[str, str]) -> None:
    """Read ``run_dir`` memory-mapped and write it to ``out`` in shards; transformers shows a bar of shards."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: already holds files; give a new or empty directory")
    with waiting(f"reading {run_dir}"):
        vidlm = load_vid(
            run_dir,
            dtype=None if dtype == "auto" else parse_dtype(dtype),
            llm_path=llm_path,
            encoder_paths=encoder_paths,
        )
    vidlm.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    Console().print(f"{out}: {vidlm.model_id}, {size / 1e9:.2f} GB; load it with merv_fast.load_vid({str(out)!r})")
