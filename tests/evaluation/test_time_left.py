import pytest
from hypothesis import given
from hypothesis import strategies as st

from amsdn.evaluation.time_left import TimeLeft, duration


def test_without_a_plan_nobody_knows_until_every_attack_has_met_an_image() -> None:
    left = TimeLeft()
    assert left.seconds({"a": 10, "b": 10}) is None
    left.note("a", 5, 10.0)
    assert left.seconds({"a": 10, "b": 10}) is None
    assert left.seconds({"a": 10, "b": 0}) == 20.0
    left.note("b", 5, 1.0)
    assert left.seconds({"a": 10, "b": 10}) == pytest.approx(22.0)


def test_a_plan_counts_as_much_as_the_others_plans_came_out() -> None:
    left = TimeLeft({"a": 4.0, "b": 10.0})
    assert left.seconds({"a": 1, "b": 1}) == 14.0
    left.note("a", 10, 10.0)  # a quarter of the plan: images fell early
    assert left.seconds({"a": 0, "b": 4}) == pytest.approx(10.0)
    left.note("b", 2, 2.0)  # what was measured outweighs every plan
    assert left.seconds({"b": 4}) == pytest.approx(4.0)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(2, 20), st.data())
def test_after_one_chunk_the_time_left_is_right_within_a_third(rates: list[float], chunks: int, data: st.DataObject) -> None:
    """Chunks differ by a seventh in what they cost; attacks by whatever they like."""
    names = [f"attack-{i}" for i in range(len(rates))]
    cost = [{n: r * data.draw(st.floats(0.86, 1.14)) * 50 for n, r in zip(names, rates, strict=True)} for _ in range(chunks)]
    left = TimeLeft()
    for done, chunk in enumerate(cost, start=1):
        for name in names:
            left.note(name, 50, chunk[name])
        truth = sum(sum(later.values()) for later in cost[done:])
        found = left.seconds(dict.fromkeys(names, 50 * (chunks - done)))
        assert found == pytest.approx(truth, rel=1 / 3)


def test_durations_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 3000, 5400, 36000)] == ["0 s", "89 s", "2 min", "50 min", "1.5 h", "10.0 h"]
