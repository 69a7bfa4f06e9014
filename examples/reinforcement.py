"""Recurrent policies on a task with memory: SB3-contrib's PPO and TorchRL, with a RIN and with what they bring.

    pip install "fused-rin[rl,experiments]"
    python examples/reinforcement.py [--steps 49152] [--out build/reinforcement]     two minutes

A cue is shown in the first of twelve steps, noise follows, and the last action has to say which cue it was: 0.5
without memory, 1 with it. SB3-contrib goes through a batch step by step as soon as an episode starts in it, TorchRL
cuts it into episodes and pads them; a RIN takes the starts as resets, in one call. Each network learns for the same
number of steps, on one thread. Writes results.json and figure.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from fused_rin import RIN
from fused_rin.rl.sb3 import MlpRINPolicy
from fused_rin.rl.torchrl import RINModule
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.libs.gym import GymWrapper
from torchrl.modules import GRUModule, OneHotCategorical, ProbabilisticActor, set_recurrent_mode

UNITS, LENGTH, ENVIRONMENTS, STEPS = 64, 12, 16, 96  # steps of an environment between two updates


class Cue(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-3, 3, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def _observation(self, cue: float) -> np.ndarray:
        noise = float(self.np_random.normal(0, 0.3))
        return np.clip(np.array([cue, noise, self.at == LENGTH - 1], np.float32), -3, 3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at, self.cue = 0, int(self.np_random.integers(2))
        return self._observation(2.0 * self.cue - 1), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        over = self.at == LENGTH - 1
        reward = float(over and int(action) == self.cue)
        self.at += 1
        return self._observation(0.0), reward, over, False, {}


# ---- SB3-contrib


class _AsLSTM(nn.Module):
    """A RIN behind the LSTM's interface."""

    def __init__(self, rnn: RIN) -> None:
        super().__init__()
        self.rnn = rnn
        self.input_size, self.hidden_size, self.num_layers = rnn.input_size, rnn.hidden_size, rnn.num_layers

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, h_n = self.rnn(x, states[0])
        return out, (h_n, states[1])


class LoopPolicy(RecurrentActorCriticPolicy):
    """The same RIN through SB3-contrib's own loop."""

    def __init__(self, observations: Any, actions: Any, schedule: Callable[[float], float], **options: Any) -> None:
        super().__init__(observations, actions, schedule, **options)
        self.lstm_actor = _AsLSTM(RIN(self.features_dim, UNITS, nonlinearity="tanh", skip=0.0))
        self.optimizer = self.optimizer_class(self.parameters(), lr=schedule(1), **self.optimizer_kwargs)


class _Watch(BaseCallback):
    """Where the time goes, and the share of right answers after each round."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []
        self.gathering, self.began = 0.0, 0.0

    def _on_rollout_start(self) -> None:
        self.began = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.gathering += time.perf_counter() - self.began
        self.returns.append(float(np.mean([episode["r"] for episode in self.model.ep_info_buffer or [{"r": 0.5}]])))

    def _on_step(self) -> bool:
        return True


def by_sb3(policy: type, steps: int) -> dict[str, Any]:
    environment = make_vec_env(Cue, n_envs=ENVIRONMENTS, seed=0)
    model = RecurrentPPO(
        policy, environment, n_steps=STEPS, batch_size=STEPS * ENVIRONMENTS // 4, n_epochs=8, learning_rate=3e-3,
        gamma=0.98, ent_coef=0.01, seed=0, device="cpu",
        policy_kwargs={"lstm_hidden_size": UNITS, "shared_lstm": True, "enable_critic_lstm": False, "net_arch": []},
    )  # fmt: skip
    watch, began = _Watch(), time.perf_counter()
    model.learn(steps, callback=watch)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "updates": seconds - watch.gathering, "returns": watch.returns}


# ---- TorchRL


def by_torchrl(recurrent: Any, steps: int) -> dict[str, Any]:
    """An actor and a critic that share `recurrent`; four updates on each batch, with advantages from returns."""
    environment = TransformedEnv(
        SerialEnv(ENVIRONMENTS, lambda: GymWrapper(Cue(), categorical_action_encoding=False)), InitTracker()
    )
    environment.append_transform(recurrent.make_tensordict_primer())
    logits = TensorDictModule(nn.Linear(UNITS, 2), ["features"], ["logits"])
    value = TensorDictModule(nn.Linear(UNITS, 1), ["features"], ["state_value"])
    draw = ProbabilisticActor(logits, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=False)
    network = TensorDictSequential(recurrent, draw)
    learner = TensorDictSequential(recurrent, logits, value)
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    collector = Collector(environment, network, frames_per_batch=STEPS * ENVIRONMENTS, total_frames=steps)
    returns, updates, began = [], 0.0, time.perf_counter()
    for batch in collector:
        done = batch["next", "done"]
        returns.append(float(batch["next", "reward"][done].mean()))
        start = time.perf_counter()
        update(learner, optimizer, batch)
        updates += time.perf_counter() - start
    collector.shutdown()
    return {"seconds": time.perf_counter() - began, "updates": updates, "returns": returns}


def update(learner: TensorDictSequential, optimizer: torch.optim.Optimizer, batch: TensorDictBase) -> None:
    """Clipped policy gradients (Schulman et al. 2017, arXiv 1707.06347) on one batch [environments, time]."""
    reward, done, action = batch["next", "reward"], batch["next", "done"], batch["action"].float()
    target, after = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        after = target[:, t] = reward[:, t] + 0.98 * after * ~done[:, t]
    old = None
    for _ in range(8):
        with set_recurrent_mode(True):
            out = learner(batch.select("observation", "is_init", "recurrent_state").clone())
        log_p = torch.log_softmax(out["logits"], -1)
        chosen = (log_p * action).sum(-1, keepdim=True)
        old = chosen.detach() if old is None else old
        advantage = target - out["state_value"].detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        ratio = (chosen - old).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        loss = 0.5 * (out["state_value"] - target).square().mean() - gain - 0.01 * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 0.5)
        optimizer.step()


def draw_figure(found: dict[str, dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, row in found.items():
        left.plot(np.linspace(0, row["seconds"], len(row["returns"])), row["returns"], label=name)
    left.set(xlabel="seconds", ylabel="right answers", ylim=(0.4, 1.02))
    left.legend(fontsize="small")
    names = list(found)
    right.barh(names[::-1], [found[name]["updates"] for name in names[::-1]])
    right.set(xlabel="seconds in updates")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=49_152)
    parser.add_argument("--out", type=Path, default=Path("build/reinforcement"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    keys: dict[str, Any] = {"in_key": "observation", "out_key": "features"}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "SB3: RIN, resets": lambda: by_sb3(MlpRINPolicy, given.steps),
        "SB3: RIN, its loop": lambda: by_sb3(LoopPolicy, given.steps),
        "SB3: LSTM, its loop": lambda: by_sb3(RecurrentActorCriticPolicy, given.steps),
        "TorchRL: RIN": lambda: by_torchrl(RINModule(3, UNITS, nonlinearity="tanh", skip=0.0, **keys), given.steps),
        "TorchRL: GRU": lambda: by_torchrl(GRUModule(3, UNITS, **keys), given.steps),
    }
    found = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        found[name] = run()
        last = float(np.mean(found[name]["returns"][-3:]))
        print(f"{name:20} {found[name]['seconds']:6.1f} s, {found[name]['updates']:6.1f} in updates, {last:.2f} right")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps({"steps": given.steps, "runs": found}, indent=1) + "\n")
    draw_figure(found, given.out / "figure.png")


if __name__ == "__main__":
    main()
