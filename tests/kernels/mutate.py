"""Change one line of a kernel at a time and see whether the tests notice.

    python -m tests.kernels.mutate [FILE...]

works in copies of the checkout, two at a time, and writes the table mutations.md beside this file. Exits 1 if a
change went unnoticed. With names of files only their changes are tried, and nothing is written.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.kernels.mutations import MUTATIONS, Mutation

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORKERS = 2
TIMEOUT = 300


def main(only: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not only or Path(mutation.file).name in only]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for worker in range(WORKERS):
            copies.put(copy_to(Path(folder) / str(worker)))
        found = []
        for mutation, caught in zip(chosen, pool.map(lambda m: attempt(m, copies), chosen), strict=True):
            found.append(caught)
            print(f"{caught or 'NOT CAUGHT':60.60} {mutation.file}: {mutation.new.strip()}", flush=True)
    if not only:
        (HERE / "mutations.md").write_text(table(chosen, found))
    return int(not all(found))


def copy_to(copy: Path) -> Path:
    """The files that the kernels' tests need."""
    shutil.copytree(ROOT / "merv_fast", copy / "merv_fast", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def attempt(mutation: Mutation, copies: "SimpleQueue[Path]") -> str | None:
    """The first test that fails under the mutation, or None."""
    copy = copies.get()
    file = copy / mutation.file
    source = file.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: must hold once, holds {source.count(mutation.old)} times: {mutation.old}")
    file.write_text(source.replace(mutation.old, mutation.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"tests/{mutation.tests}",
    ]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "does not end"
    finally:
        file.write_text(source)
        copies.put(copy)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"tests/{mutation.tests}: crashes"
    failed = re.search(r"^(?:FAILED|ERROR) ([^[ ]+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise SystemExit(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def table(mutations: list[Mutation], found: list[str | None]) -> str:
    rows = [
        "Made by `python -m tests.kernels.mutate`: one line is changed, and the first test to fail is named.",
        "",
        "| file | line | changed to | caught by |",
        "|---|---|---|---|",
    ]
    for mutation, caught in zip(mutations, found, strict=True):
        old, new = (f"`{' '.join(code.split())}`".replace("|", r"\|") for code in (mutation.old, mutation.new or " "))
        rows.append(f"| {mutation.file.removeprefix('merv_fast/')} | {old} | {new} | {caught or '**nothing**'} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
