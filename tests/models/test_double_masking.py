"""Double masking against a literal transcription of its algorithm, and its certificate against all patches."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
from amsdn.models.mask_average import MaskAverage
from amsdn.models.masking_rounds import answer, majority
from amsdn.protocols import detector_of, is_stochastic, masked_voting_of, surrogate_of, threshold_of
from amsdn.utils.masking import UNUSABLE, masked_views, view_labels


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


class OfTables(nn.Module):
    """Mixed into a defence: the first pixel of an image is the number of its table of two-mask predictions, given beforehand."""

    tables: Tensor  # [N,M,M], -1 for an unusable view
    classes = 3

    def look(self, x: Tensor, tree: object, rows: Tensor, first: Tensor, second: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
        seen = self.tables[x[rows, 0, 0, 0].long(), first, second]
        logits = torch.nn.functional.one_hot(seen.clamp_min(0), self.classes).float().masked_fill((seen < 0).unsqueeze(1), torch.nan)
        return logits, torch.bincount(rows, minlength=len(x))


class DoubleOfTables(OfTables, DoubleMasking):
    pass


class ChallengerOfTables(OfTables, ChallengerMasking):
    pass


@pytest.mark.parametrize(("height", "width", "classes"), [(1, 1, 3), (1, 2, 3), (1, 3, 3), (2, 2, 2)])
def test_both_inferences_on_every_small_table_with_unusable_views(height: int, width: int, classes: int) -> None:
    masks = height * width
    upper = torch.cartesian_prod(*[torch.arange(-1, classes)] * (masks * (masks + 1) // 2)).reshape(-1, masks * (masks + 1) // 2)
    tables = upper.new_empty(len(upper), masks, masks)
    for k, (i, j) in enumerate(itertools.combinations_with_replacement(range(masks), 2)):
        tables[:, i, j] = tables[:, j, i] = upper[:, k]
    x = torch.arange(len(tables)).float().reshape(-1, 1, 1, 1).expand(-1, 3, height, width)
    votes = tables.diagonal(dim1=1, dim2=2)
    confirmed = ((tables == votes.unsqueeze(2)).all(2) & (votes >= 0)).int()
    safe = confirmed.any(1)
    label = votes.gather(1, confirmed.argmax(1, keepdim=True)).squeeze(1)
    for kind in (DoubleOfTables, ChallengerOfTables):
        defence = kind(nn.Identity().eval(), 1, (height, width))
        defence.tables, defence.classes = tables, classes
        answers, passes = defence.decide(x, defence.first_round(x))
        assert torch.equal(answers[safe], label[safe])  # a mask that hides the patch confirms the label: nothing else can be the answer
        assert ((answers >= 0) & (answers < classes)).all()
        if kind is DoubleOfTables:
            assert torch.equal(answers, answer(tables, classes))
        else:
            assert passes.max() == masks - 1
        agree = (votes == votes[:, :1]).all(1) & (votes[:, 0] >= 0)
        assert passes[agree].sum() == 0
        assert torch.equal(answers[agree], votes[agree, 0])


def test_the_order_of_meetings_is_free_where_a_mask_confirms_its_class() -> None:
    """Random tables in which mask 0 confirms class 0, the masks in random order: the answer stays 0."""
    g, masks = seeded(3), 9
    tables = torch.randint(-1, 3, (400, masks, masks), generator=g).triu()
    tables = tables + tables.triu(1).transpose(1, 2)
    tables[:, 0, :] = tables[:, :, 0] = 0
    order = torch.stack([torch.randperm(masks, generator=g) for _ in tables])
    rows = torch.arange(len(tables)).reshape(-1, 1, 1)
    defence = ChallengerOfTables(nn.Identity().eval(), 1, 3)
    defence.tables = tables[rows, order.unsqueeze(2), order.unsqueeze(1)]
    x = torch.arange(len(tables)).float().reshape(-1, 1, 1, 1).expand(-1, 3, 3, 3)
    logits = defence.first_round(x)
    answers, passes = defence.decide(x, logits + torch.rand(logits.shape, generator=g) / 2)  # the strengths are random as well
    assert (answers == 0).all()
    assert 0 < passes.max() <= masks - 1


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
    [
        ({"patch": 0}, "at least 1"),
        ({"patch": 2, "masks_per_axis": 0}, "at least 1"),
        ({"patch": 2, "fill": (0.0, 2.0, 0.0)}, "colour"),
        ({"patch": 2, "fill": (0.0, 0.0)}, "colour"),
        ({"patch": 2, "coarser": (1,)}, "numbers from 2"),
        ({"patch": 2, "confidence": 1.5}, "probability"),
    ],
)
def test_unusable_settings_are_one_line(fragile: Fragile, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DoubleMasking(fragile, **settings)


def test_a_patch_larger_than_the_image_is_refused(fragile: Fragile) -> None:
    with pytest.raises(InputError, match="9x2 patch does not fit images of 8x8"):
        DoubleMasking(fragile, (9, 2))(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("coarser", [(), (2,)])
def test_challenger_agrees_where_certified_and_meets_fewer(fragile: Fragile, coarser: tuple[int, ...]) -> None:
    x = torch.rand(150, 3, 8, 8, generator=seeded(7))
    plain, challenger = DoubleMasking(fragile, 2, 3, coarser=coarser), ChallengerMasking(fragile, 2, 3, coarser=coarser)
    y = plain(x).argmax(1)
    certified = plain.certified(x, y)
    assert 0 < certified.sum() < len(x)
    assert torch.equal(challenger.certified(x, y), certified)
    assert torch.equal(challenger(x).argmax(1)[certified], y[certified])
    logits = plain.first_round(x)
    (_, many), (answers, few) = plain.decide(x, logits), challenger.decide(x, logits)
    assert few.max() <= 8 * (1 + len(coarser))
    assert few.sum() < 0.7 * many.sum()
    fragile.views = 0
    assert int(few.sum()) == (challenger.decide(x, logits), fragile.views)[1]  # counted as spent
    for i in range(0, 150, 10):
        alone = challenger.decide(x[i : i + 1], logits[i : i + 1])
        assert (int(alone.answer), int(alone.passes)) == (int(answers[i]), int(few[i]))


def test_coarser_masks_stand_for_finer_ones_where_they_are_confident(fragile: Fragile) -> None:
    x = torch.rand(20, 3, 8, 8, generator=seeded(8))
    defence = DoubleMasking(fragile, 2, 4, coarser=(2,), confidence=0.6)
    tree = defence.tree(8, 8)
    fine, coarse = defence.masks(8, 8), tree.masks[: len(tree.roots)]
    table, settled = defence.prediction_table(x), 0
    for i, j in itertools.combinations_with_replacement(range(len(fine)), 2):
        above = [next(n for n in tree.roots if k + len(coarse) in tree.children[n]) for k in (i, j)]
        near = fragile(torch.where(fine[i] | fine[j], defence.fill, x))
        far = fragile(torch.where(coarse[above[0]] | coarse[above[1]], defence.fill, x))
        confident = far.softmax(1).amax(1) >= 0.6
        assert torch.equal(table[:, i, j], torch.where(confident, far.argmax(1), near.argmax(1)))
        settled += int(confident.sum())
    assert 0 < settled < 20 * len(fine) * (len(fine) + 1) // 2
    fragile.views = 0
    _, passes = defence.look(
        x, tree, *(t.flatten() for t in torch.meshgrid(torch.arange(20), torch.arange(16), indexing="ij")), torch.zeros(320).long()
    )
    assert fragile.views == int(passes.sum())
    assert passes.max() <= len(coarse) + len(fine)


def test_analysis_is_certified_detection_and_points_at_the_patch(fragile: Fragile) -> None:
    defence, x = ChallengerMasking(fragile, 2, 3), torch.rand(80, 3, 8, 8, generator=seeded(10))
    assert detector_of(defence) is defence
    found, unanimous = defence.analyze(x), defence.unanimous(x)
    assert torch.equal(found.detected, unanimous == UNUSABLE)
    assert torch.equal(found.detected, found.anomaly_score > float(threshold_of(defence)))
    assert 0 < found.detected.sum() < len(x)
    assert torch.equal(found.logits, defence(x))
    assert torch.equal(found.logits.argmax(1)[~found.detected], unanimous[~found.detected])
    masks, votes = defence.masks(8, 8), view_labels(defence.first_round(x))
    assert found.anomaly_map.shape == (80, 1, 8, 8)
    assert 0 <= found.anomaly_map.min() <= found.anomaly_map.max() <= 1
    for image in found.detected.nonzero().squeeze(1)[:10].tolist():
        odd = votes[image] != majority(votes[image : image + 1], 3)
        outside = ~masks[odd].any(0)  # pixels that no disagreeing mask covers
        assert (found.anomaly_map[image][outside] == 0).all()
        assert (found.anomaly_map[image][masks[odd].all(0) & ~masks[~odd].any(0)] == 1).all()


def test_an_unusable_view_leaves_the_logits_finite_and_is_never_the_answer(fragile: Fragile) -> None:
    class Poisoned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fragile(x).masked_fill((x == 1).any(1).flatten(1).any(1, keepdim=True), torch.nan)

    x = torch.rand(6, 3, 8, 8, generator=seeded(9))
    for kind in (DoubleMasking, ChallengerMasking):
        defence = kind(Poisoned().eval(), 2, 3)
        x_adv = x.clone()
        x_adv[:, :, 3:5, 3:5] = 1
        assert torch.isfinite(defence(x_adv)).all()
        assert torch.isfinite(defence(torch.ones(1, 3, 8, 8))).all()
