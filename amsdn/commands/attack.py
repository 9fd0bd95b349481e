"""``amsdn attack``: one attack against one model, keeping the attacked images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
import tyro

from amsdn.attacks import Attack
from amsdn.attacks.detector_evasion import EvadeDetector
from amsdn.attacks.registry import ATTACKS
from amsdn.attacks.targeting import CHOICES, Choice, Targeted
from amsdn.attacks.wrapper import Wrapper
from amsdn.commands.common import check_classes, default_model, find_class, open_data, open_model
from amsdn.commands.measuring import Measured, measure
from amsdn.commands.options import parse, positive
from amsdn.commands.ranks import Workers
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.report import terminal_table
from amsdn.evaluation.shards import WHOLE
from amsdn.recipes import DEFAULT
from amsdn.records import EvalRecord, config_hash
from amsdn.utils.helpers import pick_device

EXAMPLE = "amsdn attack sparse-autoattack --k 20 --model mymodels:make_net --data cifar10 --data-root DIR --samples 200"


@dataclass(frozen=True)
class AttackOptions:
    """Options of ``amsdn attack``."""

    attack: tyro.conf.OmitArgPrefixes[Attack]
    # A model folder, a shipped model's name, timm:NAME, timm:NAME@FILE.safetensors, FILE.onnx, or module:function that returns a torch
    # classifier. timm's normalisation is put inside, or :mean=R,G,B:std=R,G,B at the end; an ONNX file must hold its own.
    model: str | None = None
    data: str = "digits"  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path | None = None  # the run folder is OUT/NAME; default: a folder of its own for every combination of settings
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    samples: int = 100  # how many test images to attack
    target: str | None = None  # next, random, least-likely, runner-up, or one class by name or number; default: any wrong class
    evade: Literal["selective", "orthogonal", "joint"] | None = None  # stay below the model's detector too, with these gradients
    evaluate: EvaluateConfig = EvaluateConfig(keep_examples=1000)
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Attack one model."""
    names = ", ".join(ATTACKS)
    if list(args) in (["-h"], ["--help"]):
        print(
            "usage: amsdn attack NAME [--FIELD VALUE ...] [--model DIR] [--data DATA]\n\n"
            f"Attacks: {names}\n\nExample: {EXAMPLE}\nEach attack explains its fields: amsdn attack pgd --help"
        )
        return
    name, rest = split_attack(args)
    description = f"Run {name} and keep the attacked images.\n\nExample: {EXAMPLE.replace('sparse-autoattack --k 20', name)}"
    options = parse(AttackOptions(attack=ATTACKS[name]()), rest, f"attack {name}", description)
    positive(options.samples, "--samples")
    budget = float(options.attack.threat.budget)
    if not math.isfinite(budget):
        raise InputError("an unlimited budget cannot be put into a report; give a finite one, or call the attack from Python")
    workers = Workers.of_environment()
    shards = workers.shards(WHOLE)
    device = pick_device(options.device)
    model_name = options.model or default_model(DEFAULT)
    model = open_model(model_name, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, model_name)
    attack = _with_goal(options, dataset.classes)
    attack.threat.sample(dataset.test.fetch(torch.tensor([0]))[0])  # raises where the threat does not fit the images
    measured = Measured(model, model_name, dataset, _folder(replace(options, model=model_name), name), device)
    for shard in shards:
        rows = measure(
            measured,
            {name: attack},
            options.evaluate,
            options.samples,
            {attack.threat.family: budget},
            shard=shard,
            progress=workers.first,
        )
    if not workers.first:
        return
    print(terminal_table({"this model": measured.out}))
    print(_effort([r for r in rows if r.attack == name], {r.sample_id for r in rows if r.family == "clean" and r.correct}, attack))
    print(f"attacked images: {measured.out / 'examples' / f'{name}.npz'} (clean, adversarial: float32 [N,3,H,W])")


def split_attack(args: Sequence[str]) -> tuple[str, list[str]]:
    """The attack's name, given first or by ``--attack NAME``, and the other words with ``--attack.field`` as ``--field``.

    Raises InputError where no attack, or an unknown one, is named.
    """
    words = [word.replace("--attack.", "--", 1) if word.startswith("--attack.") else word for word in args]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--attack=") else [word])]
    name = None
    if "--attack" in words:
        at = words.index("--attack")
        name = words[at + 1] if at + 1 < len(words) else None
        del words[at : at + 2]
    elif words and not words[0].startswith("-"):
        name = words.pop(0)
    if name is None:
        raise InputError(f"name an attack; choose one of {', '.join(ATTACKS)}")
    if name not in ATTACKS:
        raise InputError(f"unknown attack {name!r}; choose one of {', '.join(ATTACKS)}")
    return name, words


def _folder(options: AttackOptions, name: str) -> Path:
    """The run folder: the same command finds its own results again, another one does not meet them."""
    if options.out is not None:
        return options.out / name
    return Path("checkpoints/attack") / f"{name}-{config_hash(replace(options, device='auto'))[:6]}"


def _with_goal(options: AttackOptions, classes: Sequence[str]) -> Attack:
    """The attack with what ``--target`` and ``--evade`` ask for around it."""
    attack = options.attack
    if options.target is not None:
        chosen = options.target if options.target in CHOICES else find_class(options.target, classes, also=tuple(CHOICES))
        attack = Targeted(attack, towards=cast("Choice | int", chosen))
    return attack if options.evade is None else EvadeDetector(attack, gradients=options.evade)


def _effort(records: Sequence[EvalRecord], right: set[int], attack: Attack) -> str:
    """What was spent on the images that were right before the attack, and how often the attack reached its goal."""
    inside = attack.attack if isinstance(attack, EvadeDetector) else attack
    target = inside.towards if isinstance(inside, Targeted) else None
    tried = [r for r in records if r.sample_id in right and r.label != target]  # nothing is wanted of images of the target class
    if not tried:
        return f"threat {attack.threat.describe()}; no image was attacked: each was wrong before, or of the target class"
    forwards, backwards = (sum(getattr(r, f) for r in tried) / len(tried) for f in ("forwards", "backwards"))
    wrong, reached = sum(not r.correct for r in tried), sum(bool(r.success) for r in tried)
    own = f" ({reached} reached the attack's own goal)" if reached != wrong or isinstance(attack, Wrapper) else ""
    return (
        f"threat {attack.threat.describe()}; {len(tried)} images attacked, {wrong} fooled{own}; largest budget used "
        f"{max(r.spent for r in tried):g}; {forwards:.3g} forward and {backwards:.3g} backward passes an image"
    )
