"""The library's own exceptions; everything else it raises is a ValueError, TypeError or RuntimeError."""

__all__ = ["CheckpointError", "MervFastError", "VideoError"]


class MervFastError(Exception):
    """Base of the library's own exceptions."""


class VideoError(MervFastError):
    """A video cannot be read as asked; the message is ``<path>: <reason>``."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Survive a trip between processes."""
        return type(self), (self.path, self.reason)


class CheckpointError(MervFastError):
    """A checkpoint does not fit the model; the message lists unknown, missing and misshapen keys."""
