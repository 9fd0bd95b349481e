"""Patch certificates against every patch on tiny images, and the cheap certifier against complete tables."""

import itertools

import pytest
import torch
from tiny_patches import FILL, RandomRules, ShortAbove, ShortChallenger, ShortDouble, all_patched, pictures
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.evaluation import patch_certificate
from amsdn.evaluation.certifier import ABSTAIN, Claim, Sample
from amsdn.evaluation.patch_certificate import DETECTION, PATCH, PatchCertifier
from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
from amsdn.records import config_hash

Found = dict[int, dict[str, Claim]]


def claims(defence: nn.Module, x: Tensor, **settings: object) -> Found:
    """Of the images x [B,3,H,W], in their order."""
    certifier = PatchCertifier(defence, **settings)  # type: ignore[arg-type]
    found = {i: dict(c) for i, c in certifier.certify(Sample(i, image) for i, image in enumerate(x))}
    assert sorted(found) == list(range(len(x)))
    return {i: found[i] for i in range(len(x))}


def attacked(defence: DoubleMasking, x: Tensor, found: Found, patch: tuple[int, int], greys: tuple[float, ...]) -> dict[str, int]:
    """Of up to ten images, most of them certified: how many are, or not, and how many some patch breaks, for both statements."""
    count = dict.fromkeys(("certified", "open", "certified broken", "open broken", "detected", "detected broken"), 0)
    kinds = [(f[PATCH].radius > 0) + (f[DETECTION].radius > 0) for f in found.values()]
    chosen = [[i for i, k in enumerate(kinds) if k == kind][:most] for kind, most in ((2, 6), (1, 3), (0, 1))]
    for i in itertools.chain(*chosen):
        variants = all_patched(x[i], patch, greys)
        logits = defence(variants)
        assert torch.isfinite(logits).all()
        broken = bool((logits.argmax(1) != found[i][PATCH].prediction).any())
        kind = "certified" if found[i][PATCH].radius > 0 else "open"
        count[kind] += 1
        count[f"{kind} broken"] += broken
        if found[i][DETECTION].radius > 0:
            accepted = defence.unanimous(variants)
            count["detected"] += 1
            count["detected broken"] += bool(((accepted != ABSTAIN) & (accepted != found[i][DETECTION].prediction)).any())
    return count


def tournament(kind: type[DoubleMasking], side: int, patch: int | tuple[int, int], masks: int, **settings: object) -> dict[str, int]:
    """The sum over random classifiers and images of what ``attacked`` counts."""
    greys = settings.pop("greys", (0.0, 1.0))
    poison, seeds = settings.pop("poison", None), settings.pop("seeds", 6)
    total: dict[str, int] = {}
    for seed in range(seeds):
        rules = RandomRules(side, seed=seed, poison=poison)
        defence = kind(rules, patch, masks, FILL, views_per_pass=4096, **settings)
        x = pictures(60, side, seed, tuple(g for g in greys if g != poison))
        found = claims(defence, x)
        for name, value in attacked(defence, x, found, defence.patch, greys).items():
            total[name] = total.get(name, 0) + value
    return total


CASES = [
    (5, 2, 2, {}),
    (6, 2, 3, {}),
    (5, (1, 3), 3, {}),
    (6, 2, 3, {"coarser": (2,), "confidence": 0.9}),
    (6, 2, 3, {"coarser": (2,), "confidence": 0.6}),
    (5, 1, 4, {"coarser": (2, 2), "confidence": 0.9, "greys": (0.0, 0.5, 1.0)}),
    (5, 2, 2, {"poison": 1.0, "greys": (0.0, 0.25, 1.0)}),
    (6, 1, 3, {"coarser": (2,), "poison": 1.0, "greys": (0.0, 0.25, 1.0)}),
]


@pytest.mark.parametrize("kind", [DoubleMasking, ChallengerMasking])
@pytest.mark.parametrize(("side", "patch", "masks", "settings"), CASES)
def test_no_patch_breaks_a_certificate(kind: type[DoubleMasking], side: int, patch: int, masks: int, settings: dict) -> None:
    count = tournament(kind, side, patch, masks, **settings)
    assert count["certified broken"] == count["detected broken"] == 0
    assert count["certified"] >= 6
    assert count["detected"] > count["certified"]
    if "poison" not in settings:
        assert count["open broken"] >= 4  # the adversary is able


@pytest.mark.parametrize("kind", [ShortDouble, ShortChallenger])
def test_masks_one_pixel_short_are_caught(kind: type[DoubleMasking], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no mask covers a 2x2 patch at row"):
        tournament(kind, 6, 2, 3)
    monkeypatch.setattr(patch_certificate, "_check_masks", lambda tree, patch: None)
    count = tournament(kind, 6, 2, 3, seeds=4)
    assert count["certified broken"] > 0
    assert count["detected broken"] > 0


def test_coarser_masks_one_pixel_short_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict = {"coarser": (2,), "confidence": 0.6, "seeds": 3}
    with pytest.raises(InputError, match="not covered by the coarser one"):
        tournament(ShortAbove, 6, 2, 3, **settings)
    monkeypatch.setattr(patch_certificate, "_check_masks", lambda tree, patch: None)
    assert tournament(ShortAbove, 6, 2, 3, **settings)["certified broken"] > 0


@pytest.mark.parametrize("kind", [DoubleMasking, ChallengerMasking])
@pytest.mark.parametrize(("masks", "coarser"), [((1, 2), ()), (2, ()), (3, ()), (3, (2,)), (5, (2, 2))])
def test_claims_are_those_of_the_complete_table(kind: type[DoubleMasking], masks: int | tuple[int, int], coarser: tuple[int, ...]) -> None:
    seen = {True: 0, False: 0}
    for seed in range(6):
        rules = RandomRules(6, seed=seed)
        defence, x = kind(rules, 2, masks, FILL, coarser=coarser), pictures(40, 6, seed)
        found, table = claims(defence, x), defence.prediction_table(x)
        votes = table.diagonal(dim1=1, dim2=2)
        agree = (votes == votes[:, :1]).all(1)
        every = (table == table[:, :1, :1]).flatten(1).all(1)
        answers = defence(x).argmax(1)
        label = torch.where(agree, votes[:, 0], ABSTAIN)
        assert torch.equal(defence.certified(x, answers), every)
        assert [c[PATCH].prediction for c in found.values()] == answers.tolist()
        assert [c[PATCH].radius for c in found.values()] == (2.0 * every).tolist()
        assert [c[DETECTION].prediction for c in found.values()] == label.tolist()
        assert [c[DETECTION].radius for c in found.values()] == (2.0 * agree).tolist()
        for holds in every.tolist():
            seen[holds] += 1
    assert min(seen.values()) >= 10


@pytest.mark.parametrize("coarser", [(), (2,)])
@pytest.mark.parametrize("views_per_pass", [1, 7, 64])
def test_an_image_is_asked_the_same_in_any_company_and_every_view_is_counted(coarser: tuple[int, ...], views_per_pass: int) -> None:
    rules = RandomRules(6, seed=3)
    defence, x = ChallengerMasking(rules, 2, 3, FILL, views_per_pass, coarser=coarser), pictures(60, 6, 3)
    rules.views = rules.largest = 0
    found = claims(defence, x, views_per_pass=views_per_pass)
    assert rules.largest <= views_per_pass
    assert rules.views == sum(c[PATCH].samples for c in found.values())
    for i in range(0, 60, 4):
        rules.views = 0
        (alone,) = claims(defence, x[i : i + 1]).values()
        assert rules.views == alone[PATCH].samples
        assert {k: c[:3] for k, c in alone.items()} == {k: c[:3] for k, c in found[i].items()}


def test_certificates_cost_all_pairs_once_and_others_far_less() -> None:
    rules = RandomRules(6, seed=3)
    found = claims(ChallengerMasking(rules, 2, 3, FILL), pictures(200, 6, 3))
    masks, pairs = 9, 45
    whole = [c for c in found.values() if c[PATCH].radius > 0]
    split = [c for c in found.values() if c[DETECTION].prediction == ABSTAIN]
    failing = [c for c in found.values() if c[PATCH].radius == 0 and c[DETECTION].prediction != ABSTAIN]
    assert min(map(len, (whole, split, failing))) > 0
    assert all(c[PATCH].samples == pairs for c in whole)
    assert all(masks < c[PATCH].samples <= 2 * masks - 1 for c in split)
    assert sum(c[PATCH].samples for c in failing) < len(failing) * (masks + 12)  # of 36 pairs
    assert all(c[DETECTION].samples == masks for c in found.values())
    assert all(0 < c[DETECTION].seconds <= c[PATCH].seconds for c in found.values())


class Reads(nn.Module):
    """Logits (value, 0) of the mean grey of the image by a fixed function of it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        value = torch.full((len(x),), self.scale)
        return torch.stack([value, torch.zeros_like(value)], 1)


@pytest.mark.parametrize(("scale", "certified"), [(1.0, True), (0.0, False), (1e-30, True), (float("nan"), False), (float("inf"), False)])
def test_ties_and_unusable_logits_are_no_certificates(scale: float, certified: bool) -> None:
    (claim,) = claims(DoubleMasking(Reads(scale), 2, 3, FILL), pictures(1, 6, 0)).values()
    assert claim[PATCH].radius == claim[DETECTION].radius == (2.0 if certified else 0.0)
    assert claim[PATCH].prediction == 0  # a class in any case
    assert claim[DETECTION].prediction == (0 if scale == scale and scale < 2 else ABSTAIN)


def test_logits_that_differ_by_rounding_are_no_certificate() -> None:
    class Near(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([1.0, 0.0]) + torch.tensor([5.0, 5.0])

    for scale, certified in ((1e-4, False), (1e-2, True)):
        (claim,) = claims(DoubleMasking(Near(scale), 2, 3, FILL), pictures(1, 6, 0)).values()
        assert (claim[PATCH].radius > 0, claim[DETECTION].radius > 0) == (certified, certified)
        assert (
            bool(DoubleMasking(Near(scale), 2, 3, FILL).certified(pictures(1, 6, 0), torch.zeros(1, dtype=torch.long), 1e-4)) is certified
        )


def test_a_confidence_at_its_threshold_is_no_certificate() -> None:
    y, x = torch.zeros(1, dtype=torch.long), pictures(1, 6, 0)
    for shift, certified in ((0.0, False), (2e-5, False), (-2e-5, False), (0.01, True), (-0.01, True)):
        defence = DoubleMasking(Reads(1.0), 2, 3, FILL, coarser=(2,), confidence=float(torch.tensor(1.0).sigmoid()) + shift)
        (claim,) = claims(defence, x).values()
        assert (claim[PATCH].radius > 0, claim[DETECTION].radius > 0) == (certified, certified)
        assert bool(defence.certified(x, y, tolerance=1e-4)) is certified
        assert bool(defence.certified(x, y))


class OnPairs(nn.Module):
    """Logits (1, 0) under one mask, (``pair``, 0) under two that cover more pixels than one does."""

    def __init__(self, pair: float, one_mask: int) -> None:
        super().__init__()
        self.pair, self.one_mask = pair, one_mask
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        covered = (x[:, 0] == 0.5).flatten(1).sum(1)
        value = torch.where(covered > self.one_mask, self.pair, 1.0)
        return torch.stack([value, torch.zeros_like(value)], 1)


@pytest.mark.parametrize(("pair", "certified"), [(0.5, True), (0.0, False), (float("nan"), False), (-0.5, False)])
def test_a_tie_under_two_masks_alone_leaves_detection_certified(pair: float, certified: bool) -> None:
    (claim,) = claims(DoubleMasking(OnPairs(pair, 9), 2, 3, FILL), pictures(1, 6, 0)).values()
    assert (claim[PATCH].radius > 0, claim[DETECTION].radius > 0) == (certified, True)


@pytest.mark.parametrize(("shift", "certified"), [(0.0, False), (2e-5, False), (0.01, True), (-0.01, True)])
def test_a_confidence_at_its_threshold_under_two_masks_alone_leaves_detection_certified(shift: float, certified: bool) -> None:
    confidence = float(torch.tensor(0.5).sigmoid()) + shift
    (claim,) = claims(DoubleMasking(OnPairs(0.5, 25), 2, 3, FILL, coarser=(2,), confidence=confidence), pictures(1, 6, 0)).values()
    assert (claim[PATCH].radius > 0, claim[DETECTION].radius > 0) == (certified, True)


def test_rectangles_and_smaller_patches() -> None:
    defence = ChallengerMasking(Reads(1.0), (2, 4), (3, 2), FILL)
    assert next(iter(claims(defence, pictures(1, 8, 0)).values()))[PATCH].radius == 2.0
    assert next(iter(claims(defence, pictures(1, 8, 0), patch=1).values()))[PATCH].radius == 1.0
    with pytest.raises(InputError, match="no mask covers a 4x4 patch"):
        claims(defence, pictures(1, 8, 0), patch=4)
    with pytest.raises(InputError, match="9x9 patch does not fit images of 8x8"):
        claims(defence, pictures(1, 8, 0), patch=9)


def test_what_cannot_be_certified_is_one_line() -> None:
    rules = RandomRules(6)

    class Dice(RandomRules):
        stochastic = True

    class Bare(nn.Module):
        pass

    for make, message in (
        (lambda: PatchCertifier(Bare().eval()), "no defence by masks"),
        (lambda: PatchCertifier(DoubleMasking(Dice(6), 2, 3)), "stochastic"),
        (lambda: PatchCertifier(DoubleMasking(rules, 2, 3).train()), "train mode"),
        (lambda: PatchCertifier(DoubleMasking(rules.eval(), 2, 3).eval(), views_per_pass=0), "views_per_pass"),
        (
            lambda: list(PatchCertifier(DoubleMasking(rules, 2, 3).eval()).certify(iter([Sample(0, torch.rand(1, 6, 6))]))),
            "sample 0 has shape",
        ),
        (
            lambda: list(
                PatchCertifier(DoubleMasking(rules, 2, 3).eval()).certify(
                    iter([Sample(0, torch.rand(3, 6, 6)), Sample(1, torch.rand(3, 6, 7))])
                )
            ),
            "sample 1 has shape",
        ),
    ):
        with pytest.raises(InputError, match=message) as caught:
            make()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)


def test_the_configuration_knows_everything_that_changes_a_claim() -> None:
    rules = RandomRules(6)
    variants = [
        PatchCertifier(DoubleMasking(rules, 2, 3, FILL)),
        PatchCertifier(ChallengerMasking(rules, 2, 3, FILL)),
        PatchCertifier(ChallengerMasking(rules, 2, 3, (0.5, 0.5, 0.4))),
        PatchCertifier(ChallengerMasking(rules, 2, 2, FILL)),
        PatchCertifier(ChallengerMasking(rules, 2, (3, 2), FILL)),
        PatchCertifier(ChallengerMasking(rules, 3, 3, FILL)),
        PatchCertifier(ChallengerMasking(rules, 2, 3, FILL), patch=1),
        PatchCertifier(ChallengerMasking(rules, 2, 3, FILL, coarser=(2,))),
        PatchCertifier(ChallengerMasking(rules, 2, 3, FILL, coarser=(2,), confidence=0.9)),
        PatchCertifier(ChallengerMasking(rules, 2, 3, FILL), tolerance=1e-3),
    ]
    assert len({config_hash(v.config) for v in variants}) == len(variants)
    assert config_hash(PatchCertifier(DoubleMasking(rules, 2, 3, FILL, 5), views_per_pass=9).config) == config_hash(variants[0].config)
    assert all(v.model is rules and v.kinds == (PATCH, DETECTION) for v in variants)
