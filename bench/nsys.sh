#!/usr/bin/env bash
# Where the time of an answer goes, by Nsight Systems: bash bench/nsys.sh VIDEO [MODEL [QUESTION]]
#
# Records one answer after a warm-up, with the ranges of `merv-fast profile` as NVTX ranges, and prints two tables: time
# of each range, time of each kernel. The report for the nsys window is ${OUT:-bench/results/<date>}/answer.nsys-rep.
# MODEL is merv-tiny if not given, DEVICE cuda, TOKENS (the longest answer) 16; PYTHON is the interpreter. torch.profiler
# stays off: it and nsys cannot both record a GPU.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash bench/nsys.sh VIDEO [MODEL [QUESTION]]" >&2; exit 2; }
VIDEO=$(realpath "$1") MODEL=${2:-merv-tiny} QUESTION=${3:-What happens in this video?}
[ -e "$VIDEO" ] || { echo "nsys.sh: $VIDEO does not exist" >&2; exit 1; }
if [ -d "$MODEL" ]; then MODEL=$(realpath "$MODEL"); fi
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/$(date -u +%Y-%m-%d_%H%M%S)}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

NSYS=$(command -v nsys || ls -d /usr/local/cuda/bin/nsys /opt/nvidia/nsight-systems*/*/bin/nsys 2>/dev/null | tail -1) || true
if [ -z "$NSYS" ]; then
    echo "nsys.sh: nsys was not found; install Nsight Systems (package nsight-systems-cli) or add it to PATH" >&2
    exit 127
fi
mkdir -p "$OUT"

WORKLOAD='
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("nsys.sh: PyTorch finds no CUDA GPU")

from merv_fast.cli.ask import Loader
from merv_fast.models.spans import model_spans
from merv_fast.runtime.trace import nvtx_ranges, span

video, model, question, device, tokens = sys.argv[1:]
vidlm = Loader(model, device, "auto", None, {}).load()
builder = vidlm.get_prompt_builder()
builder.add_turn(role="human", message=question)
arguments = {"max_new_tokens": int(tokens), "do_sample": False}
vidlm.answer(video, builder.get_prompt(), **arguments)
torch.cuda.synchronize()
with model_spans(vidlm), nvtx_ranges():
    torch.cuda.profiler.start()
    with span("answer"):
        vidlm.answer(video, builder.get_prompt(), **arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
'

# stop, not stop-shutdown: Python ends by itself, with its own exit code.
"$NSYS" profile --trace=cuda,nvtx,osrt,cudnn,cublas --sample=none --cpuctxsw=none \
    --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true --output="$OUT/answer" \
    "$PYTHON" -c "$WORKLOAD" "$VIDEO" "$MODEL" "$QUESTION" "${DEVICE:-cuda}" "${TOKENS:-16}"
"$NSYS" stats --force-export=true --report nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum --format table "$OUT/answer.nsys-rep" |
    tee "$OUT/nsys.txt"
echo "everything: $OUT"
