"""Configuration, models, processor and loading; importing this registers MERV with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.utils import is_torchvision_available

from merv_fast.models.configuration import MervConfig, MervEncoderConfig
from merv_fast.models.explanation import explain
from merv_fast.models.loading import available_models, load_vid
from merv_fast.models.merv_model import MervModel
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.processing import MervProcessor, MervVideoProcessor
from merv_fast.models.requests import Answer, VisualTokens
from merv_fast.models.video_model import MervVideoModel

__all__ = [
    "Answer",
    "MervConfig",
    "MervForConditionalGeneration",
    "MervModel",
    "MervProcessor",
    "MervVideoModel",
    "MervVideoProcessor",
    "VisualTokens",
    "available_models",
    "explain",
    "load_vid",
]

AutoConfig.register("merv", MervConfig)
AutoConfig.register("merv_encoder", MervEncoderConfig)
AutoModel.register(MervConfig, MervVideoModel)
AutoModelForMultimodalLM.register(MervConfig, MervForConditionalGeneration)
AutoModelForImageTextToText.register(MervConfig, MervForConditionalGeneration)
AutoProcessor.register(MervConfig, MervProcessor)
# transformers offers this class only where torchvision is; nothing else of ours needs torchvision.
if is_torchvision_available():
    AutoVideoProcessor.register(MervConfig, MervVideoProcessor)
