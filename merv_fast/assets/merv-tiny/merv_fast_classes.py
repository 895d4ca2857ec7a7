"""The classes of this model are those of merv_fast: pip install merv-fast."""

from merv_fast.models import (  # noqa: F401
    MervConfig,
    MervForConditionalGeneration,
    MervProcessor,
    MervVideoModel,
    MervVideoProcessor,
)
