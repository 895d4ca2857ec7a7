"""Change one line of the code at a time and see whether the tests notice.

    python -m tests.mutate kernels|csrc [FILE...]

makes the changes that tests/kernels/mutations.py or tests/csrc/mutations.py lists, in copies of the checkout, two at a
time, and writes the table mutations.md beside the list. Exits 1 if a change went unnoticed. With names of files only
their changes are tried, and nothing is written.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

__all__ = ["Mutation"]

HERE = Path(__file__).parent
LISTS = ("kernels", "csrc")
WORKERS = 2
TIMEOUT = 300


class Mutation(NamedTuple):
    """In ``file`` the text ``old``, which stands there once, becomes ``new``; ``tests`` must then fail.

    ``tests`` are paths below tests/, with spaces between; ``library``: they use the native one, which is built again.
    """

    file: str
    tests: str
    old: str
    new: str
    library: bool = False


def main(name: str, only: list[str]) -> int:
    listed: list[Mutation] = import_module(f"tests.{name}.mutations").MUTATIONS
    chosen = [mutation for mutation in listed if not only or Path(mutation.file).name in only]
    unchanged = list({mutation.tests: mutation._replace(new=mutation.old) for mutation in chosen}.values())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for worker in range(WORKERS):
            copies.put(copy_to(Path(folder) / str(worker)))
        for mutation, failed in zip(unchanged, pool.map(lambda m: attempt(m, copies), unchanged), strict=True):
            if failed is not None:
                raise SystemExit(f"tests/{mutation.tests} must pass as they are: {failed}")
        found = []
        for mutation, caught in zip(chosen, pool.map(lambda m: attempt(m, copies), chosen), strict=True):
            found.append(caught)
            print(f"{caught or 'NOT CAUGHT':60.60} {mutation.file}: {mutation.new.strip()}", flush=True)
    if not only:
        (HERE / name / "mutations.md").write_text(table(name, chosen, found))
    return int(not all(found))


def copy_to(copy: Path) -> Path:
    """The files that the tests of both lists need."""
    for part in ("merv_fast", "tests", "csrc"):
        shutil.copytree(HERE.parent / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(HERE.parent / "pyproject.toml", copy)
    return copy


def attempt(mutation: Mutation, copies: "SimpleQueue[Path]") -> str | None:
    """The first test that fails under the mutation, or None."""
    copy = copies.get()
    file = copy / mutation.file
    source = file.read_text()
    try:
        if source.count(mutation.old) != 1:
            held = source.count(mutation.old)
            raise SystemExit(f"{mutation.file}: must hold once, holds {held} times: {mutation.old}")
        file.write_text(source.replace(mutation.old, mutation.new))
        if mutation.library:
            build(copy, mutation)
        return first_failure(copy, mutation)
    finally:
        file.write_text(source)
        copies.put(copy)


def build(copy: Path, mutation: Mutation) -> None:
    """Build the library of the copy, and see that it is the one that serves there."""
    built = python(copy, "csrc/build.py")
    if built.returncode != 0:
        raise SystemExit(f"{mutation.file}: must compile: {mutation.new}\n{built.stderr[-2000:]}")
    code = "from merv_fast.ops._native import LIBRARIES, native_fault; print(LIBRARIES['cpu'], native_fault('cpu'))"
    serves = python(copy, "-c", code).stdout.strip()
    if serves != f"{copy / 'merv_fast' / '_C.so'} None":
        raise SystemExit(f"{mutation.file}: the library must serve: {mutation.new}\n{serves}")


def first_failure(copy: Path, mutation: Mutation) -> str | None:
    """The first test that fails in the copy as it stands, or None."""
    tests = [f"tests/{path}" for path in mutation.tests.split()]
    try:
        done = python(copy, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"{' '.join(tests)}: crashes"
    failed = re.search(r"^(FAILED|ERROR) ([^[\s]+)", done.stdout, re.MULTILINE)
    # Fixtures compile the headers, so that an error of theirs says nothing about a test.
    if failed is None or (failed[1] == "ERROR" and mutation.file.startswith("csrc/")):
        raise SystemExit(f"{mutation}: {done.stdout[-4000:]}{done.stderr[-2000:]}")
    return failed[2]


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, with the package that lies there and without a compiler for CUDA."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "NVCC": "none"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def table(name: str, mutations: list[Mutation], found: list[str | None]) -> str:
    rows = [
        f"Made by `python -m tests.mutate {name}`: one line is changed, and the first test to fail is named.",
        "",
        "| file | line | changed to | caught by |",
        "|---|---|---|---|",
    ]
    for mutation, caught in zip(mutations, found, strict=True):
        file = mutation.file.removeprefix("merv_fast/").removeprefix("csrc/").removeprefix("include/")
        rows.append(f"| {file} | {cell(mutation.old)} | {cell(mutation.new)} | {caught or '**nothing**'} |")
    return "\n".join(rows) + "\n"


def cell(code: str) -> str:
    return f"`{' '.join(code.split())}`".replace("|", r"\|") if code else "(removed)"


if __name__ == "__main__":
    if sys.argv[1:2] not in ([name] for name in LISTS):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
