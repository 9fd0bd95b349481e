#!/usr/bin/env python
"""How far the CPU-sized cascades lie from the full ones: both on the same images of one model.

    python benchmarks/budgets.py --model benchmarks.victims:load_resnet20 --data cifar10 --data-root DIR --size 5 --k 5 --out runs/budgets/resnet20

Runs ``SparseAutoAttack`` and ``PatchAutoAttack``, ``quick`` and full, image by image into a run folder (killed, it goes on
where it was) and prints robust accuracy, the paired difference with its interval, and the passes that each spent.
``--json FILE`` adds the outcome, under the name of the run folder, to a results file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from amsdn.attacks import Attack, PatchAutoAttack, SparseAutoAttack
from amsdn.commands.common import open_data, open_model, provenance
from amsdn.evaluation.evaluate import CLEAN, EvaluateConfig, evaluate
from amsdn.evaluation.statistics import clopper_pearson, share
from amsdn.records import EvalRecord, canonical, write_json


@dataclass(frozen=True)
class Options:
    """Which model, which data, which threats."""

    model: str  # a model folder, or module:function that returns a torch classifier
    out: Path  # the run folder
    data: str = "cifar10"
    data_root: Path | None = None
    samples: int = 200
    size: int = 5  # side of the patch, pixels; 0 leaves the patch cascade out
    k: int = 10  # pixels; 0 leaves the sparse cascade out
    batch_size: int = 50
    json: Path | None = None


def main(options: Options) -> None:
    """Run both budgets of each threat and print the table."""
    device = torch.device("cpu" if not torch.cuda.is_available() else "cuda")
    model, dataset = open_model(options.model, device), open_data(options.data, options.data_root, None, device)
    config = EvaluateConfig(batch_size=options.batch_size, keep_examples=0)
    pairs = cascades(options)
    attacks = {name: attack for pair in pairs.values() for name, attack in pair.items()}
    rows = evaluate(model, dataset.test, attacks, options.out, config, sample_ids=range(options.samples))
    by_attack = {name: [r for r in rows if r.attack == name] for name in (CLEAN, *attacks)}
    found = {threat: compare(*(by_attack[name] for name in pair)) for threat, pair in pairs.items()}
    report = {
        **provenance(device),
        "model": options.model,
        "data": options.data,
        "samples": options.samples,
        "clean": share([r.correct for r in by_attack[CLEAN]]).as_dict(),
        "attacks": {name: canonical(attack) for name, attack in attacks.items()},
        "threats": found,
    }
    for threat, f in found.items():
        print(f"{threat}: quick {f['quick']['text']}, full {f['full']['text']}; only the full one broke {f['text']}; "
              f"passes an image quick {f['quick_passes']}, full {f['full_passes']} (forwards, backwards)")  # fmt: skip
    if options.json is not None:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        write_json(options.json, {**kept, options.out.name: report})


def cascades(options: Options) -> dict[str, dict[str, Attack]]:
    """The quick and the full cascade of each threat, in that order."""
    pairs: dict[str, dict[str, Attack]] = {}
    if options.size:
        pairs[f"patch {options.size}"] = {"patch-quick": PatchAutoAttack.quick(options.size), "patch-full": PatchAutoAttack(options.size)}
    if options.k:
        pairs[f"sparse {options.k}"] = {"sparse-quick": SparseAutoAttack.quick(options.k), "sparse-full": SparseAutoAttack(options.k)}
    return pairs


def compare(quick: Sequence[EvalRecord], full: Sequence[EvalRecord]) -> dict[str, Any]:
    """Both accuracies on the same images, and the images that only one of the two broke."""
    pairs = list(zip(quick, full, strict=True))
    missed = sum(q.correct and not f.correct for q, f in pairs)
    luck = sum(f.correct and not q.correct for q, f in pairs)
    low, high = clopper_pearson(missed, len(pairs))
    return {
        "quick": share([q.correct for q in quick]).as_dict(),
        "full": share([f.correct for f in full]).as_dict(),
        "only_full": missed,
        "only_quick": luck,
        "text": f"{100 * missed / len(pairs):.1f} % [{100 * low:.1f}, {100 * high:.1f}] of the images, only the quick one {100 * luck / len(pairs):.1f} %",
        "quick_passes": passes(quick),
        "full_passes": passes(full),
    }


def passes(rows: Sequence[EvalRecord]) -> list[int]:
    """Mean forward and backward passes an image, images that the model got wrong by itself included."""
    return [round(sum(getattr(r, f) for r in rows) / len(rows)) for f in ("forwards", "backwards")]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
