"""A word language model, as PyTorch's example of that name has it, with nn.RNN and after `replace_rnn`.

    python compat/word_language_model.py [--epochs N] [--tied] [--nonlinearity relu] [--threads N]

Embedding, dropout, two recurrent layers with dropout between them, a linear decoder, perhaps with the embedding's
weights; truncated backpropagation over windows of a corpus that lies in columns, clipped gradients, plain SGD whose
step shrinks when validation stops improving; the whole module is saved and loaded. The corpus is drawn from a Markov
chain, so that the script needs no network.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from dataclasses import dataclass, field

import torch
from fused_rin import RIN, replace_rnn
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, WINDOW, COLUMNS = 200, 35, 20


class Model(nn.Module):
    def __init__(self, units: int = 96, layers: int = 2, dropout: float = 0.2, tied: bool = False, kind: str = "tanh"):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(WORDS, units)
        self.rnn = nn.RNN(units, units, layers, nonlinearity=kind, dropout=dropout)
        self.decoder = nn.Linear(units, WORDS)
        if tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, state = self.rnn(self.drop(self.encoder(words)), state)
        return F.log_softmax(self.decoder(self.drop(out)), -1).flatten(0, 1), state

    def first_state(self, columns: int) -> Tensor:
        return self.encoder.weight.new_zeros(self.rnn.num_layers, columns, self.rnn.hidden_size)


# What torch.load has to be told of an nn.RNN model too; a RIN adds nothing to it.
SAFE = [Model, nn.Dropout, nn.Embedding, nn.RNN, nn.Linear]


def corpus(length: int, seed: int) -> Tensor:
    """Words of a Markov chain in columns, [length // COLUMNS, COLUMNS]: a few likely successors to each word."""
    draw = torch.Generator().manual_seed(0)  # the language is the same for every seed
    successors = torch.randint(WORDS, (WORDS, 4), generator=draw)
    draw.manual_seed(seed)
    choices = torch.multinomial(torch.tensor([0.5, 0.3, 0.15, 0.05]), length, replacement=True, generator=draw)
    strays = torch.rand(length, generator=draw) < 0.1
    words = torch.randint(WORDS, (length,), generator=draw)
    for t in range(1, length):
        if not strays[t]:
            words[t] = successors[words[t - 1], choices[t]]
    rows = length // COLUMNS
    return words[: rows * COLUMNS].view(COLUMNS, rows).t().contiguous()


def windows(text: Tensor):
    for start in range(0, len(text) - 1, WINDOW):
        steps = min(WINDOW, len(text) - 1 - start)
        yield text[start : start + steps], text[start + 1 : start + 1 + steps].flatten()


@torch.no_grad()
def evaluate(model: Model, text: Tensor) -> float:
    """Mean negative log-likelihood of a word."""
    model.eval()
    state, total, count = model.first_state(text.shape[1]), 0.0, 0
    for words, targets in windows(text):
        scores, state = model(words, state)
        total += F.nll_loss(scores, targets, reduction="sum").item()
        count += len(targets)
    return total / count


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # of every window
    validation: list[float] = field(default_factory=list)  # of every epoch
    seconds: float = 0.0
    reloaded: float = math.nan  # validation of the model that was saved and loaded


def train(model: Model, epochs: int, length: int, rate: float = 5.0) -> Run:
    text, unseen = corpus(length, 1), corpus(length // 5, 2)
    run, best, start = Run(), math.inf, time.perf_counter()
    torch.manual_seed(3)  # of the dropout masks
    for _ in range(epochs):
        model.train()
        state = model.first_state(COLUMNS)
        for words, targets in windows(text):
            state.detach_()
            model.zero_grad()
            scores, state = model(words, state)
            loss = F.nll_loss(scores, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad, alpha=-rate)
            run.losses.append(loss.item())
        run.validation.append(evaluate(model, unseen))
        if run.validation[-1] < best:
            best = run.validation[-1]
        else:
            rate /= 4
    run.seconds = time.perf_counter() - start
    with tempfile.TemporaryFile() as file, torch.serialization.safe_globals(SAFE):
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    loaded.rnn.flatten_parameters()
    run.reloaded = evaluate(loaded, unseen)
    return run


def compare(
    epochs: int, length: int, tied: bool = False, kind: str = "tanh", dtype: torch.dtype = torch.float32
) -> tuple[Run, Run]:
    """The same training of nn.RNN and of the replaced model."""
    torch.manual_seed(0)
    theirs = Model(tied=tied, kind=kind).to(dtype)
    ours = replace_rnn(copy.deepcopy(theirs), skip=0)
    assert type(ours.rnn) is RIN
    return train(theirs, epochs, length), train(ours, epochs, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--length", type=int, default=40_000, help="words of the training text")
    parser.add_argument("--tied", action="store_true", help="one matrix for the embedding and the decoder")
    parser.add_argument("--nonlinearity", choices=["tanh", "relu"], default="tanh")
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other on a busy machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    theirs, ours = compare(given.epochs, given.length, given.tied, given.nonlinearity)
    print(f"{'epoch':>5} {'nn.RNN':>10} {'replaced':>10}   loss of a word, unseen text")
    for epoch, pair in enumerate(zip(theirs.validation, ours.validation, strict=True), 1):
        print(f"{epoch:>5} {pair[0]:>10.6f} {pair[1]:>10.6f}")
    print(f"saved {theirs.reloaded:>10.6f} {ours.reloaded:>10.6f}   after torch.save and torch.load of the module")
    print(f"    s {theirs.seconds:>10.1f} {ours.seconds:>10.1f}")


if __name__ == "__main__":
    main()
