"""SHA-256 of what decides a result: files, tensors, the weights of a module.

SHA-256 because processors have instructions for it, which makes it faster than BLAKE2 in OpenSSL's hands.
"""

import hashlib
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from merv_fast.versions import Versions

__all__ = ["FileDigests", "WeightDigests", "digest_json", "digest_tensor", "digest_tensors", "raw_bytes"]

SETTLED_NS = 2 * 10**9
"""A file that was written to more recently could be written to again without its time stamps showing it."""


def digest_json(value: Any) -> str:
    """Of a value that JSON can hold; others count by their ``str``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """Of dtype, shape and elements, wherever they are."""
    return digest_json([str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw_bytes(tensor).data).hexdigest()])


def digest_tensors(named: Iterable[tuple[str, Tensor]], each: Callable[..., Iterable[str]] = map) -> str:
    """Of tensors and their names, in any order.

    Args:
        named: names and tensors.
        each: what applies a function to a sequence, such as the ``map`` of a pool.
    """
    ordered = sorted(named, key=lambda pair: pair[0])
    digests = each(digest_tensor, [tensor for _, tensor in ordered])
    return digest_json([[name, digest] for (name, _), digest in zip(ordered, digests, strict=True)])


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The elements of a tensor, row by row, as bytes on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class FileDigests:
    """Digests of files by content, remembered as long as a file's time stamps, size and inode stay the same.

    Args:
        most: files that are remembered.
    """

    def __init__(self, most: int = 4096) -> None:
        self.most = most
        self._known: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._lock = Lock()

    def file(self, path: str | os.PathLike[str]) -> str:
        """Of the bytes of a regular file.

        Raises:
            OSError: it cannot be read, or is no regular file.
        """
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{os.fspath(path)} is not a regular file")
            signature = signed(status)
            with self._lock:
                if signature in self._known:
                    self._known.move_to_end(signature)
                    return self._known[signature]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            same = signed(os.fstat(file.fileno())) == signature
        if same and time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
            with self._lock:
                self._known[signature] = digest
                if len(self._known) > self.most:
                    self._known.popitem(last=False)
        return digest

    def folder(self, path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> str:
        """Of the names and bytes of the files in a folder whose names end so, subfolders left out.

        Raises:
            OSError: one cannot be read.
        """
        names = sorted(name for name in os.listdir(path) if name.lower().endswith(suffixes))
        return digest_json([[name, self.file(Path(path, name))] for name in names])


class WeightDigests:
    """Digests of modules by the bytes of their parameters and buffers, remembered until one is written to.

    PyTorch's version counters tell; writes through ``parameter.data`` are not counted, so call `forget` after those.
    Tensors without counters (made in inference mode, or of a subclass) are digested every time.

    Computing one reads all weights once, on as many threads as there are processors.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[Versions, str]] = WeakKeyDictionary()
        self._lock = Lock()

    def module(self, module: nn.Module) -> str:
        """Of every parameter and buffer, with its name, dtype and shape."""
        named = list(module.named_parameters()) + list(module.named_buffers())
        tensors = [tensor for _, tensor in named]
        with self._lock:
            versions, digest = self._known.get(module, (None, ""))
            if versions is None or not versions.same(tensors):
                versions = Versions(tensors)
                with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                    digest = digest_tensors(named, pool.map)
                self._known[module] = versions, digest
            return digest

    def forget(self, module: nn.Module) -> None:
        """Digest it anew when it is asked for next."""
        with self._lock:
            self._known.pop(module, None)


def without_waiting(path: str, flags: int) -> int:
    """Open a file, and do not wait for a writer if it is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def signed(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
