"""One suite for every registered attack: a new entry of the registry is tested unasked."""

import dataclasses

import pytest
import torch
from attack_toys import Gate, gate_images, images, small_net
from torch import Tensor, nn

from amsdn.attacks import ATTACKS, Attack, base, make_attack
from amsdn.attacks.minimal_norm import MinimalNorm
from amsdn.errors import InputError
from amsdn.records import config_hash

QUICK = {"num_steps": 6, "num_queries": 40, "tries": 6, "guided_queries": 20}
SINGLE_QUERY = {"fgsm", "n-fgsm"}
SEVERAL_GRADIENTS = {"deepfool", "fab", "fab-l1", "fab-l2"}  # one to each class boundary, from one forward pass


def quick(name: str) -> Attack:
    attack = ATTACKS[name]()
    fields = {f.name for f in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{k: v for k, v in QUICK.items() if k in fields})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


every_attack = pytest.mark.parametrize("name", ATTACKS)


@every_attack
def test_is_its_own_configuration(name: str) -> None:
    attack = quick(name)
    assert attack == quick(name)
    assert hash(attack) == hash(quick(name))
    assert config_hash(attack) == config_hash(quick(name))
    assert config_hash(attack) != config_hash(dataclasses.replace(attack, eot_samples=3))


@every_attack
def test_result_is_a_member_and_describes_itself_truly(name: str) -> None:
    net, x = small_net(), images()
    y = net(x).argmax(1)
    before = x.clone()
    result = quick(name)(net, x, y, generator=seeded())
    assert torch.equal(x, before)
    assert result.x_adv.data_ptr() != x.data_ptr()
    assert quick(name).threat.contains(result.x_adv, x).all()
    logits = net(result.x_adv)
    assert torch.equal(result.prediction, logits.argmax(1))
    assert torch.equal(result.success, result.prediction != y)
    own = logits.gather(1, y[:, None]).squeeze(1)
    best_other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(result.margin, own - best_other)
    torch.testing.assert_close(result.spent, quick(name).threat.spent(result.x_adv, x))
    assert result.x_adv.dtype == result.margin.dtype == torch.float32
    assert not result.x_adv.requires_grad


@every_attack
def test_same_seed_same_result_and_no_global_randomness(name: str) -> None:
    net, x = small_net(), images()
    y = net(x).argmax(1)
    state = torch.get_rng_state()
    first = quick(name)(net, x, y, generator=seeded(7))
    torch.rand(3)
    again = quick(name)(net, x, y, generator=seeded(7))
    torch.set_rng_state(state)
    quick(name)(net, x, y, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), state)
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name


@every_attack
def test_finished_samples_leave_and_every_pass_is_counted(name: str) -> None:
    net, x = Gate(), gate_images()
    y = net(x).argmax(1)
    y[0] = 2  # misclassified before the attack
    net.seen.clear()
    result = quick(name)(net, x, y, generator=seeded())
    standing = len(x) - 1
    assert sum(net.seen) == int(result.forwards.sum()) + standing  # the rescoring is not the attacker's
    assert result.success[0]
    assert torch.equal(result.x_adv[0], x[0])
    assert (result.forwards[0], result.backwards[0], result.spent[0]) == (1, 0, 0)
    easy, hard = slice(1, 8), slice(8, 12)
    assert not result.success[hard].any()
    assert result.success[easy].any()
    full = result.forwards[hard]
    assert (full == full[0]).all()
    if name not in SINGLE_QUERY:
        assert (result.forwards[easy][result.success[easy]] < full[0]).any()
    if name not in SEVERAL_GRADIENTS:
        assert (result.backwards <= result.forwards).all()


@every_attack
def test_looking_less_often_for_finished_samples_stays_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_poll_every", lambda device: 4)  # as on an accelerator
    net, x = Gate(), gate_images()
    y = net(x).argmax(1)
    net.seen.clear()
    result = quick(name)(net, x, y, generator=seeded())
    assert sum(net.seen) == int(result.forwards.sum()) + len(x)
    assert result.success[:8].any()
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)


@every_attack
def test_nothing_leaves_in_training_and_the_model_is_as_before(name: str) -> None:
    net, x = Gate(), gate_images()
    attack = dataclasses.replace(quick(name), stop_when_fooled=False)
    net.w.grad = torch.ones_like(net.w)
    y = torch.zeros(len(x), dtype=torch.int64)
    x_adv = attack.craft(net, x, y, seeded())
    assert all(seen % len(x) == 0 for seen in net.seen)  # several where an attack asks about a population of images a sample
    assert net.w.requires_grad
    assert torch.equal(net.w.grad, torch.ones_like(net.w))
    assert attack.threat.contains(x_adv, x).all()
    assert not x_adv.requires_grad
    needless = (
        net(x).argmax(1) != y if isinstance(attack, MinimalNorm) else torch.zeros(len(x), dtype=torch.bool)
    )  # the smallest change is none
    assert ((x_adv != x).flatten(1).any(1) | needless).all()


@every_attack
def test_targeted(name: str) -> None:
    net, x = small_net(classes=3), images()
    y = net(x).argmax(1)
    targets = (y + 1) % 3
    result = quick(name)(net, x, y, targets=targets, generator=seeded())
    assert torch.equal(result.success, net(result.x_adv).argmax(1) == targets)
    gain = net(result.x_adv).gather(1, targets[:, None]) - net(x).gather(1, targets[:, None])
    if name != "noise":  # noise promises nothing
        assert gain.mean() > 0
    with pytest.raises(InputError, match="target of sample 0 is its label"):
        quick(name)(net, x, y, targets=y)


class InBfloat16(nn.Module):
    """A low-precision model that keeps the protocol: float32 images in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.bfloat16())


@every_attack
def test_low_precision_model_and_channels_last_input(name: str) -> None:
    net, x = InBfloat16().eval(), images().contiguous(memory_format=torch.channels_last)
    y = net(x).argmax(1)
    result = quick(name)(net, x, y, generator=seeded())
    assert result.x_adv.dtype == torch.float32
    assert result.margin.dtype == torch.float32
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = quick(name).craft(small_net(), x, y, seeded())
    assert x_adv.dtype == torch.float32


@every_attack
def test_bad_input_is_one_line(name: str) -> None:
    net, x, attack = small_net(), images(), quick(name)
    y = net(x).argmax(1)
    cases: list[tuple[nn.Module, Tensor, Tensor, str]] = [
        (small_net().train(), x, y, "train mode"),
        (net, x + 0.5, y, r"\[0,1\]"),
        (net, torch.where(x > 0.9, torch.nan, x), y, "finite"),
        (net, x, y + 5, "outside the 5 classes"),
        (net, x, y - 5, "outside the 5 classes"),
        (net, x, y[:3], "one class index per image"),
        (net, x, y.float(), "one class index per image"),
        (net, x[0], y, "shape"),
        (nn.Flatten(2).eval(), x, y, "must return logits"),
    ]
    for model, bad_x, bad_y, message in cases:
        with pytest.raises(InputError, match=message) as e:
            attack(model, bad_x, bad_y)
        assert "\n" not in str(e.value)


def test_make_attack() -> None:
    assert make_attack("pgd", epsilon=0.1).threat.budget == 0.1
    assert make_attack("sparse-pgd-projected", k=3) == ATTACKS["sparse-pgd"](k=3, projected=True)
    with pytest.raises(InputError, match="unknown attack 'pdg'; known: fgsm, n-fgsm"):
        make_attack("pdg")
    with pytest.raises(InputError, match=r"attack pgd: .*eps"):
        make_attack("pgd", eps=0.1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pgd", {"num_steps": 0}),
        ("pgd", {"alpha": 0.0}),
        ("pgd", {"epsilon": -1.0}),
        ("pgd", {"eot_samples": 0}),
        ("fgsm", {"epsilon": float("nan")}),
        ("patch-pgd", {"move": "sideways"}),
        ("patch-pgd", {"size": 0}),
        ("patch-pgd", {"stride": 0}),
        ("sparse-pgd", {"k": 0}),
        ("sparse-pgd", {"patience": 0}),
        ("sparse-rs", {"alpha_init": 1.5}),
        ("sparse-rs", {"num_queries": 0}),
        ("patch-rs", {"shift_every": 0}),
        ("noise", {"tries": 0}),
    ],
)
def test_unusable_settings_are_refused(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings)).split("_")[0][:3]):
        make_attack(name, **settings)


@pytest.mark.parametrize("name", ["patch-pgd", "patch-rs"])
def test_patch_larger_than_the_image(name: str) -> None:
    net, x = small_net(), images()
    with pytest.raises(InputError, match="does not fit images of 16x16"):
        make_attack(name, size=17)(net, x, net(x).argmax(1))
