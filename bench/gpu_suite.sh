#!/usr/bin/env bash
# Everything there is to run on a GPU, in under 8 minutes where stages keep their limits: bash bench/gpu_suite.sh [FOLDER]
#
# Tests with no skip allowed, compute-sanitizer over every kernel, bench.kernels, bench.attention, bench.memory,
# bench.precision, and the rest of `pytest bench/ --benchmark`; with TUNE=1 also bench.tune (2 minutes, taken from those
# two), with TUNE=write its choices are written into the kernels' sources, of which copies are left too. Logs and results
# go to FOLDER, or $OUT, or bench/results/<date>, with PACK=1 in one archive beside the summary of at most 40 lines that
# comes last. A stage that fails does not stop the others; the exit code is 1 if one did. PYTHON is the interpreter,
# MERV_FAST_COMMIT the commit where there is no git.
#
# Runs from a bare checkout, nothing installed, with Python 3.12, torch 2.11, triton 3.6, transformers 5.17 (or newer),
# numpy, safetensors, rich, pillow, hypothesis, pytest, pytest-benchmark, pytest-timeout and pytest-xdist. Wheels that
# may be added: av and decord, for the cases of the bundled clip, which are skipped without them.
set -u
FROM=$PWD
cd "$(dirname "$0")/.."
OUT=${1:-${OUT:-$PWD/bench/results/$(date -u +%Y-%m-%d_%H%M%S)}}
case $OUT in /*) ;; *) OUT=$FROM/$OUT ;; esac
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 MERV_FAST_REQUIRE_CUDA=1
unset TRITON_INTERPRET
mkdir -p "$OUT"
: >"$OUT/stages.txt"

# stage NAME SECONDS COMMAND...: run it for at most so long, its output in NAME.log, its end in stages.txt.
stage() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name $code $((SECONDS - start))" >>"$OUT/stages.txt"
    return $code
}

# clamp N LEAST MOST
clamp() { echo $(($1 < $2 ? $2 : $1 > $3 ? $3 : $1)); }

if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    echo "gpu_suite: PyTorch finds no CUDA GPU" >&2
    exit 1
fi

# Another package may be called tests or bench: a folder without __init__.py gives way to it.
for package in tests bench; do
    if ! "$PYTHON" -c "import $package, os; raise SystemExit(os.getcwd() + '/$package' not in map(os.path.abspath, $package.__path__))"; then
        touch "$package/__init__.py"
        trap 'rm -f tests/__init__.py bench/__init__.py' EXIT
    fi
done

pytest() { "$PYTHON" -m pytest -p no:cacheprovider --tb=short "$@"; }
export -f pytest
export PYTHON OUT

# The tests of the kernels need no native library; the others wait for it.
stage tests-kernels 240 bash -c 'pytest -n 12 --dist worksteal tests/kernels tests/ops tests/bench/test_clock.py' &
stage build 120 "$PYTHON" csrc/build.py
stage tests-csrc 120 bash -c 'pytest -n 4 --dist worksteal tests/csrc' &
stage tests-runtime 120 bash -c 'pytest tests/runtime/test_graphs.py tests/runtime/test_concurrent.py \
    tests/modules/test_fp8.py tests/modules/test_attention.py tests/integrations/swaps/test_on_gpu.py &&
    pytest tests/models/test_front_end_graphs.py tests/encoders/test_encoder_attention.py tests/test_versions.py \
        -k "on_a_gpu or of_a_gpu"' &
stage tests-inductor 180 bash -c 'pytest -n 6 -m slow tests/ops/test_inductor.py' &
# Compiles what the sanitizer is to see, so that it sees no compiler.
stage launches 120 "$PYTHON" -m bench.sanitize
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$SANITIZER" ]; then
    # An allocation for each tensor, so that memcheck sees a step past it.
    stage memcheck 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$SANITIZER" --tool memcheck --error-exitcode 9 "$PYTHON" -m bench.sanitize &
    stage racecheck 120 "$SANITIZER" --tool racecheck --error-exitcode 9 "$PYTHON" -m bench.sanitize &
else
    echo "compute-sanitizer was not found" | tee "$OUT/memcheck.log" >"$OUT/racecheck.log"
    printf 'memcheck 127 0\nracecheck 127 0\n' >>"$OUT/stages.txt"
fi
wait

# Alone on the GPU from here on. Each stage begins no case that could outlast its limit.
END=450
[ -z "${TUNE:-}" ] || END=310
LEFT=$(clamp $(((END - SECONDS) / 2)) 60 200)
stage kernels "$LEFT" "$PYTHON" -m bench.kernels --json "$OUT/kernels.json" --seconds $((LEFT - 30))
stage attention 60 "$PYTHON" -m bench.attention --json "$OUT/attention.json"
stage memory 60 "$PYTHON" -m bench.memory --json "$OUT/memory.json"
stage precision 40 "$PYTHON" -m bench.precision --json "$OUT/precision.json"
LEFT=$(clamp $((END - SECONDS)) 50 200)
# bench.kernels has just measured the operators.
stage bench "$LEFT" bash -c 'pytest bench/ --ignore=bench/test_ops.py --benchmark --seconds "$0" \
    --append "$OUT/bench.csv" --benchmark-json "$OUT/benchmark.json"' $((LEFT - 40))
case ${TUNE:-} in
    1) stage tune 140 "$PYTHON" -m bench.tune --seconds 110 ;;
    write)
        stage tune 140 "$PYTHON" -m bench.tune --seconds 110 --write
        mkdir -p "$OUT/tuned" && cp merv_fast/kernels/*.py "$OUT/tuned"
        ;;
esac

"$PYTHON" -m bench.summary "$OUT" >"$OUT/summary.txt"
CODE=$?
cat "$OUT/summary.txt"
if [ -n "${PACK:-}" ]; then
    PACKED=$(mktemp)
    tar czf "$PACKED" -C "$OUT" --exclude=./summary.txt . && find "$OUT" -mindepth 1 ! -name summary.txt -delete &&
        mv "$PACKED" "$OUT/everything.tar.gz"
fi
echo "everything: $OUT, $SECONDS s"
exit $CODE
