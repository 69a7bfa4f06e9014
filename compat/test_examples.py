"""PyTorch's own examples of nn.RNN, as scripts of ours: after `replace_rnn` they train to the same losses."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_rin import load_rnn_state_dict, replace_rnn, restore_rnn

from compat import name_classifier, word_language_model


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are so small that on a busy machine torch's threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_of_a_trained_word_language_model(tied):
    """As docs/migration.md has it: back into nn.RNN as they are, and into a model with a skip converted."""

    def model():
        return word_language_model.Model(tied=tied).double()

    torch.manual_seed(0)
    start = model()
    ours = replace_rnn(copy.deepcopy(start))
    word_language_model.train(ours, 1, 4_000)
    checkpoint, unseen = ours.state_dict(), word_language_model.corpus(800, 2)
    loss = word_language_model.evaluate(ours, unseen)
    assert loss != pytest.approx(word_language_model.evaluate(start, unseen), rel=1e-3)

    theirs = model()
    assert list(checkpoint) == list(theirs.state_dict())
    theirs.load_state_dict(checkpoint)
    assert word_language_model.evaluate(theirs, unseen) == pytest.approx(loss, rel=1e-12)

    with_skip = replace_rnn(model(), skip=1.0)
    with pytest.raises(RuntimeError, match="load_rnn_state_dict"):
        with_skip.load_state_dict(checkpoint)
    load_rnn_state_dict(with_skip, checkpoint)
    assert word_language_model.evaluate(with_skip, unseen) == pytest.approx(loss, rel=1e-12)

    restored = restore_rnn(ours)
    assert type(restored.rnn) is torch.nn.RNN
    assert (restored.decoder.weight is restored.encoder.weight) == tied
    assert word_language_model.evaluate(restored, unseen) == pytest.approx(loss, rel=1e-12)


def test_name_classifier():
    theirs, ours = name_classifier.compare(5, 300, torch.float64)
    assert len(ours.losses) == 1500
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-8)
    assert ours.correct == theirs.correct
    assert sum(ours.losses[-300:]) < 0.9 * sum(ours.losses[:300])
