"""The README's first Python block runs as it stands, but for the model, the clip and the numbers that cost time."""

import re
from pathlib import Path

import torch

from merv_fast import sample_clip

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_quick_start():
    quick_start, lists = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    names = {"torch": torch, "hf_token": None, "device": torch.device("cpu")}
    exec(adapted(quick_start), names)
    assert isinstance(names["text"], str)
    asked = "first = second = third = prompt_a = prompt_b = prompt_text\n"
    exec(asked + adapted(lists), names)
    assert len(names["texts"]) == 3
    assert sum(names["answer"].encoder_weights.values()) > 0.99


def adapted(block):
    for old, new in {
        '"merv-full"': '"merv-tiny"',
        "torch.bfloat16": "torch.float32",
        "[16, 16, 32, 16]": "[8, 8, 16, 8]",
        '"video.mp4"': repr(str(sample_clip())),
        '"a.mp4"': repr(str(sample_clip())),
        '"b.mp4"': repr(str(sample_clip())),
        "max_new_tokens=512": "max_new_tokens=4",
        "do_sample=False": "do_sample=False, max_new_tokens=4",
        "(video, prompt_a)": "(video, prompt_a, max_new_tokens=4)",
    }.items():
        block = block.replace(old, new)
    return block
