"""Processes of a group of four: ``python -m tests.runtime.ranks FOLDER``. Each leaves in the folder what it got.

One process imports everything and forks into four, which takes a quarter of the time.
"""

import datetime
import multiprocessing
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from merv_fast.models.video_model import MervVideoModel
from merv_fast.modules import Tail, build_fusion, build_projector
from merv_fast.modules.projectors import PooledProjector
from merv_fast.runtime.distributed import RankedEncoders
from merv_fast.runtime.exchange import VIDEOS
from tests.models.random_merv import tiny_config

RANKS, D = 4, 32
WIDTHS = (24, 16, 40, 8)
# Those of 3 are averaged to 2 with overlap: a mean over them is not that over their averages.
GRIDS = ((4, 4), (3, 3), (3, 4), (5, 3))
TIMEOUT = datetime.timedelta(seconds=60)
MANY = VIDEOS + 3
KINDS = [(kind, torch.float32) for kind in ("linear", "gelu-mlp", "single", "functions")] + [("linear", torch.bfloat16)]
GOOD, REQUESTS = (2, 5, 7, 9), 9


def front_end(kind="linear", dtype=torch.float32, videos=3):
    """Four encoders, what makes visual tokens of theirs, and inputs: the same in every process.

    The last encoder has a single token, if ``kind`` is "single"; "functions" are no projectors of ours.
    """
    torch.manual_seed(0)
    encoders = [torch.nn.Linear(6, width) for width in WIDTHS]
    mlp = kind if kind.endswith("mlp") else "linear"
    projectors = [build_projector(f"avg+{mlp}", w, D, 4, slots=2, grid=g) for w, g in zip(WIDTHS, GRIDS, strict=True)]
    inputs = [torch.randn(videos, 2, height * width, 6).to(dtype) for height, width in GRIDS]
    if kind == "single":
        projectors[3], inputs[3] = build_projector("linear", WIDTHS[3], D, 1, 1, None), inputs[3][:, :1, :1]
    fusion = build_fusion("cross_attention_avg_lq", len(WIDTHS), llm_width=D, query_width=16, positional_embedding=True)
    # Scores far apart and large, so that nothing but a difference of logarithms can hold them.
    fusion.k_proj.weight.data *= 40
    for module in (*encoders, *projectors, fusion):
        module.to(dtype).eval()
    if kind == "functions":
        return encoders, ([lambda x, own=own: own(x).sin() for own in projectors], fusion), inputs
    return encoders, Tail(projectors, fusion), inputs


def request(number, inputs):
    """Inputs of a request that are no other's."""
    return [x.roll(number, 1) * (1 + number / 8) for x in inputs]


def random_model(mlp):
    """The video model of `random_merv`, with projectors of ``mlp`` and encoder weights that differ; and frames."""
    config = tiny_config()
    config.arch_specifier = f"no-align+3davg+{mlp}"
    torch.manual_seed(0)
    model = MervVideoModel(config).eval()
    model.tail.fusion.k_proj.weight.data *= 100
    return model, torch.randint(0, 256, (2, 32, 3, 80, 96), dtype=torch.uint8)


def outcome(call, *args, **kwargs):
    """What a call returns, or the error it raises, in words."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refuse(*args):
    raise AssertionError("an encoder's tokens have been projected by themselves")


def fill(x):
    raise torch.OutOfMemoryError("no memory left")


def results_of(ranked, inputs):
    """Members, tokens and weights; other ranks' inputs are not there."""
    return ranked.members, *ranked([x if member in ranked.members else None for member, x in enumerate(inputs)])


def run_kinds(group):
    """Every kind of tail, what was called of our ops and of gloo, and what was summed up."""
    results = {}
    for kind, dtype in KINDS:
        encoders, tail, inputs = front_end(kind, dtype)
        ranked, sums = RankedEncoders(encoders, tail, group=group), []

        def all_reduce(tensor, sums=sums, plain=dist.all_reduce, **kwargs):
            sums.append((tuple(tensor.shape), tensor.dtype))
            return plain(tensor, **kwargs)

        with ExitStack() as stack:
            stack.enter_context(patch.object(dist, "all_reduce", all_reduce))
            if ranked.obstacle is None:
                stack.enter_context(patch.object(PooledProjector, "forward", refuse))
            profile = stack.enter_context(torch.profiler.profile())
            results[kind, dtype] = results_of(ranked, inputs)
        names = [event.name for event in profile.events() if event.name.startswith(("gloo:", "merv_fast::"))]
        results["calls", kind, dtype] = ranked.obstacle, sorted(name.split(":")[-1] for name in names), sums
    return results


def run_models(group):
    """The whole model, all of it in every process; and with no more than the members in each."""
    results = {}
    for mlp in ("linear", "gelu-mlp"):
        model, frames = random_model(mlp)
        inputs = model.prepare(frames)
        ranked = RankedEncoders(model.encoders, model.tail, group=group)
        results[mlp] = results_of(ranked, inputs)
        costs = [sum(p.numel() for p in encoder.parameters()) for encoder in model.encoders.values()]
        for member, name in enumerate(list(model.encoders)):
            if member not in ranked.members:
                model.encoders[name] = None
                model.tail.projectors[member].to("meta")
        ranked = RankedEncoders(model.encoders, model.tail, costs=costs, group=group)
        results[mlp, "absent"] = results_of(ranked, inputs)
    return results


def run_absent(group):
    """Other ranks' encoders and projectors without weights; then not there at all."""
    encoders, tail, inputs = front_end()
    members = RankedEncoders(encoders, tail, group=group).members
    for member in set(range(4)) - set(members):
        encoders[member].to("meta")
        tail.projectors[member].to("meta")
    results = {"meta": results_of(RankedEncoders(encoders, tail, group=group), inputs)}
    own = [encoder if member in members else None for member, encoder in enumerate(encoders)]
    projectors = [projector if member in members else None for member, projector in enumerate(tail.projectors)]
    ranked = RankedEncoders(own, (projectors, tail.fusion), costs=[6 * w + w for w in WIDTHS], group=group)
    results["none"] = results_of(ranked, inputs)
    lacking = [encoder if member not in members[:1] else None for member, encoder in enumerate(encoders)]
    results["messages"] = [
        outcome(RankedEncoders, own, tail, group=group),
        outcome(RankedEncoders, lacking, tail, costs=[6 * w + w for w in WIDTHS], group=group),
    ]
    return results


def run_failures(group):
    """Nine requests, of which some fail on one rank: what each of them gave here."""
    encoders, tail, inputs = front_end()
    ranked = RankedEncoders(encoders, tail, group=group)
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    results, member = {}, ranked.members[0]
    for number in range(1, REQUESTS + 1):
        own, kwargs = request(number, inputs), {}
        full = number == 1 and rank == 0
        if number == 3 and rank == last:
            own[member] = None
        elif number == 4 and rank in (0, last):
            own[member] = own[member][:, :1]
        elif number == 6 and rank == 0:
            own = [x[:2] for x in own]
        elif number == 8:
            kwargs["request"] = 8 + 10 * rank
        elif number == 9:
            kwargs["request"] = 9
        with patch.object(encoders[member], "forward", fill) if full else nullcontext():
            results[number] = outcome(ranked, own, **kwargs)
    return results


def run_batches(group):
    """More videos than fit on a sheet, and none; and a call in inference mode before one without."""
    encoders, tail, inputs = front_end(videos=MANY)
    with torch.inference_mode():
        ranked = RankedEncoders(encoders, tail, group=group)
        many = results_of(ranked, inputs)
    return {"many": many, "none": results_of(ranked, [x[:0] for x in inputs])}


def run_disagreements(rank):
    """Costs by which two ranks run the same encoder, an encoder more, and weights of another dtype, on one rank."""
    encoders, tail, inputs = front_end()
    ranked = RankedEncoders(encoders, tail, costs=[4, 3, 1, 2] if rank == 2 else [4, 3, 2, 1])
    results = {"members": ranked.members, "costs": outcome(ranked, inputs)}
    if rank == 3:
        encoders, projectors = [*encoders, encoders[3]], [*tail.projectors, tail.projectors[3]]
        tail, inputs = Tail(projectors, build_fusion("scalar", 5, llm_width=D)), [*inputs, inputs[3]]
    ranked = RankedEncoders(encoders, tail, costs=[4, 3, 2, 1, 0.5][: len(encoders)])
    results["encoders"] = outcome(ranked, inputs)
    encoders, tail, inputs = front_end(dtype=torch.bfloat16 if rank == 1 else torch.float32)
    results["dtypes"] = outcome(RankedEncoders(encoders, tail), inputs)
    return results


def run_messages():
    """What the constructor says of arguments that do not fit."""
    encoders, tail, _ = front_end()
    projectors, fusion = list(tail.projectors), tail.fusion
    concat = build_fusion("concat", 4, llm_width=D)
    return [
        outcome(RankedEncoders, encoders[:3], tail),
        outcome(RankedEncoders, encoders, (projectors[:3], fusion)),
        outcome(RankedEncoders, encoders, tail, costs=[1, 2, 3]),
        outcome(RankedEncoders, encoders, Tail(projectors, concat)),
    ]


def main(folder: Path, rank: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    pairs = [dist.new_group(pair, timeout=TIMEOUT) for pair in ([0, 1], [2, 3])]
    results = {"disagreements": run_disagreements(rank), "messages": run_messages()}
    for ranks, group in ((4, None), (2, pairs[rank // 2])):
        for run in (run_kinds, run_models, run_absent, run_failures, run_batches):
            results[run.__name__, ranks] = run(group)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=main, args=(Path(sys.argv[1]), rank)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
