"""The occluded views cover every small patch, and what they say together is what the module promises of them."""

import pytest
import torch
from torch import Tensor

from amsdn.models.consistency import consistent_prediction, joint_anomaly_logit, occlusion_masks


@pytest.mark.parametrize(("samples", "count"), [(1, 4), (4, 4), (5, 6), (9, 9), (36, 36), (40, 42)])
def test_views_are_fixed_at_least_so_many_and_one_covers_any_patch(samples: int, count: int) -> None:
    masks = occlusion_masks(samples, 32, 32)
    assert masks.shape == (count, 1, 32, 32)
    assert torch.equal(masks, occlusion_masks(samples, 32, 32))
    assert not masks.flatten(1).all(1).any(), "a view of nothing"
    for top in range(28):
        for left in range(28):
            assert bool(masks[:, 0, top : top + 5, left : left + 5].flatten(1).all(1).any()), (top, left)


def test_probabilities_are_averaged_and_agreement_is_that_of_the_least_convinced_view() -> None:
    calls: list[Tensor] = []
    answers = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [0.9, 0.1]])

    def classify(view: Tensor) -> Tensor:
        calls.append(view)
        return answers[len(calls) - 1 : len(calls)].log()

    x, fill = torch.rand(1, 3, 32, 32), torch.full((1, 3, 1, 1), 0.25)
    out = consistent_prediction(torch.tensor([[0.9, 0.1]]).log(), x, classify, 4, fill)
    torch.testing.assert_close(out.logits.exp(), torch.tensor([[3.4, 1.6]]) / 5)
    torch.testing.assert_close(out.agreement, torch.tensor([0.2]))
    for view, mask in zip(calls, occlusion_masks(4, 32, 32), strict=True):
        assert torch.equal(view, torch.where(mask, fill, x))


def test_agreement_is_that_of_the_class_the_logits_give_also_where_means_tie() -> None:
    """Means one rounding apart may have the same logarithm: agreement must not speak of another class than the answer."""
    gen = torch.Generator().manual_seed(0)
    even = 0.3 + 0.15 * torch.rand(4000, generator=gen)
    lean = torch.tensor(
        [0.0, 0.05, -0.05, 0.0, 0.0]
    )  # of class 0, on the image and its views: its mean is that of class 1 but for rounding
    whole, *views = (torch.stack([even + d, even, 1 - 2 * even - d], 1).log() for d in lean)
    turn = iter(views)
    out = consistent_prediction(whole, torch.rand(4000, 3, 8, 8, generator=gen), lambda _: next(turn), 4, torch.zeros(1, 3, 1, 1))
    answer = out.logits.argmax(1, keepdim=True)
    assert torch.equal(out.agreement, torch.stack([v.softmax(1).gather(1, answer).squeeze(1) for v in views]).amin(0))


def test_no_patch_leads_past_the_alarm_where_every_masked_view_is_sure_enough() -> None:
    """The theorem, against every patch that a tiny classifier can see: one whose logits are sums over pixels."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 12, 12, generator=gen)
    fill = torch.zeros(1, 1, 1, 1)

    def classify(view: Tensor) -> Tensor:
        return torch.einsum("khw,bhw->bk", weight, view[:, 0]) * 0.15

    safe = broken = 0
    for x in torch.rand(60, 1, 1, 12, 12, generator=gen) * 2 - 1:
        views = torch.cat([classify(torch.where(mask, fill, x)) for mask in occlusion_masks(4, 12, 12)]).softmax(1)
        label = int(views.mean(0).argmax())
        bound = float(views[:, [k for k in range(3) if k != label]].max())
        attacked = torch.cat([_worst(x, weight, goal, t, left) for goal in range(3) for t in range(11) for left in range(11)])
        found = consistent_prediction(classify(attacked), attacked, classify, 4, fill)
        wrong = found.logits.argmax(1) != label
        assert not (wrong & (found.agreement > bound + 1e-6)).any()
        safe, broken = safe + int(bound < 0.5), broken + int(wrong.sum())
    assert safe >= 5
    assert broken > 0, "no patch changed any answer: the test tests nothing"


def _worst(x: Tensor, weight: Tensor, goal: int, top: int, left: int) -> Tensor:
    """x with a 2x2 patch at that place that raises class ``goal`` as far as pixels in [-1, 1] can."""
    attacked = x.clone()
    window = (slice(None), slice(None), slice(top, top + 2), slice(left, left + 2))
    attacked[window] = (weight[goal] - weight.mean(0))[None, None, top : top + 2, left : left + 2].sign()
    return attacked


def test_every_view_gets_a_gradient_through_the_surrogate_and_no_value_changes() -> None:
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 12, 12, generator=gen)
    fill = torch.zeros(1, 1, 1, 1)
    x = torch.rand(5, 1, 12, 12, generator=gen)

    def classify(view: Tensor) -> Tensor:
        return torch.einsum("khw,bhw->bk", weight, view[:, 0])

    found = {}
    for through in (False, True):
        image = x.clone().requires_grad_()
        out = consistent_prediction(classify(image), image, classify, 4, fill, straight_through=through)
        (gradient,) = torch.autograd.grad(out.agreement.sum(), image)
        found[through] = (out, gradient)
    (plain, least), (surrogate, all_views) = found[False], found[True]
    assert torch.equal(plain.agreement, surrogate.agreement)
    assert torch.equal(plain.logits, surrogate.logits)
    hidden = torch.stack([(least == 0) & mask for mask in occlusion_masks(4, 12, 12)]).flatten(2).sum(2)
    assert (hidden.amax(0) >= 36).all(), "the least convinced view sees nothing behind its own mask"
    seen = ~occlusion_masks(4, 12, 12).all(0)  # by some view: the masks overlap in the middle
    assert (all_views[:, seen] != 0).all()


@pytest.mark.parametrize("with_detector", [False, True])
def test_the_score_s_log_odds_are_its_own_and_keep_a_slope_where_it_has_rounded(with_detector: bool) -> None:
    agreement = torch.tensor([1.0, 1 - 1e-6, 0.9, 0.3, 1e-4, 1e-12, 1e-30], requires_grad=True)
    head = torch.tensor([-3.0, -20.0, 0.0, 4.0, -1.0, -1.0, 2.0]) if with_detector else None
    odds = joint_anomaly_logit(head, agreement)
    score = 1 - (1 - (0 if head is None else head.sigmoid())) * agreement
    torch.testing.assert_close(odds.sigmoid(), score, atol=2e-7, rtol=1e-5)
    assert odds.isfinite().all()
    (slope,) = torch.autograd.grad(odds.sum(), agreement)
    assert (slope[2:] < 0).all()
