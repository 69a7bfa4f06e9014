"""Tasks: where the sequences come from, what is asked of a model, and how an answer is judged.

A task hands out time-major batches on its device. Which samples make up training batch n is a function of
the seed and n alone (see `seeding`), and `part` of a batch is what one of several processes takes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError
from .seeding import generator


class Batch(NamedTuple):
    inputs: tuple[Tensor, ...]  # what the model is called with; the first is [T, B, input_size]
    target: Tensor  # [B, ...]


class Part(NamedTuple):
    """The share of every global batch that process `rank` of `world` takes."""

    rank: int = 0
    world: int = 1


WHOLE = Part()


class Task:
    """What every task has. Subclasses define the sizes, the two sources of batches, `loss` and `correct`."""

    input_size: int
    output_size: int
    train_size: int | None = None  # None: an endless stream, every sequence is new
    baseline: float  # loss of the best answer that does not look at the sequence

    def train_batch(self, number: int, batch_size: int, part: Part = WHOLE) -> Batch:
        raise NotImplementedError

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        raise NotImplementedError

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch."""
        raise NotImplementedError

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Which answers are right, bool [B]."""
        raise NotImplementedError


class Adding(Task):
    """The adding problem (Hochreiter and Schmidhuber 1997; arXiv 1504.00941, 1511.06464 and 1801.06105).

    A sequence of `length` pairs: a value drawn from U[0, 1], and a marker that is 1 at two positions, one
    drawn from the first half of the sequence and one from the second (as in 1511.06464; 1801.06105 does not
    say how its two positions are drawn), and 0 elsewhere. The target is the sum of the two marked values.
    Always answering 1 gives a mean squared error of 1/6. An answer counts as correct within 0.04 of the
    sum, the criterion of the 1997 paper.
    """

    input_size, output_size = 2, 1
    baseline = 1 / 6

    def __init__(self, length: int, test_size: int = 1000, seed: int = 0, device: torch.device | str = "cpu"):
        if length < 2:
            raise UserError(f"length must be at least 2 for the task 'adding' (two marked positions), got {length}")
        self.length, self.seed, self.device = length, seed, device
        self._test = self._generate(test_size, generator(seed, "adding", "test"))

    def _generate(self, batch: int, source: torch.Generator) -> Batch:
        values = torch.rand(self.length, batch, generator=source)
        half = self.length // 2
        first = torch.randint(half, (batch,), generator=source)
        second = half + torch.randint(self.length - half, (batch,), generator=source)
        markers = torch.zeros(self.length, batch)
        rows = torch.arange(batch)
        markers[first, rows] = markers[second, rows] = 1
        target = (values[first, rows] + values[second, rows])[:, None]
        return Batch((torch.stack([values, markers], -1).to(self.device),), target.to(self.device))

    def train_batch(self, number: int, batch_size: int, part: Part = WHOLE) -> Batch:
        (x,), target = self._generate(batch_size, generator(self.seed, "adding", "train", number))
        return Batch((x[:, part.rank :: part.world],), target[part.rank :: part.world])

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        (x,), target = self._test
        for rows in _chunks(len(target), batch_size, part):
            yield Batch((x[:, rows],), target[rows])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).abs() < 0.04)[:, 0]


class PixelSequences(Task):
    """Classification of images read as sequences, over a fixed set of training and test images.

    Args:
        train, test: (images [N, T, input_size] in 0..255 as uint8, labels [N]).
        scale: what a pixel is divided by.
        noise: standard deviation of Gaussian noise on the scaled pixels of a training batch.
        permute: read the pixels of every image in one fixed random order, drawn from `order_seed`.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        *,
        classes: int,
        scale: float,
        noise: float = 0.0,
        permute: bool = False,
        order_seed: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        length, self.input_size = train[0].shape[1:]
        self.output_size, self.scale, self.noise, self.seed = classes, scale, noise, seed
        self.train_size = len(train[0])
        self.baseline = float(torch.tensor(float(classes)).log())
        order = torch.arange(length)
        if permute:
            order = torch.randperm(length, generator=generator(order_seed, "pixel order"))
        # Kept as bytes and [N, T, I]: a batch gathers whole images, and only the batch is turned time-major.
        self._train = (train[0][:, order].to(device), train[1].to(device))
        self._test = (test[0][:, order].to(device), test[1].to(device))
        self._epoch = -1
        self._samples = torch.empty(0, dtype=torch.long)

    def _batch(self, data: tuple[Tensor, Tensor], rows: Tensor | slice) -> Batch:
        images = data[0][rows].to(torch.float32).div_(self.scale)
        return Batch((images.transpose(0, 1).contiguous(),), data[1][rows])

    def train_batch(self, number: int, batch_size: int, part: Part = WHOLE) -> Batch:
        """Epochs are whole: the samples that do not fill a last batch are left out of that epoch."""
        assert self.train_size is not None
        epoch, index = divmod(number, max(1, self.train_size // batch_size))
        if epoch != self._epoch:
            order = torch.randperm(self.train_size, generator=generator(self.seed, "epoch", epoch))
            self._epoch, self._samples = epoch, order.to(self._train[0].device)
        rows = self._samples[index * batch_size : (index + 1) * batch_size]
        (x,), labels = self._batch(self._train, rows[part.rank :: part.world])
        if self.noise:
            noise = torch.randn(*x.shape[:1], len(rows), x.shape[2], generator=generator(self.seed, "noise", number))
            x = x + self.noise * noise[:, part.rank :: part.world].to(x.device)
        return Batch((x,), labels)

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        for rows in _chunks(len(self._test[0]), batch_size, part):
            yield self._batch(self._test, rows)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return output.argmax(-1) == target


def digits(
    permute: bool = False, noise: float = 0.0, seed: int = 0, device: torch.device | str = "cpu"
) -> PixelSequences:
    """Sequential digits: scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels, read pixel by pixel.

    The scans come with scikit-learn (UCI "Optical Recognition of Handwritten Digits", pixels 0..16). A
    fixed split, the same for every seed: 1,437 to train on, 360 to test.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator(0, "digits", "split"))
    images = torch.from_numpy(data.data).to(torch.uint8)[order, :, None]
    labels = torch.from_numpy(data.target)[order]
    test = 360
    return PixelSequences(
        (images[:-test], labels[:-test]),
        (images[-test:], labels[-test:]),
        classes=10, scale=16.0, noise=noise, permute=permute, seed=seed, device=device,
    )  # fmt: skip


def _chunks(size: int, chunk: int, part: Part) -> Iterator[slice]:
    for number, start in enumerate(range(0, size, chunk)):
        if number % part.world == part.rank:
            yield slice(start, start + chunk)
