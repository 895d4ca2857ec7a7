"""Loading a checkpoint of 2 GB keeps the process below 1.2 times its size."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.golden_files import load
from tests.models.golden_run import MODELS, checkpoint, write_run

ROOT = Path(__file__).parent.parent.parent
LOAD = r"""
import pickle, re, sys
import merv_fast
vidlm = merv_fast.load_vid(**pickle.load(open(sys.argv[1], "rb")))
# Not ru_maxrss, which a process inherits from the one that started it.
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read()).group(1)) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_loading_makes_no_second_copy(tmp_path):
    arguments = write_run(tmp_path)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=10, vocab_size=320, num_attention_heads=16
    )
    config.save_pretrained(tmp_path / "llm")
    groups = checkpoint(load(MODELS[0])[0])
    llm = LlamaForCausalLM(config).state_dict()
    groups["llm_backbone"] = {f"llm.{key}": value for key, value in llm.items()}
    for key, value in groups["projectors"].items():
        groups["projectors"][key] = torch.zeros(2048, *value.shape[1:])
    for key in ("attention.k_proj_weight", "attention.v_proj_weight"):
        groups["feature_fusion"][key] = torch.zeros(80, 2048)
    file = tmp_path / "run/checkpoints/latest-checkpoint.pt"
    torch.save({"model": groups}, file)
    (tmp_path / "arguments").write_bytes(pickle.dumps(arguments))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "arguments")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert file.stat().st_size > 2e9
    assert int(done.stdout) < 1.2 * file.stat().st_size
