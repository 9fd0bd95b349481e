"""Wrong and undetected: exact semantics, closed forms where the plain attack is caught, and brute force on tiny images."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from attack_toys import images, small_net
from detector_toys import GREY, SIZE, Guarded, WatchedNet, conflicting, hump, linear_odds, rows_mask
from test_registered_attacks import quick
from torch import Tensor, nn

from amsdn.attacks import ATTACKS, FGSM, Attack, Cascade, PatchPGD, PGDAttack, Restarts, SparsePGD, SparseRS
from amsdn.attacks.base import RESCORE_DRAWS
from amsdn.attacks.deepfool import DeepFool
from amsdn.attacks.detector_evasion import (
    RULES,
    EvadeDetector,
    EvadingVictim,
    Orthogonal,
    Selective,
    Sight,
    fold,
    log_odds,
    without_component,
)
from amsdn.attacks.fab import FABAttack, FABL1Attack, FABL2Attack, FABTargetedAttack, FABTargetedL1Attack, FABTargetedL2Attack
from amsdn.attacks.losses import MARGIN, Goal
from amsdn.attacks.minimal_norm import boundaries
from amsdn.attacks.targeting import Targeted
from amsdn.errors import InputError
from amsdn.protocols import threshold_of
from amsdn.records import config_hash

ZEROS = torch.zeros(1, dtype=torch.int64)
PGD = PGDAttack(0.1, 0.01, 40, random_start=False)
RANDOM_PGD = PGDAttack(0.1, 0.01, 40)
every_rule = pytest.mark.parametrize("rule", RULES)


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    analysis = model.analyze(x)
    return analysis.logits.argmax(1), analysis.detected


# --- what counts as success ---


def test_folded_logits_say_wrong_and_undetected_to_the_last_bit() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=g) * torch.tensor([1e-3, 1.0, 1e4]).repeat_interleave(1334)[:4000, None]
    score = torch.rand(4000, generator=g)
    score[::7], score[1::7], score[2::7] = 0.3, 1.0, 0.0  # on the threshold, and saturated
    y = torch.randint(5, (4000,), generator=g)
    for threshold in (0.3, 0.0, 1.0):
        detected = score > threshold
        analysis = SimpleNamespace(logits=logits, anomaly_score=score, detected=detected, anomaly_map=None)
        for declared, scale in itertools.product((torch.tensor(threshold), None), (1e-6, 1.0, 1e3)):
            answer = Sight(lambda x, a=analysis: a, declared, scale)(torch.zeros(4000, 3, 1, 1))
            assert torch.equal(answer[:, :-1], logits)
            assert torch.equal(answer.argmax(1) == 5, detected)
            folded = fold(answer, y)
            assert torch.equal(folded.argmax(1) != y, (logits.argmax(1) != y) & ~detected)
            own = torch.nn.functional.one_hot(y, 5).bool()
            assert torch.equal(folded[~own], logits[~own])


def test_the_detection_logit_is_the_best_class_plus_the_excess_over_the_threshold() -> None:
    analysis = SimpleNamespace(
        logits=torch.tensor([[1.0, 3.0], [2.0, -1.0]]), anomaly_score=torch.tensor([0.9, 0.2]), detected=torch.tensor([True, False])
    )
    odds = [torch.tensor(p / (1 - p)).log().item() for p in (0.9, 0.2, 0.4)]
    answer = Sight(lambda x: analysis, torch.tensor(0.4), 2.0)(GREY)
    assert answer[:, 2].tolist() == pytest.approx([3 + 2 * (odds[0] - odds[2]), 2 + 2 * (odds[1] - odds[2])], rel=1e-5)


def test_a_saturated_score_keeps_its_gradient_where_its_logit_is_offered() -> None:
    logit = torch.tensor([40.0, 0.3, -120.0], requires_grad=True)
    score = logit.sigmoid()
    offered = SimpleNamespace(anomaly_score=score, anomaly_logit=logit)
    (gradient,) = torch.autograd.grad(log_odds(offered).sum(), logit)
    assert gradient.tolist() == [1.0, 1.0, 1.0]
    more = SimpleNamespace(anomaly_score=1 - (1 - score) * 0.5, anomaly_logit=logit)  # a score that holds more than the logit
    assert log_odds(more)[1].item() == pytest.approx((1 - (1 - score[1]) * 0.5).logit().item(), rel=1e-5)
    alone = log_odds(SimpleNamespace(anomaly_score=torch.tensor([0.0, 0.25, 1.0])))
    assert alone.isfinite().all()
    assert alone[1].item() == pytest.approx(torch.tensor(1 / 3).log().item())


# --- closed forms: plain attacks are caught, evading ones are not, and the impossible stays so ---


def test_the_plain_attack_is_always_caught() -> None:
    model = conflicting()
    result = PGD(model, GREY, ZEROS)
    predicted, detected = outcome(model, result.x_adv)
    assert result.success.all()
    assert (predicted != 0).all()
    assert detected.all()


@every_rule
@pytest.mark.parametrize("slope", [0.1, 1.0, 50.0])
def test_evasion_is_wrong_and_undetected_where_that_is_possible(rule: str, slope: float) -> None:
    model = conflicting(slope=slope)
    result = EvadeDetector(PGD, rule)(model, GREY, ZEROS)
    predicted, detected = outcome(model, result.x_adv)
    assert result.success.all()
    assert (predicted == 1).all()
    assert not detected.any()
    assert torch.equal(result.prediction, predicted)
    assert result.margin.item() == pytest.approx(float(model(result.x_adv)[0, 0]), abs=1e-6)  # of the classes, not of the folded logits


@every_rule
def test_evasion_fails_exactly_where_it_is_impossible(rule: str) -> None:
    # Darkening the lower half is worth 2.4, the upper half 0.5 / slope before the alarm: 2.9 in all, 4.8 without a detector.
    possible, impossible = conflicting(bias=2.7), conflicting(bias=3.0)
    fine = EvadeDetector(PGDAttack(0.1, 0.005, 120, random_start=False), rule)
    assert fine(possible, GREY, ZEROS).success.all() == (rule != "orthogonal")  # which never darkens the upper half
    assert not fine(impossible, GREY, ZEROS).success.any()
    assert PGD(impossible, GREY, ZEROS).success.all()


def test_a_steep_hump_stops_the_joint_loss_and_neither_other_rule() -> None:
    attack = PGDAttack(0.15, 0.01, 30, random_start=False)
    found = {rule: bool(EvadeDetector(attack, rule)(hump(1e4), GREY, ZEROS).success) for rule in RULES}  # type: ignore[arg-type]
    assert found == {"selective": True, "orthogonal": True, "joint": False}


def test_the_orthogonal_gradient_wastes_no_step_on_undoing_the_last() -> None:
    # Only darkening the lower half leads there, ten steps of 0.01; what the selective rule gains above it loses again.
    model = conflicting(bias=2.2, slope=50.0)
    attack = PGDAttack(0.1, 0.01, 11, random_start=False)
    assert EvadeDetector(attack, "orthogonal")(model, GREY, ZEROS).success.all()
    assert not EvadeDetector(attack, "selective")(model, GREY, ZEROS).success.any()
    assert EvadeDetector(dataclasses.replace(attack, num_steps=40), "selective")(model, GREY, ZEROS).success.all()


class TwoPixels(nn.Module):
    """A 2 x 3 image of three classes by a random net; the alarm rings for its mean brightness above a line."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).repeat(3, 1)  # alike in all channels
        self.detection_threshold = 0.5
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) - 0.5) @ self.w + torch.tensor([3.0, 0.0, 0.0])

    def analyze(self, x: Tensor) -> SimpleNamespace:
        score = (40 * (x.mean((1, 2, 3)) - 0.5).abs() - 1.5).sigmoid()
        return SimpleNamespace(logits=self(x), anomaly_score=score, detected=score > 0.5, anomaly_map=x[:, :1])


def one_pixel_images(x: Tensor) -> Tensor:
    """Every image that differs from x [3,2,3] in one pixel of a corner colour."""
    found = []
    for i, j, colour in itertools.product(range(2), range(3), itertools.product((0.0, 1.0), repeat=3)):
        image = x.clone()
        image[:, i, j] = torch.tensor(colour)
        found.append(image)
    return torch.stack(found)


@pytest.mark.parametrize("declared", [True, False])
def test_search_finds_what_brute_force_finds(declared: bool) -> None:
    x = 0.4 + 0.2 * torch.rand(12, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    possible, plain = [], []
    for seed in range(3):
        model = TwoPixels(seed)
        if not declared:
            del model.detection_threshold
        y = model(x).argmax(1)
        everything = [outcome(model, one_pixel_images(image)) for image in x]
        clean_detected = outcome(model, x)[1]
        wrong_unseen = torch.stack([((p != c) & ~d).any() for (p, d), c in zip(everything, y, strict=True)])
        result = EvadeDetector(SparseRS(1, 700))(model, x, y)
        assert torch.equal(result.success, wrong_unseen)
        predicted, detected = outcome(model, result.x_adv)
        assert torch.equal(result.success, (predicted != y) & ~detected)
        assert not clean_detected.all()
        possible.append(wrong_unseen)
        plain.append(torch.stack([(p != c).any() for (p, _), c in zip(everything, y, strict=True)]))
    assert 0 < torch.cat(possible).sum() < torch.cat(plain).sum()  # the detector does forbid some, and not all


# --- any attack of the suite, alone or combined ---


@pytest.mark.parametrize(
    "attack",
    [
        PatchPGD(2, 60, 0.1),
        SparsePGD(8, 60),
        SparseRS(8, 300),
        Restarts(FGSM(0.1), 1),
        Restarts(RANDOM_PGD, 2),
        Cascade((FGSM(0.1), PGD)),
    ],
)
def test_any_attack_stays_in_its_threat_and_means_what_it_says(attack: Attack) -> None:
    g = torch.Generator().manual_seed(0)
    x = (GREY + 0.02 * torch.randn(8, 3, SIZE, SIZE, generator=g)).clamp(0, 1)
    model, y = conflicting(0.8), torch.zeros(8, dtype=torch.int64)
    evading = EvadeDetector(attack)
    model.seen = 0
    result = evading(model, x, y)
    assert model.seen == int(result.forwards.sum()) + int((result.forwards > 1).sum())
    predicted, detected = outcome(model, result.x_adv)
    assert evading.threat.contains(result.x_adv, x).all()
    assert torch.equal(result.success, (predicted != y) & ~detected)
    assert torch.equal(result.prediction, predicted)
    again = evading(model, x, y)
    assert torch.equal(result.x_adv, again.x_adv)
    if not isinstance(attack, Restarts) or attack.attack is RANDOM_PGD:
        assert result.success.any()


NEEDS_MORE = {"patch-masking-aware"}  # attacks of a particular defence


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in NEEDS_MORE])
def test_every_registered_attack_can_evade(name: str) -> None:
    model, x = WatchedNet(small_net()), images(6)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    assert not outcome(model, x)[1].any()
    attack = EvadeDetector(quick(name))
    model.seen = 0
    result = attack(model, x, y)
    assert model.seen == int(result.forwards.sum()) + 5
    predicted, detected = outcome(model, result.x_adv)
    assert torch.equal(result.success, (predicted != y) & ~detected)
    assert torch.equal(result.prediction, predicted)
    assert attack.threat.contains(result.x_adv, x).all()
    assert torch.equal(result.x_adv[0], x[0])


def test_targets_are_reached_undetected() -> None:
    class ThreeWays(Guarded):
        def forward(self, x: Tensor) -> Tensor:
            base = super().forward(x)
            return torch.stack([base[:, 0], base[:, 1], 30 * (x[:, 0, 3] - 0.5).mean(1)], 1)

    model = ThreeWays(torch.ones(3, SIZE, SIZE), 1.0, linear_odds(-rows_mask(0, 2), -0.5))
    for target in (1, 2):
        targets = torch.full_like(ZEROS, target)
        by_hand = EvadeDetector(PGD)(model, GREY, ZEROS, targets=targets)
        for wrapped in (Targeted(EvadeDetector(PGD), target), EvadeDetector(Targeted(PGD, target))):
            chosen = wrapped(model, GREY, ZEROS)
            assert torch.equal(chosen.x_adv, by_hand.x_adv)
        predicted, detected = outcome(model, by_hand.x_adv)
        assert by_hand.success.all()
        assert predicted.item() == target
        assert not detected.any()
    assert Targeted(EvadeDetector(PGD), 1).evades
    assert not Targeted(PGD, 1).evades


def test_a_detected_clean_image_that_is_wrong_is_attacked_until_the_alarm_is_silent() -> None:
    model = conflicting(bias=-0.1)
    x = GREY - 0.05 * rows_mask(0, 2)  # wrong, and 0.7 over the threshold's 0.5: detected
    assert [t.item() for t in outcome(model, x)] == [1, True]
    result = EvadeDetector(PGD)(model, x, ZEROS)
    assert result.success.all()
    assert result.forwards.item() > 1
    assert not outcome(model, result.x_adv)[1].any()


class TwoSided(Guarded):
    """Classes 0 and 1 by the sign of the brightness; the alarm rings where the upper half is not grey to within 0.025."""

    def __init__(self) -> None:
        upper = rows_mask(0, 2) / 24
        super().__init__(torch.ones(3, SIZE, SIZE), 0.0, lambda x: 40 * ((x - 0.5) * upper).sum((1, 2, 3)).abs() - 1)

    def forward(self, x: Tensor) -> Tensor:
        score = super().forward(x)[:, 0]
        return torch.stack([score, -score, torch.full_like(score, -50.0)], 1)


@every_rule
@pytest.mark.parametrize("targeted", [False, True])
def test_a_sample_does_not_see_its_batch(rule: str, targeted: bool) -> None:
    """Labels and goals stay with their samples while others leave: each sample ends as if it were alone."""
    model = TwoSided()
    offsets = torch.tensor([0.01, -0.115, 0.05, -0.135, 0.09, -0.02, 0.115, -0.07])
    x = 0.5 + offsets.reshape(-1, 1, 1, 1) * rows_mask(2, 4)
    y = (offsets < 0).long()
    x[4] -= 0.2 * rows_mask(2, 4)  # wrong before the attack
    targets = torch.where(torch.arange(8) == 2, 2, 1 - y) if targeted else None  # nobody reaches class 2
    attack = EvadeDetector(PGDAttack(0.1, 0.01, 25, random_start=False), rule)  # type: ignore[arg-type]
    together = attack(model, x, y, targets=targets)
    lower_half_alone = offsets.abs() < 0.1
    possible = offsets.abs() < 0.125 if rule != "orthogonal" else lower_half_alone
    if targeted:
        possible[2] = False
    assert torch.equal(together.success, possible)
    assert len(together.forwards.unique()) > 4
    for i in range(8):
        alone = attack(model, x[i : i + 1], y[i : i + 1], targets=None if targets is None else targets[i : i + 1])
        assert torch.equal(alone.x_adv[0], together.x_adv[i])
        assert alone.forwards[0] == together.forwards[i]


def test_in_training_nothing_leaves() -> None:
    model, x = conflicting(), GREY.repeat(3, 1, 1, 1)
    attack = EvadeDetector(PGDAttack(0.1, 0.01, 5), stop_when_fooled=False)
    x_adv = attack.craft(model, x, torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert model.seen == 15
    assert attack.threat.contains(x_adv, x).all()


def test_a_wrapper_is_its_own_configuration() -> None:
    attacks = [EvadeDetector(PGD, rule) for rule in RULES] + [EvadeDetector(PGD, scale=2.0), EvadeDetector(FGSM())]  # type: ignore[arg-type]
    assert len({config_hash(a) for a in attacks}) == len({hash(a) for a in attacks}) == 5
    assert config_hash(EvadeDetector(PGD)) == config_hash(EvadeDetector(PGD))
    assert EvadeDetector(dataclasses.replace(PGD, eot_samples=3)).part.eot_samples == 3
    assert EvadeDetector(PGD, eot_samples=5).part.eot_samples == 5
    assert not EvadeDetector(dataclasses.replace(PGD, stop_when_fooled=False)).part.stop_when_fooled


# --- gradients ---


def rules_victim(model: nn.Module, rule: str, x: Tensor, y: Tensor) -> EvadingVictim:
    return EvadingVictim.watching(model, y, RULES[rule](), 1.0, 16).aiming(Goal(y))


FAB_AND_DEEPFOOL = (
    DeepFool(2.0),
    FABAttack(0.1, 10),
    FABL2Attack(2.0, 10),
    FABL1Attack(20.0, 10),
    FABTargetedAttack(0.1, 10),
    FABTargetedL2Attack(2.0, 10),
    FABTargetedL1Attack(20.0, 10),
)


@pytest.mark.parametrize("attack", FAB_AND_DEEPFOOL, ids=lambda a: type(a).__name__)
def test_attacks_that_walk_to_boundaries_ignore_the_rule_as_documented(attack: Attack) -> None:
    model, x = WatchedNet(small_net()), images(6)
    y = model(x).argmax(1)
    joint, *others = (EvadeDetector(attack, gradients=rule)(model, x, y) for rule in ("joint", "selective", "orthogonal"))
    assert (joint.backwards > 0).any()
    for other in others:
        assert torch.equal(other.x_adv, joint.x_adv)
        assert torch.equal(other.backwards, joint.backwards)


def test_the_boundary_to_the_class_in_front_is_the_alarms_threshold() -> None:
    w, v = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    model, y = Guarded(w, -1.0, linear_odds(v, 0.5)), ZEROS  # at grey: class 1, and the alarm rings
    assert [o.item() for o in outcome(model, GREY)] == [1, True]
    for rule in RULES:
        victim = rules_victim(model, rule, GREY, y)
        normals, values, _ = victim.gradients(GREY, lambda z: boundaries(z, Goal(y), 1))
        torch.testing.assert_close(normals[0, 0], -v, atol=1e-5, rtol=1e-5)
        assert values.item() == pytest.approx(-0.5, abs=1e-5)
        found = EvadeDetector(DeepFool(2.0), gradients=rule)(model, GREY, y)
        assert found.success.all()
        assert found.spent.item() == pytest.approx(0.5 / v.norm().item(), rel=0.05)


def test_the_threshold_is_put_where_the_answers_are_once() -> None:
    victim = EvadingVictim.watching(conflicting(), torch.zeros(1, dtype=torch.int64, device="meta"), Selective(), 1.0, 16)
    assert isinstance(victim.value, Sight)
    assert victim.value.threshold is not None
    assert victim.value.threshold.device.type == "meta"


def test_rules_follow_the_closed_form_gradients() -> None:
    w, v = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    model = Guarded(w, 0.0, linear_odds(v, 0.0))
    push = {"classifier": -2 * w, "detector": -v}  # the attack's loss is twice the margin
    # Four places: fooled or not, detected or not.
    x = torch.stack(
        [0.5 + 0.01 * (i * w + j * v - (w * v).sum() * (i * v / (v * v).sum() + j * w / (w * w).sum())) for i in (1, -1) for j in (1, -1)]
    )
    y = torch.zeros(4, dtype=torch.int64)
    predicted, detected = outcome(model, x)
    assert predicted.tolist() == [0, 0, 1, 1]
    assert detected.tolist() == [True, False, True, False]
    for rule in ("selective", "orthogonal"):
        victim = rules_victim(model, rule, x, y)
        gradient, loss, logits = victim.gradient(x, lambda z: 2 * MARGIN(z, Goal(y)))
        for got, aim in zip(gradient[:3], ("classifier", "classifier", "detector"), strict=True):
            want = push[aim]
            if rule == "orthogonal":
                other = push["detector" if aim == "classifier" else "classifier"]
                want = want - (want * other).sum() / (other * other).sum() * other
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, 2 * MARGIN(fold(victim.value(x), y), Goal(y)))
        assert torch.equal(logits.argmax(1) != y, torch.tensor([False, False, False, True]))
        assert victim.backwards.tolist() == [2 if rule == "orthogonal" else 1] * 4
        assert victim.forwards.tolist() == [1] * 4
    (both,) = rules_victim(model, "joint", x[:1], y[:1]).gradient(x[:1], lambda z: MARGIN(z, Goal(y[:1])))[0]
    torch.testing.assert_close(both, -v - w, rtol=1e-4, atol=1e-5)  # best other - (best + excess), the best being the label
    (third,) = rules_victim(model, "joint", x[2:3], y[:1]).gradient(x[2:3], lambda z: MARGIN(z, Goal(y[:1])))[0]
    torch.testing.assert_close(third, -v, rtol=1e-4, atol=1e-5)


def test_orthogonal_parts_by_gram_schmidt() -> None:
    aim, along = torch.randn(2, 6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    shares = (aim * along).sum((1, 2, 3)) / (along * along).sum((1, 2, 3))
    for size in (1.0, 1e-30, 1e30):  # squares of such gradients leave float32
        rest = without_component(aim * size, along * 1e-25) / size
        torch.testing.assert_close(rest, aim - shares.reshape(-1, 1, 1, 1) * along, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without_component(aim, -2 * aim), aim)  # one line: nothing would be left
    torch.testing.assert_close(without_component(aim, torch.zeros_like(aim)), aim)


class Rounded(Guarded):
    """``conflicting`` behind rounding to 64 levels, with one of several surrogates."""

    def __init__(self, stand_in: str) -> None:
        inner = conflicting()
        super().__init__(inner.w, inner.bias, inner.odds)
        self.stand_in, self.inner = stand_in, inner

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 64).round() / 64)

    def analyze(self, x: Tensor) -> SimpleNamespace:
        return super().analyze((x * 64).round() / 64 if self.stand_in != "classes only" else x)

    def differentiable_surrogate(self) -> nn.Module | None:
        return {"none": None, "smooth": conflicting(), "matching": Through(self), "classes only": ClassesOnly()}[self.stand_in]


class Through(nn.Module):
    matches_forward = True

    def __init__(self, model: Rounded) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def analyze(self, x: Tensor) -> SimpleNamespace:
        return self.model.inner.analyze(x + ((x * 64).round() / 64 - x).detach())


class ClassesOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return conflicting()(x)


@pytest.mark.parametrize(
    ("stand_in", "broken", "cost"), [("none", False, 1), ("smooth", True, 2), ("matching", True, 1), ("classes only", True, 2)]
)
@every_rule
def test_bpda_through_the_surrogates_analysis(stand_in: str, broken: bool, cost: int, rule: str) -> None:
    model = Rounded(stand_in)
    result = EvadeDetector(PGD, rule)(model, GREY, ZEROS)
    assert result.success.all() == broken
    victim = rules_victim(model, rule, GREY, ZEROS)
    x = 0.5 - 0.1 * torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(victim.differentiable(x), victim.value(x))  # BPDA changes gradients, no value
    gradient, _, _ = victim.gradient(x, lambda z: MARGIN(z, Goal(ZEROS)))
    assert bool(gradient.any()) == broken
    assert victim.forwards.tolist() == [cost]


# --- random defences ---


class Flickering(Guarded):
    """Its alarm rings at random, with a probability that falls as the lower half darkens."""

    stochastic = True

    def analyze(self, x: Tensor) -> SimpleNamespace:
        score = self.odds(x).sigmoid()
        rings = torch.rand(len(x)) < score
        return SimpleNamespace(logits=self(x), anomaly_score=score, detected=rings, anomaly_map=x[:, :1])


def test_a_random_detector_must_be_silent_in_most_calls() -> None:
    never = Flickering(torch.ones(3, SIZE, SIZE), -1.0, lambda x: 0 * x.mean((1, 2, 3)) + 1.2)  # rings in 77 % of the calls
    x, y = GREY.repeat(30, 1, 1, 1), torch.zeros(30, dtype=torch.int64)
    attack = EvadeDetector(SparseRS(1, 20, eot_samples=1))
    result = attack(never, x, y)
    assert not result.success.any()  # although each call is wrong and unseen with probability 0.23
    assert (result.prediction == 1).all()
    rarely = Flickering(torch.ones(3, SIZE, SIZE), -1.0, lambda x: 0 * x.mean((1, 2, 3)) - 2.0)
    result = attack(rarely, x, y)
    assert result.success.all()
    assert set(result.forwards.tolist()) == {RESCORE_DRAWS}


def test_eot_evades_a_random_detector() -> None:
    model = Flickering(torch.ones(3, SIZE, SIZE), 1.0, linear_odds(40 * rows_mask(2, 4) - 40 * rows_mask(0, 2), -1.0))
    x, y = GREY.repeat(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64)
    result = EvadeDetector(dataclasses.replace(PGD, eot_samples=8))(model, x, y)
    assert result.success.all()
    assert (model.odds(result.x_adv) < 0).all()


def test_every_draw_counts_and_goes_into_the_mean() -> None:
    model = Flickering(torch.ones(3, SIZE, SIZE), 1.0, linear_odds(rows_mask(0, 2), 0.0))
    evading = EvadeDetector(FGSM(0.01, eot_samples=7))
    victim = evading.victim_of(model, ZEROS)
    assert isinstance(victim, EvadingVictim)
    _, _, logits = victim.gradient(GREY, lambda z: MARGIN(z, Goal(ZEROS)))
    assert (victim.forwards.item(), victim.backwards.item()) == (7, 7)
    assert logits.exp().sum().item() == pytest.approx(1, abs=1e-5)  # the log of a mean probability; one call's logits are not
    assert EvadeDetector(FGSM(0.01), eot_samples=3).victim_of(model, ZEROS).draws == 3
    assert Targeted(EvadeDetector(FGSM(0.01, eot_samples=4))).victim_of(model, ZEROS).draws == 4


# --- mistakes ---


def test_mistakes_are_named_in_one_line() -> None:
    blind = conflicting()
    blind.has_detector = False  # type: ignore[assignment]
    lost, several = conflicting(), conflicting()
    lost.detection_threshold, several.detection_threshold = float("nan"), [0.1, 0.2]  # type: ignore[assignment]

    class Odd(Guarded):
        def analyze(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self(x), anomaly_score=x[:, 0], detected=x[:, 0] > 1, anomaly_map=x[:, :1])

    cases: list[tuple[Attack, nn.Module, str]] = [
        (EvadeDetector(PGD), blind, "has no detector"),
        (EvadeDetector(PGD), nn.Flatten().eval(), "has no detector"),
        (EvadeDetector(PGD), lost, "finite"),
        (EvadeDetector(PGD), several, "one number"),
        (EvadeDetector(PGD), Odd(GREY[0], 1.0, lambda x: x), "one anomaly_score"),
        (Restarts(EvadeDetector(RANDOM_PGD), 2), conflicting(), r"write EvadeDetector\(Restarts"),
    ]
    for attack, model, message in cases:
        with pytest.raises(InputError, match=message) as e:
            attack(model, GREY, ZEROS)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="label 7 of sample 0 is outside"):
        EvadeDetector(PGD)(conflicting(), GREY, ZEROS + 7)
    with pytest.raises(InputError, match="gradients must be one of selective, orthogonal, joint, got both"):
        EvadeDetector(PGD, "both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale must be positive"):
        EvadeDetector(PGD, scale=0.0)


def test_thresholds_may_be_numbers_or_tensors_of_one() -> None:
    for declared in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        assert threshold_of(SimpleNamespace(detection_threshold=declared)) == 0.25
    assert threshold_of(SimpleNamespace()) is None
    assert Selective.backwards == 1
    assert Orthogonal.backwards == 2
