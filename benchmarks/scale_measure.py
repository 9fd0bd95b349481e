"""Measure what ``benchmarks/scale_model.py`` reckons with, on this machine, in about a minute.

    python benchmarks/scale_measure.py [--threads 1] [--out results/benchmarks/scale.json]

Counted: operations and operators of AMSDN on ConvNeXt-tiny at 224 px, and how many forward passes an image of a step of the
``imagenet`` recipe is worth. Timed: one training pass of it, the matrix peak, JPEG decoding on one core, a checkpoint.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms
from training import ROOT
from training_machine import Marks, count_flops, count_operators, matmul_peak, random_images, spread
from training_steps import COUNTED, counted, forward_flops, fresh, kinds, step_flops

from amsdn.commands.common import provenance
from amsdn.data import ArraySplit
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import Recipe, get_recipe
from amsdn.records import write_json
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.checkpoint import STATE_FILE, save_state
from amsdn.training.defence import DefenceConfig
from amsdn.utils.helpers import generator, keep_freed_memory
from amsdn.utils.images import read_image

MODEL = AMSDNConfig(num_classes=1000, variant="tiny", stem_stride=4)
PHOTO = (500, 375)  # pixels; about what ImageNet's photographs measure
KILOBYTES = 110  # and about what one weighs


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    p.add_argument("--quick", action="store_true", help="a small model, everything once; the figures mean nothing")
    p.add_argument("--out", type=Path, help="default: results/benchmarks/scale.json; with --quick none")
    options = p.parse_args(arguments)
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, size = (AMSDNConfig(variant="compact", width=4), 64) if options.quick else (MODEL, 224)
    seconds, repeats = (0.2, 1) if options.quick else (5.0, 3)
    device, recipe = torch.device("cpu"), get_recipe("imagenet")
    steps = stages(recipe) | {kind: (kinds(recipe)[kind], recipe.train.loop.epochs) for kind in ("clean", "pgd-10")}
    forward, training = (counted(model, size, training, count_flops) / 2 for training in (False, True))
    document = {
        **provenance(device),
        "model": {"variant": model.variant, "image_size": size, "parameters": sum(q.numel() for q in fresh(model, device).parameters())},
        "gflop": {"forward": forward / 1e9, "training": training / 1e9},
        "operators": {"forward": counted(model, size, False, count_operators), "training": counted(model, size, True, count_operators)},
        "recipe": {"name": recipe.name, "batch": recipe.train.loop.batch_size},
        "steps": {name: {"f": forwards(c, 224, 4 if options.quick else COUNTED), "epochs": e} for name, (c, e) in steps.items()},
        "peak_gflops": {n: matmul_peak(device, d) / 1e9 for n, d in (("fp32", torch.float32), ("bf16", torch.bfloat16))},
        "training_pass": training_pass(model, size, repeats),
        "decode": decoding(seconds),
        "checkpoint": checkpoint(model),
        "asked": asked_passes(),
    }
    out = options.out or (None if options.quick else ROOT / "results" / "benchmarks" / "scale.json")
    if out is not None:
        write_json(out, document)
    print(document)
    return 0


def stages(recipe: Recipe) -> dict[str, tuple[AdversarialTrainConfig, float]]:
    """The recipe's two labelled stages with their epochs; fine-tuning as a training stage of the same batches, all attacks alike."""
    shared = {f.name: getattr(recipe.finetune, f.name) for f in fields(DefenceConfig)}
    finetune = AdversarialTrainConfig(**shared, clean_start=0)
    epochs = recipe.train.loop.epochs, recipe.finetune.loop.epochs
    return {"train": (replace(recipe.train, clean_start=0), epochs[0]), "finetune": (finetune, epochs[1])}


def forwards(config: AdversarialTrainConfig, size: int, batch: int) -> float:
    """Forward passes' worth of operations for an image of such a step, counted on a thin model.

    A thin model's ratio serves, since the passes are the same ones.
    """
    thin = AMSDNConfig(variant="compact", width=4)
    split = ArraySplit(random_images(batch, size, generator("cpu", "scale")), torch.zeros(batch, dtype=torch.int64))
    return step_flops(config, thin, split, batch) / forward_flops(thin, size)


def asked_passes() -> dict[str, float]:
    """Forward passes' worth that evaluation and certification ask for each image, from the other benchmarks; a gradient counts as one more."""
    folder = ROOT / "results" / "benchmarks"
    budgets, proofs = (json.loads((folder / name).read_text()) for name in ("budgets.json", "certification.json"))
    found = {"clean": 1.0}
    for threat, report in budgets["digits-amsdn"]["threats"].items():
        found[f"quick {threat} cascade"] = float(sum(report["quick_passes"]))
    for threat, report in budgets["resnet20"]["threats"].items():
        if threat.startswith("sparse"):
            found[f"quick {threat} cascade"] = float(sum(report["quick_passes"]))
    for line in proofs["patch"]["certificates"]:
        if line["masks"] == "4x4, 2x2 first":
            found["patch certificate, 4x4, 2x2 first"] = line["passes"]["mean"]
    for line in proofs["l2"]:
        if line["procedure"] == "sequential, r = .25":
            found["l2 certificate, r = .25"] = line["samples"]["mean"]
    return found


def training_pass(config: AMSDNConfig, size: int, repeats: int) -> dict[str, Any]:
    """Seconds an image of forward and backward in bf16, two images at once."""
    model, x = fresh(config, torch.device("cpu")).to(memory_format=torch.channels_last), torch.rand(2, 3, size, size)  # type: ignore[call-overload]
    marks = Marks(x.device, process=torch.get_num_threads() == 1)
    for _ in range(repeats + 1):
        marks.mark()
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.trace(x.contiguous(memory_format=torch.channels_last)).logits
        logits.sum().backward()
    marks.mark()
    return {"precision": "bf16", "seconds_per_image": spread([marks.seconds(i, i + 1) / 2 for i in range(1, repeats + 1)])}


def decoding(seconds: float) -> dict[str, Any]:
    """Images a second on one core: Pillow's decoding with a random resized crop to 224 px and a flip; and our folder reader's."""
    files = [_photo(image) for image in load_sample_images().images]
    training = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            path.write_bytes(content)
        return {
            "bytes": [len(f) for f in files],
            "pixels": list(PHOTO),
            "random_resized_crop": _rate(lambda i: training(Image.open(io.BytesIO(files[i])).convert("RGB")), len(files), seconds),
            "folder_reader": _rate(lambda i: read_image(paths[i], image_size=224), len(files), seconds),
        }


def _photo(pixels: Any) -> bytes:
    """A real photograph as a JPEG of ImageNet's usual size and weight."""
    image = Image.fromarray(pixels).resize(PHOTO, Image.Resampling.LANCZOS)
    found = b""
    for quality in range(60, 100, 2):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        found = buffer.getvalue()
        if len(found) >= 1000 * KILOBYTES:
            break
    return found


def _rate(once: Any, kinds: int, seconds: float) -> float:
    """Calls a second of this process's own time; every photograph alike."""
    for i in range(kinds):
        once(i)
    start, done = time.process_time(), 0
    while time.process_time() - start < seconds:
        once(done % kinds)
        done += 1
    return done / (time.process_time() - start)


def checkpoint(config: AMSDNConfig) -> dict[str, float]:
    """Bytes of the training state (weights, their average, the optimizer's two moments), and this process's own seconds to write it.

    Waiting for the disk is not in them: it depends on the disk.
    """
    weights = fresh(config, torch.device("cpu")).state_dict()
    state = {name: {k: v.clone() for k, v in weights.items()} for name in ("model", "ema", "first", "second")}
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        save_state(Path(folder), state)
        return {"seconds": time.process_time() - start, "bytes": (Path(folder) / STATE_FILE).stat().st_size}


if __name__ == "__main__":
    sys.exit(main())
