"""Public packages that use torch.nn.RNN, run unmodified after `fused_rin.replace_rnn`.

Not part of `make test`: they bring many dependencies. `make compat` installs them apart from everything and runs this.
speechbrain is not among them: it imports torchaudio, whose builds need a CUDA build of torch and this one is for CPUs.
Where both are there (`pip install speechbrain torchaudio`), its test runs too.
"""

from __future__ import annotations

import copy

import fused_rin
import numpy
import pandas
import pytest
import torch
from fused_rin import RIN


def _series(count: int = 3, length: int = 80) -> pandas.DataFrame:
    time = numpy.arange(length)
    frames = [
        pandas.DataFrame({
            "unique_id": str(i),
            "ds": pandas.date_range("2020-01-01", periods=length, freq="D"),
            "y": numpy.sin(time / (3 + i)) + 0.1 * i,
        })
        for i in range(count)
    ]  # fmt: skip
    return pandas.concat(frames, ignore_index=True)


def _replaced(module: torch.nn.Module, skip: float, count: int = 1) -> torch.nn.Module:
    report = fused_rin.replace_rnn(module, skip=skip, report=True)
    assert len(report.replaced) == count
    assert not report.left_alone
    assert any(isinstance(part, RIN) for part in module.modules())
    assert not any(isinstance(part, torch.nn.RNN) for part in module.modules())
    return module


@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_sktime_network(activation, bidirectional, skip):
    from sktime.networks.rnn import RNNNetworkTorch

    torch.manual_seed(0)
    hidden = torch.nn.ReLU() if activation == "relu" else torch.nn.Tanh()
    theirs = RNNNetworkTorch(
        input_size=3, num_classes=4, hidden_dim=24, n_layers=2, activation=None, activation_hidden=hidden,
        bias=True, init_weights=True, dropout=0.0, fc_dropout=0.0, bidirectional=bidirectional,
    )  # fmt: skip
    ours = _replaced(copy.deepcopy(theirs), skip)
    x, labels = torch.randn(16, 40, 3), torch.randint(0, 4, (16,))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    losses = []
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-4)
    assert losses[4] < losses[0]


@pytest.mark.parametrize("skip", [0.0, 1.0])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_speechbrain_rnn(nonlinearity, bidirectional, skip):
    """Its block packs padded batches by their relative lengths."""
    try:
        from speechbrain.nnet.RNN import RNN
    except (ImportError, OSError) as error:
        pytest.skip(f"speechbrain or the torchaudio it imports cannot be loaded: {error}")

    torch.manual_seed(0)
    theirs = RNN(24, input_shape=(6, 40, 5), nonlinearity=nonlinearity, num_layers=2, bidirectional=bidirectional)
    ours = _replaced(copy.deepcopy(theirs), skip)
    x, lengths = torch.randn(6, 40, 5), torch.tensor([1.0, 0.5, 0.7, 0.2, 1.0, 0.9])
    for arguments in ((x,), (x, None, lengths)):
        for a, b in zip(ours(*arguments), theirs(*arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    losses = []
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = net(x, lengths=lengths)[0].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-4)
    assert losses[4] < losses[0]


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_darts_rnn_model(skip, tmp_path):
    """Two models, fitted for an epoch from one seed; one has its net replaced, and both go on."""
    from darts import TimeSeries
    from darts.models import RNNModel

    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    frame = _series(1)
    series = TimeSeries.from_values(frame["y"].to_numpy(dtype=numpy.float32))
    model, other = (
        RNNModel(
            input_chunk_length=12, model="RNN", hidden_dim=16, n_rnn_layers=2, dropout=0.0, training_length=20,
            batch_size=16, n_epochs=1, random_state=0, work_dir=str(tmp_path / name), pl_trainer_kwargs=quiet,
            optimizer_cls=torch.optim.SGD, optimizer_kwargs={"lr": 1e-2},
        ).fit(series)
        for name in ("theirs", "ours")
    )  # fmt: skip
    _replaced(other.model, skip)
    # Every call draws a seed from the model's own generator, so both are called equally often.
    before = model.predict(6).values()
    numpy.testing.assert_allclose(other.predict(6).values(), before, rtol=1e-4, atol=1e-5)
    for each in (model, other):
        torch.manual_seed(1)
        each.fit(series, epochs=3)
    after = model.predict(6).values()
    assert numpy.abs(after - before).max() > 1e-3
    numpy.testing.assert_allclose(other.predict(6).values(), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recurrent", [False, True])
def test_neuralforecast_rnn(recurrent):
    """Built, replaced, then fitted and asked by the package's own trainer."""
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MAE
    from neuralforecast.models import RNN

    frame, results = _series(), []
    for replace in (False, True):
        model = RNN(
            h=4, input_size=16, encoder_hidden_size=16, encoder_n_layers=2, decoder_hidden_size=16, loss=MAE(),
            recurrent=recurrent, max_steps=6, batch_size=3, random_seed=1, scaler_type="standard", accelerator="cpu",
            enable_progress_bar=False, logger=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        if replace:
            _replaced(model, skip=0.0)
        forecaster = NeuralForecast(models=[model], freq="D")
        forecaster.fit(frame)
        losses = [loss for _, loss in forecaster.models[0].train_trajectories]
        results.append((losses, forecaster.predict()["RNN"].to_numpy()))
    assert len(results[0][0]) == 6
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    numpy.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)
