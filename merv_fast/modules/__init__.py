"""What stands between the encoders and the language model."""

from merv_fast.modules.architecture import Architecture
from merv_fast.modules.attention import (
    attention,
    attention_choices,
    attention_of,
    attention_shapes,
    attention_versions,
    check_attention,
    set_attention,
)
from merv_fast.modules.attention_choice import AttentionChoice
from merv_fast.modules.fp8 import Fp8Linear, to_fp8
from merv_fast.modules.fusion import build_fusion, convert_fusion_state_dict
from merv_fast.modules.projectors import build_projector
from merv_fast.modules.tail import Tail

__all__ = [
    "Architecture",
    "AttentionChoice",
    "Fp8Linear",
    "Tail",
    "attention",
    "attention_choices",
    "attention_of",
    "attention_shapes",
    "attention_versions",
    "build_fusion",
    "build_projector",
    "check_attention",
    "convert_fusion_state_dict",
    "set_attention",
    "to_fp8",
]
