"""What certificates cost, side by side: ours, Cohen's fixed n, plain double masking, ART's smoothing; same model, same images.

    python benchmarks/certification.py --model DIR [--data cifar10] [--images N] [--only l2 patch ...] [--work DIR]
    python benchmarks/certification.py --docs docs/certificates/cost.md      # draw the tables from the JSON, run nothing

Everything is measured into --work, sample by sample: a killed benchmark goes on where it stopped. Parts:

    l2      mean samples and certified accuracy of the sequential tests, and of n samples for every image
    replay  the same on the images of Cohen's published log, whose hit probabilities are known: no network, small losses show
    patch   passes for each certificate and each answer, for six mask sets
    l0      what votes over disjoint pixels certify
    art     images a second beside ART's smoothing at the same n, and the memory of both
"""

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import certificate_art
import certificate_l0
import certificate_l2
import certificate_patch
import torch
from certificate_bench import Bench
from certificate_tables import draw, tables
from outcome import run_or_draw
from victims import ROOT, SHARED

from amsdn.commands.common import open_data, open_model, provenance
from amsdn.errors import InputError
from amsdn.evaluation.run_folder import claim, data_fingerprint, model_fingerprint
from amsdn.records import write_json
from amsdn.utils.helpers import keep_freed_memory, pick_device

PARTS = ("l2", "replay", "patch", "l0", "art")
LOG = SHARED / "third_party" / "cohen_cifar10_resnet110_sigma_0.25.tsv"
LOG_SIGMA = 0.25


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", default="benchmarks.victims:load_resnet20", help="a model folder, or module:function (default: public ResNet-20)"
    )
    p.add_argument("--data", default="cifar10", help="as for amsdn certify")
    p.add_argument("--data-root", type=Path, help="where cifar10 lies (or AMSDN_DATA)")
    p.add_argument("--images", type=int, default=500, help="the first test images")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts only")
    p.add_argument(
        "--minutes", type=float, default=20.0, help="for each line that may have to do with fewer images: smoothing, plain masking"
    )
    p.add_argument("--sigma", type=float, default=0.25, help="of the noise, in pixel units")
    p.add_argument("--reference-n", type=int, default=100_000, help="samples of Cohen's procedure, and the most that ours may take")
    p.add_argument("--reference-images", type=int, help="at most this many images for it (default: as many as fit in --minutes)")
    p.add_argument("--repeats", type=int, default=20, help="of the replay")
    p.add_argument("--patch", type=int, default=5, help="side of the patch, pixels")
    p.add_argument("--confidence", type=float, default=0.8, help="from which coarser masks stand for those inside them")
    p.add_argument("--attacked", type=int, default=100, help="images for patch inference, clean and attacked")
    p.add_argument("--attack-steps", type=int, default=20, help="of patch-pgd")
    p.add_argument("--grids", type=int, nargs="+", default=[6, 8], help="parts a side of the pixel votes")
    p.add_argument("--art-images", type=int, default=4)
    p.add_argument(
        "--art-n", type=int, nargs="+", default=[1000, 10_000], help="ART holds all of the noise at once: 80 kB a sample at 32 pixels"
    )
    p.add_argument("--art-repeats", type=int, default=3)
    p.add_argument("--memory-n", type=int, nargs="*", default=[1000, 10_000, 100_000], help="for our memory; ART's is measured at --art-n")
    p.add_argument("--batch-size", type=int, default=1024, help="noisy copies or masked images in memory at once")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark-certification", help="run folders, to go on in")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "certification.json")
    p.add_argument("--docs", type=Path, help="draw the tables of --out into this page and run nothing")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    return run_or_draw(parser().parse_args(arguments), benchmark, draw)


def benchmark(options: argparse.Namespace) -> None:
    """Measure the parts asked for, write each when it is done, print all."""
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # patch certificates leave room for the rounding of float32, not for that of TF32
    bench, settings = open_bench(options)
    document = open_document(options.out, settings)
    about = {"batch_size": bench.batch_size, "minutes": bench.minutes, "torch_threads": torch.get_num_threads(), "art": _version()}
    document["sessions"].append(provenance(bench.device, parts=options.only, **about))
    for part in PARTS:
        if part not in options.only:
            continue
        print(f"{part} ...", flush=True)
        found = measure(part, bench, options)
        if found is not None:
            document[part] = found
            write_json(options.out, document)
    print(tables(document))


def open_bench(options: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """The model and the data, and the settings that tell one benchmark from another. Raises InputError where --work holds another one."""
    device = pick_device(options.device)
    model, dataset = open_model(options.model, device), open_data(options.data, options.data_root, None, device)
    images = min(options.images, len(dataset.test))
    if min(images, options.attacked, options.art_images, options.repeats, options.art_repeats) < 1:
        raise InputError("--images, --attacked, --art-images, --repeats and --art-repeats must be at least 1")
    settings = {
        "model": options.model,
        "fingerprint": model_fingerprint(model),
        "data": options.data,
        "data_fingerprint": data_fingerprint(dataset.test),
        "sigma": options.sigma,
        "n": options.reference_n,
        "patch": options.patch,
        "confidence": options.confidence,
    }
    machine = {"device": str(device), "threads": torch.get_num_threads(), "batch_size": options.batch_size}
    options.work.mkdir(parents=True, exist_ok=True)
    claim(options.work, "benchmark.json", {**settings, **machine})
    bench = Bench(
        model=model,
        split=dataset.test,
        classes=len(dataset.classes),
        device=device,
        work=options.work,
        images=images,
        minutes=options.minutes,
        sigma=options.sigma,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    return bench, settings


def open_document(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The file to go on with, or a new one. Raises InputError for one that was made with other settings."""
    if not path.exists():
        return {"settings": settings, "sessions": []}
    document: dict[str, Any] = json.loads(path.read_text())
    if document["settings"] != settings:
        raise InputError(f"{path} was made with {document['settings']}, this run has {settings}; delete it or choose another --out")
    return document


def measure(part: str, bench: Bench, options: argparse.Namespace) -> Any:
    """The result of one part; None, after saying why, where it cannot be measured on this machine."""
    if part == "l2":
        return certificate_l2.measure(bench, options.reference_n, options.reference_images)
    if part == "replay":
        if not LOG.exists():
            print(f"replay left out: Cohen's published log is not at {LOG}")
            return None
        key = f"replay-{options.reference_n}-{options.repeats}"
        return bench.once(key, lambda: certificate_l2.replay(LOG, LOG_SIGMA, options.reference_n, options.repeats))
    if part == "patch":
        return certificate_patch.measure(bench, options.patch, options.confidence, options.attacked, options.attack_steps)
    if part == "l0":
        return certificate_l0.measure(bench, options.grids)
    where = (options.model, options.data, str(options.data_root or ""))
    if _version() is None:
        print("art: not installed (make peers), so only our memory is measured")
        return {"speed": [], "memory": certificate_art.memory(bench, where, {"ours": options.memory_n})}
    return {
        "speed": certificate_art.speed(bench, options.art_images, options.art_n, options.art_repeats),
        "memory": certificate_art.memory(bench, where, {"ours": options.memory_n, "art": options.art_n}),
    }


def _version() -> str | None:
    try:
        return version("adversarial-robustness-toolbox")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
