"""Models: a recurrent network, and a linear layer that reads its last state. Initialised as the paper does.

arXiv 1801.06105 draws W and U of its networks from N(0, 0.001^2) ("similar to Le et al. 2015"; read as a
standard deviation, see `Settings`), sets the recurrent matrix of the IRNN to the identity and every bias to
0, and gives the LSTM Glorot-uniform input weights and orthogonal recurrent ones. The GRU and the tanh RNN,
which it does not have, get the LSTM's. The reading layer is torch.nn.Linear as it comes.
"""

from __future__ import annotations

from torch import Tensor, nn

from fused_rin import RIN

MODELS = ("rin", "irnn", "rnn", "lstm", "gru")


class SequenceModel(nn.Module):
    """[T, B, input_size] -> [B, output_size]: `rnn` over the sequence, `head` on the last layer's last
    state.
    """

    def __init__(self, rnn: nn.RNNBase, output_size: int):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        state = self.rnn(x)[1]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


def build_model(
    name: str,
    input_size: int,
    output_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    input_std: float = 1e-3,
    recurrent_std: float = 1e-3,
) -> SequenceModel:
    """A model by its name in `MODELS`, drawn from torch's global generator.

    Args:
        input_std: standard deviation of the input weights of `rin` and `irnn`.
        recurrent_std: standard deviation of U, `rin` only.
    """
    makers = {
        "rin": lambda: RIN(input_size, hidden_size, num_layers),
        "irnn": lambda: RIN(input_size, hidden_size, num_layers, skip=0.0),
        "rnn": lambda: nn.RNN(input_size, hidden_size, num_layers, nonlinearity="tanh"),
        "lstm": lambda: nn.LSTM(input_size, hidden_size, num_layers),
        "gru": lambda: nn.GRU(input_size, hidden_size, num_layers),
    }
    rnn = makers[name]()
    for parameter_name, parameter in rnn.named_parameters():
        if parameter_name.startswith("bias"):
            nn.init.zeros_(parameter)
            continue
        recurrent = parameter_name.startswith("weight_hh")
        for gate in parameter.chunk(parameter.shape[0] // hidden_size):
            if name == "irnn" and recurrent:
                nn.init.eye_(gate)
            elif name in ("rin", "irnn"):
                nn.init.normal_(gate, std=recurrent_std if recurrent else input_std)
            elif recurrent:
                nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(gate)
    return SequenceModel(rnn, output_size)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
