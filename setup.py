"""Build the native kernels with the package where that is possible; elsewhere the package is pure Python."""

import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HOOK = runpy.run_path(str(Path(__file__).parent / "csrc" / "build.py"))
LIBRARIES = {"merv_fast._C": False, "merv_fast._C_cuda": True}
"""Whether each is of CUDA kernels."""


def say(line: str) -> None:
    """Tell what was left out; pip shows it with -v, and `merv-fast doctor` tells it again."""
    print(f"merv-fast: {line}", file=sys.stderr)


class BuildKernels(build_ext):
    """Leave the compilers to csrc/build.py."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the libraries know nothing of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        """A compiler that fails costs speed, not the installation."""
        cuda = LIBRARIES[extension.name]
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            HOOK["build_cuda" if cuda else "build"](HOOK["sources"](cuda), target)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"{target.name} is left out, PyTorch's operators serve instead: {error}")


extensions = []
for name, cuda in LIBRARIES.items():
    if reason := HOOK["missing"](cuda):
        say(f"{name.rpartition('.')[2]}.so is left out, PyTorch's operators serve instead: {reason}")
    else:
        extensions.append(Extension(name, [], optional=True))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
