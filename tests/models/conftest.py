import numpy as np
import pytest

from tests.models.golden_run import write_run
from tests.models.random_merv import build_tiny


def write_clip(path, frames=40, size=(96, 128), seed=0):
    """An H.264 clip whose frames all differ; ``size`` is (height, width)."""
    import av  # which a GPU machine may lack

    noise = np.random.default_rng(seed).integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            picture = np.roll(noise, index, axis=1).repeat(16, axis=0).repeat(16, axis=1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Three clips of different sizes and lengths."""
    folder = tmp_path_factory.mktemp("clips")
    sizes = [(40, (96, 128)), (75, (128, 96)), (20, (64, 64))]
    return [write_clip(folder / f"{i}.mp4", frames, size, seed=i) for i, (frames, size) in enumerate(sizes)]


@pytest.fixture(scope="session")
def tiny():
    """A model with random weights, whose answers go on."""
    return build_tiny()


@pytest.fixture(scope="session")
def golden_run(tmp_path_factory):
    """What loads the first golden run from disk."""
    return write_run(tmp_path_factory.mktemp("golden"))
