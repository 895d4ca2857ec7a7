"""Stand-ins for flash-attn 2, 3 and 4 and xformers: they take what those take, refuse what those refuse, and tell.

Each computes in float64. Signatures: ``flash_attn/flash_attn_interface.py``, ``hopper/flash_attn_interface.py`` and
``flash_attn/cute/interface.py`` of Dao-AILab/flash-attention, ``xformers/ops/fmha`` of facebookresearch/xformers.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from merv_fast.modules.attention_backends import BACKENDS

MODULES = {
    "flash_attention_2": ("flash_attn", "flash_attn_func"),
    "flash_attention_3": ("flash_attn_interface", "flash_attn_func"),
    "flash_attention_4": ("flash_attn.cute", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}
"""Backend -> where its function is."""

VARIANTS = [*MODULES, "flash_attention_3 with sums"]
"""Older releases of flash-attn 3 return the sums of exponentials too; the CuTe one does so in all."""


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On heads first."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


class StandIn:
    """The function of a package on a CPU; ``calls`` are the tensors it was given."""

    def __init__(self, variant: str) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scale = 1.0
        flash = variant.startswith("flash")
        sums = variant in ("flash_attention_4", "flash_attention_3 with sums")

        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            for tensor in (q, k, v):
                if tensor.ndim != 4 or tensor.stride(-1) != 1 or not len(tensor) or tensor.shape[-1] % 8:
                    raise RuntimeError(f"no kernel for {tuple(tensor.shape)} with strides {tensor.stride()}")
                if flash and tensor.dtype not in (torch.float16, torch.bfloat16):
                    raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
            self.calls.append((q, k, v))
            wide = (t.transpose(1, 2).double() for t in (q * self.scale, k, v))
            # Contiguous as [R, tokens, heads, d]: so do the packages allocate it.
            out = definition(*wide).transpose(1, 2).to(q.dtype).contiguous()
            return (out, torch.zeros(q.shape[0], q.shape[2], q.shape[1])) if sums else out

        self.function: Callable[..., Any] = SIGNATURES[variant.split()[0]](compute)


def flash_attention_2(compute):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False
    ):
        assert (dropout_p, softmax_scale, causal, window_size, return_attn_probs) == (0.0, None, False, (-1, -1), False)
        return compute(q, k, v)

    return flash_attn_func


def flash_attention_3(compute):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1)):
        assert (softmax_scale, causal, qv, window_size) == (None, False, None, (-1, -1))
        return compute(q, k, v)

    return flash_attn_func


def flash_attention_4(compute):
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None)
    ):
        assert (qv, gather_kv_indices, softmax_scale, causal, window_size) == (None, None, None, False, (None, None))
        return compute(q, k, v)

    return flash_attn_func


def xformers(compute):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert (attn_bias, p, scale, op) == (None, 0.0, None, None)
        return compute(query, key, value)

    return memory_efficient_attention


SIGNATURES = {
    "flash_attention_2": flash_attention_2,
    "flash_attention_3": flash_attention_3,
    "flash_attention_4": flash_attention_4,
    "xformers": xformers,
}


def install(monkeypatch: pytest.MonkeyPatch, variant: str, on_cpu: bool = True) -> StandIn:
    """Let the package of a backend be a stand-in, and have it serve on a CPU as it does on a GPU."""
    name = variant.split()[0]
    stand_in, (path, attribute) = StandIn(variant), MODULES[name]
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(".".join(parts[:count])))
    setattr(sys.modules[path], attribute, stand_in.function)
    if on_cpu:
        dtypes = next(iter(BACKENDS[name].dtypes.values()))
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(dtypes={"cpu": dtypes}))
    return stand_in


def remove(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the package of a backend be missing, also where it is installed."""
    path = MODULES[name][0]
    for module in (path, path.split(".")[0]):
        monkeypatch.setitem(sys.modules, module, None)
