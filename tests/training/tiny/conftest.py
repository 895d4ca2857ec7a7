import pytest

from merv_fast.training.tiny.recipe import Run

PRETRAINING = {"languagebind": 2, "dinov2": 12, "vivit": 4, "siglip": 12}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of all stages at a size of seconds: too small to learn what lasts."""
    folder = tmp_path_factory.mktemp("run")
    return Run(folder, seed=3, count=32, pretraining=PRETRAINING, word_steps=40, answer_epochs=4, batch=2, processes=1)


@pytest.fixture(scope="session")
def learned(run):
    """The model that came of it."""
    return run()
