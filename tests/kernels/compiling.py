"""Compile the kernels that calls would launch on a GPU, without having one.

Run as a program, so that Triton's interpreter is off:

    python -m tests.kernels.compiling CAPABILITY MODULE

compiles every case of ``tests/kernels/MODULE.py`` and prints a JSON object for each kernel it would launch:
what the compiler made of it.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

WAIT = "griddepcontrol.wait"
EARLY = re.compile(r"\b((ld|st)(?!\.(param|shared))|atom|red|cp|bra)\b")


def pretend(capability: int) -> list[SimpleNamespace]:
    """Make Triton compile for ``sm_<capability>`` and launch nothing; what it would launch is listed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 132}),
    )
    triton.runtime.driver.set_active(driver)
    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert 0 < grid[0] < 1 << 31, f"{self.__name__}: grid {grid}"
        assert all(0 < size < 1 << 16 for size in grid[1:]), f"{self.__name__}: grid {grid}"
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        nested = [kind for kind in kernel.src.signature.values() if isinstance(kind, tuple)]
        assert "tensordesc" not in str(nested), f"{self.__name__}: a launch does not unpack descriptors in tuples"
        launched.append(SimpleNamespace(name=self.__name__, kernel=kernel, grid=tuple(grid)))
        return kernel

    JITFunction.run = compile_only
    return launched


def describe(kernel) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) and of shared memory, and the PTX's instructions of some kinds.

    "waits" and "releases" are those of a dependent launch, and "early" whether it branches, or touches what another
    kernel could have written, before it waits.
    """
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    ptx = kernel.asm["ptx"]
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "dependent": kernel.metadata.launch_pdl,
        "waits": ptx.count(WAIT),
        "releases": ptx.count("griddepcontrol.launch_dependents"),
        "early": WAIT in ptx and bool(re.search(EARLY, ptx.split(WAIT)[0])),
    }


def main(capability: int, module: str) -> None:
    from tests.kernels.registry import CASES

    launched = pretend(capability)
    import_module(f"tests.kernels.{module}")
    for name, case in CASES.items():
        launched.clear()
        case.call()
        for one in launched:
            matrix, chained = one.name in case.matrix, case.dependent
            row = {"case": name, "kernel": one.name, "grid": one.grid, "matrix": matrix, "chained": chained}
            print(json.dumps(row | describe(one.kernel)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
