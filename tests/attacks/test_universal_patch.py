"""One patch for all images: known optima on linear models, what unseen images say of it, and its files."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attack_toys import Linear, images, small_net
from torch import Tensor, nn

from amsdn.attacks import AdvPatch, ApplyPatch, UniversalPatch, success_rate
from amsdn.attacks.base import RESCORE_DRAWS, Victim
from amsdn.attacks.losses import CrossEntropy, Goal, Margin
from amsdn.attacks.physical import DIGITAL, NONE, Transformations, apply
from amsdn.attacks.printing import load_png, save_png
from amsdn.attacks.universal_patch import LogSuccess, endless_batches
from amsdn.errors import InputError
from amsdn.records import config_hash


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("loss", [LogSuccess(), Margin(), CrossEntropy()])
def test_optimum_at_a_fixed_place_of_a_linear_model(loss: Margin) -> None:
    """The margin is w.x: each value of the best patch is black where w is positive, else white."""
    model, at = Linear(bias=0.0), Transformations(place=(2, 3))
    patch = AdvPatch(4, 40, batch_size=8, transformations=at, loss=loss).fit(model, images(20, 8), zeros(20), seeded())
    assert torch.equal(patch.content, (model.w[:, 2:6, 3:7] < 0).float())
    towards = AdvPatch(4, 40, batch_size=8, transformations=at, loss=loss, target_class=0)
    assert torch.equal(towards.fit(model, images(20, 8), zeros(20) + 1, seeded()).content, (model.w[:, 2:6, 3:7] > 0).float())


def test_near_the_optimum_over_all_places_of_a_linear_model() -> None:
    """Anywhere in 8x8, a value of a 3x3 patch meets 36 weights alike often: the best value follows the sign of their sum."""
    model = Linear(bias=0.0)
    met = F.conv2d(model.w.detach().unsqueeze(1), torch.ones(1, 1, 6, 6)).squeeze(1)  # [3,3,3]: the sum of those 36 weights
    best = float((met * (met < 0)).sum())
    attack = AdvPatch(3, 200, batch_size=32, transformations=NONE, loss=Margin())
    content = attack.fit(model, images(64, 8), zeros(64), seeded()).content
    assert float((met * content).sum()) < 0.95 * best


class Corner(nn.Module):
    """Class 1 if the four top left pixels are bright, all of them: a patch elsewhere does not do."""

    def forward(self, x: Tensor) -> Tensor:
        score = 40 * (x[:, :, :2, :2].mean((1, 2, 3)) - 0.8)
        return torch.stack([-score, score, torch.full_like(score, -50)], 1)


def test_success_is_counted_per_image_and_only_where_it_means_something() -> None:
    net = Corner().eval()
    x = torch.cat([images(6, 4, high=0.1), images(2, 4, low=0.9)])  # dark are class 0, bright are class 1
    y = torch.tensor([0, 0, 0, 0, 0, 2, 1, 1])  # the sixth is wrong without a patch
    white, at = torch.ones(3, 2, 2), Transformations(place=(0, 0))
    found = success_rate(net, x, y, white, at, 3, seeded(), target=1, batch_size=5)
    assert found.attackable.tolist() == [True] * 5 + [False] + [True] * 2
    assert found.targetable.tolist() == [True] * 5 + [False] * 3
    assert found.untargeted().tolist() == [1.0] * 5 + [0.0] * 2
    assert found.targeted().tolist() == [1.0] * 5
    anywhere = success_rate(net, x, y, white, NONE, 300, seeded(), target=1)
    assert float(anywhere.targeted().mean()) == pytest.approx(1 / 9, abs=0.03)  # 9 places, one of which covers the corner
    assert success_rate(net, x, y, white, NONE, 3, seeded()).hit.sum() == 0


class Coin(nn.Module):
    """A random defence: wrong on three calls of ten, so the vote is right."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        wrong = (torch.rand(len(x)) < 0.3).float()
        return torch.stack([1 - wrong, wrong], 1)


def test_one_lucky_call_of_a_random_model_is_no_success() -> None:
    found = success_rate(Coin().eval(), images(20), zeros(20), torch.ones(3, 4, 4), NONE, 4, seeded())
    assert found.fooled.mean() < 0.05
    again = success_rate(Coin().eval(), images(20), zeros(20), torch.ones(3, 4, 4), NONE, 4, seeded())
    assert torch.equal(found.fooled, again.fooled)
    assert RESCORE_DRAWS > 9


class Masked(nn.Module):
    """A quantising defence without any gradient, that names its stand-in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Linear(bias=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 15).round() / 15)

    def differentiable_surrogate(self) -> nn.Module:
        return self.net


def test_a_masked_gradient_is_looked_through() -> None:
    model = Masked().eval()
    attack = AdvPatch(4, 60, transformations=Transformations(place=(2, 3)))
    found = attack.fit(model, images(20, 8), zeros(20), seeded()).content
    assert torch.equal(found, (model.net.w[:, 2:6, 3:7] < 0).float())


def test_learned_patches_beat_random_ones_on_unseen_images() -> None:
    net, train, test = small_net(), images(60), images(60, seed=1)
    patch = AdvPatch(10, 40, batch_size=30).fit(net, train, net(train).argmax(1), seeded())
    y = net(test).argmax(1)

    def fooled(content: Tensor) -> float:
        return float(success_rate(net, test, y, content, DIGITAL, 4, seeded(1)).untargeted().mean())

    assert fooled(patch.content) > 1.5 * max(fooled(torch.rand(3, 10, 10, generator=seeded(s))) for s in range(5))
    assert not any(p.grad is not None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_same_seed_same_patch() -> None:
    net, x = small_net(), images(20)
    y = net(x).argmax(1)
    attack = AdvPatch(5, 8, batch_size=7, draws=2)
    first, again, other = (attack.fit(net, x, y, seeded(s)).content for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, (first * 255).round() / 255)


def test_all_images_of_a_batch_wear_the_same_patch() -> None:
    net, x = small_net(), images(5)
    attack = AdvPatch(5, 10, tries=1, transformations=Transformations(place=(4, 6)), stop_when_fooled=False)
    seen = attack.craft(net, x, net(x).argmax(1), seeded())[:, :, 4:9, 6:11]
    assert torch.equal(seen, seen[:1].expand_as(seen))
    assert torch.equal(seen, (seen * 255).round() / 255)


def test_cost_is_what_the_docstring_says() -> None:
    net, x = small_net(), images(5)
    result = AdvPatch(3, 7, draws=2, tries=4, stop_when_fooled=False)(net, x, net(x).argmax(1))
    assert (result.forwards == 1 + 7 * 2 + 4).all()
    assert (result.backwards == 7 * 2).all()


def test_a_trained_target_holds_whatever_the_caller_wants() -> None:
    net, x = small_net(), images(30)
    y = net(x).argmax(1)
    target = int((y[0] + 1) % 5)
    attack = AdvPatch(9, 40, tries=1, target_class=target, transformations=Transformations(place=(3, 3)), stop_when_fooled=False)
    before, after = net(x), net(attack.craft(net, x, y, seeded()))
    rise = (after - before).mean(0)
    assert rise.argmax() == target


def test_log_success_is_the_log_of_the_probability_of_success() -> None:
    logits = torch.randn(6, 4, generator=seeded()).double() * 3
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(LogSuccess()(logits, Goal(labels)), (1 - p).log())
    torch.testing.assert_close(LogSuccess()(logits, Goal(labels, targeted=True)), p.log())
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(LogSuccess()(sure, Goal(torch.tensor([0]))).sum(), sure)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.5, 0.5]]))  # not lost where the model is sure


def test_batches_cover_each_epoch_once() -> None:
    rows = endless_batches(10, 4, seeded())
    epochs = [torch.cat([next(rows), next(rows)]).tolist() for _ in range(5)]
    assert all(len(set(e)) == 8 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 5
    assert next(endless_batches(3, 3, seeded())).tolist() == [0, 1, 2]


def finished(folder: Path, seed: int = 0) -> Path:
    content = (torch.rand(3, 5, 5, generator=seeded(seed)) * 255).round() / 255
    UniversalPatch(content, {"class": "AdvPatch"}).save(folder / "patch.png", note=1)
    return folder / "patch.png"


def test_save_and_load(tmp_path: Path) -> None:
    path = finished(tmp_path)
    loaded = UniversalPatch.load(path)
    assert torch.equal(loaded.content, load_png(path))
    assert loaded.attack == {"class": "AdvPatch"}
    finished(tmp_path / "other", seed=1)
    (tmp_path / "other" / "patch.json").replace(path.with_suffix(".json"))
    with pytest.raises(InputError, match="describes another patch"):
        UniversalPatch.load(path)


def test_applied_patch_is_known_by_its_content(tmp_path: Path) -> None:
    path = finished(tmp_path)
    attack = ApplyPatch(path, 5)
    assert attack.digest == UniversalPatch.load(path).digest
    assert attack == ApplyPatch(path, 5, digest=attack.digest)
    before = config_hash(attack)
    save_png((torch.rand(3, 5, 5, generator=seeded(1)) * 255).round() / 255, path)
    assert config_hash(ApplyPatch(path, 5)) != before
    with pytest.raises(InputError, match="the file has changed"):
        attack(small_net(), images(2), small_net()(images(2)).argmax(1))
    with pytest.raises(InputError, match="no such patch"):
        ApplyPatch(tmp_path / "none.png")


def test_applied_patch_takes_the_worst_of_its_tries(tmp_path: Path) -> None:
    path, net, x = finished(tmp_path), small_net(), images(30)
    y = net(x).argmax(1)
    one, many = (ApplyPatch(path, 5, tries=n, transformations=DIGITAL)(net, x, y, generator=seeded()) for n in (1, 12))
    assert (many.margin[~many.success] <= one.margin[~many.success]).all()
    assert many.success.sum() >= one.success.sum()
    assert (many.forwards[~many.success] == 13).all()
    assert ApplyPatch(path, 5).threat.contains(many.x_adv, x).all()
    assert many.margin.mean() < one.margin.mean()


def test_gradient_is_that_of_the_expected_loss() -> None:
    net, x = small_net(), images(8)
    attack, content = AdvPatch(5, loss=Margin()), torch.rand(3, 5, 5, generator=seeded(3))
    goal = Goal(net(x).argmax(1))
    gradient, _ = attack._gradient(Victim.of(net, 8, x.device), x, goal, content, seeded(4))
    leaf = content.clone().requires_grad_(True)
    shown = apply(x, leaf, DIGITAL.sample(8, 5, seeded(4)))
    (expected,) = torch.autograd.grad(Margin()(net(shown), goal).sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def test_bad_input_to_fit_is_one_line() -> None:
    net, x = small_net(), images(4)
    y = net(x).argmax(1)
    for attack, labels, message in (
        (AdvPatch(), y[:2], "labels must be whole numbers"),
        (AdvPatch(), y + 9, "outside the 5 classes"),
        (AdvPatch(target_class=7), y, "class 7 is outside the 5 classes"),
        (AdvPatch(target_class=0), zeros(4), "other classes than the target"),
        (AdvPatch(17), y, "a patch of 17 px does not fit images of 16x16"),
    ):
        with pytest.raises(InputError, match=message) as e:
            attack.fit(net, x, labels)
        assert "\n" not in str(e.value)
    for target in (5, 99):  # as an attack, not only in fit
        with pytest.raises(InputError, match=f"AdvPatch: target_class must be below 5, got {target}"):
            AdvPatch(5, 2, target_class=target)(net, x, y)
    with pytest.raises(InputError, match="train mode"):
        AdvPatch().fit(small_net().train(), x, y)
    with pytest.raises(InputError, match="draws"):
        success_rate(net, x, y, torch.ones(3, 4, 4), NONE, 0)


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        ([0, 1], None, r"labels must be whole numbers \[4\]"),
        ([0.0, 1, 2, 3], None, "labels must be whole numbers"),
        ([0, 1, 2, 5], None, "class 5 is outside the 5 classes"),
        ([0, -1, 2, 3], None, "class -1 is outside the 5 classes"),
        ([0, 1, 2, 3], 99, "class 99 is outside the 5 classes"),
        ([0, 1, 2, 3], -1, "class -1 is outside the 5 classes"),
    ],
)
def test_a_rate_of_labels_or_a_target_that_cannot_be_is_refused(labels: list[float], target: int | None, message: str) -> None:
    with pytest.raises(InputError, match=f"success_rate: {message}") as e:
        success_rate(small_net(), images(4), torch.tensor(labels), torch.ones(3, 4, 4), NONE, 1, target=target)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"momentum": 1.0}, {"tries": 0}, {"draws": 0}, {"target_class": -1}, {"size": 0}])
def test_unusable_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        AdvPatch(**settings)  # type: ignore[arg-type]
    assert config_hash(AdvPatch()) != config_hash(dataclasses.replace(AdvPatch(), momentum=0.5))
