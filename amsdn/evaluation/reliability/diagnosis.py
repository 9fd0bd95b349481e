"""All checks on one model: what is wrong with it as an object of measurement, and with the attacks of each threat.

For every threat the gradient attack is compared with companions: random noise, a single step, queries alone, a whole curve of budgets, and no limit at all.
The number that a reader looks at, the worst case over all attacks of the evaluation, is compared with one more attack of much effort, and the strongest cascade must
find adversarial examples that were put there on purpose. The companions run like any attack, on the first images, into rows under ``OUT/reliability``, so that they
resume and can be looked into.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from amsdn.attacks import (
    FGSM,
    APGDAttack,
    APGDL2Attack,
    Attack,
    Cascade,
    GuidedSparseRS,
    PatchPGD,
    PatchRS,
    SparsePGD,
    SquareAttack,
    SquareL2Attack,
)
from amsdn.attacks.gradient_attacks import PGDL2Attack
from amsdn.attacks.losses import MARGIN
from amsdn.attacks.noise import RandomNoise
from amsdn.evaluation.evaluate import CLEAN, EvaluateConfig, evaluate
from amsdn.evaluation.reliability.binarization import binarization_test
from amsdn.evaluation.reliability.finding import FILE, MODEL, Finding, Reliability
from amsdn.evaluation.reliability.model_checks import model_findings
from amsdn.evaluation.reliability.path_checks import path_findings, transfer_finding
from amsdn.evaluation.reliability.result_checks import (
    effort_is_enough,
    falls_with_budget,
    falls_without_limit,
    standing,
    stronger_wins,
)
from amsdn.evaluation.run_folder import Samples
from amsdn.evaluation.table import complete_table
from amsdn.protocols import is_black_box
from amsdn.records import EvalRecord, write_json
from amsdn.utils.helpers import generator

FOLDER = "reliability"
PATH_IMAGES, BINARIZED_IMAGES = 24, 12


@dataclass(frozen=True)
class Diagnosis:
    """One threat's attacks, by what each is for."""

    attack: Attack  # by gradients: the one whose path is watched, and whom others should not beat
    strongest: Attack  # what the threat's number rests on most
    more: Attack  # what is tried beside everything that was tried
    single: Attack
    unlimited: Attack
    curve: Mapping[float, Attack]  # other budgets, smaller and larger
    search: Attack | None = None  # queries alone; None where they are known to beat gradients, and are part of every suite
    noise_tries: int = 10

    def attacks(self) -> dict[str, Attack]:
        """All of them by the names of their rows."""
        found = {"attack": self.attack, "noise": RandomNoise(self.attack.threat, self.noise_tries), "single": self.single}
        found |= {"more": self.more, "unlimited": self.unlimited}
        found |= {f"at-{budget:g}": attack for budget, attack in self.curve.items()}
        return found if self.search is None else found | {"search": self.search}


def linf_diagnosis(epsilon: float, strongest: Attack | None = None, steps: int = 20) -> Diagnosis:
    """APGD against FGSM, Square, and half and twice the radius; restarted APGD on the margin is what is tried besides."""
    attack = APGDAttack(epsilon, steps)
    return Diagnosis(
        attack,
        strongest or attack,
        more=APGDAttack(epsilon, 4 * steps, loss=MARGIN),
        single=FGSM(epsilon),
        unlimited=APGDAttack(1.0, 2 * steps),
        curve={scale * epsilon: APGDAttack(scale * epsilon, steps) for scale in (0.5, 2.0)},
        search=SquareAttack(epsilon, 100),
    )


def l2_diagnosis(epsilon: float, strongest: Attack | None = None, steps: int = 20) -> Diagnosis:
    """APGD against one step, Square, and half and twice the radius; longer APGD on the margin is what is tried besides."""
    attack = APGDL2Attack(epsilon, steps)
    return Diagnosis(
        attack,
        strongest or attack,
        more=APGDL2Attack(epsilon, 4 * steps, loss=MARGIN),
        single=PGDL2Attack(epsilon=epsilon, alpha=epsilon, num_steps=1, random_start=False),
        unlimited=APGDL2Attack(100.0, 2 * steps),
        curve={scale * epsilon: APGDL2Attack(scale * epsilon, steps) for scale in (0.5, 2.0)},
        search=SquareL2Attack(epsilon, 100),
    )


def patch_diagnosis(side: int, image_side: int, strongest: Attack | None = None, steps: int = 100) -> Diagnosis:
    """Racing patch PGD against one step, Patch-RS, smaller and larger patches, and one as large as the image; a much longer race besides."""
    attack = PatchPGD.racing(side, steps)
    return Diagnosis(
        attack,
        strongest or attack,
        more=PatchPGD.racing(side, 4 * steps),
        single=PatchPGD(side, 1, alpha=1.0),
        unlimited=PatchPGD(image_side, 2 * steps, alpha=0.1, move="never"),
        curve={float(size): PatchPGD.racing(size, steps) for size in (max(side - 2, 1), side + 2)},
        search=PatchRS(side, steps),
    )


def sparse_diagnosis(pixels: int, image_side: int, strongest: Attack | None = None, steps: int = 200) -> Diagnosis:
    """sPGD against one step, half and twice the pixels, and all of them; guided search besides. Random search is known to find others."""
    attack = SparsePGD(pixels, steps)
    return Diagnosis(
        attack,
        strongest or attack,
        more=Cascade((SparsePGD(pixels, 4 * steps), GuidedSparseRS(pixels, 4 * steps))),
        single=SparsePGD(pixels, 1),
        unlimited=SparsePGD(image_side**2, steps),
        curve={float(k): SparsePGD(k, steps) for k in (max(pixels // 2, 1), 2 * pixels)},
    )


def diagnose(
    model: nn.Module,
    split: Samples,
    out: Path,
    diagnoses: Mapping[str, Diagnosis],
    samples: int = 100,
    config: EvaluateConfig | None = None,
    *,
    records: Sequence[EvalRecord] = (),
    planned: Mapping[str, Mapping[str, float]] | None = None,
    progress: bool = True,
) -> Reliability:
    """Run every check on the first ``samples`` images of ``split`` and write OUT/reliability.json. Resumes; errors are those of ``evaluate``.

    ``records`` are the evaluation's rows, of those images at least; without any, the gradient attack's number is the one that is checked.
    ``planned`` are seconds an image by threat and attack (see ``cost``), for the time left.
    """
    config = config or EvaluateConfig(keep_examples=0)
    x, y = split.fetch(torch.arange(min(PATH_IMAGES, len(split))))
    found = {MODEL: model_findings(model, x, y)}
    if is_black_box(model):  # nothing but queries was possible: that alone decides
        found |= {threat: [] for threat in diagnoses}
        diagnoses = {}
    for threat, diagnosis in diagnoses.items():
        folder = out / FOLDER / threat
        count = min(samples, len(split))
        title = f"checks of {threat}"
        seconds = (planned or {}).get(threat)
        rows = evaluate(
            model, split, diagnosis.attacks(), folder, config, sample_ids=range(count), progress=progress, planned=seconds, title=title
        )
        draw = generator(x.device, config.seed, "reliability", threat)
        found[threat] = row_findings(rows, diagnosis, worst_case(records, diagnosis, range(count)))
        found[threat] += path_findings(model, diagnosis.attack, x, y, draw)
        transfer = transfer_finding(model, diagnosis.attack, x, y, draw)
        found[threat] += [] if transfer is None else [transfer]
        found[threat].append(binarization_test(model, x[:BINARIZED_IMAGES], diagnosis.strongest, draw))
    reliability = Reliability(found)
    write_json(out / FILE, reliability.as_dict())
    return reliability


def worst_case(records: Sequence[EvalRecord], diagnosis: Diagnosis, ids: Sequence[int]) -> Tensor | None:
    """Which of these samples stand after every attack of the evaluation within the checked budget, [N]; None without rows."""
    if not records:
        return None
    wanted = frozenset(ids)
    table = complete_table(row for row in records if row.sample_id in wanted)
    threat = diagnosis.attack.threat
    return ~torch.tensor(table.broken(threat.family, float(threat.budget)))


def row_findings(rows: Sequence[EvalRecord], diagnosis: Diagnosis, worst: Tensor | None = None) -> list[Finding]:
    """The checks that compare rows, ``worst`` being who stands after everything. Images that are wrong without any attack are broken under all of them."""
    by_attack: dict[str, list[bool]] = {}
    for row in rows:
        by_attack.setdefault(row.attack, []).append(row.correct)
    stands = {name: standing(correct) for name, correct in by_attack.items()}
    clean = stands[CLEAN]
    after = {name: clean & found for name, found in stands.items()}
    main = after["attack"]
    worst = main if worst is None else worst
    curve = {budget: after[f"at-{budget:g}"] for budget in diagnosis.curve}
    findings = [
        falls_without_limit(after["unlimited"]),
        falls_with_budget({**curve, float(diagnosis.attack.threat.budget): main}),
        stronger_wins("beats noise", main, after["noise"], "random noise breaks images that the attack does not"),
        stronger_wins("beats a single step", main, after["single"], "a single step breaks images that many steps do not"),
        effort_is_enough(worst, worst & after["more"]),
    ]
    if "search" in after:
        findings.append(stronger_wins("beats search", main, after["search"], "queries alone break images that gradients do not"))
    return findings
