"""The tasks are what their definitions say, and a batch is a function of (seed, number) alone."""

import math

import pytest
import torch
from fused_rin.experiments.errors import UserError
from fused_rin.experiments.tasks import Adding, Part, PixelSequences, digits


@pytest.mark.parametrize("length", [2, 3, 17, 200])
def test_adding_is_the_sum_of_two_marked_values(length):
    task = Adding(length, test_size=11)
    (x,), target = task.train_batch(0, 33)
    assert x.shape == (length, 33, 2)
    assert target.shape == (33, 1)
    values, markers = x.unbind(-1)
    assert set(markers.unique().tolist()) <= {0.0, 1.0}
    assert (markers.sum(0) == 2).all()
    assert ((values >= 0) & (values < 1)).all()
    torch.testing.assert_close((values * markers).sum(0)[:, None], target)


def test_adding_marks_one_position_of_each_half_all_equally_often():
    (x,), _ = Adding(11).train_batch(0, 20_000)
    markers = x[..., 1]
    assert (markers[:5].sum(0) == 1).all()
    expected = torch.tensor([1 / 5] * 5 + [1 / 6] * 6)
    torch.testing.assert_close(markers.mean(1), expected, atol=0.015, rtol=0)


def test_adding_baseline_is_the_loss_of_always_answering_one():
    task = Adding(20)
    (_,), target = task.train_batch(0, 50_000)
    assert task.loss(torch.ones_like(target), target).item() == pytest.approx(task.baseline, rel=0.03)


def test_adding_counts_answers_within_four_hundredths():
    task = Adding(20)
    target = torch.tensor([[1.0], [1.0], [1.0]])
    assert task.correct(torch.tensor([[1.039], [1.041], [0.961]]), target).tolist() == [True, False, True]


def test_adding_needs_two_positions():
    with pytest.raises(UserError, match="length must be at least 2"):
        Adding(1)


@pytest.mark.parametrize("make", [lambda seed: Adding(20, seed=seed), lambda seed: digits(noise=0.1, seed=seed)])
def test_batches_depend_on_seed_and_number_alone(make):
    task = make(3)
    late = task.train_batch(50, 32)
    again = make(3)
    for number in (50, 3):  # out of order, from a fresh task
        torch.testing.assert_close(again.train_batch(number, 32), task.train_batch(number, 32), rtol=0, atol=0)
    assert not torch.equal(late.inputs[0], task.train_batch(51, 32).inputs[0])
    assert not torch.equal(late.inputs[0], make(4).train_batch(50, 32).inputs[0])


@pytest.mark.parametrize("make", [lambda: Adding(20, test_size=1003), lambda: digits(noise=0.1)])
def test_parts_make_up_the_whole_batch(make):
    (whole,), target = make().train_batch(7, 32)
    parts = [make().train_batch(7, 32, Part(rank, 2)) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.inputs[0], whole[:, rank::2])
        assert torch.equal(part.target, target[rank::2])
    everything = sum(len(batch.target) for batch in make().test_batches(100))
    shared = [sum(len(batch.target) for batch in make().test_batches(100, Part(rank, 3))) for rank in range(3)]
    assert sum(shared) == everything
    assert min(shared) > 0


def test_digits_are_split_once_and_for_all():
    task, other = digits(seed=0), digits(seed=1)
    (x,), labels = next(task.test_batches(1000))
    assert x.shape == (64, 360, 1)
    assert torch.equal(x, next(other.test_batches(1000)).inputs[0])
    assert x.min() >= 0
    assert x.max() == 1
    assert sorted(labels.unique().tolist()) == list(range(10))
    assert task.train_size == 1437
    assert task.baseline == pytest.approx(math.log(10), rel=1e-3)


def test_digits_train_and_test_share_no_scan():
    task = digits()
    (test,), _ = next(task.test_batches(1000))
    train = torch.cat([task.train_batch(number, 479).inputs[0] for number in range(3)], 1)
    seen = {image.numpy().tobytes() for image in train[..., 0].t()}
    assert len(seen) == 1437
    assert not seen & {image.numpy().tobytes() for image in test[..., 0].t()}


def test_an_epoch_shows_every_sample_once():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None]
    task = PixelSequences((images, images[:, 0, 0].long()), (images, images[:, 0, 0].long()), classes=10, scale=1.0)
    epochs = [torch.cat([task.train_batch(2 * e + i, 5).target for i in range(2)]).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_permuting_is_one_fixed_order_of_the_same_pixels():
    (plain,), _ = next(digits().test_batches(1000))
    (permuted,), _ = next(digits(permute=True).test_batches(1000))
    assert not torch.equal(plain, permuted)
    assert torch.equal(plain.sort(0).values, permuted.sort(0).values)
    (train,), _ = digits(permute=True, seed=5).train_batch(0, 32)
    (unpermuted,), _ = digits(seed=5).train_batch(0, 32)
    columns = {column.numpy().tobytes(): index for index, column in enumerate(plain[..., 0])}
    order = [columns[column.numpy().tobytes()] for column in permuted[..., 0]]
    moved = [i for i in range(64) if (plain[i] != plain[0]).any()]  # constant pixels cannot be told apart
    assert torch.equal(train[moved], unpermuted[order][moved]) or torch.equal(train, unpermuted[order])


def test_noise_is_on_training_pixels_only():
    (clean,), labels = digits().train_batch(4, 500)
    (noisy,), same = digits(noise=0.1).train_batch(4, 500)
    assert torch.equal(labels, same)
    assert (noisy - clean).std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(next(digits().test_batches(9)).inputs[0], next(digits(noise=0.1).test_batches(9)).inputs[0])


def test_adding_with_a_fixed_training_set_shows_every_sequence_once_an_epoch():
    task = Adding(9, train_size=12)
    epochs = [torch.cat([task.train_batch(3 * e + i, 4).target for i in range(3)]) for e in range(2)]
    assert torch.equal(epochs[0].sort(0).values, epochs[1].sort(0).values)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(epochs[0].unique()) == 12


def test_a_subset_is_part_of_the_training_set_and_of_a_larger_subset():
    task = digits()
    images = {row.numpy().tobytes() for row in task.subset(1437, 3)._train[0]}
    small, large = task.subset(90, 3), task.subset(360, 3)
    assert torch.equal(small._train[0], large._train[0][:90])
    assert torch.equal(small._train[1], large._train[1][:90])
    assert {row.numpy().tobytes() for row in task._train[0]} == images
    assert not torch.equal(task.subset(90, 4)._train[1], small._train[1])
    assert task.train_size == 1437
    (x,), labels = small.train_batch(0, 90)  # an epoch has every sample once
    assert sorted(labels.tolist()) == sorted(small._train[1].tolist())
    assert torch.equal(next(small.test_batches(360)).target, next(task.test_batches(360)).target)
    assert x.shape == (64, 90, 1)
    for size in (0, 1438):
        with pytest.raises(UserError, match=f"between 1 and 1437 training samples, got {size}"):
            task.subset(size, 0)
