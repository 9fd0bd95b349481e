"""Double masking: passes for a certificate and for an answer, beside the plain form and PatchCleanser's own code.

What the others would spend is counted on complete tables P[i][j] of two-mask predictions, measured on the same images:

- plain: all M (M + 1) / 2 pairs of every image, as PatchCleanser's ``pc_certification.py`` does it,
- row by row: the same pairs in their order, until one is not the true label (which our certifier is not told),
- Algorithm 1 and challenger masking in the order of their ``utils/defense.py``: mask by mask, the next challenger by its index.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from certificate_bench import Bench, certified, mean_of
from torch import Tensor

from amsdn.attacks import PatchPGD
from amsdn.evaluation.patch_certificate import PATCH, PatchCertifier
from amsdn.evaluation.statistics import share
from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
from amsdn.models.masking_rounds import majority
from amsdn.recipes.defences import PatchDefence
from amsdn.records import CertRecord
from amsdn.utils.helpers import generator

TABLES_AT_ONCE = 4  # images whose tables are measured between two writes


@dataclass(frozen=True)
class MaskSet:
    """Masks of a defence: how many an axis, how coarser ones around them are grouped, and how sure these must be to stand for them."""

    masks_per_axis: int
    coarser: tuple[int, ...]
    confidence: float

    @property
    def name(self) -> str:
        grid = f"{self.masks_per_axis}x{self.masks_per_axis}"
        above = " in ".join(f"{g}x{g}" for g in self.coarser)
        return f"{grid}, {above} first" if above else grid

    @property
    def folder(self) -> str:
        above = [*map(str, self.coarser), f"{self.confidence:g}"] if self.coarser else []
        return "-".join(["patch", str(self.masks_per_axis), *above])

    def around(self, bench: Bench, size: int, kind: type[DoubleMasking] = ChallengerMasking) -> DoubleMasking:
        """The defence of the benchmark's model against patches of ``size`` pixels a side, as ``amsdn certify`` would build it."""
        how = PatchDefence(size, self.masks_per_axis, coarser=self.coarser, confidence=self.confidence, views_per_pass=bench.batch_size)
        built = how.around(bench.model)
        more = {"coarser": self.coarser, "confidence": self.confidence}
        return kind(built.classifier, size, self.masks_per_axis, built.fill, bench.batch_size, **more)


MASKS: tuple[tuple[int, tuple[int, ...]], ...] = ((6, ()), (6, (2,)), (6, (2, 2)), (4, ()), (4, (2,)), (3, ()))


def measure(bench: Bench, size: int, confidence: float, attacked: int, attack_steps: int) -> dict[str, Any]:
    """Certificates and inference for each mask set; what is attacked are the first images."""
    x, y = bench.first(attacked)
    pictures = {"clean": x, f"patch-pgd-{attack_steps}": _attacked(bench, PatchPGD(size, attack_steps), x, y)}
    found: dict[str, Any] = {"certificates": [], "inference": []}
    for masks in (MaskSet(per_axis, coarser, confidence) for per_axis, coarser in MASKS):
        found["certificates"].append(_certificates(bench, masks, size))
        for name, images in pictures.items():
            found["inference"].append({"masks": masks.name, "images": name, **_answers(bench, masks, size, name, images, y)})
    return found


def _attacked(bench: Bench, attack: PatchPGD, x: Tensor, y: Tensor) -> Tensor:
    """The images as the attack on the bare model leaves them, made once."""
    path = bench.work / f"patch-pgd-{attack.size}-{attack.num_steps}-{len(x)}.pt"
    if not path.exists():
        draws = generator(bench.device, "benchmark certification")
        parts = zip(x.split(64), y.split(64), strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat([attack(bench.model, a, b, generator=draws).x_adv for a, b in parts]).cpu(), path)
    return torch.load(path, map_location=bench.device)  # type: ignore[no-any-return]


def _certificates(bench: Bench, masks: MaskSet, size: int) -> dict[str, Any]:
    defence = masks.around(bench, size)
    rows = certified(bench, masks.folder, PatchCertifier(defence, views_per_pass=bench.batch_size))
    patch = [r for r in rows if r.certificate == PATCH]
    detection = [r for r in rows if r.certificate != PATCH]
    held = [r.radius > 0 for r in patch]
    line = {
        "masks": masks.name,
        "side": _side(defence, bench),
        "images": len(patch),
        "certified": share(held).as_dict(),
        "certified_right": share([r.radius > 0 and r.correct for r in patch]).as_dict(),
        "detection_right": share([r.radius > 0 and r.correct for r in detection]).as_dict(),
        "accuracy": share([r.correct for r in patch]).as_dict(),
        "passes": mean_of([r.samples for r in patch]),
        "passes_certified": mean_of([r.samples for r in patch if r.radius > 0]),
        "passes_failed": mean_of([r.samples for r in patch if r.radius == 0]),
        "seconds_per_image": fmean(r.seconds for r in patch),
        "plain": None,
    }
    if not masks.coarser:  # coarser masks make another defence, the plain form of which is that of its finest masks
        line["plain"] = _plain(bench, masks, defence, patch)
    return line


def _plain(bench: Bench, masks: MaskSet, defence: DoubleMasking, rows: Sequence[CertRecord]) -> dict[str, Any]:
    """All pairs of as many of the images as fit in the benchmark's minutes, and how far ours agrees with them."""
    tables, seconds = measured_tables(bench, masks, defence, "clean", *bench.first(bench.images), bench.minutes)
    passes = defence_pairs(tables.shape[1])
    whole = [bool((table == table[0, 0]).all()) and int(table[0, 0]) >= 0 for table in tables]
    ours = [r.radius > 0 for r in rows[: len(tables)]]
    stops = [row_by_row(table, r.label) for table, r in zip(tables, rows, strict=False)]
    return {
        "images": len(tables),
        "passes": passes,
        "seconds_per_image": seconds / len(tables),
        "certified": share(whole).as_dict(),
        "only_plain": sum(a and not b for a, b in zip(whole, ours, strict=True)),
        "only_ours": sum(b and not a for a, b in zip(whole, ours, strict=True)),
        "row_by_row": mean_of(stops),
        "ours_on_the_same": mean_of([r.samples for r in rows[: len(tables)]]),
    }


def _answers(bench: Bench, masks: MaskSet, size: int, name: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Passes and accuracy of inference by our two forms and, on complete tables of the same images, by PatchCleanser's."""
    line: dict[str, Any] = {}
    for rule, kind in (("algorithm_1", DoubleMasking), ("challenger", ChallengerMasking)):
        defence = masks.around(bench, size, kind)

        def spent(defence: DoubleMasking = defence) -> dict[str, Any]:
            answer, passes = answered(defence, x)
            return {"answers": answer.tolist(), "passes": passes.tolist()}

        found = bench.once(f"{masks.folder}-{size}-{name}-{rule}-{len(x)}", spent)
        line[rule] = mean_of(found["passes"])
        line[f"{rule}_accuracy"] = share([a == b for a, b in zip(found["answers"], y.tolist(), strict=True)]).as_dict()
    if not masks.coarser:
        tables, _ = measured_tables(bench, masks, masks.around(bench, size), name, x, y, bench.minutes)
        classes = bench.classes
        line["their_algorithm_1"] = mean_of([their_algorithm_1(t, classes) for t in tables])
        line["their_challenger"] = mean_of([their_challenger(t) for t in tables])
    return line


@torch.no_grad()
def answered(defence: DoubleMasking, x: Tensor) -> tuple[Tensor, Tensor]:
    """(answers, passes) int64 [B] of the defence on x [B,3,H,W], first round included."""
    answers, passes = [], []
    for part in x.split(64):
        tree = defence.tree(*part.shape[2:])
        count = tree.ancestors.shape[1]
        own = torch.arange(count, device=x.device).repeat(len(part))
        rows = torch.arange(len(part), device=x.device).repeat_interleave(count)
        logits, first = defence.look(part, tree, rows, own, own)
        found = defence.decide(part, logits.reshape(len(part), count, -1))
        answers.append(found.answer.cpu())
        passes.append((first + found.passes).cpu())
    return torch.cat(answers), torch.cat(passes)


def measured_tables(
    bench: Bench, masks: MaskSet, defence: DoubleMasking, name: str, x: Tensor, y: Tensor, minutes: float
) -> tuple[Tensor, float]:
    """(P int64 [N,M,M], seconds) of the first images, as many as fit in the minutes and at least a few; measured once."""
    tables, seconds = [], 0.0
    for start in range(0, len(x), TABLES_AT_ONCE):
        part = x[start : start + TABLES_AT_ONCE]

        def measured(part: Tensor = part) -> dict[str, Any]:
            begun = time.perf_counter()
            table = defence.prediction_table(part).flatten(1).tolist()
            return {"seconds": time.perf_counter() - begun, "table": [" ".join(map(str, t)) for t in table]}

        found = bench.once(f"{masks.folder}-{defence.patch[0]}-{name}-tables/{start:05d}-{len(part)}", measured)
        seconds += found["seconds"]
        flat = torch.tensor([[int(v) for v in text.split()] for text in found["table"]])
        count = round(flat.shape[1] ** 0.5)
        tables.append(flat.reshape(len(flat), count, count))
        if seconds >= 60 * minutes:
            break
    return torch.cat(tables), seconds


def defence_pairs(masks: int) -> int:
    """How many unordered pairs of masks there are, each mask with itself included."""
    return masks * (masks + 1) // 2


def row_by_row(table: Tensor, label: int) -> int:
    """Pairs (i, j >= i) of P [M,M] looked at, row by row, until one is not the label; all where none is."""
    first, second = torch.triu_indices(*table.shape)
    wrong = (table[first, second] != label).nonzero()
    return int(wrong[0]) + 1 if len(wrong) else len(first)


def their_algorithm_1(table: Tensor, classes: int) -> int:
    """Passes of PatchCleanser's ``double_masking`` on P [M,M]: M, then each disagreer's row until it is refuted; no more after a confirmation."""
    votes, passes = table.diagonal(), len(table)
    most = int(majority(votes.unsqueeze(0), classes)[0])
    for i in (votes != most).nonzero().flatten().tolist():
        refuted = (table[i] != votes[i]).nonzero()
        passes += int(refuted[0]) + 1 if len(refuted) else len(table)
        if not len(refuted):
            break
    return passes


def their_challenger(table: Tensor) -> int:
    """Passes of PatchCleanser's ``challenger_masking`` on P [M,M]: the candidate, at first mask 0, meets the first mask left of another class."""
    votes, live, candidate, passes = table.diagonal().tolist(), set(range(len(table))), 0, len(table)
    while challengers := [i for i in sorted(live) if votes[i] != votes[candidate]]:
        passes += 1
        if int(table[candidate, challengers[0]]) == votes[challengers[0]]:
            live.remove(candidate)
            candidate = challengers[0]
        else:
            live.remove(challengers[0])
    return passes


def _side(defence: DoubleMasking, bench: Bench) -> int:
    """Of the first of the finest masks, in pixels."""
    x, _ = bench.first(1)
    return int(defence.masks(*x.shape[2:])[0].any(2).sum())
