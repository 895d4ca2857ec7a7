"""What was computed of a video, kept in memory and on disk."""

from merv_fast.runtime.cache.video_cache import VideoCache

__all__ = ["VideoCache"]
