"""One of two gloo processes: ``python -m tests.training.ranks DATA OUT RANK PORT``. Leaves its losses in OUT."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from merv_fast.training import train
from merv_fast.training.stages import RECOMPUTE
from tests.training.small import QUICK, small_model

RANKS, BATCH, STEPS = 2, 4, 6
ARGUMENTS = QUICK | {"max_steps": STEPS, "learning_rate": 1e-3, "global_batch_size": BATCH, "warmup_steps": 0}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
RUNS = {
    "ddp": ("finetune", {}, False),
    "fsdp": ("finetune", FSDP | {"save_strategy": "steps", "save_steps": STEPS // 2}, False),
    "fsdp-align": ("align", FSDP | {RECOMPUTE: True}, True),
    "fsdp-full": ("full", FSDP, False),
}
"""Stage, arguments, and whether encoders run once and their features are kept."""


def run(name: str, data: Path, out: Path, ranks: int, resume: bool = False) -> list[float]:
    """The losses of one of `RUNS`; a single process shards nothing."""
    stage, arguments, kept = RUNS[name]
    arguments = {key: value for key, value in arguments.items() if ranks > 1 or not key.startswith("fsdp")}
    arguments |= ARGUMENTS | arguments | {"per_device_train_batch_size": BATCH // ranks}
    small = small_model()
    cache = out.parent / "cache" if kept else None
    losses = train(small, stage, data, out, cache=cache, resume=resume, arguments=arguments).losses
    sharded = all(isinstance(tensor, DTensor) for tensor in small.model.parameters())
    assert sharded == ("fsdp" in arguments)
    return losses


def shard_on_cpus() -> None:
    """Have accelerate shard over these processes: it does so only where it takes devices for GPUs."""
    plain = PartialState.__init__

    def __init__(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = __init__


def main(data: Path, out: Path, rank: int, port: str) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    losses = {"ddp": run("ddp", data, out / "ddp", RANKS)}
    shard_on_cpus()
    for name in ("fsdp", "fsdp-align", "fsdp-full"):
        losses[name] = run(name, data, out / name, RANKS)
    dist.barrier()
    if rank == 0:
        shutil.copytree(out / "fsdp" / f"checkpoint-{STEPS // 2}", out / "resumed" / f"checkpoint-{STEPS // 2}")
    dist.barrier()
    losses["resumed"] = run("fsdp", data, out / "resumed", RANKS, resume=True)
    (out / f"{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
