import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amsdn.data.sampling import balanced_first, batches, held_out_size, hold_out, occurrence, stratified_order
from amsdn.errors import InputError

label_lists = st.lists(st.integers(0, 5), min_size=1, max_size=60)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(label_lists)
@settings(deadline=None, max_examples=50)
def test_occurrence_counts_earlier_samples_of_the_label(labels):
    expected = [labels[:i].count(label) for i, label in enumerate(labels)]
    assert occurrence(torch.tensor(labels)).tolist() == expected


@given(label_lists, st.integers(1, 70))
@settings(deadline=None, max_examples=50)
def test_balanced_first_equalises_counts_and_nests(labels, n):
    labels = torch.tensor(labels)
    chosen = balanced_first(labels, n)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == min(n, len(labels))
    taken, there = (torch.bincount(ls, minlength=6) for ls in (labels[chosen], labels))
    unexhausted = taken[taken < there]
    if len(unexhausted):  # only a class that has no more samples may fall behind the fullest by more than one
        assert taken.max() - unexhausted.min() <= 1
    assert set(balanced_first(labels, max(1, n // 2)).tolist()) <= set(chosen.tolist())


@given(label_lists, st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_every_prefix_of_a_stratified_order_has_the_class_shares(labels, seed):
    labels = torch.tensor(labels)
    order = stratified_order(labels, seeded(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    counts = torch.bincount(labels, minlength=6)
    share = counts / len(labels)
    # Up to the fraction t of the order, each of K classes is within 1/2 of n_c t, so the whole is within K/2 of n t.
    slack = 0.5 + share * counts.count_nonzero() / 2 + 1e-4
    for n in range(1, len(labels) + 1):
        assert ((torch.bincount(labels[order[:n]], minlength=6) - share * n).abs() <= slack).all()


def test_stratified_order_depends_on_its_generator_alone():
    labels = torch.arange(60) % 3
    assert torch.equal(stratified_order(labels, seeded(1)), stratified_order(labels, seeded(1)))
    assert not torch.equal(stratified_order(labels, seeded(1)), stratified_order(labels, seeded(2)))


@pytest.mark.parametrize(("n", "size"), [(2, 1), (25, 1), (49, 1), (50, 2), (50_000, 2000), (10**6, 2000)])
def test_held_out_size(n, size):
    assert held_out_size(n, "here") == size


def test_one_image_cannot_be_split():
    with pytest.raises(InputError, match=r"^here: 1 training image\(s\)"):
        held_out_size(1, "here")


def test_hold_out_is_a_stratified_partition_and_repeatable():
    labels = torch.arange(300) // 100  # sorted by class: the tail alone would be one class
    train, val = hold_out(labels, "here")
    assert sorted(torch.cat([train, val]).tolist()) == list(range(300))
    assert torch.bincount(labels[val]).tolist() == [4, 4, 4]
    assert torch.equal(val, hold_out(labels, "here")[1])


def test_batches_cover_the_split_once_in_order():
    assert [b.tolist() for b in batches(range(5), 2)] == [[0, 1], [2, 3], [4]]


def test_shuffled_batches_cover_the_split_once_and_repeat_by_seed():
    first = torch.cat(list(batches(range(50), 8, seeded(3))))
    assert sorted(first.tolist()) == list(range(50))
    assert first.tolist() != list(range(50))
    assert torch.equal(first, torch.cat(list(batches(range(50), 8, seeded(3)))))


def test_the_order_is_drawn_when_batches_is_called():
    generator = seeded(3)
    waiting = batches(range(50), 8, generator)
    generator.manual_seed(99)
    assert torch.equal(torch.cat(list(waiting)), torch.cat(list(batches(range(50), 8, seeded(3)))))


def test_batches_of_nothing_and_of_no_size():
    assert list(batches(range(0), 4)) == []
    with pytest.raises(InputError, match="got 0"):
        batches(range(5), 0)
