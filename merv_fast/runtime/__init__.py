"""How the model is run: encoders side by side, over processes, in parts."""

from merv_fast.runtime.concurrent import ConcurrentEncoders
from merv_fast.runtime.distributed import RankedEncoders

__all__ = ["ConcurrentEncoders", "RankedEncoders"]
