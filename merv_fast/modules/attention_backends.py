"""What can compute softmax attention over heads, as one table, and whether it serves on this machine.

    q     [R, heads, queries, d]   any strides with a contiguous last dimension
    k, v  [R, heads, keys, d]      likewise, same dtype
    out   [R, heads, queries, d]   in that dtype

    out = softmax(q k^T / sqrt(d)) v

Packages take and give ``[R, tokens, heads, d]``, which is the same memory seen otherwise: no head is copied.

Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1. Names are those of transformers'
``attn_implementation``; those that begin with ``sdpa_`` are the kernels of PyTorch's one function, each by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["BACKENDS", "Attend", "Backend", "backend_version", "check_backend", "check_tensors", "load_backend"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backend(NamedTuple):
    """One way to compute attention, and what it takes.

    Args:
        load: imports and returns the function.
        dtypes: by type of device; None where every device and dtype will do.
        head_sizes: values of d; None for all.
        package: distribution that holds the function, None for PyTorch.
        remedy: how to get the package.
    """

    load: Callable[[], Attend]
    dtypes: Mapping[str, Sequence[torch.dtype]] | None = None
    head_sizes: range | None = None
    package: str | None = None
    remedy: str = ""


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: product, softmax in at least float32, product."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attention in PyTorch."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """That of cuDNN."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, _trained(q, k, v))[0]


def sdpa_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The memory-efficient one in PyTorch."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, _trained(q, k, v))[0]


def _trained(*tensors: Tensor) -> bool:
    """Whether a backward pass will ask for the sums of exponentials."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@dataclass(frozen=True)
class TokensFirst:
    """A package's function, which takes and gives ``[R, tokens, heads, d]``, on heads ``[R, heads, tokens, d]``.

    Two of one function are equal, so that what was found out about it is known of both.
    """

    function: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in the head of this file."""
        out = self.function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        # Some releases of flash-attention give the sums of exponentials too.
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    @classmethod
    def of(cls, module: str, function: str) -> "TokensFirst":
        """The function of that name, imported."""
        return cls(getattr(import_module(module), function))


HALF = (torch.float16, torch.bfloat16)
SINGLE = (*HALF, torch.float32)
DOUBLE = (*SINGLE, torch.float64)
FLASH_HEADS, ALIGNED_HEADS = range(8, 257, 8), range(8, 65537, 8)
SOURCES = "github.com/Dao-AILab/flash-attention"

# `torch.nn.attention.sdpa_kernel` sets flags of the whole process: two threads that use it at once can leave them set
# for good. So PyTorch's kernels are called by their own names.
BACKENDS: dict[str, Backend] = {
    "eager": Backend(lambda: eager),
    "sdpa": Backend(lambda: scaled_dot_product_attention),
    "sdpa_flash": Backend(lambda: sdpa_flash, {"cuda": HALF, "cpu": DOUBLE}, FLASH_HEADS),
    "sdpa_cudnn": Backend(lambda: sdpa_cudnn, {"cuda": HALF}, FLASH_HEADS),
    "sdpa_efficient": Backend(lambda: sdpa_efficient, {"cuda": SINGLE}, ALIGNED_HEADS),
    "flash_attention_2": Backend(
        lambda: TokensFirst.of("flash_attn", "flash_attn_func"),
        {"cuda": HALF},
        FLASH_HEADS,
        "flash-attn",
        "pip install flash-attn",
    ),
    "flash_attention_3": Backend(
        lambda: TokensFirst.of("flash_attn_interface", "flash_attn_func"),
        {"cuda": HALF},
        FLASH_HEADS,
        "flash-attn-3",
        f"pip install from the folder hopper of {SOURCES}",
    ),
    "flash_attention_4": Backend(
        lambda: TokensFirst.of("flash_attn.cute", "flash_attn_func"),
        {"cuda": HALF},
        FLASH_HEADS,
        "flash-attn-4",
        "pip install --pre flash-attn-4",
    ),
    "xformers": Backend(
        lambda: TokensFirst.of("xformers.ops", "memory_efficient_attention"),
        {"cuda": SINGLE},
        ALIGNED_HEADS,
        "xformers",
        "pip install xformers",
    ),
}
"""By name."""


def load_backend(name: str) -> Attend:
    """The function of a backend.

    Raises:
        ValueError: no backend has that name.
        ImportError: its package is missing or cannot be imported.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    backend = BACKENDS[name]
    try:
        return backend.load()
    except Exception as error:  # whatever a package does while it is imported
        rule = f"{backend.package} must be importable for {name} ({backend.remedy})"
        raise ImportError(f"attention: {rule}, got {type(error).__name__}: {error}") from error


def check_backend(
    name: str, head_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Raise unless a backend serves for heads of that size, in ``dtype`` on ``device`` where these are known.

    A small attention is computed once by what does not serve everywhere, and compared with ``eager``.

    Raises:
        ValueError: no backend has that name, or it does not take such heads, that device or dtype.
        ImportError: its package is missing or cannot be imported.
        RuntimeError: it failed, or its result was wrong.
    """
    check_tensors(name, load_backend(name), head_size, device, dtype)


def check_tensors(
    name: str, attend: Attend, head_size: int, device: torch.device | None, dtype: torch.dtype | None
) -> None:
    """What `check_backend` does once the function of the backend is loaded; what a call can afford."""
    check_limits(name, head_size, device, dtype)
    if BACKENDS[name].dtypes is None or device is None or dtype is None or torch.compiler.is_compiling():
        return
    if device.type != "meta" and (found := fault(attend, head_size, device, dtype)):
        rule = f"right for heads of {head_size} in {name_dtype(dtype)} on {device} (or choose sdpa)"
        raise RuntimeError(f"attention: result of {name} must be {rule}, got {found}")


def check_limits(name: str, head_size: int, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` where the table says that a backend does not serve."""
    _, dtypes, sizes, _, _ = BACKENDS[name]
    if sizes is not None and head_size not in sizes:
        rule = f"a multiple of {sizes.step} up to {sizes[-1]} (sdpa takes any)"
        raise ValueError(f"attention: head size of {name} must be {rule}, got {head_size}")
    if dtypes is None or device is None or device.type == "meta":
        return
    if device.type not in dtypes:
        rule = f"on {' or '.join(dtypes)} (move the model there, or choose sdpa)"
        raise ValueError(f"attention: tensors of {name} must be {rule}, got {device.type}")
    if dtype is not None and dtype not in dtypes[device.type]:
        rule = f"{' or '.join(map(name_dtype, dtypes[device.type]))} (cast the model, or choose sdpa)"
        raise ValueError(f"attention: tensors of {name} must be {rule}, got {name_dtype(dtype)}")


@lru_cache(maxsize=256)
def fault(attend: Attend, head_size: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with what a function computes for a few strided heads, or None."""
    rows, tokens, heads = 2, 67, 3
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        packed = numbers(rows * tokens * 3 * heads * head_size, device, dtype).view(rows, tokens, 3, heads, head_size)
        return discrepancy(attend, *packed.permute(2, 0, 3, 1, 4))


def numbers(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """So many between -1 and 1, always the same, of which only every 9973rd comes again."""
    period = torch.arange(9973, device=device, dtype=torch.float64).sin().to(dtype)
    return period.repeat(-(-count // len(period)))[:count]


def discrepancy(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What is wrong with what a function computes, or None; of many rows and queries some are compared.

    Its error may be twice that of ``eager`` in the same dtype and one rounding step, and what sums may differ by.
    """
    rows, queries = (some(count, most, q.device) for count, most in ((q.shape[0], 8), (q.shape[-2], 128)))
    try:
        got = attend(q, k, v)[rows][..., queries, :]
    except Exception as caught:  # whatever a package raises
        return f"{type(caught).__name__}: {caught}"
    dtype, q, k, v = q.dtype, q[rows][..., queries, :], k[rows], v[rows]
    exact, low = eager(q.double(), k.double(), v.double()), eager(q, k, v)
    error = (got - exact).abs().max().item()
    # One rounding of the result, and sums over channels and tokens in any order in at least float32.
    wide = torch.promote_types(dtype, torch.float32)
    steps = 2 * torch.finfo(dtype).eps + (q.shape[-1] + k.shape[-2]) * torch.finfo(wide).eps
    budget = 2 * (low.double() - exact).abs().max().item() + steps * exact.abs().max().item()
    # NaN is not within any budget.
    return None if error <= budget else f"an error of {error:.3g}, budget {budget:.3g}"


def some(count: int, most: int, device: torch.device) -> Tensor:
    """Up to ``most`` of ``count`` indices, evenly, with the first and the last."""
    return torch.linspace(0, count - 1, min(count, most), device=device, dtype=torch.float64).round().long()


@cache
def backend_version(name: str) -> str | None:
    """The version of the package of a backend; None for PyTorch, and where it is not known."""
    package = BACKENDS[name].package
    try:
        return None if package is None else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
