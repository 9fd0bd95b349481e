"""``amsdn patch``: learn one patch for all images, judge it on images and transformations it never saw, and print it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amsdn.attacks.base import check_gradients
from amsdn.attacks.physical import DIGITAL, PHYSICAL, Transformations, apply
from amsdn.attacks.printing import Picture, check_print_size, contact_sheet, quantised, save_pdf
from amsdn.attacks.universal_patch import AdvPatch, PatchSuccess, UniversalPatch, success_rate
from amsdn.commands.common import check_classes, describe_data, describe_model, find_class, open_data, open_model, provenance
from amsdn.commands.options import parse, positive
from amsdn.commands.ranks import Workers
from amsdn.data import Dataset
from amsdn.errors import InputError
from amsdn.evaluation.run_folder import model_fingerprint
from amsdn.evaluation.statistics import share
from amsdn.recipes import DEFAULT
from amsdn.records import canonical
from amsdn.utils.helpers import generator, pick_device
from amsdn.utils.images import save_image

EXAMPLE = "amsdn patch --model checkpoints/digits-demo/finetune/model --target 3 --physical True"
EXAMPLES, SHOWN = 8, 3  # images on the contact sheet, and how many draws of each kind
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True)
class PatchOptions:
    """Options of ``amsdn patch``."""

    model: str = f"checkpoints/{DEFAULT}/finetune/model"  # a model folder, timm:NAME[@FILE.safetensors], or module:function that returns a torch classifier
    data: str = "digits"  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path = Path("checkpoints/patch")  # where the patch goes; an earlier patch there is replaced
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    size: int = 8  # side of the patch in the image, pixels
    target: str | None = None  # the class it should be taken for, by name or index; default: any wrong class
    physical: bool = False  # train for print and camera too: perspective, light, blur, print colour, noise
    print_size_cm: float = 10.0  # side of the printed patch
    num_steps: int = 500  # of training
    batch_size: int = 64  # training images a step
    train_samples: int = 2000  # training images to learn from, drawn at random
    samples: int = 500  # test images to judge it on, the first ones
    draws: int = 10  # random transformations for each test image
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Learn, judge, write and print one patch."""
    description = f"Learn one patch that fools a model on all images.\n\nExample: {EXAMPLE}"
    options = parse(PatchOptions(), args, "patch", description)
    for name in ("size", "num_steps", "batch_size", "train_samples", "samples", "draws"):
        positive(getattr(options, name), f"--{name.replace('_', '-')}")
    Workers.refuse()
    check_print_size(options.print_size_cm)
    device = pick_device(options.device)
    model = open_model(options.model, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, options.model)
    if options.size > dataset.image_size:
        raise InputError(f"--size {options.size}: larger than the images ({dataset.image_size} px); choose a smaller patch")
    target = None if options.target is None else find_class(options.target, dataset.classes)
    attack = AdvPatch(
        options.size,
        options.num_steps,
        batch_size=options.batch_size,
        target_class=target,
        transformations=PHYSICAL if options.physical else DIGITAL,
    )
    check_gradients(attack, model, f"--model {options.model}: learning a patch")
    path = options.out / "patch.png"
    about = f"{options.size} px patch against {options.model}, {'untargeted' if target is None else f'target {dataset.classes[target]}'}"
    options.out.mkdir(parents=True, exist_ok=True)  # before the training, in case it fails
    patch = learn(model, dataset, attack, options, device)
    judged = judge(model, dataset, patch, attack, options, device)
    patch.save(path, **facts(model, dataset, attack, options, judged, device))
    save_pdf(patch.content, path.with_suffix(".pdf"), options.print_size_cm, f"{about}; {options.print_size_cm:g} cm wide; {patch.digest}")
    save_image(examples(model, dataset, patch, attack, options, device), options.out / "example.png")
    print(table(judged, about, options))
    print(
        f"patch: {path}, {path.with_suffix('.pdf')} ({options.print_size_cm:g} cm), {path.with_suffix('.json')}; {options.out / 'example.png'}"
    )


def learn(model: nn.Module, dataset: Dataset, attack: AdvPatch, options: PatchOptions, device: torch.device) -> UniversalPatch:
    """The patch learned on a random part of the training split."""
    chosen = torch.randperm(len(dataset.train), generator=generator("cpu", options.seed, "patch images"))[: options.train_samples]
    images, labels = dataset.train.fetch(chosen)
    return attack.fit(model, images, labels, generator(device, options.seed, "patch training"), progress=True)


@dataclass(frozen=True)
class Judged:
    """One row of the result: what was put on the test images, and what came of it."""

    name: str
    transformations: Transformations
    success: PatchSuccess


def judge(
    model: nn.Module, dataset: Dataset, patch: UniversalPatch, attack: AdvPatch, options: PatchOptions, device: torch.device
) -> list[Judged]:
    """The patch on test images under fresh draws of the trained transformations and under held-out ones.

    Last, as a control, a patch of random colours: what covering that part of the image does by itself.
    """
    images, labels = dataset.test.fetch(torch.arange(min(options.samples, len(dataset.test))))
    noise = quantised(torch.rand(patch.content.shape, generator=generator("cpu", options.seed, "patch control")))
    trained, held_out = attack.transformations, attack.transformations.held_out()
    rows = []
    for name, content, ranges in (
        ("transformations as trained", patch.content, trained),
        ("held-out transformations", patch.content, held_out),
        ("random colours instead", noise, trained),
    ):
        seeded = generator(device, options.seed, "patch test", name)
        result = success_rate(model, images, labels, content, ranges, options.draws, seeded, target=attack.target_class, progress=True)
        rows.append(Judged(name, ranges, result))
    return rows


def rate(shares: Tensor) -> dict[str, Any]:
    """Per-image shares of successful draws [N] as a mean and as the worst of the draws, each with a 95 % Wilson interval.

    The mean of N independent values in [0,1] varies at most as much as a share of N coin flips of the same mean, so
    Wilson's formula at that mean and N errs on the safe side, however the draws of one image hang together.
    """
    n, worst = len(shares), share([bool(s) for s in shares > 0])
    mean = float(shares.double().mean()) if n else None
    low, high = (None, None) if mean is None else wilson_of_mean(mean, n)
    return {"images": n, "mean": mean, "low": low, "high": high, "worst_of_draws": worst.as_dict()}


def wilson_of_mean(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval where n values in [0,1] have this mean."""
    middle, spread = mean + Z * Z / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + Z * Z / n)), min(1.0, (middle + spread) / (1 + Z * Z / n))


def rates(judged: Judged, options: PatchOptions) -> dict[str, Any]:
    """Untargeted and, where there is a target, targeted success."""
    found = {"untargeted": rate(judged.success.untargeted())}
    return found if options.target is None else {**found, "targeted": rate(judged.success.targeted())}


def facts(
    model: nn.Module, dataset: Dataset, attack: AdvPatch, options: PatchOptions, judged: Sequence[Judged], device: torch.device
) -> dict[str, Any]:
    """What patch.json says besides the attack's own settings."""
    return {
        "target": None if attack.target_class is None else {"index": attack.target_class, "name": dataset.classes[attack.target_class]},
        "print_size_cm": options.print_size_cm,
        "definition": "untargeted: wrong class, of test images classified correctly without the patch; targeted: the target "
        "class, of those of another class; mean: over images and draws; worst_of_draws: images fooled in at least one draw",
        "results": [{"name": j.name, "transformations": canonical(j.transformations), **rates(j, options)} for j in judged],
        "draws": options.draws,
        "train_samples": min(options.train_samples, len(dataset.train)),
        "model": {"name": options.model, **describe_model(model, model_fingerprint(model))},
        "data": describe_data(dataset, min(options.samples, len(dataset.test))),
        **provenance(device, seed=options.seed),
    }


def table(judged: Sequence[Judged], about: str, options: PatchOptions) -> str:
    """The result for the terminal."""
    lines = [about, f"{'':<28}{'success':<12}{'images':>6}   {'mean over draws':<24}worst of {options.draws} draws"]
    for row in judged:
        for kind, r in rates(row, options).items():
            mean = "no images" if r["mean"] is None else f"{100 * r['mean']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
            lines.append(f"{row.name:<28}{kind:<12}{r['images']:>6}   {mean:<24}{r['worst_of_draws']['text']}")
    return "\n".join(lines)


def examples(
    model: nn.Module, dataset: Dataset, patch: UniversalPatch, attack: AdvPatch, options: PatchOptions, device: torch.device
) -> Tensor:
    """A contact sheet of the first test images, clean and under random draws, not chosen by their outcome; successes are framed."""
    images, labels = dataset.test.fetch(torch.arange(min(EXAMPLES, len(dataset.test))))
    seeded = generator(device, options.seed, "patch examples")
    trained, held_out = attack.transformations, attack.transformations.held_out()
    columns = [images]
    for ranges in (trained, held_out):
        drawn = [ranges.sample(len(images), attack.size, seeded) for _ in range(SHOWN)]
        columns += [apply(images, patch.content.to(device), d) for d in drawn]
    headings = ["clean", "as trained", *[""] * (SHOWN - 1), "held out"]
    with torch.no_grad():
        answers = [model(x).float().softmax(1).max(1) for x in columns]
    framed = [(a.indices != labels) & (attack.target_class is None or a.indices == attack.target_class) for a in answers]
    rows = [
        [
            Picture(x[i], f"{dataset.classes[int(a.indices[i])][:12]} {float(a.values[i]):.2f}", bool(w[i]))
            for x, a, w in zip(columns, answers, framed, strict=True)
        ]
        for i in range(len(images))
    ]
    return contact_sheet(rows, headings)
