"""A plan fits the budget exactly where steps take known times, is kept over restarts, and measuring it disturbs nothing."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from amsdn.data import ArraySplit
from amsdn.errors import InputError
from amsdn.training.budget import FEWEST_STEPS, MOMENTS, PLAN_FILE, Plan, parse_budget, plan_stage, refuse_other_budget, span
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput, train

LOOP = LoopConfig(epochs=3, batch_size=10, mixed_precision=False)  # 4 steps an epoch


class Time:
    """A clock that stands still unless a step takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Stage):
    """A step that takes ``cost(progress)`` seconds, and ``first`` more the first time."""

    name = "timed"

    def __init__(self, time: Time, cost: Callable[[float], float], first: float = 0.0) -> None:
        self.time, self.cost, self.first, self.steps = time, cost, first, 0
        self.seen: list[float] = []

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        self.time.now += self.cost(batch.progress) + (self.first if not self.steps else 0.0)
        self.steps += 1
        self.seen.append(batch.progress)
        torch.rand(3)
        loss: Tensor = model(batch.x).square().mean()
        return StepOutput(loss, {}, memory={"mean": batch.x.mean()})

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        assert all(m.keys() == {"mean"} for m in memories)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def planned(split: ArraySplit, folder: Path, budget: float, *costs: Callable[[float], float] | float, first: float = 0.0) -> Plan:
    time = Time()
    each = [c if callable(c) else lambda _, c=c: c for c in costs]
    return plan_stage(lambda: [Timed(time, c, first) for c in each], network(), split, LOOP, budget, folder, clock=time)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10min", 600), ("90s", 90), ("1.5h", 5400), ("600", 600), (" 2 H ", 7200), (".5m", 30), ("3sec", 3)]
)
def test_budgets_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5min", "0", "10 parsecs", "min", "1e3", "nan", "inf", "1.2.3s", "10min30s"])
def test_what_is_no_time_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget .*no time; give for instance 90s, 10min or 1\.5h"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["90s", "10min", "1.5h", "2h", "1h", "45min", "0.25s", "125s", "100s"])
def test_a_time_is_said_as_it_is_read(text: str) -> None:
    assert parse_budget(span(parse_budget(text))) == parse_budget(text)


def test_equal_steps_fill_the_budget_exactly(tiny_split: ArraySplit, tmp_path: Path) -> None:
    plan = planned(tiny_split, tmp_path, 1000.0, 1.0)
    # Two warm-ups and four passes over twelve moments make 50 seconds, the rehearsal's twentieth; of the rest 3 % is kept back.
    assert (plan.rehearsed_steps, plan.rehearsal_s, plan.step_s, plan.start_s) == (50, 50.0, 1.0, 0.0)
    assert plan.steps == math.floor(950 * 0.97)
    assert plan.planned_s == plan.steps


def test_a_short_budget_rehearses_every_moment_once_and_a_long_one_five_times(tiny_split: ArraySplit, tmp_path: Path) -> None:
    assert planned(tiny_split, tmp_path / "a", 60.0, 1.0).rehearsed_steps == 2 + MOMENTS
    assert planned(tiny_split, tmp_path / "b", 1e6, 1.0).rehearsed_steps == 2 + 5 * MOMENTS


def test_the_mean_is_over_the_run_and_over_the_sorts(tiny_split: ArraySplit, tmp_path: Path) -> None:
    attacked = [lambda p, c=c: 1.0 if p < 0.25 else c for c in (3.0, 5.0, 10.0)]
    plan = planned(tiny_split, tmp_path, 1000.0, *attacked)
    assert plan.step_s == pytest.approx(0.25 * 1 + 0.75 * 6)
    assert plan.start_s == 0


def test_five_sorts_still_get_equal_turns(tiny_split: ArraySplit, tmp_path: Path) -> None:
    plan = planned(tiny_split, tmp_path, 4000.0, 1.0, 2.0, 3.0, 4.0, 20.0)
    assert plan.step_s == pytest.approx(6.0)
    assert (plan.rehearsed_steps - 6) % 15 == 0


def test_the_first_steps_of_every_sort_are_counted_once_and_not_as_usual_ones(tiny_split: ArraySplit, tmp_path: Path) -> None:
    plan = planned(tiny_split, tmp_path, 1000.0, 1.0, 2.0, first=30.0)
    assert plan.step_s == pytest.approx(1.5)
    assert plan.start_s == pytest.approx(60.0)
    assert plan.steps == math.floor((1000 - plan.rehearsal_s - 60) * 0.97 / 1.5)


def test_one_hiccup_among_five_passes_is_not_the_usual(tiny_split: ArraySplit, tmp_path: Path) -> None:
    time, calls = Time(), iter(range(10**6))
    plan = plan_stage(
        lambda: [Timed(time, lambda _: 500.0 if next(calls) == 20 else 1.0)], network(), tiny_split, LOOP, 1e5, tmp_path, clock=time
    )
    assert plan.step_s == 1.0


def test_the_moments_are_spread_evenly_over_the_run(tiny_split: ArraySplit, tmp_path: Path) -> None:
    time = Time()
    stages = [Timed(time, lambda _: 1.0) for _ in range(2)]
    plan_stage(lambda: stages, network(), tiny_split, LOOP, 100.0, tmp_path, clock=time)
    measured = sorted(stages[0].seen[2:] + stages[1].seen[1:])
    assert measured == pytest.approx([(i + 0.5) / MOMENTS for i in range(MOMENTS)])
    assert stages[0].seen[0] < 0.1
    assert stages[0].seen[1] > 0.8  # warmed up at both ends, where steps may differ


def test_the_fitted_loop_takes_just_the_planned_steps(tiny_split: ArraySplit, tmp_path: Path) -> None:
    plan = planned(tiny_split, tmp_path, 60.0, 1.0)
    assert plan.steps == 44
    time = Time()
    stage = Timed(time, lambda _: 1.0)
    train(stage, network(), tiny_split, plan.fitted(LOOP, tiny_split), tmp_path / "run")
    assert stage.steps == plan.steps
    assert time.now == plan.planned_s
    for steps in range(20, 3000, 7):
        fitted = replace(plan, steps=steps).fitted(replace(LOOP, batch_size=13), tiny_split)
        assert round(fitted.epochs * 3) == steps


def test_a_plan_is_measured_once(tiny_split: ArraySplit, tmp_path: Path) -> None:
    first = planned(tiny_split, tmp_path, 60.0, 1.0)
    assert planned(tiny_split, tmp_path, 60.0, 7.0) == first  # slower now, and planned all the same
    with pytest.raises(InputError, match=r"budget.json: this stage was planned for --budget 1min, not 90s; give that to go on"):
        planned(tiny_split, tmp_path, 90.0, 1.0)
    with pytest.raises(InputError, match=r"begun with --budget 1min; give it again to go on"):
        refuse_other_budget(tmp_path)
    refuse_other_budget(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="planned under other settings"):
        plan_stage(list, network(), tiny_split, replace(LOOP, learning_rate=0.5), 60.0, tmp_path)
    with pytest.raises(InputError, match="planned under other settings"):
        plan_stage(list, network(), tiny_split, LOOP, 60.0, tmp_path, settings="another attack")


def test_a_run_begun_without_a_budget_cannot_be_given_one(tiny_split: ArraySplit, tmp_path: Path) -> None:
    train(Timed(Time(), lambda _: 0.0), network(), tiny_split, LOOP, tmp_path)
    with pytest.raises(InputError, match=r"this stage was begun without --budget; leave it out to go on, or use another --out"):
        planned(tiny_split, tmp_path, 60.0, 1.0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"steps": 5})])
def test_a_damaged_plan_is_one_line(content: str, tiny_split: ArraySplit, tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text(content)
    with pytest.raises(InputError, match=r"budget.json: no plan of AMSDN, or damaged; delete the folder"):
        planned(tiny_split, tmp_path, 60.0, 1.0)


def test_too_small_a_budget_is_refused_with_one_that_suffices(tiny_split: ArraySplit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--budget 20s: a step takes 1s here.* at least (\S+)$") as error:
        planned(tiny_split, tmp_path / "a", 20.0, 1.0)
    assert not (tmp_path / "a").exists()
    assert planned(tiny_split, tmp_path / "b", parse_budget(str(error.value).split()[-1]), 1.0).steps >= FEWEST_STEPS


def test_a_rehearsal_that_uses_up_the_budget_gives_up_at_once_and_says_what_suffices(tiny_split: ArraySplit, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--budget 2s: used up by 3 of at least 14 steps of rehearsal, which took 3s; (\S+) should do"
    ) as error:
        planned(tiny_split, tmp_path / "a", 2.0, 1.0)
    assert not (tmp_path / "a").exists()
    assert planned(tiny_split, tmp_path / "b", parse_budget(str(error.value).split()[-3]), 1.0).steps >= FEWEST_STEPS


def test_measuring_touches_neither_the_model_nor_randomness_nor_the_folder(tiny_split: ArraySplit, tmp_path: Path) -> None:
    model = network()
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    time = Time()
    plan_stage(lambda: [Timed(time, lambda _: 1.0)], model, tiny_split, LOOP, 60.0, tmp_path, clock=time)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [p.name for p in tmp_path.iterdir()] == [PLAN_FILE]


def test_the_end_says_so_only_when_clearly_late(tiny_split: ArraySplit, tmp_path: Path) -> None:
    plan = planned(tiny_split, tmp_path, 600.0, 1.0)
    assert plan.lateness(1.14 * plan.planned_s) is None
    assert plan.lateness(1.16 * plan.planned_s) == f"training took {span(1.16 * plan.planned_s)}, planned were 556s of a budget of 10min"


def test_on_a_real_clock_a_plan_is_made(tiny_split: ArraySplit, tmp_path: Path) -> None:
    plan = plan_stage(lambda: [Timed(Time(), lambda _: 0.0)], network(), tiny_split, LOOP, 20.0, tmp_path)
    assert plan.steps > FEWEST_STEPS
    assert 0 < plan.step_s < 1
    assert 0 < plan.rehearsal_s < 20
