"""Launch kernels as on a GPU, but for the driver, which is tests/kernels/libcuda.c.

    python -m tests.kernels.launching CAPABILITY MODULE

makes every call of ``tests/kernels/MODULE.py``; Triton compiles the kernels, encodes their descriptors and packs
their arguments.
"""

import sys
from importlib import import_module
from types import SimpleNamespace


def main(capability: int, module: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    from tests.kernels.registry import CASES

    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=CudaUtils(),
        launcher_cls=CudaLauncher,
    )
    triton.runtime.driver.set_active(driver)
    import_module(f"tests.kernels.{module}")
    for name, case in CASES.items():
        print(f"{name} (dependent after {case.dependent})" if case.dependent else name, flush=True)
        case.call()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
