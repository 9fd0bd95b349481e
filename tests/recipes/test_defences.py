"""The certified classifiers are put around a model with its own colour, its own weights and nothing of its light consistency."""

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.protocols import GREY
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.threats import PatchRegion, SparsePixels


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> AMSDN:
    torch.manual_seed(0)
    return AMSDN(variant="compact", width=2, fpn_channels=8, consistency_samples=3).eval()


def test_an_amsdn_is_masked_in_its_own_colour_without_its_light_views(model: AMSDN) -> None:
    defence = PatchDefence(size=4, masks_per_axis=2).around(model)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(defence.fill, model.mask_fill)
    assert torch.equal(defence.classifier(x), model._stages(x, False).logits)
    assert not torch.equal(defence.classifier(x), model(x))  # which averages over its light views
    assert model.config.consistency_samples == 3
    assert next(defence.parameters()) is next(model.parameters())


def test_any_other_classifier_is_masked_in_grey_unless_it_says_otherwise() -> None:
    plain = Plain().eval()
    assert PatchDefence().around(plain).fill.flatten().tolist() == list(GREY)
    plain.mask_fill = (0.1, 0.2, 0.3)
    assert PatchDefence().around(plain).fill.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_rectangle_is_attacked_by_the_largest_square_that_is_certified() -> None:
    """Radii are sides of squares: a larger attack would count for nothing in the cross-check."""
    assert PatchDefence(size=(3, 6)).around(Plain().eval()).patch == (3, 6)
    assert {attack.threat for attack in DefenceAttacks().on_patches((3, 6)).values()} == {PatchRegion(3)}
    assert {attack.threat for attack in DefenceAttacks().on_patches(5).values()} == {PatchRegion(5)}


def test_every_pixel_budget_is_attacked_by_gradients_and_by_search() -> None:
    attacks = DefenceAttacks(pixels=(2, 7)).on_pixels()
    assert [attack.threat for attack in attacks.values()] == [SparsePixels(2), SparsePixels(2), SparsePixels(7), SparsePixels(7)]
    assert len({type(attack) for attack in attacks.values()}) == 2


def test_impossible_defences_are_one_line() -> None:
    for make in (
        lambda: PatchDefence(size=0).around(Plain()),
        lambda: PixelDefence(rows=0).around(Plain()),
        lambda: DefenceAttacks(samples=0),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert "\n" not in str(caught.value)
