"""The attack on consistency hides from the view that already errs, and wins over the others."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from amsdn.attacks import EvadeDetector, HiddenViewPatch, PatchPGD, Victim
from amsdn.attacks.patch_attacks import paste
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.utils.masking import covered_places

SIDE = 12


class Corners(nn.Module):
    """Logits: twice the mean of the upper left quadrant against that of the lower half; black pixels speak for neither."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, :, :6, :6].mean((1, 2, 3)), x[:, :, 6:].mean((1, 2, 3))
        return 25 * torch.stack([2 * left, right], 1)


@dataclass(frozen=True)
class Quadrants:
    """Four masks, a quadrant each."""

    classifier: nn.Module
    fill: Tensor

    def masks(self, height: int, width: int) -> Tensor:
        masks = torch.zeros(4, 1, height, width, dtype=torch.bool)
        for number in range(4):
            top, left = 6 * (number // 2), 6 * (number % 2)
            masks[number, :, top : top + 6, left : left + 6] = True
        return masks


class Consistent(nn.Module):
    """Answers by the mean over image and views, and alarms where a view gives the answer less than a half."""

    detection_threshold = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.views = Quadrants(Corners(), torch.zeros(1, 3, 1, 1))

    def occluded_views(self) -> Quadrants:
        return self.views

    def analyze(self, x: Tensor) -> SimpleNamespace:
        masks = self.views.masks(*x.shape[2:])
        seen = torch.stack([self.views.classifier(v).softmax(1) for v in (x, *(torch.where(m, self.views.fill, x) for m in masks))])
        mean = seen.mean(0)
        agreement = seen[1:].gather(2, mean.argmax(1).expand(4, -1).unsqueeze(2)).squeeze(2).amin(0)
        anomaly = 1 - agreement
        return SimpleNamespace(logits=mean.log(), anomaly_score=anomaly, detected=anomaly > 0.5, anomaly_map=torch.zeros_like(x[:, :1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.analyze(x).logits


def half_bright() -> tuple[Tensor, Tensor]:
    """Class 0 by the upper left, dim enough to be outshone; under its mask the lower half alone speaks, for class 1."""
    x = torch.zeros(4, 3, SIDE, SIDE)
    x[:, :, :6, :6] = torch.tensor([0.35, 0.38, 0.4, 0.42]).reshape(-1, 1, 1, 1)
    x[:, :, 6:] = 0.6
    return x, torch.zeros(4, dtype=torch.int64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_it_finds_the_only_road_past_the_alarm() -> None:
    model, (x, y) = Consistent().eval(), half_bright()
    assert (model(x).argmax(1) == y).all()
    result = EvadeDetector(HiddenViewPatch(size=5, num_steps=120))(model, x, y, generator=generator())
    after = model.analyze(result.x_adv)
    assert result.success.all()
    assert (after.logits.argmax(1) == 1).all()
    assert not after.detected.any()
    assert PatchPGD(5).threat.contains(result.x_adv, x).all()


def test_every_patch_lies_under_the_mask_whose_view_errs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = Consistent().eval(), half_bright()
    tried: list[Tensor] = []
    monkeypatch.setattr(
        "amsdn.attacks.hidden_view.paste", lambda images, content, corner: tried.append(corner) or paste(images, content, corner)
    )
    EvadeDetector(HiddenViewPatch(size=5, num_steps=4, plans=1, stop_when_fooled=False))(model, x, y, generator=generator())
    hidden = covered_places(model.views.masks(SIDE, SIDE), (5, 5))
    assert tried
    for corner in tried:
        assert hidden[0, corner[:, 0], corner[:, 1]].all()  # the upper left: without it the lower half speaks


def test_a_target_is_aimed_at_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = AMSDN.from_config(AMSDNConfig(variant="compact", width=4, consistency_samples=4)).eval(), torch.rand(3, 3, 32, 32)
    wanted: list[Tensor] = []
    plans = HiddenViewPatch._plans
    monkeypatch.setattr(HiddenViewPatch, "_plans", lambda *a: wanted.append(plans(*a)[1]) or plans(*a))
    y, targets = model(x).argmax(1), (model(x).argmax(1) + 3) % 10
    attack = HiddenViewPatch(num_steps=4, plans=4, places=1)
    attack(model, x, y, targets=targets, generator=generator())
    attack(model, x, y, generator=generator())
    assert (wanted[0] == targets.unsqueeze(1)).all()
    assert (wanted[1] != y.unsqueeze(1)).all()


def test_passes_are_counted_for_every_view() -> None:
    model, (x, y) = Consistent().eval(), half_bright()
    result = HiddenViewPatch(size=5, num_steps=12, plans=2, places=2, stop_when_fooled=False)(model, x, y, generator=generator())
    assert (result.backwards == 12 + 2).all()
    assert (result.forwards == 1 + 4 + 12 + 2).all()  # the first is the clean image's


def test_the_package_s_own_consistency_is_met_and_another_model_gets_plain_patches() -> None:
    config = AMSDNConfig(variant="compact", width=4, consistency_samples=4)
    model = AMSDN.from_config(config).eval()
    views = model.occluded_views()
    assert views is not None
    x, y = torch.rand(2, 3, 32, 32, generator=generator()), torch.tensor([0, 1])
    with torch.no_grad():
        bare = AMSDN.from_config(replace(config, consistency_samples=0)).eval()
        bare.load_state_dict(model.state_dict())
        torch.testing.assert_close(views.classifier(x), bare(x))
    result = EvadeDetector(HiddenViewPatch(num_steps=6))(model, x, y, generator=generator())
    assert PatchPGD(5).threat.contains(result.x_adv, x).all()
    assert bare.occluded_views() is None
    ours = HiddenViewPatch(num_steps=6)(bare, x, y, generator=generator())
    plain = PatchPGD.racing(5, 6)(bare, x, y, generator=generator())
    assert torch.equal(ours.x_adv, plain.x_adv)


@pytest.mark.parametrize("field", ["num_steps", "plans", "places", "alpha", "last_alpha"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(InputError, match=field):
        HiddenViewPatch(**{field: 0})


def test_it_is_one_run_of_a_victim() -> None:
    model, (x, y) = Consistent().eval(), half_bright()
    assert Victim.of(model, 4, x.device).modules[0] is model
    again = [HiddenViewPatch(num_steps=12)(model, x, y, generator=generator()).x_adv for _ in range(2)]
    assert torch.equal(*again)
