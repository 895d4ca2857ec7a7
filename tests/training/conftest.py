import pytest

from tests.training.small import ANSWERS, conversation, write_clips, write_data


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Sixteen clips."""
    return write_clips(tmp_path_factory.mktemp("clips"), 16)


@pytest.fixture(scope="session")
def data(clips):
    """A data file that asks the same of every clip and wants another answer of each."""
    entries = [conversation(answer, video=clip.name) for clip, answer in zip(clips, ANSWERS, strict=True)]
    return write_data(clips[0].parent, entries)
