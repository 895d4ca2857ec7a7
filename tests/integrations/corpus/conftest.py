import pytest

from merv_fast import load_vid
from tests.video.clips import write_clip


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Clips of different sizes, in a folder with other files."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(8):
        write_clip(folder / f"{number}.mp4", count=33 + number, height=32 + 4 * number, width=48)
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.fixture(scope="session")
def vidlm():
    return load_vid("merv-tiny").eval()
