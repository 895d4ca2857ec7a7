"""Files that come with the package: the model ``merv-tiny`` and a short clip."""

from pathlib import Path

__all__ = ["sample_clip"]


def sample_clip() -> Path:
    """Path of the bundled clip: 4 s, 320 x 240, H.264; a red ball crosses a room while a blue box rises."""
    return Path(__file__).parent / "clip.mp4"
