import pytest
import torch
import torch.nn.functional as F

from amsdn.data import Augment
from amsdn.errors import InputError
from amsdn.records import config_hash


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 64, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=seeded(7))


def crops(image: torch.Tensor, shift: int) -> list[torch.Tensor]:
    """All windows of the reflect-padded image, by slicing: the oracle for the gather."""
    height, width = image.shape[1:]
    padded = F.pad(image[None], (shift,) * 4, mode="reflect")[0]
    return [padded[:, i : i + height, j : j + width] for i in range(2 * shift + 1) for j in range(2 * shift + 1)]


def test_nothing_asked_for_changes_nothing():
    x = pictures()
    assert torch.equal(Augment(flip=False, shift=0)(x, seeded()), x)


@pytest.mark.parametrize("flip", [False, True])
def test_every_output_is_one_of_the_possible_shifts_and_all_occur(flip):
    x = pictures(1, 5, 6).repeat(400, 1, 1, 1)
    out = Augment(flip=flip, shift=1)(x, seeded())
    allowed = crops(x[0], 1) + (crops(x[0].flip(2), 1) if flip else [])
    seen = {next(i for i, crop in enumerate(allowed) if torch.equal(crop, image)) for image in out}
    assert seen == set(range(len(allowed)))


def test_flip_alone_mirrors_about_half():
    x = pictures(400)
    out = Augment(flip=True, shift=0)(x, seeded())
    kept, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert (kept ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_images_draw_independently():
    x = pictures(1).repeat(64, 1, 1, 1)
    assert len(Augment(shift=3)(x, seeded()).flatten(1).unique(dim=0)) > 16


def test_shift_is_clamped_to_the_image():
    x = pictures(20, 4, 3)
    out = Augment(flip=False, shift=100)(x, seeded())
    assert out.shape == x.shape
    assert all(out[i].unique().numel() <= x[i].numel() and torch.isin(out[i], x[i]).all() for i in range(20))
    one_pixel = torch.rand(2, 3, 1, 1, generator=seeded())
    assert torch.equal(Augment()(one_pixel, seeded()), one_pixel)


@pytest.mark.parametrize("cutout", [1, 3, 8, 50])
def test_cutout_is_one_square_of_the_mean(cutout):
    x = pictures(50)
    out = Augment(flip=False, shift=0, cutout=cutout)(x, seeded())
    side = min(cutout, 8)
    for before, after in zip(x, out, strict=True):
        hole = (before != after).all(0)
        rows, columns = hole.nonzero().unbind(1)
        assert hole.sum() == side * side
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (side, side)
        assert torch.equal(after[:, hole], before.mean(dim=(1, 2))[:, None].expand(-1, side * side))


def test_same_seed_same_output_and_other_seed_another():
    x = pictures()
    augment = Augment(cutout=3)
    assert torch.equal(augment(x, seeded(1)), augment(x, seeded(1)))
    assert not torch.equal(augment(x, seeded(1)), augment(x, seeded(2)))


def test_input_is_left_alone_and_type_kept():
    x = pictures().double()
    before = x.clone()
    out = Augment(cutout=3)(x, seeded())
    assert torch.equal(x, before)
    assert out.dtype == torch.float64
    assert out.amin() >= 0
    assert out.amax() <= 1


def test_it_is_its_own_configuration():
    assert config_hash(Augment()) == config_hash(Augment(flip=True, shift=4, cutout=0))
    assert config_hash(Augment()) != config_hash(Augment(shift=3))


@pytest.mark.parametrize("field", ["shift", "cutout"])
def test_negative_sizes_are_refused(field):
    with pytest.raises(InputError, match=rf"Augment\({field}\).*got -1"):
        Augment(**{field: -1})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cpu_generator_gives_the_same_on_the_gpu():
    x, augment = pictures(), Augment(shift=3)
    assert torch.equal(augment(x.cuda(), seeded()).cpu(), augment(x, seeded()))
    on_device = augment(x.cuda(), torch.Generator("cuda").manual_seed(0))
    assert on_device.device.type == "cuda"
