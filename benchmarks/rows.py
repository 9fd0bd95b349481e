"""What the benchmark compares: for each attack our settings, the peers' equal ones, two budgets, and how many images it can afford."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from amsdn.attacks import APGDAttack, APGDTargetedAttack, Attack, FewPixelDE, PatchPGD, PGDAttack, SigmaZero, SparseRS
from amsdn.attacks.carlini_wagner import CWL2
from amsdn.attacks.deepfool import DeepFool
from amsdn.attacks.fab import FABTargetedAttack
from amsdn.attacks.square_attack import SquareAttack
from amsdn.attacks.suites import AutoAttack

ALL = math.inf  # the budget of an attack that looks for the nearest image: whatever it finds counts


@dataclass(frozen=True)
class Row:
    """One attack: ``ours`` from a budget and the scaled settings, and the peers' call by family, with the same settings.

    ``budgets``: regime -> budget. ``judged``: for attacks that look for the nearest image, the budget by which robust
    accuracy is judged. ``passes``: forwards and backwards an image costs that stands to the end, for the plan.
    """

    name: str
    family: str | None
    ours: Callable[[float, dict[str, Any]], Attack]
    budgets: dict[str, float]
    settings: dict[str, Any]
    samples: int
    passes: Callable[[dict[str, Any]], tuple[float, float]]
    repeats: int = 3
    unit: str = "epsilon"  # the peers' name for the budget; empty if they take none
    judged: float | None = None
    fixed: dict[str, Any] = field(default_factory=dict)  # settings that --steps-scale leaves alone
    step: float | None = None  # a peer's step length, as a share of the budget
    note: str = ""

    def scaled(self, scale: float) -> dict[str, Any]:
        """The settings with every count of steps or queries times ``scale``, at least 1."""
        return {name: max(round(value * scale), 1) for name, value in self.settings.items()} | self.fixed

    def attack(self, budget: float, scale: float) -> Attack:
        """Ours at a budget."""
        return self.ours(budget, self.scaled(scale))

    def peer_settings(self, budget: float, scale: float) -> dict[str, Any]:
        """What the peers' adapter is called with."""
        step = {"alpha": budget * self.step} if self.step else {}
        return self.scaled(scale) | step | ({self.unit: budget} if self.unit else {})


def _steps(s: dict[str, Any]) -> tuple[float, float]:
    return s["num_steps"], s["num_steps"]


def _nine(s: dict[str, Any]) -> tuple[float, float]:
    return 9 * s["num_steps"], 9 * s["num_steps"]


def _cascade(s: dict[str, Any]) -> tuple[float, float]:
    return 28 * s["num_steps"] + s["num_queries"], 19 * s["num_steps"]


HALF, USUAL = "small", "usual"  # about half of the images stand; the budget that papers quote, where most fall
LINF = {HALF: 0.5 / 255, USUAL: 8 / 255}

ROWS = [
    Row(
        "pgd-50",
        "pgd",
        lambda e, s: PGDAttack(e, e / 4, s["num_steps"]),
        LINF,
        {"num_steps": 50},
        64,
        _steps,
        step=1 / 4,
    ),
    Row("apgd-100", "apgd-ce", lambda e, s: APGDAttack(e, s["num_steps"]), LINF, {"num_steps": 100}, 64, _steps, 2),
    Row("apgd-t", "apgd-t", lambda e, s: APGDTargetedAttack(e, s["num_steps"]), LINF, {"num_steps": 100}, 24, _nine, 2),
    Row(
        "square-5000",
        "square",
        lambda e, s: SquareAttack(e, s["num_queries"]),
        {HALF: 2 / 255, USUAL: 8 / 255},
        {"num_queries": 5000},
        16,
        lambda s: (s["num_queries"], 0),
        1,
    ),
    Row(
        "cw",
        "cw",
        lambda e, s: CWL2(e, s["num_steps"], s["searches"], s["learning_rate"], initial_const=s["initial_const"]),
        {"nearest": ALL},
        {"num_steps": 100},
        16,
        lambda s: (s["num_steps"] * s["searches"],) * 2,
        2,
        unit="",
        judged=0.1,
        fixed={"searches": 5, "initial_const": 0.1, "learning_rate": 0.01},
        note="torchattacks has no search over the constant; it gets all the steps at once",
    ),
    Row(
        "deepfool",
        "deepfool",
        lambda e, s: DeepFool(e, s["num_steps"], s["overshoot"]),
        {"nearest": ALL},
        {"num_steps": 50},
        32,
        lambda s: (4.0, 36.0),
        unit="",
        judged=0.1,
        fixed={"overshoot": 0.02},
    ),
    Row(
        "fab-t",
        "fab-t",
        lambda e, s: FABTargetedAttack(e, s["num_steps"]),
        LINF,
        {"num_steps": 100},
        12,
        lambda s: (18 * s["num_steps"], 9 * s["num_steps"]),
        1,
    ),
    Row(
        "autoattack",
        "autoattack",
        lambda e, s: AutoAttack(e, num_steps=s["num_steps"], num_queries=s["num_queries"]),
        LINF,
        {"num_steps": 100, "num_queries": 5000},
        12,
        _cascade,
        1,
        note="torchattacks' own AutoAttack runs APGD and FAB for 10 steps; here its parts run at the paper's 100",
    ),
    Row(
        "few-pixel",
        "few-pixel",
        lambda k, s: FewPixelDE(int(k), s["population"], s["num_steps"]),
        {"one pixel": 1, "five pixels": 5},
        {"num_steps": 19},
        16,
        lambda s: (s["population"] * (s["num_steps"] + 1), 0),
        2,
        unit="k",
        fixed={"population": 100},
        note="ART's population cannot be set: 400 members, so four times the queries; it runs with --slow only",
    ),
    Row(
        "sigma-zero",
        "l0",
        lambda k, s: SigmaZero(3 * 32 * 32, s["num_steps"], stop_when_fooled=False),
        {"nearest": 3 * 32 * 32},
        {"num_steps": 200},
        24,
        _steps,
        2,
        unit="",
        judged=5,
        note="no peer has sigma-zero; FMN-L0 is their nearest attack, and counts channel values where we count pixels",
    ),
    Row(
        "sparse-rs",
        None,
        lambda k, s: SparseRS(int(k), s["num_queries"]),
        {"five pixels": 5, "twenty pixels": 20},
        {"num_queries": 2000},
        16,
        lambda s: (s["num_queries"], 0),
        1,
        unit="k",
        note="no installable peer has it",
    ),
    Row(
        "patch-pgd",
        "patch",
        lambda size, s: PatchPGD.racing(int(size), s["num_steps"]),
        {"4x4": 4},
        {"num_steps": 50},
        32,
        lambda s: (2 * s["num_steps"], s["num_steps"]),
        1,
        unit="size",
        fixed={"step": 0.05},  # ours has its own, shrinking steps
        note="ART's patch is universal: it is made for one image at a time, at a fixed place; ours races several starts, the first in the middle, and looks for the place too",
    ),
]

SLOW = {("cw", "art"), ("few-pixel", "art")}  # minutes for a handful of images: --slow adds them
FACTOR = {
    ("square", "art"): 3.0,
    ("apgd-ce", "art"): 1.6,
    ("deepfool", "art"): 6.0,
    ("cw", "art"): 8.0,
    ("few-pixel", "art"): 4.0,
}  # plan only
