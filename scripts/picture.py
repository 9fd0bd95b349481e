#!/usr/bin/env python
"""Draw the README's picture from a run folder: clean, attacked, and where the model says it was attacked.

python scripts/picture.py runs/demo/AMSDN docs/example.png patch-autoattack-8 sparse-autoattack-20
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from amsdn.evaluation.figures import heat_overlay

COLUMNS = 4


def main(run: Path, out: Path, attacks: list[str]) -> None:
    classes = json.loads((run / "run.json").read_text())["data"]["classes"]
    figure, axes = plt.subplots(len(attacks), 3 * COLUMNS, figsize=(1.25 * 3 * COLUMNS, 1.65 * len(attacks)), squeeze=False)
    for row, attack in zip(axes, attacks, strict=True):
        found = np.load(run / "examples" / f"{attack}.npz", allow_pickle=False)
        for i in range(COLUMNS):
            clean, attacked = (found[k][i].transpose(1, 2, 0) for k in ("clean", "adversarial"))
            before, after = classes[found["clean_prediction"][i]], classes[found["prediction"][i]]
            _show(row[3 * i], clean, f"clean: {before}")
            _show(row[3 * i + 1], attacked, f"attacked: {after}")
            _show(row[3 * i + 2], heat_overlay(attacked, found["anomaly_map_adv"][i, 0]), "anomaly map")
        row[0].set_ylabel(attack, fontsize=8)
    figure.tight_layout(pad=0.4, w_pad=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _show(axis: plt.Axes, image: np.ndarray, title: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=7)
    axis.set_xticks([])
    axis.set_yticks([])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
