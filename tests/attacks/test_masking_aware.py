"""The masking-aware attack against the truth: every place and every {0,1} colour, on a defence that is exactly computable."""

import dataclasses
import itertools

import pytest
import torch
from attack_toys import images, small_net
from torch import Tensor, nn

from amsdn.attacks import Attack, AttackResult, MaskingAwarePatch, PatchPGD, Victim
from amsdn.attacks.masking_aware import _Plan, _Views, _Wish
from amsdn.errors import InputError
from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
from amsdn.utils.masking import masked_views

SIZE, COUNT, CLASSES = 8, 24, 3
COLOURS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).reshape(8, 3, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Fragile(nn.Module):
    """A random net, balanced so that about every case occurs: certified, standing, broken by either route. Notes its views."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * SIZE * SIZE, CLASSES))
        self.offset = torch.zeros(CLASSES)
        self.views: list[int] = []
        with torch.no_grad():
            self.offset = self(torch.rand(64, 3, SIZE, SIZE, generator=seeded(1))).mean(0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.views.append(len(x))
        return self.net(8 * x - 4) - self.offset


class Toy:
    """Images, the defence's answers, and which (place, image) any {0,1} colour of a one-pixel patch breaks."""

    def __init__(self, defence: type[DoubleMasking] = DoubleMasking, **settings: object) -> None:
        self.net = Fragile()
        self.defence = defence(self.net, patch=1, masks_per_axis=3, views_per_pass=4096, **settings).eval()
        self.x = torch.rand(COUNT, 3, SIZE, SIZE, generator=seeded(3))
        self.y = self.defence(self.x).argmax(1)
        self.certified = self.defence.certified(self.x, self.y)
        self.answers = torch.stack([self._answers(row, column) for row, column in itertools.product(range(SIZE), repeat=2)])  # [P,B,8]
        self.broken = (self.answers != self.y.unsqueeze(1)).any(2)  # [P,B]

    def _answers(self, row: int, column: int) -> Tensor:
        patched = self.x.repeat_interleave(len(COLOURS), 0)
        patched[:, :, row : row + 1, column : column + 1] = COLOURS.repeat(COUNT, 1, 1, 1)
        return self.defence(patched).argmax(1).reshape(COUNT, len(COLOURS))


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def found(toy: Toy) -> AttackResult:
    return attack()(toy.defence, toy.x, toy.y)


def attack(**settings: object) -> MaskingAwarePatch:
    return MaskingAwarePatch(size=1, **{"num_steps": 10, "check_every": 5, "majority_places": 20, "confirming_places": 4, **settings})


def test_finds_what_exhaustive_search_finds_and_never_more_than_the_certificate_allows(toy: Toy, found: AttackResult) -> None:
    breakable = toy.broken.any(0)
    assert 0 < toy.certified.sum() < COUNT - breakable.sum() + 1 <= COUNT
    assert breakable.sum() >= COUNT / 2
    assert found.success[breakable].all()
    assert not found.success[toy.certified].any()
    assert torch.equal(found.success, toy.defence(found.x_adv).argmax(1) != toy.y)


def test_coarser_masks_and_challengers_change_what_is_in_reach() -> None:
    """The table must be the defence's own: that of the finest masks rules places out where this defence can be broken."""
    other = Toy(ChallengerMasking, coarser=(2,), confidence=0.4)
    result, breakable = attack()(other.defence, other.x, other.y), other.broken.any(0)
    plain = DoubleMasking(other.net, patch=1, masks_per_axis=3).eval()
    confirms = (plain.prediction_table(other.x) == other.y.reshape(-1, 1, 1)).all(2)
    covered = plain.masks(SIZE, SIZE).flatten(1).float()
    out_of_reach = ((confirms.float() @ covered) > 0).all(1)  # by the finest masks alone
    assert (breakable & out_of_reach).any()
    assert not result.success[other.certified].any()
    assert result.success[breakable].all()


def test_both_routes_are_needed(toy: Toy, found: AttackResult) -> None:
    majority = attack(confirming_places=0)(toy.defence, toy.x, toy.y)
    assert majority.success.sum() < found.success.sum()


def test_a_plain_attack_through_the_surrogate_finds_fewer(toy: Toy, found: AttackResult) -> None:
    plain = PatchPGD(size=1, num_steps=20)(toy.defence, toy.x, toy.y)
    assert plain.success.sum() < found.success.sum()


def test_places_that_it_rules_out_are_those_where_nothing_works(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    carry_out = MaskingAwarePatch._carry_out
    monkeypatch.setattr(
        MaskingAwarePatch, "_carry_out", lambda self, plans, *a: seen.extend(p.corner for p in plans) or carry_out(self, plans, *a)
    )
    attack(majority_places=64, confirming_places=0, num_steps=1)(toy.defence, toy.x, toy.y)
    corners = torch.stack(seen)  # [64,hopeful,2]
    table, masks = toy.defence.prediction_table(toy.x), toy.defence.masks(SIZE, SIZE)
    confirms = (table == toy.y.reshape(-1, 1, 1)).all(2)  # [B,M]
    forced = torch.stack([confirms[:, masks[:, 0, r, c]].any(1) for r, c in itertools.product(range(SIZE), repeat=2)])  # [P,B]
    assert not (forced & toy.broken).any()
    hopeful = (~forced).any(0).nonzero().squeeze(1)
    assert corners.shape[1] == len(hopeful)
    for n, image in enumerate(hopeful):
        tried = {int(r * SIZE + c) for r, c in corners[:, n]}
        assert tried == set((~forced[:, image]).nonzero().squeeze(1).tolist())


def test_every_view_it_climbs_on_shows_the_patch(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[_Plan] = []
    monkeypatch.setattr(MaskingAwarePatch, "_carry_out", lambda self, made, views, victim, x, *a: plans.extend(made) or x)
    attack()(toy.defence, toy.x, toy.y)
    masks = toy.defence.masks(SIZE, SIZE)[:, 0]
    assert len(plans) == 24
    for plan in plans:
        first, second = plan.draw(12, seeded())
        row, column = plan.corner.T.unsqueeze(2)
        assert not (masks[first, row, column] | masks[second, row, column]).any()


def test_gradient_is_that_of_the_views_by_the_image(toy: Toy) -> None:
    first, second = (torch.randint(9, (COUNT, 5), generator=seeded(s)) for s in (1, 2))
    wish = _Wish(toy.y, torch.arange(COUNT) % 2 == 0)
    victim = Victim.of(toy.defence, COUNT, toy.x.device)
    got = _Views.of(toy.defence, victim, toy.x, per_pass=7).gradient(victim, toy.x, first, second, wish)
    leaf, masks = toy.x.clone().requires_grad_(True), toy.defence.masks(SIZE, SIZE)
    total = torch.zeros(())
    for n in range(5):
        probability = toy.net(masked_views(leaf, masks, first[:, n], second[:, n], toy.defence.fill)).softmax(1)
        own = probability.gather(1, toy.y.unsqueeze(1)).squeeze(1)
        total = total + torch.where(wish.anything_else, 1 - own, own).log().sum()
    total.backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-3, atol=1e-4)
    assert (victim.backwards == 5).all()


def test_out_of_reach_images_cost_the_table_and_come_back_as_they_are(toy: Toy) -> None:
    toy.net.views.clear()
    held = toy.x[toy.certified]
    result = attack()(toy.defence, held, toy.y[toy.certified])
    assert torch.equal(result.x_adv, held)
    assert (result.forwards == 1 + 45).all()  # the defence once, and 9 masks make 45 pairs
    assert (result.backwards == 0).all()


def test_every_view_is_counted(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inside = toy.net, [0]
    forward = DoubleMasking.forward

    def metered(self: DoubleMasking, x: Tensor) -> Tensor:
        before = sum(net.views)
        out = forward(self, x)
        inside[0] += sum(net.views) - before - len(x)  # a call of the defence counts once, whatever it looks at
        return out

    monkeypatch.setattr(DoubleMasking, "forward", metered)
    net.views.clear()
    result = attack(views_per_pass=7, majority_places=3)(toy.defence, toy.x, toy.y)
    rescored = COUNT
    assert sum(net.views) - inside[0] == int(result.forwards.sum()) + rescored
    standing = ~result.success & (result.backwards > 0)
    assert standing.any()
    plans = 3 + 4
    assert (result.backwards[standing] == 9 + 4 + plans * 10 * 8).all()
    assert (result.forwards[standing] == 1 + 45 + 9 + 4 + plans * (10 * 8 + 10 // 5)).all()
    assert (result.forwards[result.success] < result.forwards[standing].max()).any()


def test_towards_a_target_as_exhaustive_search(toy: Toy) -> None:
    targets = (toy.y + 1) % CLASSES
    reachable = (toy.answers == targets.unsqueeze(1)).any(2).any(0)
    result = attack()(toy.defence, toy.x, toy.y, targets=targets)
    assert torch.equal(result.success, toy.defence(result.x_adv).argmax(1) == targets)
    assert 0 < reachable.sum() < COUNT
    assert result.success[reachable].float().mean() >= 0.9
    assert not result.success[toy.certified].any()


def test_a_patch_that_no_mask_covers_may_go_anywhere(toy: Toy) -> None:
    some = toy.certified.nonzero().squeeze(1)[:2]
    result = MaskingAwarePatch(size=(5, 6), num_steps=10, majority_places=2)(toy.defence, toy.x[some], toy.y[some])
    assert result.success.all()  # the masks are 3 x 3: the certificate says nothing of such a patch
    assert MaskingAwarePatch(size=(5, 6)).threat.contains(result.x_adv, toy.x[some]).all()


class Rounded(nn.Module):
    """A classifier whose own gradient is zero, and which says so."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 8).round() / 8)

    def differentiable_surrogate(self) -> nn.Module:
        return self.net


def test_gradients_come_from_what_the_classifier_declares(toy: Toy) -> None:
    defence = DoubleMasking(Rounded(toy.net), 1, 3).eval()
    y = defence(toy.x).argmax(1)
    result = attack()(defence, toy.x, y)
    assert result.success.float().mean() >= 0.5
    assert not result.success[defence.certified(toy.x, y)].any()


def test_in_training_every_image_gets_a_patch_and_nothing_leaves(toy: Toy) -> None:
    train = attack(stop_when_fooled=False, majority_places=1, confirming_places=1)
    x_adv = train.craft(toy.defence, toy.x, toy.y, seeded())
    assert train.threat.contains(x_adv, toy.x).all()
    assert (x_adv != toy.x).flatten(1).any(1).all()


def test_without_masks_it_is_the_plain_attack() -> None:
    net, x = small_net(), images()
    y = net(x).argmax(1)
    aware = MaskingAwarePatch(size=3, num_steps=4, majority_places=2, confirming_places=1)(net, x, y, generator=seeded(3))
    plain = PatchPGD(size=3, num_steps=12)(net, x, y, generator=seeded(3))
    for field in dataclasses.fields(plain):
        assert torch.equal(getattr(aware, field.name), getattr(plain, field.name)), field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"majority_places": 0}, "majority_places must be at least 1"),
        ({"confirming_places": -1}, "confirming_places must not be negative"),
        ({"views_per_step": 0}, "views_per_step must be at least 1"),
        ({"last_alpha": 0.0}, "last_alpha must be positive"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack(**settings)


def test_is_an_attack_on_one_patch() -> None:
    made: Attack = MaskingAwarePatch((2, 3))
    assert made.threat.describe() == "1 patch of 2x3"
