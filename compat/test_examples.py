"""PyTorch's own examples of nn.RNN, as scripts of ours: after `replace_rnn` they train to the same losses."""

from __future__ import annotations

import pytest
import torch

from compat import name_classifier, word_language_model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["tanh", "relu"])
def test_word_language_model(kind, tied):
    """Dropout masks included, and the whole module saved, and loaded with weights_only."""
    theirs, ours = word_language_model.compare(2, 8_000, tied, kind, torch.float64)
    assert len(ours.losses) == len(theirs.losses) > 20
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-8)
    assert ours.validation == pytest.approx(theirs.validation, rel=1e-8)
    assert ours.validation[-1] < 5.3  # log(200), of a model that knows nothing
    assert ours.reloaded == ours.validation[-1]


def test_name_classifier():
    theirs, ours = name_classifier.compare(5, 300, torch.float64)
    assert len(ours.losses) == 1500
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-8)
    assert ours.correct == theirs.correct
    assert sum(ours.losses[-300:]) < 0.9 * sum(ours.losses[:300])
