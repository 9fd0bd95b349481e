"""The ``standard`` protocol beside the same protocol put together by hand from torchattacks, foolbox and ART: seconds, and what stands.

    python benchmarks/evaluation.py [--model cifar10-cpu] [--samples 50] [--threads 1] [--work DIR] [--out results/benchmarks/evaluation.json]

Same model, images and budgets; ``evaluation_by_hand`` says which attacks, in how many steps and queries. Ours is ``evaluate`` with the protocol's
attacks, one after another, without the checks of reliability. Threat by threat ours and theirs run in turn; both meet only images that still stand, frozen weights and the
same threads. One judge decides: an image counts as broken where it lies in the threat model (``amsdn.threats``) and the plain model's argmax is not
its label. With one thread on a CPU the seconds are the process's own. Each attack's evidence goes into --work when it is done: a killed run goes on
with the next one. ``scripts/benchmark_tables.py write`` draws docs/evaluation/cost.md from the file.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_by_hand as by_hand
import torch
from evaluation_tables import evaluation_table, summarise
from torch import Tensor, nn
from victims import ROOT, Counted

from amsdn.attacks import Attack
from amsdn.commands.common import open_data, open_model, provenance
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import evaluate
from amsdn.evaluation.protocol import Protocol
from amsdn.evaluation.run_folder import Samples, claim, data_fingerprint, model_fingerprint
from amsdn.protocols import device_of
from amsdn.records import write_json
from amsdn.threats import ThreatModel
from amsdn.utils.helpers import keep_freed_memory, pick_device

PARTIAL = "evaluation.json"  # in --work: what is measured so far
Seconds = tuple[float, float]  # the process's own, the wall clock's


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="cifar10-cpu", help="a shipped model, a model folder, or module:function")
    p.add_argument("--data", default="cifar10", help="as for amsdn evaluate")
    p.add_argument("--data-root", type=Path, help="where cifar10 lies (or AMSDN_DATA)")
    p.add_argument("--samples", type=int, default=50, help="the first test images")
    p.add_argument("--threads", type=int, default=1, help="torch threads")
    p.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark-evaluation", help="the folder to go on in")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "evaluation.json")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    try:
        benchmark(parser().parse_args(arguments))
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what --work does not hold yet, then write and print all."""
    absent = by_hand.missing()
    if absent:
        raise InputError(f"{', '.join(absent)} not installed, and the comparison needs all of {', '.join(by_hand.LIBRARIES)}: make peers")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    bench.warm_up()
    for number, line in enumerate(bench.lines()):
        sides = [lambda line=line: bench.ours(line), lambda line=line: bench.theirs(line)]  # type: ignore[misc]
        for side in sides if number % 2 == 0 else reversed(sides):
            side()
    document = bench.document | {"lines": summarise(bench.document)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, document)
    print(evaluation_table(document))
    return document


class Bench:
    """One model, its images, and what has been measured on them so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = pick_device(options.device)
        self.model = open_model(options.model, device).requires_grad_(False)
        self.split: Samples = open_data(options.data, options.data_root, None, device).test
        if not 1 <= options.samples <= len(self.split):
            raise InputError(f"--samples must lie in 1..{len(self.split)}, got {options.samples}")
        x, y = self.split.fetch(torch.arange(options.samples))
        self.x, self.y = x.to(device), y.to(device)
        self.protocol = Protocol.named("standard", x.shape[-1])
        self.attacks = self.protocol.attacks(self.model)
        self.parts = by_hand.parts(self.protocol)
        self.work = options.work
        self.right = predictions(self.model, self.x) == self.y
        self.document = self._open(options)

    def _open(self, options: argparse.Namespace) -> dict[str, Any]:
        """What --work holds of this benchmark, with this session. Raises InputError where it holds another one."""
        settings = {
            "model": options.model,
            "fingerprint": model_fingerprint(self.model),
            "data": options.data,
            "data_fingerprint": data_fingerprint(self.split),
            "samples": options.samples,
            "protocol": [self.protocol.name, self.protocol.version],
            "threads": options.threads,
            "device": str(device_of(self.model)),
        }
        self.work.mkdir(parents=True, exist_ok=True)
        claim(self.work, "benchmark.json", settings)
        path = self.work / PARTIAL
        document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": settings, "sessions": [], "parts": {}}
        document["clock"] = "the process's own seconds" if self._process else "the wall clock"
        document["clean"] = self.right.tolist()
        document["sessions"].append(provenance(device_of(self.model), libraries=by_hand.library_versions()))
        return document

    @property
    def _process(self) -> bool:
        return device_of(self.model).type == "cpu" and torch.get_num_threads() == 1

    def lines(self) -> list[tuple[str, float]]:
        """Family and budget of every threat, in the protocol's order."""
        return list(dict.fromkeys((a.threat.family, float(a.threat.budget)) for a in self.attacks.values()))

    def warm_up(self) -> None:
        """Import every library and let it and the model allocate, on two images and in no time that counts."""
        toy = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10)).to(self.x.device).requires_grad_(False).eval()
        x, y = self.x[:2], predictions(toy, self.x[:2])
        seen = set()
        for part in self.parts:
            if part.name not in seen:
                part.attack(toy, toy, x, y)
                seen.add(part.name)
        leaf = self.x.clone().requires_grad_(True)
        torch.autograd.grad(by_hand.differentiable(self.model)(leaf).sum(), leaf)

    def ours(self, line: tuple[str, float]) -> None:
        """Every attack of the protocol on one threat, each by an ``evaluate`` of its own."""
        for name, attack in self.attacks.items():
            if line_of(attack.threat) == line:
                self._once("ours", name, lambda name=name, attack=attack: self._evaluate(name, attack))  # type: ignore[misc]

    def _evaluate(self, name: str, attack: Attack) -> dict[str, Any]:
        folder = self.work / "ours" / name
        shutil.rmtree(folder, ignore_errors=True)  # half of a killed measurement cannot be timed
        rows, seconds = self._timed(
            lambda: evaluate(
                self.model, self.split, {name: attack}, folder, self.protocol.config, sample_ids=range(len(self.x)), progress=False
            )
        )
        rows = [row for row in rows if row.attack == name]
        standing = {key_of(attack.threat): [row.correct for row in rows]}
        return measured(name, standing, seconds, sum(r.forwards for r in rows), sum(r.backwards for r in rows), evades=attack.evades)

    def theirs(self, line: tuple[str, float]) -> None:
        """Every part by hand that has this threat, on the images that the parts before it left."""
        for part in self.parts:
            if line in map(line_of, part.threats):
                key = part.name if len(part.threats) > 1 else f"{part.name}, {key_of(part.threats[0])}"
                self._once("by hand", key, lambda part=part: self._by_hand(part))  # type: ignore[misc]

    def _by_hand(self, part: by_hand.Part) -> dict[str, Any]:
        at = self._left(part).nonzero().squeeze(1)
        model, differentiable = Counted(self.model), Counted(by_hand.differentiable(self.model))
        x, y, x_adv, seconds = self.x[at], self.y[at], self.x.clone(), (0.0, 0.0)
        if len(at):
            x_adv[at], seconds = self._timed(lambda: part.attack(model, differentiable, x, y))
        x_adv = x_adv.clamp(0, 1)
        wrong = predictions(self.model, x_adv) != self.y
        standing, outside = {}, {}
        for threat in part.threats:
            inside = threat.contains(x_adv, self.x)
            standing[key_of(threat)] = (~(wrong & inside) & self.right).tolist()
            outside[key_of(threat)] = int((wrong & ~inside & self.right).sum())
        passes = (model.forwards + differentiable.forwards, model.backwards + differentiable.backwards)
        return measured(part.name, standing, seconds, *passes, outside=outside, attacked=len(at), counts=dict(part.counts))

    def _left(self, part: by_hand.Part) -> Tensor:
        """The images [N] that this part is given: right at first, and left by the parts before it on some threat of its own."""
        left = torch.zeros_like(self.right)
        for threat in part.threats:
            found = [
                p["standing"][key_of(threat)] for p in self.document["parts"].get("by hand", {}).values() if key_of(threat) in p["standing"]
            ]
            left |= self.right & torch.tensor([self.right.tolist(), *found], device=left.device).all(0)
        return left

    def _once(self, side: str, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and keep, unless it is there."""
        kept = self.document["parts"].setdefault(side, {})
        if key not in kept:
            kept[key] = measure()
            write_json(self.work / PARTIAL, self.document)
            stand = ", ".join(f"{name}: {sum(right)}" for name, right in kept[key]["standing"].items())
            print(f"{side:8} {key:45} {kept[key]['seconds']:8.1f} s, standing {stand}", flush=True)

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, Seconds]:
        process, wall = time.process_time(), time.perf_counter()
        result = work()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        process, wall = time.process_time() - process, time.perf_counter() - wall
        return result, (process if self._process else wall, wall)


def measured(name: str, standing: dict[str, list[bool]], seconds: Seconds, forwards: int, backwards: int, **more: Any) -> dict[str, Any]:
    """What is kept of one attack: by threat, which images it left standing."""
    passes = {"forwards": forwards, "backwards": backwards}
    return {"name": name, "standing": standing, "seconds": seconds[0], "wall_seconds": seconds[1], **passes, **more}


def line_of(threat: ThreatModel) -> tuple[str, float]:
    return threat.family, float(threat.budget)


def key_of(threat: ThreatModel) -> str:
    """``linf 8/255``, ``sparse 20``, ``patch 5``."""
    return f"{threat.family} {float(threat.budget):g}" if threat.counts else threat.describe()


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """[B]."""
    return model(x).argmax(1)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
