import pytest

from amsdn.evaluation.bars import BARS, published

CIFAR = {"name": "cifar10", "split": "test", "image_size": 32}


def test_a_bar_stands_only_beside_exactly_its_threat_and_data() -> None:
    assert published("certified:patch", 5.0, CIFAR) == "best published: 60 certified / 86 clean, BagCert 2021"
    assert published("worst:linf", 0.03137255, CIFAR).startswith("best published: 58.1 robust")  # a float32's 8/255
    assert published("median:l0", 0, CIFAR) == "best published: 13 pixels, FPA 2024"
    for key, budget in (
        ("certified:patch", 6.0),
        ("worst:patch", 5.0),
        ("worst:l2", 0.5),
        ("certified:patch-detection", 5.0),
        ("clean", 0.0),
    ):
        assert published(key, budget, CIFAR) == ""


@pytest.mark.parametrize("data", [None, {}, {"name": "digits"}, {**CIFAR, "image_size": 64}, {**CIFAR, "split": "train"}])
def test_other_data_have_no_bar(data: dict[str, object] | None) -> None:
    assert not any(published(bar.key, bar.budget, data) for bar in BARS)


def test_what_is_quoted_from_memory_says_so() -> None:
    assert {bar.recalled for bar in BARS} == {True, False}
    assert all(("from memory" in str(bar)) == bar.recalled for bar in BARS)


def test_every_bar_is_a_share_and_each_threat_has_one() -> None:
    assert len({(bar.key, bar.budget) for bar in BARS}) == len(BARS)
    assert all(0 < bar.value <= (bar.clean or 100) <= 100 for bar in BARS)
