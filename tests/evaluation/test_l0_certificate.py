"""The l0 certifier: the bound of its votes, for whatever samples come in whatever company."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN, Certifier, Claim, Sample
from amsdn.evaluation.l0_certificate import L0Certifier, L0Config
from amsdn.records import config_hash
from amsdn.utils.voting import changes_survived, run_off


class Pixels(nn.Module):
    """A voting defence of its own making, without the package's models: every pixel is a voter and its channels are the logits."""

    tolerance = 1e-3

    def __init__(self, grid: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.classifier = nn.Flatten()
        self.grid = grid
        self.sizes: list[int] = []
        self.eval()

    @property
    def parts(self) -> int:
        return self.grid[0] * self.grid[1]

    def part_logits(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        colours = x.flatten(2).transpose(1, 2)
        return torch.where(colours.amax(2, keepdim=True) > 0.25, colours, math.nan)


def images(count: int, height: int = 2, width: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) ** 3


def certified(certifier: Certifier, x: Tensor) -> dict[int, Claim]:
    rows = list(certifier.certify(Sample(10 + i, image) for i, image in enumerate(x)))
    assert all(set(claims) == {"l0"} for _, claims in rows)
    return {sample_id: claims["l0"] for sample_id, claims in rows}


def test_no_image_of_a_tiny_world_contradicts_a_claim_and_one_pixel_more_is_too_many() -> None:
    colours = torch.tensor([[1.0, 0.5, 0], [0, 1.0, 0.5], [0, 0.5, 1.0]])
    codes = torch.tensor(list(itertools.product(range(3), repeat=6)))
    world = colours[codes].transpose(1, 2).reshape(-1, 3, 2, 3)
    defence = Pixels()
    answers = run_off(defence.part_logits(world))
    claims = certified(L0Certifier(defence, 50), world)
    radius = torch.tensor([claims[10 + i].radius for i in range(len(world))])
    assert [claims[10 + i].prediction for i in range(len(world))] == answers.tolist()
    distance = (codes[:, None] != codes).sum(2)
    nearest = torch.where(answers[:, None] != answers, distance, 99).amin(1)
    assert bool((radius < nearest).all())
    assert bool((radius + 1 >= nearest).any())
    assert {int(r) for r in radius.unique()} == {0, 1, 2, 3}


def test_claims_do_not_depend_on_company_order_or_batch() -> None:
    x = images(23)
    expected = {i: c[:3] for i, c in certified(L0Certifier(Pixels(), 23), x).items()}
    assert len({c[0] for c in expected.values()}) == 4  # three classes and abstentions
    assert len({c[1] for c in expected.values()}) > 2
    for images_per_batch in (1, 5, 100):
        assert {i: c[:3] for i, c in certified(L0Certifier(Pixels(), images_per_batch), x).items()} == expected
    backwards = L0Certifier(Pixels(), 4).certify(Sample(10 + i, x[i]) for i in reversed(range(23)))
    assert {i: claims["l0"][:3] for i, claims in backwards} == expected


def test_samples_are_pulled_as_there_is_room_and_sizes_may_differ() -> None:
    pulled: list[int] = []

    def source() -> Iterator[Sample]:
        for i in range(9):
            pulled.append(i)
            yield Sample(i, images(1, seed=i, height=2 if i < 6 else 3, width=3 if i < 6 else 2)[0])

    defence = Pixels()
    results = L0Certifier(defence, images_per_batch=4).certify(source())
    assert pulled == []
    next(results)
    assert pulled == [0, 1, 2, 3]
    assert [i for i, _ in results] == [*range(1, 9)]
    assert defence.sizes == [4, 2, 2, 1]


def test_what_a_claim_says() -> None:
    x = images(40)
    claims = certified(L0Certifier(Pixels(), 8), x)
    defence = Pixels()
    answers, radii = (t.tolist() for t in changes_survived(defence.part_logits(x), defence.tolerance))
    assert -1 in radii
    for answer, radius, claim in zip(answers, radii, claims.values(), strict=True):
        assert claim[:3] == ((answer, float(radius), 6) if radius >= 0 else (ABSTAIN, 0.0, 6))
        assert claim.seconds >= 0


def test_nothing_is_claimed_where_no_vote_is_firm() -> None:
    (claim,) = certified(L0Certifier(Pixels()), torch.full((1, 3, 2, 3), 0.1)).values()
    assert claim[:3] == (ABSTAIN, 0.0, 6)


def test_the_configuration_names_what_is_certified() -> None:
    certifier = L0Certifier(Pixels((1, 6)))
    assert certifier.kinds == ("l0",)
    assert certifier.config == L0Config(1, 6, 1e-3)
    assert isinstance(certifier.model, nn.Flatten)
    assert config_hash(certifier.config) != config_hash(L0Certifier(Pixels((6, 1))).config)
    assert config_hash(certifier.config) == config_hash(L0Certifier(Pixels((1, 6)), images_per_batch=3).config)


def test_unusable_models_and_images_are_one_line() -> None:
    noisy = Pixels()
    noisy.stochastic = True  # type: ignore[assignment]
    for model, message in ((nn.Flatten().eval(), "PixelPartition"), (Pixels().train(), "train mode"), (noisy, "stochastic")):
        with pytest.raises(InputError, match=message) as caught:
            L0Certifier(model)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="images_per_batch"):
        L0Certifier(Pixels(), 0)
    for value in (1.5, math.nan):
        with pytest.raises(InputError, match=r"\[0,1\]"):
            certified(L0Certifier(Pixels()), torch.full((1, 3, 2, 3), value))
