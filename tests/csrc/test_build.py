"""Building: the stable ABI, headers without torch, a compiler that fails, CUDA for every architecture."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HOOK = runpy.run_path(str(ROOT / "csrc" / "build.py"))
HEADERS = sorted((ROOT / "csrc" / "include" / "merv_fast").iterdir())

needs_compiler = pytest.mark.skipif(HOOK["compiler"]() is None, reason="needs a C++ compiler")


@needs_compiler
def test_an_op_compiles_loads_and_runs(tmp_path):
    library = tmp_path / "probe.so"
    HOOK["build"]([HERE / "probe.cpp"], library)
    assert list(tmp_path.iterdir()) == [library]
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); "
        "print(torch.ops.merv_fast_probe.twice(torch.tensor([1.0, 2.5])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[2.0, 5.0]"


@needs_compiler
def test_a_failed_build_leaves_what_was_there(tmp_path, capfd):
    broken, library = tmp_path / "broken.cpp", tmp_path / "library.so"
    broken.write_text("int main( {")
    library.write_bytes(b"the last one")
    with pytest.raises(subprocess.CalledProcessError):
        HOOK["build"]([broken], library)
    assert library.read_bytes() == b"the last one"
    assert sorted(tmp_path.iterdir()) == [broken, library]


LOOPS = {
    "widen_pixels": "vpshufb",
    "resample_wide": "vpmulld.*%ymm",
    "resample_column_row": "vpmulld.*%ymm",
    "4poolEPKf": "vaddps.*%ymm",
    "4poolEPKNS_7Float16E": "vdivps.*%ymm",
    "4meanERKNS_6TokensIfE": "vaddps.*%ymm",
    "5weighEPKNS_6TokensIfE": "vmulps.*%ymm",
}
"""Part of the symbol of each hot loop, and an instruction that only a vectorised one has."""


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads x86-64 assembly")
def test_hot_loops_are_vectorised(tmp_path):
    program = tmp_path / "loops.cpp"
    program.write_text(
        '#include "merv_fast/fuse.h"\n#include "merv_fast/pool.h"\n#include "merv_fast/resample.h"\n'
        "using namespace merv_fast;\n"
        "void f(const float* x, const PoolShape& s, const Tokens<float>& t, const FrameResampler& r, float* out,\n"
        "       Float16* half, uint8_t* bytes, ResampleScratch& scratch) {\n"
        "  pool(x, s, 0, 1, out); pool(half, s, 0, 1, half); mean(t, 256, out); weigh(&t, x, 4, 999, 0, 9, out);\n"
        "  r(bytes, 1, 1, 1, bytes, scratch);\n"
        "}\n"
    )
    command = [HOOK["compiler"](), *HOOK["FLAGS"], HOOK["EXACT"], "-Wno-unused-function"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "-S", str(program), "-o", "-"]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    functions = re.split(r"^(?=\w[\w.]*:$)", assembly, flags=re.MULTILINE)
    for symbol, instruction in LOOPS.items():
        clones = [
            f for f in functions if symbol in f.split(":")[0] and "avx2" in f.split(":")[0] and ".cfi_startproc" in f
        ]
        assert clones, symbol
        assert any(re.search(instruction, clone) for clone in clones), symbol


@needs_compiler
@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
def test_headers_stand_alone(header):
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-Wno-unused-function"]
    include = f"-I{ROOT / 'csrc' / 'include'}"
    code = f'#include "merv_fast/{header.name}"\n'
    subprocess.run([HOOK["compiler"](), *flags, include, "-x", "c++", "-"], input=code, text=True, check=True)


def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path):
    pytest.importorskip("setuptools")
    false = shutil.which("false")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": false}, capture_output=True, text=True, check=True, timeout=120
    )
    assert "merv-fast: _C.so is left out, PyTorch's operators serve instead: " in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(HOOK["nvcc"]() is None, reason="needs nvcc")
def test_cuda_sources_compile_for_every_architecture_without_spills(tmp_path):
    """The binding and its kernels; linking needs a torch that is built with CUDA."""
    host = ["-Xcompiler", f"-fPIC,{HOOK['EXACT']}", "-ccbin", HOOK["compiler"]()]
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "0"]
    command = [HOOK["nvcc"](), "-O3", "-std=c++20", *host, *strict, *HOOK["gencode"](HOOK["ARCHITECTURES"])]
    command += [*HOOK["torch_flags"](), "-DUSE_CUDA", "-c", str(ROOT / "csrc" / "resample.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "resample.o")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", done.stderr)
    assert {arch for _, arch in compiled} == set(HOOK["ARCHITECTURES"])
    assert len(compiled) == 5 * len(HOOK["ARCHITECTURES"])
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == len(compiled)
    assert set(spills) == {("0", "0", "0")}
