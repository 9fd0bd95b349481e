"""Time budgets: how many steps of a stage fit into so many seconds.

A rehearsal on a copy of the model measures what a step costs; the stage is then planned for as many steps as fit, so that its
learning rate reaches zero as the time is up. The plan is written down before training and read again by a run that goes on
after a kill: what is measured may differ from one start to the next, the number of steps may not.

A schedule driven by the clock itself, as in speed records, would need no rehearsal, but no run could be repeated or resumed
exactly.
"""

import copy
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from amsdn.data import Split
from amsdn.errors import InputError
from amsdn.records import config_hash, write_json
from amsdn.training.checkpoint import STATE_FILE
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput, train
from amsdn.training.ranks import ALONE, Ranks

PLAN_FILE = "budget.json"
FEWEST_STEPS = 20  # with fewer the schedule means nothing
MOMENTS = 12  # of a run at which a step is measured
PASSES = 5  # over these moments, at most
REHEARSAL_SHARE = 0.05  # of the budget, after which no further pass begins
RESERVE = 0.03  # of the time, for checkpoints and logs, which the rehearsal does not write
LATE = 1.15  # times the plan, from which the end says so

Clock = Callable[[], float]  # seconds since any moment
UNITS = {"": 1, "s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Seconds of ``10min``, ``90s``, ``1.5h`` or plain seconds; raises InputError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise InputError(f"--budget {text}: no time; give for instance 90s, 10min or 1.5h")
    return float(found[1]) * UNITS[found[2]]


def span(seconds: float) -> str:
    """A time as a person would say it, and as ``parse_budget`` reads it: 90s, 10min, 1.5h; three digits where it is not even."""
    sizes = {"h": 3600, "min": 60, "s": 1}
    for unit, size in sizes.items():
        even = float(f"{seconds / size:.3g}") * size == seconds
        if even and (seconds >= 2 * size or seconds == size):
            return f"{seconds / size:.3g}{unit}"
    unit = "h" if seconds >= 7200 else "min" if seconds >= 120 else "s"
    return f"{seconds / sizes[unit]:.3g}{unit}"


@dataclass(frozen=True)
class Plan:
    """How many steps a stage takes, and what that was read from. Times are in seconds."""

    budget_s: float
    settings: str  # hash of what the stage was asked to do
    steps: int
    step_s: float  # mean over the run
    start_s: float  # what the first steps of every sort cost beyond that
    rehearsal_s: float
    rehearsed_steps: int

    @property
    def planned_s(self) -> float:
        """How long training should take."""
        return self.start_s + self.steps * self.step_s

    def fitted(self, loop: LoopConfig, split: Split) -> LoopConfig:
        """``loop`` with as many epochs as make the planned number of steps."""
        return replace(loop, epochs=self.steps / steps_per_epoch(loop, split))

    def told(self) -> str:
        """The plan as one line."""
        return (
            f"{self.rehearsed_steps} rehearsed steps took {span(self.rehearsal_s)}, {span(self.step_s)} a step: "
            f"{self.steps} steps fit into {span(self.budget_s)}"
        )

    def lateness(self, used_s: float) -> str | None:
        """One line if training took clearly longer than planned."""
        if used_s <= LATE * self.planned_s:
            return None
        return f"training took {span(used_s)}, planned were {span(self.planned_s)} of a budget of {span(self.budget_s)}"


def steps_per_epoch(loop: LoopConfig, split: Split) -> int:
    """How many whole batches the split gives."""
    return max(1, len(split) // min(loop.batch_size, len(split)))


def plan_stage(
    sorts: Callable[[], Sequence[Stage]],
    model: nn.Module,
    split: Split,
    loop: LoopConfig,
    budget_s: float,
    folder: Path,
    *,
    settings: Any = None,
    ranks: Ranks = ALONE,
    clock: Clock | None = None,
) -> Plan:
    """The plan that ``folder`` holds, or a new one, written there, for training ``model`` on ``split`` within ``budget_s``.

    ``sorts`` makes the stages of which the real one is an even mixture, for instance one for each attack that it draws from.
    A mixture that shifts while it learns is planned as if it stayed even, and an attack that stops early on images that it has
    fooled costs more later than on the untrained copy. Neither ``model`` nor any randomness of the caller is touched. All of
    ``ranks`` rehearse together and take the first one's figures.

    Raises InputError where the folder was begun otherwise, or where fewer than ``FEWEST_STEPS`` steps fit.
    """
    asked = config_hash(settings, {k: v for k, v in loop.shaping().items() if k != "epochs"}, len(split))
    found: Plan | None = ranks.gather(_found(folder, budget_s, asked) if ranks.first else None)[0]
    if found is not None:
        return found
    clock = clock or _synchronised(next(model.parameters()).device)
    began = clock()
    rehearsed = _rehearse(sorts, model, split, loop, budget_s, clock, ranks)
    step_s, start_s, rehearsal_s = ranks.gather((rehearsed.step_s(), rehearsed.start_s(), clock() - began))[0]
    steps = math.floor((budget_s - rehearsal_s - start_s) * (1 - RESERVE) / step_s)
    if steps < FEWEST_STEPS:
        least = rehearsal_s + start_s + FEWEST_STEPS * step_s / (1 - RESERVE)
        raise InputError(
            f"--budget {span(budget_s)}: a step takes {span(step_s)} here and the rehearsal took {span(rehearsal_s)}, so only {max(0, steps)} "
            f"steps fit; {FEWEST_STEPS} need at least {span(math.ceil(1.1 * least))}"
        )
    plan = Plan(budget_s, asked, steps, step_s, start_s, rehearsal_s, rehearsed.taken)
    if ranks.first:
        write_json(folder / PLAN_FILE, asdict(plan))
    return plan


def refuse_other_budget(folder: Path) -> None:
    """Raise InputError where ``folder`` holds a run that was begun with a budget, and none is given now."""
    path = folder / PLAN_FILE
    if path.exists():
        budget = span(_parsed(path).budget_s)
        raise InputError(f"{path}: this stage was begun with --budget {budget}; give it again to go on, or use another --out")


def _found(folder: Path, budget_s: float, asked: str) -> Plan | None:
    """The plan in ``folder``, None where there is none. Raises InputError where it is another's, or the stage was begun without."""
    path, state = folder / PLAN_FILE, folder / STATE_FILE
    if not path.exists() and state.exists():
        raise InputError(f"{state}: this stage was begun without --budget; leave it out to go on, or use another --out")
    if not path.exists():
        return None
    plan = _parsed(path)
    if plan.budget_s != budget_s:
        raise InputError(
            f"{path}: this stage was planned for --budget {span(plan.budget_s)}, not {span(budget_s)}; give that to go on, or use another --out"
        )
    if plan.settings != asked:
        raise InputError(f"{path}: planned under other settings ({plan.settings}, now {asked}); use another --out, or delete that folder")
    return plan


def _parsed(path: Path) -> Plan:
    try:
        plan = Plan(**json.loads(path.read_bytes()))
        sound = plan.steps >= FEWEST_STEPS and min(plan.budget_s, plan.step_s) > 0
    except (OSError, ValueError, TypeError):
        sound = False
    if not sound:
        raise InputError(f"{path}: no plan of AMSDN, or damaged; delete the folder to start this stage afresh")
    return plan


def _synchronised(device: torch.device) -> Clock:
    """A clock that first waits until the device has done what it was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


class _Enough(Exception):
    """The rehearsal knows what it wanted to know."""


def _rehearse(
    sorts: Callable[[], Sequence[Stage]], model: nn.Module, split: Split, loop: LoopConfig, budget_s: float, clock: Clock, ranks: Ranks
) -> "_Rehearsal":
    """Train a copy through the very loop that will be used, until enough steps are timed; only what they cost is kept.

    Raises InputError as soon as the rehearsal itself has used up the budget.
    """
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=cuda), tempfile.TemporaryDirectory() as folder:
        rehearsal = _Rehearsal(sorts(), budget_s, clock, ranks)
        epochs = (rehearsal.most + 1) / steps_per_epoch(loop, split)
        # So slow a learning rate that weights met at the wrong moment of the schedule cannot diverge.
        calm = replace(loop, epochs=epochs, learning_rate=1e-12, checkpoint_every_s=math.inf, log_every=rehearsal.most + 2)
        try:
            train(rehearsal, copy.deepcopy(model), split, calm, Path(folder), ranks=ranks)
        except _Enough:
            return rehearsal
    raise AssertionError("a rehearsal always ends itself")


class _Rehearsal(Stage):
    """Stages taking turns at evenly spaced moments of an imagined run, and what each of their steps took.

    Every sort is warmed up first. Then ``MOMENTS`` moments (or as many more as give every sort the same number) are visited
    again and again while time is left; what a moment costs is the median over its visits, what a run costs the mean over moments.
    """

    name = "rehearse"

    def __init__(self, sorts: Sequence[Stage], budget_s: float, clock: Clock, ranks: Ranks) -> None:
        self.sorts, self.budget_s, self.clock, self.ranks = list(sorts), budget_s, clock, ranks
        self.moments = len(self.sorts) * math.ceil(MOMENTS / len(self.sorts))
        self.warm_ups = 1 + len(self.sorts)
        self.most = self.warm_ups + PASSES * self.moments
        self.seconds: list[float] = []
        self.last: float | None = None

    @property
    def taken(self) -> int:
        """Steps so far."""
        return len(self.seconds)

    def step_s(self) -> float:
        """The mean over the moments."""
        return fmean(self._cost(moment) for moment in range(self.moments))

    def start_s(self) -> float:
        """What the first step of each sort cost beyond its like."""
        first, *others = self.seconds[: self.warm_ups]
        like = [self._cost(self.moments - len(self.sorts) + i) for i in range(len(self.sorts))]
        pairs = [(first, self._cost(0)), *zip(others, like, strict=True)]
        return sum(max(0.0, took - usual) for took, usual in pairs)

    def extra_modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({str(i): stage.extra_modules() for i, stage in enumerate(self.sorts)})

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        if self.last is None:
            self.last = self.clock()
        return self._sort().step(model, teacher, replace(batch, progress=self._progress()))

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        """Called when a step is done, whatever number of parts it had."""
        self._sort().remember(memories)
        now = self.clock()
        assert self.last is not None
        self.seconds.append(now - self.last)
        self.last = now
        self._give_up_in_time()
        visits, within = divmod(self.taken - self.warm_ups, self.moments)
        if self.taken > self.warm_ups and within == 0 and not self._another(visits):
            raise _Enough

    def _give_up_in_time(self) -> None:
        """Raise InputError once the budget is used up, by the first process's clock."""
        spent = sum(self.seconds)
        if self.ranks.agree([self.ranks.first and spent > self.budget_s])[0]:
            least = spent / self.taken * (self.warm_ups + self.moments + FEWEST_STEPS)
            raise InputError(
                f"--budget {span(self.budget_s)}: used up by {self.taken} of at least {self.warm_ups + self.moments} steps of rehearsal, which took "
                f"{span(spent)}; {span(math.ceil(1.1 * least))} should do"
            )

    def _another(self, visits: int) -> bool:
        """Whether one more pass fits into the time, by the first process's clock."""
        fits = visits < PASSES and sum(self.seconds) + sum(self.seconds[-self.moments :]) <= REHEARSAL_SHARE * self.budget_s
        return bool(self.ranks.agree([fits and self.ranks.first])[0])

    def _moment(self) -> int:
        """The moment that the coming step visits; the first steps warm up the beginning, then every sort at the end."""
        coming = self.taken - self.warm_ups
        if coming >= 0:
            return coming % self.moments
        return 0 if self.taken == 0 else self.moments + coming

    def _progress(self) -> float:
        return (self._moment() + 0.5) / self.moments

    def _sort(self) -> Stage:
        return self.sorts[self._moment() % len(self.sorts)]

    def _cost(self, moment: int) -> float:
        return median(self.seconds[self.warm_ups + moment :: self.moments])
