"""``import merv_fast`` is innocent: cheap, quiet, and without the heavy parts."""

import json
import subprocess
import sys

PROBE = """
import json, sys, time, warnings
import torch
warnings.simplefilter("error")
started = time.perf_counter()
import merv_fast
seconds = time.perf_counter() - started
heavy = [name for name in ("transformers", "triton", "av", "PIL", "typer", "rich") if name in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""

LAYERS = """
import sys
import merv_fast.ops, merv_fast.video, merv_fast.modules, merv_fast.encoders
print([name for name in ("transformers", "triton", "av") if name in sys.modules])
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)


def test_import_costs_little():
    done = run(PROBE)
    got = json.loads(done.stdout)
    assert got["heavy"] == []
    assert not got["cuda"]
    assert got["seconds"] < 0.5
    assert done.stderr == ""


def test_the_lower_layers_work_without_transformers_triton_and_av():
    assert run(LAYERS).stdout.strip() == "[]"


def test_every_public_name_is_there():
    import merv_fast

    assert all(getattr(merv_fast, name) is not None for name in merv_fast.__all__)
    assert set(dir(merv_fast)) == set(merv_fast.__all__)
