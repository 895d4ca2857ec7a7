"""What stands between the encoders and the language model."""

from merv_fast.modules.architecture import Architecture
from merv_fast.modules.attention import attention
from merv_fast.modules.fusion import build_fusion, convert_fusion_state_dict
from merv_fast.modules.projectors import build_projector
from merv_fast.modules.tail import Tail

__all__ = ["Architecture", "Tail", "attention", "build_fusion", "build_projector", "convert_fusion_state_dict"]
