"""What is asked of inputs and models, and what a model may declare."""

import math

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.protocols import check_eval_mode, check_images, detector_of, device_of, is_stochastic, mask_fill_of, surrogate_of


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.rand(3, 8, 8), "shape"),
        (torch.rand(2, 1, 8, 8), "shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide uint8 by 255"),
        (torch.rand(0, 3, 8, 8), "empty"),
        (torch.rand(1, 3, 8, 8) + 0.5, "undo any normalisation"),
        (torch.rand(1, 3, 8, 8) - 0.5, "undo any normalisation"),
        (torch.full((1, 3, 8, 8), math.nan), "finite"),
        (torch.full((1, 3, 8, 8), math.inf), "finite"),
    ],
)
def test_unusable_images_are_one_line_that_says_where(x: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        check_images(x, "here")
    assert str(error.value).startswith("here: ")
    assert "\n" not in str(error.value)


def test_one_bad_pixel_among_many_is_found() -> None:
    x = torch.rand(4, 3, 8, 8)
    check_images(x, "here")
    x[2, 1, 3, 3] = math.nan
    with pytest.raises(InputError):
        check_images(x, "here")


def test_train_mode_is_found_in_any_part() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3))).eval()
    check_eval_mode(model, "here")
    model[1][0].train()
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        check_eval_mode(model, "here")


class Declares(nn.Module):
    stochastic = True

    def differentiable_surrogate(self) -> nn.Module:
        return nn.Identity()

    def analyze(self, x: Tensor) -> None: ...


def test_what_a_defence_declares_is_read_and_its_silence_means_nothing_special() -> None:
    plain, declared = nn.Identity(), Declares()
    assert not is_stochastic(plain)
    assert is_stochastic(declared)
    assert surrogate_of(plain) is None
    assert isinstance(surrogate_of(declared), nn.Identity)
    assert detector_of(plain) is None
    assert detector_of(declared) is declared
    declared.has_detector = False  # type: ignore[assignment]
    assert detector_of(declared) is None
    assert device_of(plain) == torch.device("cpu")


def test_covered_pixels_take_the_declared_colour_or_grey() -> None:
    assert torch.equal(mask_fill_of(nn.Identity()), torch.full((1, 3, 1, 1), 0.5))
    model = nn.Identity()
    for declared in ((0.25, 0.5, 1.0), torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64).reshape(1, 3, 1, 1)):
        model.mask_fill = declared
        fill = mask_fill_of(model)
        assert fill.dtype == torch.float32
        assert torch.equal(fill, torch.tensor([0.25, 0.5, 1.0]).reshape(1, 3, 1, 1))


@pytest.mark.parametrize("declared", [0.5, (0.1, 0.2), "grey", None, (0.1, 0.2, math.nan), (0.1, 0.2, 1.5), (-0.1, 0.2, 0.5)])
def test_a_colour_that_is_none_is_refused_in_one_line(declared: object) -> None:
    model = nn.Identity()
    model.mask_fill = declared
    with pytest.raises(InputError, match="mask_fill must be a colour") as error:
        mask_fill_of(model)
    assert "\n" not in str(error.value)
