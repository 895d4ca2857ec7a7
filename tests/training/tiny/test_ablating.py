"""Ablations: each variant has the parts that its name says, and is trained and asked as the others are."""

import json

import numpy as np
import pytest

from merv_fast.training.tiny import __main__ as command
from merv_fast.training.tiny import ablating
from merv_fast.training.tiny.ablating import VARIANTS, Ablation, ablate
from merv_fast.training.tiny.answering import Score
from merv_fast.training.tiny.questions import KINDS

TOKENS = {"merv-tiny": 128, "vivit alone": 128, "concat": 512, "learnable W": 128, "1 token": 8, "blind": 128}
FUSIONS = {"concat": "concat", "learnable W": "scalar"}


@pytest.fixture
def trained(run, learned, monkeypatch):
    """What each variant's model was, and what it was shown in training."""
    seen = []
    learn = ablating.learn_to_answer

    def spy(model, tokenizer, clips, features, *args, **kwargs):
        seen.append((model.config, [np.array(each) for each in features]))
        return learn(model, tokenizer, clips, features, *args, **kwargs)

    monkeypatch.setattr(ablating, "learn_to_answer", spy)
    return seen


def test_variants_are_what_they_are_called(run, trained):
    ablations = list(ablate(run, 24, 5, 1, list(TOKENS)))
    assert [each.tokens for each in ablations] == list(TOKENS.values())
    counts = [{kind: score.asked for kind, score in each.scores.items()} for each in ablations]
    assert len(counts[0]) > len(KINDS) / 2
    assert all(count == counts[0] for count in counts)
    whole = run.features()
    for (config, features), name in zip(trained, TOKENS, strict=True):
        assert config.feature_fusion == FUSIONS.get(name, "cross_attention_avg_lq")
        encoders = ["vivit"] if name == "vivit alone" else ["languagebind", "dinov2", "vivit", "siglip"]
        assert config.encoders == encoders
        for given, encoder in zip(features, encoders, strict=True):
            right = whole[list(run.pretraining).index(encoder)]
            assert np.array_equal(given, np.zeros_like(right) if name == "blind" else right)


def test_one_variant_for_each_part():
    changes = [str(variant) for variant in VARIANTS.values()]
    assert len(VARIANTS) == len(set(changes)) == 11


def test_the_command_keeps_the_scores(tmp_path, monkeypatch, capsys):
    scores = {kind: Score(10 * place, place**2, 0.5) for place, kind in enumerate(KINDS, 1)}
    monkeypatch.setattr(command, "ablate", lambda *args: (Ablation(8, scores) for _ in VARIANTS))
    command.main(["ablate", str(tmp_path)])
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert list(rows) == list(VARIANTS)
    # 1 of 10, 4 of 20, 9 of 30, ...
    assert rows["blind"] == pytest.approx(
        {"visual tokens": 8, "questions": 660, **{kind: place / 10 for place, kind in enumerate(KINDS, 1)}, "mean": 0.6}
    )
    assert "vivit alone" in capsys.readouterr().out
