"""Policies for SB3-contrib and TorchRL, each against the way through time that it replaces."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fused_rin import PLRNN, RIN, DeepTransitionRIN, LeakyRNN
from torch import nn

RNNS = {
    "rin": (RIN, {"nonlinearity": "tanh", "skip": 0.5}),
    "leaky": (LeakyRNN, {"alpha": 0.3}),
    "deep": (DeepTransitionRIN, {"nonlinearity": "tanh"}),
}


class Calls:
    """How often a module was called, and with how many steps."""

    def __init__(self, module: nn.Module) -> None:
        self.steps: list[int] = []
        module.register_forward_pre_hook(lambda _, args: self.steps.append(args[0].shape[0]))


# ---- SB3-contrib


class AsLSTM(nn.Module):
    """A RIN behind the LSTM's interface, for SB3-contrib's own way."""

    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.rnn, self.input_size = rnn, rnn.input_size

    def forward(self, x: Any, states: Any) -> Any:
        out, h_n = self.rnn(x, states[0])
        return out, (h_n, states[1])


def cue_environment() -> Any:
    gymnasium = pytest.importorskip("gymnasium", reason="the extra `rl` was not installed")

    class Cue(gymnasium.Env):
        """+1 or -1 is shown in the first of five steps; the last action is to say which it was."""

        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.step_number, self.cue = 0, int(self.np_random.integers(2))
            return torch.tensor([2.0 * self.cue - 1, 0]).numpy(), {}

        def step(self, action: Any) -> Any:
            self.step_number += 1
            over = self.step_number == 5
            reward = float(over and action == self.cue)
            return torch.tensor([0.0, self.step_number == 4]).numpy(), reward, over, False, {}

    return Cue


@pytest.fixture(scope="module")
def sb3() -> Any:
    pytest.importorskip("sb3_contrib", reason="the extra `rl` was not installed")
    from fused_rin.rl import sb3

    return sb3


@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_sequence_is_one_call_and_equals_the_loop(sb3, kind, layers):
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    make, options = RNNS[kind]
    torch.manual_seed(0)
    rnn = make(3, 8, layers, dtype=torch.float64, **options)
    for parameter in rnn.parameters():
        nn.init.normal_(parameter, std=0.3)
    for steps, sequences in ((1, 4), (7, 5)):
        features = torch.randn(steps * sequences, 3, dtype=torch.float64, requires_grad=True)
        state = torch.randn(layers, sequences, 8, dtype=torch.float64, requires_grad=True)
        starts = (torch.rand(steps * sequences) < 0.4).double()
        calls, results = Calls(rnn), []
        for process, module in (
            (sb3.MlpRINPolicy._process_sequence, rnn),
            (RecurrentActorCriticPolicy._process_sequence, AsLSTM(rnn)),
        ):
            out, (h_n, second) = process(features, (state, torch.zeros_like(state)), starts, module)
            assert not second.any()
            grads = torch.autograd.grad(
                (out * torch.arange(8.0)).sum() + h_n.square().sum(), [features, state, *rnn.parameters()]
            )
            results.append((out, h_n, *grads))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert calls.steps == [steps] + [1] * steps


@pytest.mark.parametrize("shared", [False, True])
def test_recurrent_ppo_learns_with_it_and_comes_back_from_a_file(sb3, shared, tmp_path):
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    environment = make_vec_env(cue_environment(), n_envs=8, seed=0)
    arguments = {"lstm_hidden_size": 16, "shared_lstm": shared, "enable_critic_lstm": not shared, "net_arch": []}
    model = RecurrentPPO(
        sb3.MlpRINPolicy, environment, n_steps=40, batch_size=80, n_epochs=6, learning_rate=5e-3, gamma=0.9, seed=0,
        ent_coef=0.01, policy_kwargs=arguments, device="cpu",
    )  # fmt: skip
    assert type(model.policy.lstm_actor) is RIN
    optimized = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.policy.parameters()}
    calls = Calls(model.policy.lstm_actor)
    model.learn(40 * 8)
    updates = [steps for steps in calls.steps if steps > 1]
    assert len(updates) == 4 * 6, "one call for each of an update's batches"
    model.learn(40 * 8 * 25)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    assert sum(returns) / len(returns) > 0.9, "0.5 without memory"

    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    again = RecurrentPPO.load(tmp_path / "model", device="cpu")
    policy = sb3.MlpRINPolicy.load(tmp_path / "policy", device="cpu")
    observation = environment.reset()
    expected, state = model.predict(observation, deterministic=True)
    for other in (again, policy):
        actions, others = other.predict(observation, deterministic=True)
        assert (actions == expected).all()
        assert (others[0] == state[0]).all()


def test_other_observations_and_networks(sb3):
    from gymnasium import spaces

    image = spaces.Box(0, 255, (1, 36, 36), dtype="uint8")
    for kind, observations in (
        (sb3.CnnRINPolicy, image),
        (sb3.MultiInputRINPolicy, spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": image})),
    ):
        policy = kind(
            observations, spaces.Discrete(2), lambda _: 1e-3, lstm_hidden_size=8, n_lstm_layers=2, rnn_class=LeakyRNN,
            lstm_kwargs={"alpha": 0.2},
        )  # fmt: skip
        assert type(policy.lstm_critic) is LeakyRNN
        _, state = policy.predict(observations.sample())
        assert state[0].shape == (2, 1, 8)
    make = functools.partial(sb3.MlpRINPolicy, spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: 1e-3)
    with pytest.raises(TypeError, match=r"rnn_class must be a recurrent module of fused_rin, got .*LSTM"):
        make(rnn_class=nn.LSTM)
    with pytest.raises(ValueError, match="lstm_kwargs must not have batch_first"):
        make(lstm_kwargs={"batch_first": True})


# ---- TorchRL


@pytest.fixture(scope="module")
def torchrl() -> Any:
    pytest.importorskip("torchrl", reason="the extra `rl` was not installed")
    from fused_rin.rl import torchrl

    return torchrl


@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_rollout_and_its_batch_agree(torchrl, kind, layers):
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.envs import InitTracker, SerialEnv, TransformedEnv
    from torchrl.envs.libs.gym import GymWrapper
    from torchrl.modules import set_recurrent_mode

    make, options = RNNS[kind]
    torch.manual_seed(0)
    module = torchrl.RINModule(
        2, 8, layers, rnn_class=make, in_key="observation", out_key="features", **options
    )  # fmt: skip
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    cue = cue_environment()
    environment = TransformedEnv(SerialEnv(3, lambda: GymWrapper(cue())), InitTracker())
    environment.append_transform(module.make_tensordict_primer())
    head = nn.Sequential(nn.Linear(8, 2), nn.Softmax(-1))
    act = TensorDictModule(lambda f: torch.nn.functional.one_hot(head(f).argmax(-1), 2), ["features"], ["action"])
    calls = Calls(module.rnn)
    batch = environment.rollout(13, TensorDictSequential(module, act), break_when_any_done=False)
    assert calls.steps == [1] * 13
    assert batch["is_init"].sum() == 3 * 3
    step_by_step, states = batch["features"], batch["next", "recurrent_state"]
    with set_recurrent_mode(True):
        again = module(batch.clone())
    assert calls.steps[13:] == [13]
    torch.testing.assert_close(again["features"], step_by_step)
    torch.testing.assert_close(again["next", "recurrent_state"][:, -1], states[:, -1])
    if layers == 1:
        torch.testing.assert_close(again["next", "recurrent_state"], states)
    # One trajectory without a batch dimension, and several of them.
    with set_recurrent_mode(True):
        torch.testing.assert_close(module(batch[1].clone())["features"], step_by_step[1])
        stacked = torch.stack([batch, batch.flip(0)])
        torch.testing.assert_close(module(stacked)["features"][1].flip(0), step_by_step)


def test_gradients_do_not_cross_the_start_of_an_episode(torchrl):
    from tensordict import TensorDict

    module = torchrl.RINModule(
        2, 8, in_keys=["x", "h"], out_keys=["y", ("next", "h")], nonlinearity="tanh", default_recurrent_mode=True
    )
    x = torch.randn(3, 6, 2, requires_grad=True)
    is_init = torch.zeros(3, 6, 1, dtype=torch.bool)
    is_init[:, 4] = True
    module(TensorDict({"x": x, "is_init": is_init}, [3, 6]))["y"][:, 5].sum().backward()
    assert not x.grad[:, :4].any()
    assert x.grad[:, 4:].all()


def test_wrong_arguments_of_the_module(torchrl):
    make = functools.partial(torchrl.RINModule, in_key="x", out_key="y")
    with pytest.raises(ValueError, match="input_size and hidden_size must be given, or rnn"):
        make(3)
    with pytest.raises(ValueError, match="rnn cannot be given with the arguments of a new one"):
        make(3, 4, rnn=RIN(3, 4))
    with pytest.raises(ValueError, match="batch_first=False, bidirectional=False and return_sequences=True, got True"):
        make(rnn=RIN(3, 4, batch_first=True))
    with pytest.raises(ValueError, match="either in_key or in_keys must be given, got None and None"):
        torchrl.RINModule(3, 4, out_key="y")
    with pytest.raises(ValueError, match="out_keys must be two, of output and state"):
        torchrl.RINModule(3, 4, in_key="x", out_keys=["y"])
    with pytest.raises(ValueError, match="the state must be written to"):
        torchrl.RINModule(3, 4, in_key="x", out_keys=["y", "z"]).make_tensordict_primer()
    assert isinstance(make(rnn=PLRNN(3, 4)).rnn, PLRNN)
