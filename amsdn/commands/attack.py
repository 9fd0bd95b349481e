"""``amsdn attack``: one attack against one model, keeping the attacked images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from amsdn.attacks import Attack
from amsdn.attacks.registry import ATTACKS
from amsdn.commands.common import check_classes, open_data, open_model
from amsdn.commands.measuring import Measured, measure
from amsdn.commands.options import parse, positive
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.report import terminal_table
from amsdn.recipes import DEFAULT
from amsdn.records import EvalRecord
from amsdn.threats import ThreatModel
from amsdn.utils.helpers import pick_device


@dataclass(frozen=True)
class AttackOptions:
    """Options of ``amsdn attack``."""

    attack: Attack
    model: str = f"checkpoints/{DEFAULT}/finetune/model"  # a model folder, or module:function that returns a torch classifier
    data: str = "digits"  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path = Path("checkpoints/attack")  # the run folder
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    samples: int = 100  # how many test images to attack
    evaluate: EvaluateConfig = EvaluateConfig()
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Attack one model."""
    names = ", ".join(ATTACKS)
    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise InputError(f"name an attack first; choose one of {names}")
    if args[0] in ("-h", "--help"):
        print(f"usage: amsdn attack NAME [--attack.FIELD VALUE ...] [--model DIR] [--data DATA]\n\nAttacks: {names}\n\n"
              "Example: amsdn attack pgd --attack.epsilon 8/255 --model checkpoints/digits-demo/finetune/model --limit 50\n"
              "Each attack explains its fields: amsdn attack pgd --help")  # fmt: skip
        return
    name = args[0]
    if name not in ATTACKS:
        raise InputError(f"unknown attack {name!r}; choose one of {names}")
    default = AttackOptions(attack=ATTACKS[name]())
    description = f"Run {name} and keep the attacked images.\n\nExample: amsdn attack {name} --model checkpoints/digits-demo/finetune/model --limit 50"
    options = parse(default, args[1:], f"attack {name}", description)
    positive(options.samples, "--samples")
    device = pick_device(options.device)
    model = open_model(options.model, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, options.model)
    config = replace(options.evaluate, keep_examples=options.samples)
    measured = Measured(model, options.model, dataset, options.out / name, device)
    threat = options.attack.threat
    rows = measure(measured, {name: options.attack}, config, options.samples, {threat.family: float(threat.budget)})
    print(terminal_table({"this model": measured.out}))
    print(_effort([r for r in rows if r.attack == name], {r.sample_id for r in rows if r.family == "clean" and r.correct}, threat))
    print(f"attacked images: {measured.out / 'examples' / f'{name}.npz'} (clean, adversarial: float32 [N,3,H,W])")


def _effort(records: Sequence[EvalRecord], attacked: set[int], threat: ThreatModel) -> str:
    """What was spent on the images that were right before the attack."""
    tried = [r for r in records if r.sample_id in attacked]
    if not tried:
        return f"threat {threat.describe()}; every image was wrong without an attack, so none was attacked"
    forwards, backwards = (sum(getattr(r, f) for r in tried) / len(tried) for f in ("forwards", "backwards"))
    return (
        f"threat {threat.describe()}; {len(tried)} images attacked, {sum(not r.correct for r in tried)} fooled; largest budget used "
        f"{max(r.spent for r in tried):g}; {forwards:.0f} forward and {backwards:.0f} backward passes an image"
    )
