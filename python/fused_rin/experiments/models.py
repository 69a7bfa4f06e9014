"""Models: a recurrent network, and a linear layer that reads its last state. Initialised as the paper does.

arXiv 1801.06105 draws W and U of its networks from N(0, 0.001^2) ("similar to Le et al. 2015"; read as a
standard deviation, see `Settings`), sets the recurrent matrix of the IRNN to the identity and every bias to
0, and gives the LSTM Glorot-uniform input weights and orthogonal recurrent ones. The GRU and the tanh RNN,
which it does not have, get the LSTM's. The reading layer is torch.nn.Linear as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_rin import RIN, DeepTransitionRIN

# "tanh" is the function of "rnn" on our kernels; the others but "rnn", "lstm" and "gru" run on them, too.
MODELS = ("rin", "rin-dt", "irnn", "tanh", "rnn", "lstm", "gru")
RECURRENT_INITS = ("normal", "shift", "cycles")
IDENTITY_FIXED = ("rin", "rin-dt")  # what they train is U = V - I
STATE_GIVEN = ("rin", "rin-dt", "irnn", "tanh", "rnn", "gru")  # they take a first state that is one tensor


Recurrent = nn.RNNBase  # torch.nn.RNN's call, and a hidden_size


class SequenceModel(nn.Module):
    """[T, B, input_size] -> [B, output_size]: `rnn` over the sequence, `head` on the last layer's last
    state. The first state h0 [num_layers, B, hidden_size] is zero where it is not given.
    """

    def __init__(self, rnn: Recurrent, output_size: int):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, output_size)

    def forward(self, x: Tensor, h0: Tensor | None = None) -> Tensor:
        return self.head(last_state(self.rnn(x) if h0 is None else self.rnn(x, h0)))


class QuestionModel(nn.Module):
    """The paper's network for bAbI: an RNN over the story and one over the question; a third one reads both outputs.

    "Both outputs are concatenated" is read as: in time, the story's states, then the question's.

    Args:
        make_rnn: (input_size) -> a recurrent network with the signature of torch.nn.RNN.
        vocabulary: words, the padding 0 included.
    """

    EMBEDDING = 200

    def __init__(self, make_rnn: Callable[[int], Recurrent], vocabulary: int, output_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, self.EMBEDDING, padding_idx=0)
        self.story, self.question = make_rnn(self.EMBEDDING), make_rnn(self.EMBEDDING)
        self.reader = make_rnn(self.story.hidden_size)
        self.head = nn.Linear(self.story.hidden_size, output_size)

    def forward(self, story: Tensor, question: Tensor) -> Tensor:
        """story [T, B] and question [Q, B], word numbers -> [B, output_size]."""
        read = [rnn(self.embedding(words))[0] for rnn, words in ((self.story, story), (self.question, question))]
        return self.head(last_state(self.reader(torch.cat(read))))


def last_state(result: tuple[Tensor, Any]) -> Tensor:
    """The last layer's last state, [B, hidden_size], of what a recurrent network returns."""
    state = result[1]
    return (state[0] if isinstance(state, tuple) else state)[-1]


def make_rnn(
    name: str,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    input_std: float = 1e-3,
    recurrent_std: float = 1e-3,
    recurrent_init: str = "normal",
    cycles: Sequence[int] = (),
) -> Recurrent:
    """A recurrent network by its name in `MODELS`, its weights drawn from torch's global generator.

    Args:
        input_std: standard deviation of the input weights of RIN, RIN-DT and IRNN.
        recurrent_std: standard deviation of U.
        recurrent_init: "normal", or for a RIN "shift": V = U + I starts as a cyclic shift of the units (plus
            the normal part). The matrices that keep the norm of every non-negative state, and keep it
            non-negative, are the permutations. Of those the identity adds up all inputs alike, whenever they
            come; in the cycle (as in the simple cycle reservoirs of Rodan and Tino, 10.1109/TNN.2010.2089641)
            a state tells from the first step on when an input came, modulo hidden_size. "cycles": V is several
            of them side by side, and the identity.
        cycles: of "cycles", the lengths; the units that are left start with the identity.
    """
    makers: dict[str, Callable[[], Recurrent]] = {
        "rin": lambda: RIN(input_size, hidden_size, num_layers),
        "rin-dt": lambda: DeepTransitionRIN(input_size, hidden_size, num_layers),
        "irnn": lambda: RIN(input_size, hidden_size, num_layers, skip=0.0),
        "tanh": lambda: RIN(input_size, hidden_size, num_layers, nonlinearity="tanh", skip=0.0),
        "rnn": lambda: nn.RNN(input_size, hidden_size, num_layers, nonlinearity="tanh"),
        "lstm": lambda: nn.LSTM(input_size, hidden_size, num_layers),
        "gru": lambda: nn.GRU(input_size, hidden_size, num_layers),
    }
    rnn = makers[name]()
    for parameter_name, parameter in rnn.named_parameters():
        if parameter_name.startswith("bias"):
            nn.init.zeros_(parameter)
            continue
        recurrent = parameter_name.startswith(("weight_hh", "weight_deep"))
        for gate in parameter.view(-1, hidden_size, parameter.shape[-1]):
            if name == "irnn" and recurrent:
                nn.init.eye_(gate)
            elif name in ("rin", "rin-dt", "irnn"):
                nn.init.normal_(gate, std=recurrent_std if recurrent else input_std)
                if recurrent and recurrent_init != "normal":
                    _add_cycles(gate, (hidden_size,) if recurrent_init == "shift" else cycles)
            elif recurrent:
                nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(gate)
    return rnn


def _add_cycles(u: Tensor, lengths: Sequence[int]) -> None:
    """Makes U + I of U = 0 a permutation with these cycles: each unit's state goes to the next one of its cycle."""
    first = 0
    with torch.no_grad():
        for length in lengths:
            block = u[first : first + length, first : first + length]
            identity = torch.eye(length)
            block += identity.roll(1, 0) - identity
            first += length


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
