"""The poster's FLOPs tables beside ours: ``python -m bench.flops [--json [FILE]]``.

Parameters and products of every projector and every fusion, where each total comes from, by which rule each cell was
counted, and what the strategies cost when all are counted alike. Nothing is computed and no weights are read: the
modules are counted at full size on the ``meta`` device. ``--json`` prints the same as JSON and nothing else, or writes
it to FILE beside the tables. Exits with 1 where a cell of the first table does not print as the poster's, or a row of
the second is not within 1% of it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.poster import (
    FUSIONS,
    PROJECTORS,
    TEXT_DEVIATION,
    TEXT_TOKENS,
    FusionRow,
    Model,
    Projector,
    count_model,
    count_projector,
)
from bench.provenance import commit

TITLES = {
    "languagebind": "LanguageBind",
    "dinov2": "DINOv2",
    "vivit": "ViViT",
    "siglip": "SigLIP",
    "projectors": "projectors",
    "fusion": "fusion",
    "llm": "LLM: linear layers, head",
    "llm_attention": "LLM: attention products",
}
ALIKE = {
    "without_llm_attention": "LLM's attention left out",
    "with_llm_attention": "LLM's attention counted",
    "every_product": "every product",
    "merv_fast": "merv_fast",
}
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
NEAR = 0.01
"""How far off a row of the second table may be: its text is random, which alone moves it by 0.4%."""
WIDTH = 120


def misses(projectors: Sequence[Projector], model: Model) -> list[str]:
    """What is not as the poster has it, in words."""
    found = []
    for row, counted in zip(PROJECTORS, projectors, strict=True):
        for what, ours, poster in (
            ("parameters", counted.params, row.params),
            ("FLOPs", getattr(counted.reference, row.unit), row.flops),
        ):
            if as_printed(ours, poster) != poster:
                found.append(f"{row.name}: {ours:,} {what} do not print as {poster}")
    for strategy in model.strategies:
        ours, poster = sum(model.poster_parts(strategy).values()), strategy.row.poster
        if abs(ours / poster - 1) > NEAR:
            found.append(f"{strategy.row.name}: {tera(ours)} T MACs are not within {NEAR:.0%} of {tera(poster, 2)} T")
    return found


def as_printed(number: int, like: str) -> str:
    """``number`` in the unit and with the decimals of ``like``, such as ``9.7G``."""
    unit = like.lstrip("0123456789.")
    decimals = len(like.removesuffix(unit).partition(".")[2])
    return f"{number / UNITS[unit]:.{decimals}f}{unit}"


def convention(row: FusionRow) -> str:
    """What the poster's number counts, in words."""
    return f"MACs, the LLM's attention products {'counted' if row.llm_attention else 'left out'}"


def as_json(projectors: Sequence[Projector], model: Model) -> dict[str, Any]:
    """Everything that the tables say, numbers unrounded."""
    strategies = {strategy.row.name: strategy for strategy in model.strategies}
    cross = strategies["Cross-Attn"]
    return {
        "projector": {
            row.name: {"params": counted.params, "flops": getattr(counted.reference, row.unit)}
            for row, counted in zip(PROJECTORS, projectors, strict=True)
        },
        "fusion": {
            name: {"macs": sum(model.poster_parts(strategy).values()), "poster": strategy.row.poster}
            for name, strategy in strategies.items()
        },
        "projector_merv_fast": {
            row.name: {"macs": counted.merv_fast.macs, "pooled": counted.merv_fast.pooled}
            for row, counted in zip(PROJECTORS, projectors, strict=True)
        },
        "parts": {name: model.poster_parts(strategy) for name, strategy in strategies.items()},
        "alike": {name: model.alike(strategy) for name, strategy in strategies.items()},
        "collapsed": {
            "reference": {"last_layers": model.projectors.macs, "weighing": cross.fusion.macs},
            "merv_fast": {
                "gemm": model.gemm,
                "last_layers": prod(model.gemm),
                "weighing": cross.tail.macs - prod(model.gemm),
                "folding_once": cross.folding.macs,
            },
        },
        "encoders": {
            name: {
                "params": encoder.params,
                "poster": encoder.seen(name),
                "every_product": encoder.reference.macs,
                "merv_fast": encoder.merv_fast.macs,
            }
            for name, encoder in model.encoders.items()
        },
        "params": {
            "projectors": dict(zip(model.encoders, model.projector_params, strict=True)),
            "fusion": {name: strategy.params for name, strategy in strategies.items()},
            "used_of_fusion": {name: strategy.used_params for name, strategy in strategies.items()},
            "llm": model.llm_params,
        },
        "conventions": {
            "projector": {row.name: f"{row.convention}, {row.frames} frames" for row in PROJECTORS},
            "fusion": {row.name: convention(row) for row in FUSIONS},
        },
        "visual_tokens": {name: strategy.visual_tokens for name, strategy in strategies.items()},
        "text_tokens": {"mean": TEXT_TOKENS, "deviation": TEXT_DEVIATION},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def show(projectors: Sequence[Projector], model: Model, console: Console) -> None:
    """Print every table."""
    tables = [
        projector_table(projectors),
        fusion_table(model),
        parts_table(model),
        encoder_table(model),
        alike_table(model),
        tail_table(model),
    ]
    for table in tables:
        table.caption_justify = "left"
        console.print(table)
        console.print()


def projector_table(projectors: Sequence[Projector]) -> Table:
    attention = projectors[[row.name for row in PROJECTORS].index("2D Attn")]
    table = Table(
        title="Pre-fusion projector: one encoder 1024 wide, 256 -> 64 tokens a frame, the resampler alone",
        caption="The column mixes units. The asterisk as 16 frames is inferred from the factor of two. 2D Attn as the "
        f"reference runs it: merv_fast projects the queries once for all frames, {attention.merv_fast.linear:,} MACs, "
        f"and both multiply {attention.reference.attention:,} more inside the attention.",
    )
    columns(table, "row", "frames >", "params, poster >", "ours >", "FLOPs, poster >", "ours >", "what is counted")
    for row, counted in zip(PROJECTORS, projectors, strict=True):
        flops = getattr(counted.reference, row.unit)
        table.add_row(
            row.name, str(row.frames), row.params, f"{counted.params:,}", row.flops, f"{flops:,}", row.convention
        )
    return table


def fusion_table(model: Model) -> Table:
    table = Table(
        title="Fusion strategy: the whole model once, 16/16/32/16 frames, LLaMA-2-7B, T MACs",
        caption=f"The poster's text is random, {TEXT_TOKENS} +- {TEXT_DEVIATION} tokens, drawn anew for each row: ours "
        "are at the mean, and the noise is one standard deviation. LLaMA-2's tokenizer is not part of this project, so "
        "the mean is a constant. Which rows count the LLM's attention is inferred: no one rule brings all five near. "
        "25%-Mixed is our reading, every fourth token of each encoder; the released code has none.",
    )
    columns(table, "row", "visual tokens >", "params >", "poster >", "ours >", "off by >", "noise >", "LLM's attention")
    for strategy in model.strategies:
        row, ours = strategy.row, sum(model.poster_parts(strategy).values())
        table.add_row(
            row.name,
            f"{strategy.visual_tokens:,}",
            f"{strategy.params:,}",
            f"{row.poster / 1e12:.2f}",
            tera(ours),
            f"{100 * (row.poster / ours - 1):+.1f}%",
            f"{100 * strategy.noise / ours:.1f}%",
            "counted" if row.llm_attention else "left out",
        )
    return table


def parts_table(model: Model) -> Table:
    table = Table(
        title="Where those totals come from, T MACs",
        caption="As the poster's counter sees it: without the attention products of DINOv2 and SigLIP, which call "
        "scaled_dot_product_attention. Every block of every encoder, as the reference runs them; logits of all tokens.",
    )
    columns(table, "part", *(f"{strategy.row.name} >" for strategy in model.strategies))
    parts = [model.poster_parts(strategy) for strategy in model.strategies]
    for name, title in TITLES.items():
        table.add_row(title, *(tera(part[name]) for part in parts), end_section=name == "llm_attention")
    table.add_row("total", *(tera(sum(part.values())) for part in parts))
    return table


def encoder_table(model: Model) -> Table:
    table = Table(
        title="Encoders, T MACs a video",
        caption="Parameters of every block. merv_fast: every product, but only of the blocks whose output is used.",
    )
    columns(table, "encoder", "params >", "poster's counter >", "every product >", "merv_fast >")
    encoders = list(model.encoders.items())
    for name, encoder in encoders:
        needs = (encoder.seen(name), encoder.reference.macs, encoder.merv_fast.macs)
        last = name == encoders[-1][0]
        table.add_row(TITLES[name], f"{encoder.params:,}", *map(tera, needs), end_section=last)
    totals = (
        sum(encoder.seen(name) for name, encoder in encoders),
        sum(encoder.reference.macs for _, encoder in encoders),
        sum(encoder.merv_fast.macs for _, encoder in encoders),
    )
    table.add_row("total", f"{sum(encoder.params for _, encoder in encoders):,}", *map(tera, totals))
    return table


def alike_table(model: Model) -> Table:
    named = {strategy.row.name: strategy for strategy in model.strategies}
    cross, scalar = named["Cross-Attn"], named["Learnable W"]
    table = Table(
        title="The strategies, all counted alike, T MACs",
        caption=f"Cross-Attn and Learnable W are {(cross.row.poster - scalar.row.poster) / 1e12:.2f} T apart on the "
        f"poster. The fusions differ by {tera(cross.fusion.macs - scalar.fusion.macs, 6)} T, the LLM's attention is "
        f"{tera(cross.llm.attention)} T: counted in one and not in the other. The first two columns see the encoders "
        "as the poster does, the third sees all. The last is what merv_fast runs: the blocks whose output is used, and "
        "projectors and fusion as one where they collapse.",
    )
    columns(table, "strategy", "visual tokens >", *(f"{title} >" for title in ALIKE.values()))
    for strategy in model.strategies:
        costs = model.alike(strategy)
        table.add_row(strategy.row.name, f"{strategy.visual_tokens:,}", *(tera(costs[key]) for key in ALIKE))
    return table


def tail_table(model: Model) -> Table:
    cross = next(strategy for strategy in model.strategies if strategy.row.name == "Cross-Attn")
    tokens, channels, width = model.gemm
    listed = " + ".join(f"{params:,}" for params in model.projector_params)
    table = Table(
        title="Projectors and Cross-Attn of merv-base, MACs a video",
        caption="Collapsed, they need hardly fewer products; what never exists are the encoders' projected tokens, "
        f"{len(model.encoders)} x {tokens:,} x {width:,} numbers. Scaling the {tokens:,} x {channels:,} pooled numbers "
        f"is no product and not in it. Folding the query needs {cross.folding.macs:,} more, once for all videos. "
        f"Parameters: projectors {listed} = {sum(model.projector_params):,}; fusion {cross.params:,}, of which "
        f"{cross.used_params:,} matter and are held here.",
    )
    columns(table, "way", "last layers >", "weighing >", "together >")
    collapsed = f"pool_project_fuse: one GEMM of {tokens} x {channels} x {width} over the concatenated channels, scores"
    for way, layers, together in (
        ("reference: four projections, attention, weighed sum", model.projectors.macs, model.projectors + cross.fusion),
        (collapsed, prod(model.gemm), cross.tail),
    ):
        table.add_row(way, *(f"{macs:,}" for macs in (layers, together.macs - layers, together.macs)))
    return table


def columns(table: Table, *titles: str) -> None:
    """Add columns; those that end in ``>`` hold numbers."""
    for title in titles:
        table.add_column(title.removesuffix(" >"), justify="right" if title.endswith(">") else "left")


def tera(macs: float, digits: int = 4) -> str:
    return f"{macs / 1e12:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON alone, or write it to FILE")
    options = parser.parse_args(arguments)
    projectors, model = [count_projector(row) for row in PROJECTORS], count_model()
    written = json.dumps(as_json(projectors, model), indent=1) + "\n"
    if options.json == "-":
        print(written, end="")
    else:
        show(projectors, model, Console(width=None if sys.stdout.isatty() else WIDTH))
    if options.json not in (None, "-"):
        Path(options.json).write_text(written)
    missed = misses(projectors, model)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
