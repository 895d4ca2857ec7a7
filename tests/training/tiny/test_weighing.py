"""Weights by theme, and the sheets of clips in which an encoder weighs most."""

import pytest

from merv_fast.training.tiny.__main__ import main
from merv_fast.training.tiny.scenes import THEMES
from merv_fast.training.tiny.weighing import activating, by_theme, weigh


@pytest.fixture(scope="module")
def weighed(learned, tmp_path_factory):
    return weigh(learned, tmp_path_factory.mktemp("weighed"), 2, 9)


def test_every_theme_is_weighed(weighed):
    assert [each.scene.theme for each in weighed] == 2 * list(THEMES)
    assert all(sum(each.weights.values()) == pytest.approx(1, abs=1e-3) for each in weighed)
    means = by_theme(weighed)
    first, second = (each.weights for each in weighed if each.scene.theme == "camera")
    assert means["camera"] == pytest.approx({name: (first[name] + second[name]) / 2 for name in first})


def test_the_sheet_shows_the_clips_with_most_weight(weighed, monkeypatch):
    from merv_fast.training.tiny import weighing

    shown = []
    monkeypatch.setattr(weighing, "contact_sheet", lambda title, rows: shown.extend([title, *rows]))
    activating(weighed, "vivit", 3)
    title, *rows = shown
    weights = sorted((each.weights["vivit"] for each in weighed), reverse=True)
    assert title == "vivit weighs most"
    assert [row.name for row in rows] == [f"{weight:.3f}" for weight in weights[:3]]
    assert all(row.frames.shape == (8, 64, 64, 3) for row in rows)
    best = max(weighed, key=lambda each: each.weights["vivit"])
    assert rows[0].detail.startswith(best.scene.theme)


def test_the_command_draws_a_sheet_for_each_encoder(run, learned, tmp_path, capsys):
    learned.save_pretrained(tmp_path / "model")
    main(["weights", str(tmp_path / "sheets"), "--model", str(tmp_path / "model"), "--clips", "1"])
    names = {"languagebind", "dinov2", "vivit", "siglip"}
    assert {file.name for file in (tmp_path / "sheets").iterdir()} == {f"merv-tiny-{name}.png" for name in names}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "sheets").iterdir())
    assert "counting" in capsys.readouterr().out
