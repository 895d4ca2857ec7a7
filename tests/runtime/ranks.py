"""One process of a group of four: ``python -m tests.runtime.ranks FOLDER RANK``. Leaves its results in the folder."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from merv_fast.modules import build_fusion, build_projector
from merv_fast.runtime.distributed import RankedEncoders, fuse_over_ranks

RANKS, D, TOKENS = 4, 32, 4
WIDTHS = (24, 16, 40, 8)


def front_end(dtype=torch.float32):
    """Four encoders, their projectors and the fusion, the same in every process; and their inputs."""
    torch.manual_seed(0)
    encoders = [torch.nn.Linear(6, width) for width in WIDTHS]
    projectors = [build_projector("avg+linear", width, D, TOKENS, slots=2, grid=(4, 4)) for width in WIDTHS]
    fusion = build_fusion("cross_attention_avg_lq", len(WIDTHS), llm_width=D, query_width=16, positional_embedding=True)
    # Scores far apart and large, so that nothing but a difference of logarithms can hold them.
    fusion.k_proj.weight.data *= 40
    modules = [module.to(dtype).eval() for module in (*encoders, *projectors, fusion)]
    inputs = [torch.randn(3, 2, 16, 6).to(dtype) for _ in WIDTHS]
    return modules[:4], modules[4:8], modules[8], inputs


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            encoders, projectors, fusion, inputs = front_end(dtype)
            for ranks, group in ((4, None), (2, pairs[rank // 2])):
                ranked = RankedEncoders(encoders, projectors, fusion, group=group)
                own = [x if member in ranked.members else None for member, x in enumerate(inputs)]
                results[ranks, dtype] = ranked.members, *ranked(own)
        values = [torch.zeros(1, 2, D, dtype=torch.bfloat16)]
        try:
            fuse_over_ranks(values, [min(rank, 2)], fusion)
        except ValueError as error:
            results["twice"] = str(error)
        try:
            ranked([None] * 4)
        except ValueError as error:
            results["none"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
