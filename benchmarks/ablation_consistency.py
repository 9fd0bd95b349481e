"""What prediction consistency's light mode is worth: the same weights, answering with and without occluded views, attacked in earnest.

    python benchmarks/ablation_consistency.py --work runs/ablations --arms "all parts" plain

The models are those of ``benchmarks/ablations.py``. A defence that looks at more views also slows and confuses attacks, so one attack
says little: an image counts as right (or as right or noticed) only where it is so under every attack, those made on the bare weights
and carried over included. The attack that knows the views is ``HiddenViewPatch``. A consistency.json beside each result.json; it resumes.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablations import folder_of
from torch import Tensor

from amsdn.attacks import Attack, EvadeDetector, HiddenViewPatch, PatchPGD
from amsdn.commands.common import provenance
from amsdn.commands.stages import calibrate, clean_accuracy
from amsdn.data import Dataset, load_dataset
from amsdn.models.amsdn import AMSDN
from amsdn.models.storage import load_model
from amsdn.records import write_json
from amsdn.utils.helpers import keep_freed_memory

PATCH = 5
BATCH = 50


def answering_by(model: AMSDN, views: int, data: Dataset) -> AMSDN:
    """The same weights with ``views`` occluded views (0: none), its threshold from the last half of the validation images."""
    other = AMSDN.from_config(replace(model.config, pretrained=False, consistency_samples=views))
    other.load_state_dict(model.state_dict())
    if other.has_detector:
        calibrate(other.eval(), data.val.subset(torch.arange(len(data.val) // 2, len(data.val))), torch.device("cpu"))
    return other.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def bare_attacks(model: AMSDN, scale: float) -> dict[str, Attack]:
    """Against the weights alone, also to be carried over: to its end, and beside the detector where there is one."""
    strong = PatchPGD.racing(PATCH, _steps(60, scale), stop_when_fooled=False)
    attacks: dict[str, Attack] = {"patch": PatchPGD.racing(PATCH, _steps(60, scale)), "patch, to its end": strong}
    return attacks | ({"evading": EvadeDetector(strong)} if model.has_detector else {})


def view_attacks(scale: float) -> dict[str, Attack]:
    """Against the whole defence, its alarm included."""
    plain = PatchPGD.racing(PATCH, _steps(40, scale))
    hidden = HiddenViewPatch(PATCH, _steps(120, scale))
    return {
        "evading, selective": EvadeDetector(plain),
        "evading, joint": EvadeDetector(plain, gradients="joint"),
        "hidden view": EvadeDetector(hidden, gradients="joint"),
    }


def _steps(count: int, scale: float) -> int:
    return max(round(count * scale), 1)


class Standing:
    """Per image and attack: whether the answer is right, and whether it is right or noticed."""

    def __init__(self, model: AMSDN, y: Tensor) -> None:
        self.model, self.y = model, y
        self.by_attack: dict[str, tuple[Tensor, Tensor]] = {}

    def judge(self, attack: str, x: Tensor) -> None:
        """Ask the model about images [B,3,H,W] that ``attack`` made of those with labels y."""
        with torch.no_grad():
            seen = [self.model.analyze(part) for part in x.split(BATCH)]
        right = torch.cat([s.logits for s in seen]).argmax(1) == self.y
        self.by_attack[attack] = right, right | torch.cat([s.detected for s in seen])

    def counts(self) -> dict[str, Any]:
        """How many stand under each attack, and under all of them."""
        every = [torch.stack(found).all(0) for found in zip(*self.by_attack.values(), strict=True)]
        each = {name: [int(found.sum()) for found in pair] for name, pair in self.by_attack.items()}
        return {"correct": int(every[0].sum()), "correct_or_noticed": int(every[1].sum()), "samples": len(self.y), "by_attack": each}


def crafted(attack: Attack, model: AMSDN, x: Tensor, y: Tensor) -> Tensor:
    """What the attack makes of the images, in batches with a generator each."""
    parts = [
        attack(model, a, b, generator=torch.Generator().manual_seed(i))
        for i, (a, b) in enumerate(zip(x.split(BATCH), y.split(BATCH), strict=True))
    ]
    return torch.cat([part.x_adv for part in parts])


def compared(model: AMSDN, views: int, data: Dataset, samples: int, scale: float) -> dict[str, Any]:
    """Both ways of answering on the first ``samples`` validation images. Counts."""
    x, y = data.val.fetch(torch.arange(samples))
    bare, viewing = answering_by(model, 0, data), answering_by(model, views, data)
    alone, joined = Standing(bare, y), Standing(viewing, y)
    for name, attack in bare_attacks(bare, scale).items():
        x_adv = crafted(attack, bare, x, y)
        alone.judge(name, x_adv)
        joined.judge(f"{name}, carried over", x_adv)
    for name, attack in view_attacks(scale).items():
        joined.judge(name, crafted(attack, viewing, x, y))
    return {"bare": alone.counts() | on_clean(bare, data), "occluded": joined.counts() | on_clean(viewing, data)}


def on_clean(model: AMSDN, data: Dataset) -> dict[str, Any]:
    """Accuracy and alarms on the first half of the validation images; the threshold is from the other half."""
    half = data.val.subset(torch.arange(len(data.val) // 2))
    alarms = 0
    with torch.no_grad():
        for rows in torch.arange(len(half)).split(BATCH):
            alarms += int(model.analyze(half.fetch(rows)[0]).detected.sum())
    return {"clean": clean_accuracy(model, half, torch.device("cpu")), "alarms": alarms}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="where CIFAR-10 lies (default: AMSDN_DATA or data/)")
    parser.add_argument("--limit", type=int, help="use at most this many images of every split (a dry run)")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="where the ablations' runs are kept")
    parser.add_argument("--arms", nargs="+", default=["all parts", "plain"])
    parser.add_argument("--views", type=int, default=4, help="how many occluded views")
    parser.add_argument("--samples", type=int, default=100, help="validation images that are attacked")
    parser.add_argument("--scale", type=float, default=1.0, help="of the attacks' steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    data = load_dataset("cifar10", root=options.data_root, limit=options.limit)
    folders: Mapping[str, list[Path]] = {arm: sorted(options.work.glob(f"{folder_of(arm)}/*/result.json")) for arm in options.arms}
    for arm, found in folders.items():
        for result in found:
            target = result.parent / "consistency.json"
            if not target.exists():
                counts = compared(load_model(result.parent / "train" / "model"), options.views, data, options.samples, options.scale)
                write_json(target, provenance(torch.device("cpu"), views=options.views) | counts)
                print(f"{arm}, seed {result.parent.name}: {counts}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
