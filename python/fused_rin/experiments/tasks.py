"""Tasks: where the sequences come from, what is asked of a model, and how an answer is judged.

A task hands out time-major batches on its device. Which samples make up training batch n is a function of
the seed and n alone (see `seeding`), and `part` of a batch is what one of several processes takes of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import read_mnist
from .errors import UserError
from .seeding import generator

Device = torch.device | str


class Batch(NamedTuple):
    inputs: tuple[Tensor, ...]  # what the model is called with, time first
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


class Epochs:
    """Which samples make up training batch n: every epoch is a new order of all, drawn from (seed, epoch).

    Epochs are whole: the samples that do not fill a last batch are left out of that epoch.
    """

    def __init__(self, size: int, seed: int, device: Device = "cpu"):
        self.size, self.seed, self.device = size, seed, device
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows(self, number: int, batch_size: int) -> Tensor:
        """The samples of batch `number`, [batch_size]."""
        epoch, index = divmod(number, max(1, self.size // batch_size))
        if epoch != self._epoch:
            order = torch.randperm(self.size, generator=generator(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, order.to(self.device)
        return self._order[index * batch_size : (index + 1) * batch_size]


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

    def __init__(self, length: int, train_size: int = 0, test_size: int = 1000, seed: int = 0, device: Device = "cpu"):
        """With a `train_size`, epochs over so many fixed sequences; with 0 an endless stream of new ones."""
        if length < 2:
            raise UserError(f"length must be at least 2 for the task 'adding', got {length}")
        self.length, self.seed, self.device = length, seed, device
        self.train_size = train_size or None
        self._epochs = Epochs(train_size, seed)
        self._train = self._draw(train_size, generator(seed, "adding", "train"))
        self._test = self._draw(test_size, generator(seed, "adding", "test"))

    def _draw(self, size: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Values [size, T], first and second position [size]."""
        half = self.length // 2
        values = torch.rand(size, self.length, generator=source)
        first = torch.randint(half, (size,), generator=source)
        return values, first, half + torch.randint(self.length - half, (size,), generator=source)

    def _batch(self, drawn: tuple[Tensor, Tensor, Tensor], rows: Tensor | slice) -> Batch:
        values, first, second = (part[rows] for part in drawn)
        samples = torch.arange(len(values))
        markers = torch.zeros_like(values)
        markers[samples, first] = markers[samples, second] = 1
        target = values[samples, first] + values[samples, second]
        x = torch.stack([values, markers], -1).transpose(0, 1).contiguous()
        return Batch((x.to(self.device),), target[:, None].to(self.device))

    def train_batch(self, number: int, batch_size: int, part: Part = WHOLE) -> Batch:
        own = slice(part.rank, None, part.world)
        if self.train_size is None:
            return self._batch(self._draw(batch_size, generator(self.seed, "adding", "train", number)), own)
        return self._batch(self._train, self._epochs.rows(number, batch_size)[own])

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        for rows in _chunks(len(self._test[0]), batch_size, part):
            yield self._batch(self._test, rows)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).abs() < 0.04)[:, 0]


class Classification(Task):
    """Classes over a fixed set of training and test samples; subclasses say how samples become a batch."""

    train_size: int

    def __init__(self, train: tuple[Tensor, ...], test: tuple[Tensor, ...], classes: int, seed: int, device: Device):
        """The last tensor of `train` and `test` holds the labels; all have the samples first."""
        self._train = tuple(values.to(device) for values in train)
        self._test = tuple(values.to(device) for values in test)
        self.output_size, self.seed, self.train_size = classes, seed, len(train[-1])
        self.baseline = float(torch.special.entr(torch.bincount(train[-1]) / self.train_size).sum())
        self._epochs = Epochs(self.train_size, seed, device)

    @property
    def constant_accuracies(self) -> list[float]:
        """For each answer that there is, the share of the test samples that always giving it gets right."""
        labels = self._test[-1]
        return [count / len(labels) for count in torch.bincount(labels, minlength=self.output_size).tolist()]

    def subset(self, size: int, seed: int) -> Classification:
        """The same task with `size` of the training samples, drawn by `seed`: larger subsets hold the smaller.

        Raises UserError where there are not so many.
        """
        if not 1 <= size <= self.train_size:
            raise UserError(f"a subset must have between 1 and {self.train_size} training samples, got {size}")
        part = copy.copy(self)
        rows = torch.randperm(self.train_size, generator=generator(seed, "subset"))[:size]
        part._train = tuple(values[rows.to(values.device)] for values in self._train)
        part.train_size, part.seed, part._epochs = size, seed, Epochs(size, seed, self._train[-1].device)
        return part

    def train_batch(self, number: int, batch_size: int, part: Part = WHOLE) -> Batch:
        return self._batch(self._train, self._epochs.rows(number, batch_size)[part.rank :: part.world])

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        for rows in _chunks(len(self._test[-1]), batch_size, part):
            yield self._batch(self._test, rows)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def correct(self, output: Tensor, target: Tensor) -> Tensor:
        return output.argmax(-1) == target

    def _batch(self, data: tuple[Tensor, ...], rows: Tensor | slice) -> Batch:
        raise NotImplementedError


class PixelSequences(Classification):
    """Images read as sequences.

    Args:
        train, test: (images [N, T, input_size] in 0..scale as uint8, labels [N]).
        scale: what a pixel is divided by.
        noise: standard deviation of Gaussian noise on the scaled pixels of a training batch.
        permute: read every image in one fixed random order of its steps, the same for every seed.
        standardize: after all that, subtract the mean of all training pixels and divide by their deviation.
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
        standardize: bool = False,
        seed: int = 0,
        device: Device = "cpu",
    ):
        length, self.input_size = train[0].shape[1:]
        self.shift, self.scale = _moments(train[0]) if standardize else (0.0, scale)
        self.noise = noise * scale / self.scale
        if permute:
            order = torch.randperm(length, generator=generator(0, "pixel order"))
            train, test = ((images[:, order], labels) for images, labels in (train, test))
        # Kept as bytes and [N, T, I]: a batch gathers whole images, and only the batch is turned time-major.
        super().__init__(train, test, classes, seed, device)

    def train_batch(self, number: int, batch_size: int, part: Part = WHOLE) -> Batch:
        (x,), labels = super().train_batch(number, batch_size, part)
        if self.noise:
            source = generator(self.seed, "noise", number)
            noise = torch.randn(len(x), len(labels) * part.world, self.input_size, generator=source)
            x = x + self.noise * noise[:, part.rank :: part.world].to(x.device)
        return Batch((x,), labels)

    def _batch(self, data: tuple[Tensor, ...], rows: Tensor | slice) -> Batch:
        images, labels = (_take(values, rows) for values in data)
        # Turned as bytes and then converted: a third of the time of the other way round (80 us at 128 images).
        x = images.transpose(0, 1).contiguous().to(torch.float32)
        return Batch((x.sub_(self.shift).div_(self.scale),), labels)


def _moments(pixels: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of bytes; from their counts, which is fast and exact."""
    counts = torch.bincount(pixels.flatten(), minlength=256).double() / pixels.numel()
    values = torch.arange(256, dtype=torch.float64)
    mean = float(counts @ values)
    return mean, math.sqrt(counts @ (values - mean) ** 2)


def digits(
    permute: bool = False, noise: float = 0.0, standardize: bool = False, seed: int = 0, device: Device = "cpu"
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
        classes=10, scale=16.0, noise=noise, permute=permute, standardize=standardize, seed=seed, device=device,
    )  # fmt: skip


def _take(values: Tensor, rows: Tensor | slice) -> Tensor:
    """values[rows]; index_select takes half the time that indexing with a tensor does."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def _chunks(size: int, chunk: int, part: Part) -> Iterator[slice]:
    for number, start in enumerate(range(0, size, chunk)):
        if number % part.world == part.rank:
            yield slice(start, start + chunk)


def mnist(
    folder: Path,
    rows: bool = False,
    permute: bool = False,
    noise: float = 0.0,
    standardize: bool = False,
    seed: int = 0,
    device: Device = "cpu",
) -> PixelSequences:
    """MNIST pixel by pixel, T=784, or, as a quick variant, row by row: 28 steps of 28 pixels."""
    shape = (-1, 28, 28) if rows else (-1, 784, 1)
    train, test = ((images.reshape(shape), labels) for images, labels in read_mnist(folder))
    return PixelSequences(
        train, test,
        classes=10, scale=255.0, noise=noise, permute=permute, standardize=standardize, seed=seed, device=device,
    )  # fmt: skip
