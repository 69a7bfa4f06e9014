"""A classifier of names by their letters, as PyTorch's tutorial builds one, with nn.RNN and after `replace_rnn`.

    python compat/name_classifier.py [--names N] [--epochs N] [--threads N]

Each name is one call: a column of one-hot letters, the last state to a linear layer, the likelihood of the language.
Batches are made by adding up gradients. The names are drawn letter by letter from languages that are made up here.
"""

from __future__ import annotations

import argparse
import copy
import string
import time
from dataclasses import dataclass, field

import torch
from fused_rin import RIN, replace_rnn
from torch import Tensor, nn
from torch.nn import functional as F

LETTERS = string.ascii_lowercase + "'"
LANGUAGES = 6


class Classifier(nn.Module):
    def __init__(self, units: int = 128):
        super().__init__()
        self.rnn = nn.RNN(len(LETTERS), units)
        self.out = nn.Linear(units, LANGUAGES)

    def forward(self, letters: Tensor) -> Tensor:
        """Letters [T, 1, len(LETTERS)] -> log-likelihoods [1, LANGUAGES]."""
        _, state = self.rnn(letters)
        return F.log_softmax(self.out(state[0]), 1)


def names(count: int, seed: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(letters of a name [T, 1, len(LETTERS)], its language [1]), the languages in turn."""
    draw = torch.Generator().manual_seed(0)  # a language: letters that it likes, and which of them follow which
    liked = torch.rand(LANGUAGES, 1, len(LETTERS), generator=draw) ** 3
    chains = liked * torch.rand(LANGUAGES, len(LETTERS), len(LETTERS), generator=draw) ** 3
    draw.manual_seed(seed)
    result = []
    for i in range(count):
        language, letters = i % LANGUAGES, [int(torch.randint(len(LETTERS), (1,), generator=draw))]
        for _ in range(int(torch.randint(3, 11, (1,), generator=draw))):
            letters.append(int(torch.multinomial(chains[language, letters[-1]], 1, generator=draw)))
        columns = F.one_hot(torch.tensor(letters), len(LETTERS)).to(dtype)[:, None]
        result.append((columns, torch.tensor([language])))
    return result


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # of every name
    correct: float = 0.0  # of names that were not trained on
    seconds: float = 0.0


def train(model: Classifier, epochs: int, count: int, batch: int = 16) -> Run:
    dtype = model.out.weight.dtype
    known, unseen = names(count, 1, dtype), names(count // 4, 2, dtype)
    optimizer, run, start = torch.optim.SGD(model.parameters(), lr=0.15), Run(), time.perf_counter()
    draw = torch.Generator().manual_seed(3)
    for _ in range(epochs):
        for group in torch.randperm(len(known), generator=draw).split(batch):
            optimizer.zero_grad()
            for i in group.tolist():
                letters, language = known[i]
                loss = F.nll_loss(model(letters), language)
                (loss / len(group)).backward()
                run.losses.append(loss.item())
            nn.utils.clip_grad_norm_(model.parameters(), 3)
            optimizer.step()
    run.seconds = time.perf_counter() - start
    with torch.no_grad():
        right = sum(int(model(letters).argmax()) == int(language) for letters, language in unseen)
    run.correct = right / len(unseen)
    return run


def compare(epochs: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Run, Run]:
    """The same training of nn.RNN and of the replaced model."""
    torch.manual_seed(0)
    theirs = Classifier().to(dtype)
    ours = replace_rnn(copy.deepcopy(theirs), skip=0)
    assert type(ours.rnn) is RIN
    return train(theirs, epochs, count), train(ours, epochs, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other on a busy machine")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    theirs, ours = compare(given.epochs, given.names)
    print(f"{'epoch':>5} {'nn.RNN':>10} {'replaced':>10}   mean loss of a name")
    for epoch in range(given.epochs):
        part = slice(epoch * given.names, (epoch + 1) * given.names)
        means = [sum(run.losses[part]) / given.names for run in (theirs, ours)]
        print(f"{epoch + 1:>5} {means[0]:>10.6f} {means[1]:>10.6f}")
    print(f"right {theirs.correct:>10.3f} {ours.correct:>10.3f}   of names that were not trained on")
    print(f"    s {theirs.seconds:>10.1f} {ours.seconds:>10.1f}")


if __name__ == "__main__":
    main()
