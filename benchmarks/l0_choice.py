"""Which l0 certificate: votes over disjoint pixels, or randomized ablation? Both on one backbone, trained for the same time.

Feature partition (ours, amsdn.models.pixel_partition; Hammoudeh & Lowd, AAAI 2024): R x C voters, one pass each, a certain bound.
Beside the run-off that we use, what a plain plurality of the same votes would certify.
Randomized ablation (Levine & Feizi, AAAI 2020): the class most often given to images of which K random pixels are kept; n0 passes
choose it and n more bound its probability by Clopper and Pearson at alpha .001. Absent pixels are encoded apart from every colour,
by a presence channel and the mean colour. No change of r pixels matters as long as the probability exceeds
1/2 + 1 - C(d-r,K) / C(d,K), d being all pixels (Theorem 1 there). "more samples" puts the measured share in the place of its lower
bound: no certificate, but what one could become with ever more passes.

One network of each kind serves all grids, or all K: it is trained on a random one for each image. Time is process time.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.commands.common import provenance
from amsdn.data import Augment, Dataset, Split, batches, load_dataset
from amsdn.evaluation.statistics import clopper_pearson_lower
from amsdn.models.amsdn import AMSDN
from amsdn.models.backbone.compact import conv_norm
from amsdn.models.pixel_partition import PixelPartition
from amsdn.records import write_json
from amsdn.utils.helpers import generator, keep_freed_memory
from amsdn.utils.partition import Grid, random_part_views
from amsdn.utils.voting import cast_votes, changes_survived, count_votes

RADII = (1, 2, 4, 8, 12)
ALPHA = 0.001
ABSENT = -1.0  # where a pixel is not kept; no colour
AUGMENT = Augment(flip=True, shift=4)
View = Callable[[Tensor, torch.Generator], Tensor]


class PresenceNormalize(nn.Module):
    """images [B,3,H,W] with ABSENT pixels -> [B,4,H,W]: normalised, the mean where absent, and whether present."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        present = (x[:, :1] != ABSENT).to(x.dtype)
        return torch.cat([self.inner(x) * present, present], 1)


def backbone(width: int, *, presence: bool) -> AMSDN:
    """The compact AMSDN without pyramid, attention and purification; with ``presence``, one input channel more."""
    torch.manual_seed(0)
    model = AMSDN(variant="compact", width=width, fpn=False, attention=False, purification=False)
    if presence:
        model.normalize = PresenceNormalize(model.normalize)  # type: ignore[assignment]
        model.backbone.stem = conv_norm(4, width)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def ablated(x: Tensor, keep: Tensor, draws: torch.Generator) -> Tensor:
    """x [N,3,H,W] with all but ``keep[n]`` uniformly drawn pixels of image n ABSENT."""
    order = torch.rand(len(x), x.shape[2] * x.shape[3], generator=draws).argsort(1).argsort(1)
    return torch.where((order < keep[:, None]).reshape(len(x), 1, *x.shape[2:]), x, ABSENT)


def randomly_ablated(x: Tensor, draws: torch.Generator, keeps: tuple[int, ...]) -> Tensor:
    """For training: a random K of ``keeps`` for each image."""
    return ablated(x, torch.tensor(keeps)[torch.randint(len(keeps), (len(x),), generator=draws)], draws)


def trained(model: AMSDN, train: Split, view: View, options: argparse.Namespace) -> AMSDN:
    """The model after ``options.minutes`` of process time on views of ``train``: SGD, triangular rate, bf16, label smoothing."""
    draws, budget, batch = generator("cpu", "l0 choice"), 60 * options.minutes, 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    started, seen, loss = time.process_time(), 0, torch.tensor(math.nan)
    model.train()
    while True:
        for indices in batches(train, batch, draws):
            done = (time.process_time() - started) / budget
            if done >= 1:
                print(f"trained on {seen:,} images, last loss {float(loss.detach()):.3f}", flush=True)
                return model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            optimizer.param_groups[0]["lr"] = 0.1 * min(done / 0.15, (1 - done) / 0.85) + 1e-4
            x, y = train.fetch(indices)
            x = view(AUGMENT(x, draws), draws).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(y)


def row(method: str, passes: int, answer: Tensor, radius: Tensor, label: Tensor, seconds: float) -> dict[str, Any]:
    """A line of the table from answers, radii (-1: none) and labels [N]; a wrong answer counts as radius -1."""
    held = torch.where(answer == label, radius, -1)
    certified = {f"r={r}": float((held >= r).double().mean()) for r in RADII}
    accuracy, middle = float((answer == label).double().mean()), int(held.median())
    return {"method": method, "passes": passes, "clean": accuracy, "median": middle, **certified, "s/image": seconds / len(label)}


@torch.no_grad()
def partition_rows(model: AMSDN, grids: list[Grid], images: Tensor, labels: Tensor, keep: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Two lines for each grid, by run-off and by plurality; leaves the parts' logits in ``keep``."""
    rows = []
    for grid in grids:
        started, defence = time.process_time(), PixelPartition(model, *grid, views_per_pass=512)
        logits = defence.part_logits(images)
        found = changes_survived(logits, defence.tolerance)
        name, seconds = f"partition {grid[0]}x{grid[1]}", time.process_time() - started
        rows.append(row(name, defence.parts, *found, labels, seconds))
        rows.append(row(f"{name}, plurality", defence.parts, *plurality(logits), labels, seconds))
        keep[name] = logits
    return rows


def plurality(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(answer, radius) [B] by most votes, ties to the smaller class, rounding neglected: floor((n_y - n_c - [c < y]) / 2), smallest c."""
    counts = count_votes(cast_votes(logits), logits.shape[2])
    answer = counts.argmax(1, keepdim=True)
    lead = counts.gather(1, answer) - counts - (torch.arange(counts.shape[1]) < answer).long()
    return answer.squeeze(1), lead.scatter(1, answer, 2 * logits.shape[1] + 2).amin(1).div(2, rounding_mode="floor")


def ablation_radius(probability: float, pixels: int, keep: int) -> int:
    """The largest r with probability > 1/2 + 1 - C(pixels-r,keep) / C(pixels,keep); -1 if there is none (Levine & Feizi, Theorem 1)."""
    radius = -1
    while radius + 1 <= pixels and probability - 1 + math.comb(pixels - radius - 1, keep) / math.comb(pixels, keep) > 0.5:
        radius += 1
    return radius


@torch.no_grad()
def ablation_rows(model: AMSDN, keeps: tuple[int, ...], images: Tensor, labels: Tensor, n0: int, n: int) -> list[dict[str, Any]]:
    """Two lines for each K: the certificate, and what more samples could make of it."""
    rows, pixels = [], images.shape[2] * images.shape[3]
    for keep in keeps:
        started, draws = time.process_time(), generator("cpu", "ablation", keep)
        views = partial(_ablation_counts, model, keep=keep, draws=draws)
        first = torch.stack([views(x, n0) for x in images])
        counts = torch.stack([views(x, n) for x in images])
        answer = first.argmax(1)
        hits = counts.gather(1, answer[:, None]).squeeze(1).tolist()
        radius = torch.tensor([ablation_radius(clopper_pearson_lower(h, n, ALPHA), pixels, keep) for h in hits])
        seconds = time.process_time() - started
        rows.append(
            row(f"ablation K={keep}", n0 + n, counts.argmax(1), torch.where(answer == counts.argmax(1), radius, -1), labels, seconds)
        )
        limit = torch.tensor([ablation_radius(float(c) / n, pixels, keep) for c in counts.amax(1)])
        rows.append(row(f"ablation K={keep}, more samples", n0 + n, counts.argmax(1), limit, labels, seconds))
    return rows


def _ablation_counts(model: AMSDN, x: Tensor, n: int, *, keep: int, draws: torch.Generator) -> Tensor:
    """How often each class is the answer on n ablations of x [3,H,W] -> [K] int64."""
    votes = model(ablated(x.expand(n, *x.shape), torch.full((n,), keep), draws)).argmax(1)
    return count_votes(votes[None], 10)[0]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, accuracies in per cent."""
    columns = ["clean", *(f"r={r}" for r in RADII)]
    lines = [f"| method | passes | median radius | {' | '.join(columns)} | s/image |", "|---" * (len(columns) + 4) + "|"]
    for r in rows:
        shares = " | ".join(f"{100 * r[c]:.1f}" for c in columns)
        lines.append(f"| {r['method']} | {r['passes']} | {r['median']} | {shares} | {r['s/image']:.2f} |")
    return "\n".join(lines)


def compare(data: Dataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train both networks and certify the same first test images with each."""
    images, labels = data.test.fetch(torch.arange(options.samples))
    grids: list[Grid] = [(side, side) for side in options.grids]
    logits: dict[str, Tensor] = {}
    ours = trained(backbone(options.width, presence=False), data.train, lambda x, g: random_part_views(x, grids, g), options)
    rows = partition_rows(ours, grids, images, labels, logits)
    print(table(rows), flush=True)
    if options.logits is not None:
        torch.save({"labels": labels, **logits}, options.logits)
    if options.keeps:
        keeps = tuple(options.keeps)
        theirs = trained(backbone(options.width, presence=True), data.train, partial(randomly_ablated, keeps=keeps), options)
        rows += ablation_rows(theirs, keeps, images, labels, options.n0, options.n)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="where CIFAR-10 lies (default: AMSDN_DATA or data/)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training for each of the two networks")
    parser.add_argument("--samples", type=int, default=300, help="test images")
    parser.add_argument("--width", type=int, default=16, help="of the compact network")
    parser.add_argument("--grids", type=int, nargs="+", default=[4, 6, 8], help="parts per axis")
    parser.add_argument("--keeps", type=int, nargs="*", default=[20, 50, 75], help="pixels that an ablation keeps; none: leave it out")
    parser.add_argument("--n0", type=int, default=50, help="ablations that choose the class")
    parser.add_argument("--n", type=int, default=600, help="ablations that bound its probability")
    parser.add_argument("--logits", type=Path, help="also save the parts' logits in this file")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/l0_choice.json"), help="the table as JSON")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    rows = compare(load_dataset("cifar10", root=options.data_root), options)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    write_json(options.out, provenance(torch.device("cpu"), settings=settings, alpha=ALPHA, rows=rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
