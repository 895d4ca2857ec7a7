"""File to uint8 frames, and frames to each encoder's input."""

from merv_fast.video.base import Video, VideoLimits
from merv_fast.video.loader import VideoItem, VideoLoader
from merv_fast.video.open import load_frames, open_video
from merv_fast.video.prepare import Recipe, prepare
from merv_fast.video.sampling import every, sample_indices

__all__ = [
    "Recipe",
    "Video",
    "VideoItem",
    "VideoLimits",
    "VideoLoader",
    "every",
    "load_frames",
    "open_video",
    "prepare",
    "sample_indices",
]
