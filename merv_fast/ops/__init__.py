"""The operators: each a contract with a PyTorch reference, registered as torch.ops.merv_fast.<name>."""

from merv_fast.ops._native import load_native
from merv_fast.ops.fuse_encoders import fuse_encoders
from merv_fast.ops.pool_project import pool_project
from merv_fast.ops.pool_project_fuse import pool_project_fuse
from merv_fast.ops.pool_tokens import pool_tokens
from merv_fast.ops.resample_frames import resample_frames
from merv_fast.ops.resample_normalise import resample_normalise
from merv_fast.ops.temporal_attention import temporal_attention

__all__ = [
    "fuse_encoders",
    "pool_project",
    "pool_project_fuse",
    "pool_tokens",
    "resample_frames",
    "resample_normalise",
    "temporal_attention",
]

load_native()
