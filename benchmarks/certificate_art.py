"""Smoothing with a fixed number of samples, ours and ART's: speed in one process, peak memory in a fresh one for each.

python benchmarks/certificate_art.py ours|art N MODEL DATA DATA_ROOT DEVICE SIGMA BATCH    # prints the memory of one certificate as JSON
"""

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from certificate_bench import Bench
from torch import Tensor, nn

from amsdn.commands.common import open_data, open_model
from amsdn.errors import InputError
from amsdn.evaluation.certifier import Sample
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig

ALPHA, N0 = 0.001, 100
Certified = tuple[list[int], list[float], int]  # predictions, radii, samples asked for
LIBRARIES = ("ours", "art")


def ours(model: nn.Module, x: Tensor, classes: int, sigma: float, n: int, batch: int) -> Certified:
    """Our scheduler with Cohen's fixed n; n0 and n are rounded up to whole blocks."""
    block = min(32, batch)
    config = SmoothingConfig(sigma, (), fixed=True, n0=N0, n=n, alpha=ALPHA, batch_size=batch, block=block)
    claims = {i: c["l2"] for i, c in SmoothingCertifier(model, config).certify(Sample(i, image) for i, image in enumerate(x))}
    found = [claims[i] for i in range(len(x))]
    return [c.prediction for c in found], [c.radius for c in found], sum(c.samples for c in found)


def art(model: nn.Module, x: Tensor, classes: int, sigma: float, n: int, batch: int) -> Certified:
    """``PyTorchRandomizedSmoothing.certify`` at the same batch size, which is not its default of 32."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    kind = {"sample_size": N0, "scale": sigma, "alpha": ALPHA, "device_type": "gpu" if x.is_cuda else "cpu"}
    np.random.seed(0)  # noqa: NPY002 - ART draws from the global generator
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        smoothed = PyTorchRandomizedSmoothing(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, **kind)
        prediction, radius = smoothed.certify(x.cpu().numpy(), n, batch_size=batch)
    return prediction.tolist(), radius.tolist(), len(x) * (N0 + n)


RUN: dict[str, Callable[..., Certified]] = {"ours": ours, "art": art}


def speed(bench: Bench, images: int, samples: list[int], repeats: int) -> list[dict[str, Any]]:
    """Both in turn on the same images, one line for each n: seconds are medians, ratios are taken within a repeat."""
    x, _ = bench.first(images)
    lines = []
    for n in samples:
        runs = [
            {library: bench.once(f"art-{n}-{len(x)}/{library}-{i}", _timed(bench, library, x, n)) for library in LIBRARIES}
            for i in range(repeats)
        ]
        ratios = sorted(r["art"]["seconds"] / r["ours"]["seconds"] for r in runs)
        line: dict[str, Any] = {
            "n": n,
            "images": len(x),
            "repeats": repeats,
            "times": median(ratios),
            "times_range": [ratios[0], ratios[-1]],
        }
        for library in LIBRARIES:
            seconds = median(r[library]["seconds"] for r in runs)
            some = runs[0][library]
            line[library] = {
                "seconds": seconds,
                "images_per_second": len(x) / seconds,
                "samples_per_second": some["samples"] / seconds,
                "mean_radius": sum(some["radii"]) / len(x),
                "abstained": sum(p < 0 for p in some["predictions"]),
            }
        lines.append(line)
    return lines


def _timed(bench: Bench, library: str, x: Tensor, n: int) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        common = (bench.classes, bench.sigma)
        RUN[library](bench.model, x[:1], *common, 32, bench.batch_size)  # imports, warms up
        started = time.perf_counter()
        predictions, radii, samples = RUN[library](bench.model, x, *common, n, bench.batch_size)
        return {"seconds": time.perf_counter() - started, "samples": samples, "predictions": predictions, "radii": radii}

    return run


# --- memory -------------------------------------------------------------------------------------------------------------


def memory(bench: Bench, where: tuple[str, str, str], samples: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Peak memory of one certificate for each library and n, each in a process of its own. ``where``: model, data, data root."""
    lines = []
    for library in LIBRARIES:
        for n in samples.get(library, []):
            settings = [library, str(n), *where, str(bench.device), str(bench.sigma), str(bench.batch_size)]
            found = bench.once(f"memory/{library}-{n}-{bench.batch_size}", lambda settings=settings: _probe(settings))
            lines.append({"library": library, "n": n, **found})
    return lines


def _probe(settings: list[str]) -> dict[str, Any]:
    """Run this file on the settings and read what it prints."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(Path(__file__).resolve()), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        raise InputError(f"the memory probe {' '.join(settings)} failed: {done.stderr.strip().splitlines()[-1:]}; run {' '.join(command)}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def probe(library: str, n: str, model: str, data: str, root: str, device: str, sigma: str, batch: str) -> dict[str, Any]:
    """Peak memory in MiB before and after one certificate with n samples. Before it: the model, the data, and a full batch through it."""
    place = torch.device(device)
    classifier, dataset = open_model(model, place), open_data(data, Path(root) if root else None, None, place)
    x, _ = dataset.test.fetch(torch.arange(1))
    x, classes = x.to(place), len(dataset.classes)
    with torch.no_grad():
        classifier(x.expand(int(batch), *x.shape[1:]).contiguous())
    RUN[library](classifier, x, classes, float(sigma), 32, int(batch))
    before = _peak(place)
    RUN[library](classifier, x, classes, float(sigma), int(n), int(batch))
    after = _peak(place)
    return {"before": before, "peak": after, "grown": {k: after[k] - before[k] for k in after}}


def _peak(device: torch.device) -> dict[str, float]:
    """The process's largest resident memory so far and, on a GPU, the largest that torch allocated there; MiB.

    Not ``ru_maxrss`` where /proc tells more: Linux hands that one down from the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        host = next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    return {"host": host, "gpu": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {"host": host}


if __name__ == "__main__":
    print(json.dumps(probe(*sys.argv[1:])))
