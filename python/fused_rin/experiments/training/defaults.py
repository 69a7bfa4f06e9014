"""What a task is trained with where nothing else is asked for, and the recipes that go further."""

from __future__ import annotations

from typing import Any

# By task; everything else as in `Settings`.
# Adding: a network that still answers at random is easily driven over the edge. One Adam step of 1e-3 can add 0.1 to
# the spectral radius of 100 units, and 1.1^200 is 2e8; hence the long warm-up. And the weights of units that are
# seldom active see gradients near 0, which Adam scales up to full steps until one of them explodes; hence eps, which
# is small against the entries of a gradient of norm 1. (With eps 1e-8 one run in nine was lost, at half the rate.)
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "adding": {"learning_rate": 7e-4, "eps": 3e-5, "schedule": "cosine", "warmup": 0.7, "steps": 2200},
    "digits": {
        **{"input_std": 1.0, "recurrent_std": 0.03, "noise": 0.1},
        **{"schedule": "cosine", "steps": 2400, "batch_size": 64},
    },
    "mnist": {"batch_size": 128, "steps": 4680, "eval_every": 468, "learning_rate": 1e-4},
    "mnist-rows": {"batch_size": 128, "steps": 2340, "eval_every": 468},
    "babi": {"steps": 620, "eval_every": 31},
}

# `--recipe best`: one plain layer past the paper's Table 1. docs/reproduction.md says what each part is for, and what
# it has reached.
_MNIST: dict[str, Any] = {
    **{"hidden_size": 128, "input_std": 0.64, "recurrent_std": 1e-3, "batch_size": 32},
    **{"learning_rate": 3e-3, "recurrent_optimizer": "muon", "bias_rate": 0.005, "schedule": "cosine", "warmup": 0.05},
    **{"clip": 1.0, "ema": 0.999, "log_every": 125, "eval_every": 1875, "checkpoint_every": 125},
}
# By name, task and permute.
RECIPES: dict[str, dict[tuple[str, bool], dict[str, Any]]] = {
    "best": {
        ("mnist", False): {
            **_MNIST,
            **{"recurrent_init": "cycles", "recurrent_cycles": "14,27,28,29", "recurrent_rate": 0.03},
            **{"noise": 0.1, "state_noise": 0.5, "steps": 28 * 1875},
        },
        ("mnist", True): {
            **_MNIST,
            **{"recurrent_init": "shift", "recurrent_rate": 0.06, "state_noise": 0.01, "steps": 24 * 1875},
        },
    }
}
