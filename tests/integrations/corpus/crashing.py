"""A decoder that some file kills."""

import os
import signal

from merv_fast.video.loader import decode_clip


def decode_or_crash(path):
    if path.endswith("1.mp4"):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_clip(path, 32)
