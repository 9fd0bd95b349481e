"""Double masking against a literal transcription of its algorithm, and its certificate against all patches."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.double_masking import DoubleMasking, MaskAverage, answer
from amsdn.protocols import is_stochastic, masked_voting_of, surrogate_of
from amsdn.utils.masking import masked_views


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transcribed(table: list[list[int]]) -> int:
    """PatchCleanser, Algorithm 1, line by line; MASKPRED returns the majority and the disagreers."""

    def mask_pred(predictions: list[int]) -> tuple[int, list[tuple[int, int]]]:
        counts = Counter(predictions)
        most = min(label for label in counts if counts[label] == max(counts.values()))
        return most, [(mask, label) for mask, label in enumerate(predictions) if label != most]

    y_maj, disagreers = mask_pred([table[i][i] for i in range(len(table))])
    if not disagreers:
        return y_maj
    for mask, y_dis in disagreers:
        _, second = mask_pred(table[mask])
        if not second:
            return y_dis
    return y_maj


def symmetric(upper: tuple[int, ...], masks: int) -> list[list[int]]:
    table = [[0] * masks for _ in range(masks)]
    for (i, j), value in zip(itertools.combinations_with_replacement(range(masks), 2), upper, strict=True):
        table[i][j] = table[j][i] = value
    return table


@pytest.mark.parametrize(("masks", "classes"), [(1, 3), (2, 3), (3, 3), (4, 2)])
def test_answer_is_the_algorithm_on_every_small_table(masks: int, classes: int) -> None:
    tables = [symmetric(upper, masks) for upper in itertools.product(range(classes), repeat=masks * (masks + 1) // 2)]
    got = answer(torch.tensor(tables), classes)
    assert got.tolist() == [transcribed(t) for t in tables]


class Fragile(nn.Module):
    """A random net whose answers change easily under masks, so that every case of the algorithm occurs."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 8 * 8, classes))
        self.views = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.views += len(x)
        logits = self.net(8 * x - 4)
        return logits - self.offset if hasattr(self, "offset") else logits


@pytest.fixture
def fragile() -> Fragile:
    net = Fragile()
    net.offset = net(torch.rand(64, 3, 8, 8, generator=seeded(1))).mean(0).detach()
    return net


def test_forward_answers_as_the_algorithm_does_and_looks_at_no_more_than_it_needs(fragile: Fragile) -> None:
    defence, x = DoubleMasking(fragile, patch=3, masks_per_axis=2), torch.rand(200, 3, 8, 8, generator=seeded(2))
    table = defence.prediction_table(x)
    expected = [transcribed(t) for t in table.tolist()]
    assert len(set(expected)) == 3
    votes = table.diagonal(dim1=1, dim2=2)
    unanimous = (votes == votes[:, :1]).all(1)
    minority = torch.tensor([e != Counter(v).most_common(1)[0][0] for e, v in zip(expected, votes.tolist(), strict=True)])
    assert unanimous.any()
    assert minority.any()  # case 2 of the algorithm occurs as well
    fragile.views = 0
    assert defence(x).argmax(1).tolist() == expected
    pending = (votes != votes.mode(1).values[:, None]).sum()
    assert len(x) * 4 <= fragile.views <= len(x) * 4 + int(pending) * 4


def test_table_is_the_classifier_on_the_views(fragile: Fragile) -> None:
    defence, x = DoubleMasking(fragile, patch=(2, 3), masks_per_axis=2, fill=(0.1, 0.2, 0.3)), torch.rand(3, 3, 8, 8, generator=seeded())
    masks, table = defence.masks(8, 8), defence.prediction_table(x)
    for i, j in itertools.product(range(4), repeat=2):
        views = masked_views(x, masks, torch.full((3,), i), torch.full((3,), j), defence.fill)
        assert torch.equal(table[:, i, j], fragile(views).argmax(1))


def test_small_passes_and_other_images_change_nothing(fragile: Fragile) -> None:
    x = torch.rand(9, 3, 8, 8, generator=seeded(3))
    y = fragile(x).argmax(1)
    whole, chunked = DoubleMasking(fragile, 3, 3), DoubleMasking(fragile, 3, 3, views_per_pass=5)
    torch.testing.assert_close(whole(x), chunked(x))
    torch.testing.assert_close(whole(x)[4:5], whole(x[4:5]))
    assert torch.equal(whole.certified(x, y), chunked.certified(x, y))


def test_certified_is_all_pairs_right(fragile: Fragile) -> None:
    defence, x = DoubleMasking(fragile, patch=2, masks_per_axis=2), torch.rand(60, 3, 8, 8, generator=seeded(4))
    table = defence.prediction_table(x)
    y = table[:, 0, 0]
    expected = (table == y.reshape(-1, 1, 1)).flatten(1).all(1)
    assert 0 < expected.sum() < 60
    assert torch.equal(defence.certified(x, y), expected)
    assert not defence.certified(x, (y + 1) % 3).any()


def test_no_patch_changes_the_answer_of_a_certified_image(fragile: Fragile) -> None:
    defence, x = DoubleMasking(fragile, patch=2, masks_per_axis=2), torch.rand(60, 3, 8, 8, generator=seeded(5))
    y = fragile(x).argmax(1)
    held = x[defence.certified(x, y)][:3]
    assert len(held) == 3
    label = defence(held).argmax(1)
    for row, column in itertools.product(range(7), repeat=2):
        patched = held.repeat_interleave(32, 0)
        patched[:, :, row : row + 2, column : column + 2] = torch.randint(
            2, (len(patched), 3, 2, 2), generator=seeded(row * 7 + column)
        ).float()
        assert torch.equal(defence(patched).argmax(1), label.repeat_interleave(32))


def test_logits_are_probabilities_that_move_with_the_image_even_when_saturated() -> None:
    class Saturated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = 1e4 * (x.flatten(1).mean(1) - 0.5)
            return torch.stack([score, -score], 1)

    x = torch.stack([torch.full((3, 8, 8), 0.7), torch.full((3, 8, 8), 0.3)])
    logits = DoubleMasking(Saturated().eval(), 2, 2)(x)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(2))
    assert logits.argmax(1).tolist() == [0, 1]


def test_what_it_declares(fragile: Fragile) -> None:
    defence, x = DoubleMasking(fragile, 3, 2, views_per_pass=6), torch.rand(4, 3, 8, 8, generator=seeded(6))
    assert masked_voting_of(defence) is defence
    assert masked_voting_of(fragile) is None
    assert not is_stochastic(defence)
    surrogate = surrogate_of(defence)
    assert isinstance(surrogate, MaskAverage)
    whole = MaskAverage(DoubleMasking(fragile, 3, 2))
    gradients = []
    for module in (surrogate, whole):
        leaf = x.clone().requires_grad_(True)
        module(leaf)[:, 0].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])  # the recomputed passes are the same passes
    masks = defence.masks(8, 8)
    views = torch.stack([fragile(torch.where(mask, defence.fill, x)).softmax(1) for mask in masks])
    torch.testing.assert_close(surrogate(x), views.mean(0).log())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patch": 0}, "at least 1"), ({"patch": 2, "masks_per_axis": 0}, "at least 1"), ({"patch": 2, "fill": (0.0, 2.0, 0.0)}, "colour")],
)
def test_unusable_settings_are_one_line(fragile: Fragile, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DoubleMasking(fragile, **settings)


def test_a_patch_larger_than_the_image_is_refused(fragile: Fragile) -> None:
    with pytest.raises(InputError, match="9x2 patch does not fit images of 8x8"):
        DoubleMasking(fragile, (9, 2))(torch.rand(1, 3, 8, 8))
