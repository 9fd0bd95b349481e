#!/usr/bin/env python
"""Attack the demo's two models on digits that no choice of the recipe ever saw: test images 150 to 399.

    python scripts/held_out.py runs/demo OUT

The recipe was tuned while looking at test images 0 to 149, the ones that the demo's own table is about.
"""

import sys
from pathlib import Path

from amsdn.data import load_dataset
from amsdn.evaluation.evaluate import evaluate
from amsdn.evaluation.summary import summarise
from amsdn.models.storage import load_model
from amsdn.recipes import get_recipe

FRESH = range(150, 400)


def main(demo: Path, out: Path) -> None:
    recipe, split = get_recipe("digits-demo"), load_dataset("digits").test
    attacks = {n: a for n, a in recipe.attacks.items() if a.threat.family in ("patch", "sparse")}
    for name, stage in (("AMSDN", "finetune"), ("control", "train")):
        model = load_model(demo / name / stage / "model")
        records = evaluate(model, split, attacks, out / name, recipe.evaluate, sample_ids=FRESH)
        found = summarise(records, headline=recipe.headline)
        worst = {t["family"]: t["robust_accuracy"]["text"] for t in found["threats"] if t["budget"] == found["headline"][t["family"]]}
        print(
            name,
            "clean",
            found["clean"]["text"],
            *(f"{f} {found['headline'][f]:g}: {text}" for f, text in worst.items()),
            f"n {len(FRESH)}",
            sep="; ",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
