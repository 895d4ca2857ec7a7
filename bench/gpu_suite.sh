#!/usr/bin/env bash
# Prove and time the kernels on a GPU, in under 8 minutes: bash bench/gpu_suite.sh
#
# Tests with no skip allowed, compute-sanitizer over every kernel, and bench.kernels; with TUNE=1 also bench.tune
# (2 minutes more), with TUNE=write its choices are written into the kernels' sources. Logs and results go to
# ${OUT:-bench/results/<date>}. A stage that fails does not stop the others; the exit code is that of the worst.
# PYTHON is the interpreter, MERV_FAST_COMMIT the commit where there is no git.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/$(date -u +%Y-%m-%d_%H%M%S)}
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
export PYTHON

# The tests of the kernels need no native library; the others wait for it.
stage tests-kernels 240 bash -c 'pytest -n 12 --dist worksteal tests/kernels tests/ops tests/bench/test_clock.py' &
stage build 120 "$PYTHON" csrc/build.py
stage tests-csrc 120 bash -c 'pytest -n 4 --dist worksteal tests/csrc' &
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

# Alone on the GPU from here on.
LEFT=$((455 - SECONDS))
LEFT=$((LEFT > 220 ? 220 : LEFT < 60 ? 60 : LEFT))
stage kernels "$LEFT" "$PYTHON" -m bench.kernels --json "$OUT/kernels.json" --seconds $((LEFT - 30))
case ${TUNE:-} in
    1) stage tune 140 "$PYTHON" -m bench.tune --seconds 110 ;;
    write) stage tune 140 "$PYTHON" -m bench.tune --seconds 110 --write ;;
esac

grep -hE "^(FAILED|ERROR) |passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|NOT FINITE|: best " "$OUT"/*.log | tail -60
"$PYTHON" - "$OUT/kernels.json" <<'PYTHON'
import json
import sys

try:
    found = json.load(open(sys.argv[1]))
except OSError:
    sys.exit("bench.kernels left no results")
print(f"{found['device']}, torch {found['torch']}, triton {found['triton']}, {found['commit'][:12]}, {found['date']}")
for target in found["targets"]:
    measured = "" if target["measured"] is None else f"{target['measured']:.2f}"
    asked = f"{'<=' if target['at_most'] else '>='} {target['asked']:g}"
    print(f"{target['name']:75} {asked:>8} {measured:>8}  {target['verdict']}")
for title in ("failures", "left_out"):
    for line in found[title]:
        print(f"{title}: {line}")
PYTHON
echo "stage, exit code, seconds:"
cat "$OUT/stages.txt"
echo "everything: $OUT, $SECONDS s"
awk '$2 != 0 { bad = 1 } END { exit bad }' "$OUT/stages.txt"
