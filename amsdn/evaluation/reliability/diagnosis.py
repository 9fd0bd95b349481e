"""All checks on one model: what is wrong with it as an object of measurement, and with each threat's attack.

For every threat one attack, the one whose number a reader will look at, is compared with companions: random noise, a single step, queries alone, twice
the effort, a whole curve of budgets, and no limit at all. They run like any attack, on the first images, into rows under ``OUT/reliability``, so
that they resume and can be looked into.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amsdn.attacks import FGSM, APGDAttack, APGDL2Attack, Attack, PatchPGD, PatchRS, SparsePGD, SquareAttack, SquareL2Attack
from amsdn.attacks.gradient_attacks import PGDL2Attack
from amsdn.attacks.noise import RandomNoise
from amsdn.evaluation.evaluate import CLEAN, EvaluateConfig, evaluate
from amsdn.evaluation.reliability.binarization import binarization_test
from amsdn.evaluation.reliability.finding import Finding, verdict
from amsdn.evaluation.reliability.model_checks import model_findings
from amsdn.evaluation.reliability.path_checks import path_findings
from amsdn.evaluation.reliability.result_checks import (
    effort_is_enough,
    falls_with_budget,
    falls_without_limit,
    standing,
    stronger_wins,
)
from amsdn.evaluation.run_folder import Samples
from amsdn.records import EvalRecord, write_json
from amsdn.utils.helpers import generator

FOLDER, FILE = "reliability", "reliability.json"
MODEL = "model"  # the findings that hold for every threat
PATH_IMAGES, BINARIZED_IMAGES = 24, 12


@dataclass(frozen=True)
class Diagnosis:
    """One threat's attack and its companions, by what each is for."""

    attack: Attack
    single: Attack
    more: Attack
    unlimited: Attack
    curve: Mapping[float, Attack]  # other budgets, smaller and larger
    search: Attack | None = None  # queries alone; None where they are known to win, and are part of every suite
    noise_tries: int = 10

    def attacks(self) -> dict[str, Attack]:
        """All of them by the names of their rows."""
        found = {"attack": self.attack, "noise": RandomNoise(self.attack.threat, self.noise_tries), "single": self.single}
        found |= {"more": self.more, "unlimited": self.unlimited}
        found |= {f"at-{budget:g}": attack for budget, attack in self.curve.items()}
        return found if self.search is None else found | {"search": self.search}


def linf_diagnosis(epsilon: float, steps: int = 20) -> Diagnosis:
    """APGD against FGSM, Square, twice the steps, and half and twice the radius."""
    other = {scale * epsilon: APGDAttack(scale * epsilon, steps) for scale in (0.5, 2.0)}
    return Diagnosis(
        APGDAttack(epsilon, steps),
        FGSM(epsilon),
        APGDAttack(epsilon, 2 * steps),
        APGDAttack(1.0, 2 * steps),
        other,
        SquareAttack(epsilon, 100),
    )


def l2_diagnosis(epsilon: float, steps: int = 20) -> Diagnosis:
    """APGD against one step, Square, twice the steps, and half and twice the radius."""
    other = {scale * epsilon: APGDL2Attack(scale * epsilon, steps) for scale in (0.5, 2.0)}
    single = PGDL2Attack(epsilon=epsilon, alpha=epsilon, num_steps=1, random_start=False)
    unlimited = APGDL2Attack(100.0, 2 * steps)
    return Diagnosis(APGDL2Attack(epsilon, steps), single, APGDL2Attack(epsilon, 2 * steps), unlimited, other, SquareL2Attack(epsilon, 100))


def patch_diagnosis(side: int, image_side: int, steps: int = 60) -> Diagnosis:
    """Racing patch PGD against one step, Patch-RS, twice the steps, smaller and larger patches, and one as large as the image."""
    other = {float(size): PatchPGD.racing(size, steps) for size in (max(side - 2, 1), side + 2)}
    whole = PatchPGD(image_side, 2 * steps, alpha=0.1, move="never")
    return Diagnosis(
        PatchPGD.racing(side, steps), PatchPGD(side, 1, alpha=1.0), PatchPGD.racing(side, 2 * steps), whole, other, PatchRS(side, steps)
    )


def sparse_diagnosis(pixels: int, image_side: int, steps: int = 60) -> Diagnosis:
    """sPGD against one step, twice the steps, half and twice the pixels, and all of them; random search is known to find others."""
    other = {float(k): SparsePGD(k, steps) for k in (max(pixels // 2, 1), 2 * pixels)}
    return Diagnosis(
        SparsePGD(pixels, steps), SparsePGD(pixels, 1), SparsePGD(pixels, 2 * steps), SparsePGD(image_side**2, 2 * steps), other
    )


@dataclass(frozen=True)
class Reliability:
    """What the checks found, by threat; those of the model count for all of them."""

    findings: Mapping[str, list[Finding]] = field(default_factory=dict)

    def verdict(self, threat: str) -> str:
        """``yes``, or ``no, because ...``."""
        return verdict([*self.findings.get(MODEL, []), *self.findings.get(threat, [])])

    def as_dict(self) -> dict[str, Any]:
        """For reliability.json."""
        threats = {name: {"reliable": self.verdict(name), "findings": [asdict(f) for f in found]} for name, found in self.findings.items()}
        return {"threats": threats}


def diagnose(
    model: nn.Module,
    split: Samples,
    out: Path,
    diagnoses: Mapping[str, Diagnosis],
    samples: int = 100,
    config: EvaluateConfig | None = None,
    *,
    progress: bool = True,
) -> Reliability:
    """Run every check on the first ``samples`` images of ``split`` and write OUT/reliability.json. Resumes; errors are those of ``evaluate``."""
    config = config or EvaluateConfig(keep_examples=0)
    x, y = split.fetch(torch.arange(min(PATH_IMAGES, len(split))))
    found = {MODEL: model_findings(model, x, y)}
    for threat, diagnosis in diagnoses.items():
        folder = out / FOLDER / threat
        count = min(samples, len(split))
        title = f"checks of {threat}"
        rows = evaluate(model, split, diagnosis.attacks(), folder, config, sample_ids=range(count), progress=progress, title=title)
        draw = generator(x.device, config.seed, "reliability", threat)
        found[threat] = row_findings(rows, diagnosis)
        found[threat] += path_findings(model, diagnosis.attack, x, y, draw)
        found[threat].append(binarization_test(model, x[:BINARIZED_IMAGES], diagnosis.attack, draw))
    reliability = Reliability(found)
    write_json(out / FILE, reliability.as_dict())
    return reliability


def row_findings(rows: list[EvalRecord], diagnosis: Diagnosis) -> list[Finding]:
    """The checks that compare rows. Images that are wrong without any attack are broken under all of them."""
    by_attack: dict[str, list[bool]] = {}
    for row in rows:
        by_attack.setdefault(row.attack, []).append(row.correct)
    stands = {name: standing(correct) for name, correct in by_attack.items()}
    clean = stands[CLEAN]
    after = {name: clean & found for name, found in stands.items()}
    curve = {budget: after[f"at-{budget:g}"] for budget in diagnosis.curve}
    main = after["attack"]
    budget = float(diagnosis.attack.threat.budget)
    findings = [
        falls_without_limit(after["unlimited"]),
        falls_with_budget({**curve, budget: main}),
        stronger_wins("beats noise", main, after["noise"], "random noise breaks images that the attack does not"),
        stronger_wins("beats a single step", main, after["single"], "a single step breaks images that many steps do not"),
        effort_is_enough(main, after["more"]),
    ]
    if "search" in after:
        findings.append(stronger_wins("beats search", main, after["search"], "queries alone break images that gradients do not"))
    return findings
