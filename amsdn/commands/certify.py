"""``amsdn certify``: certified l2 robustness by randomized smoothing, cross-checked by attacks on the smoothed classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amsdn.commands.common import check_classes, open_data, open_model
from amsdn.commands.measuring import Measured, certify
from amsdn.commands.options import parse, positive, recipe_help, split_recipe
from amsdn.evaluation.certification import SmoothingConfig
from amsdn.evaluation.crosscheck import RecheckConfig
from amsdn.evaluation.statistics import share
from amsdn.recipes import Recipe
from amsdn.records import CertRecord
from amsdn.utils.helpers import pick_device

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class CertifyOptions:
    """Options of ``amsdn certify``."""

    model: str  # a model folder, or module:function that returns a torch classifier
    data: str  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path  # the run folder; that of amsdn evaluate, if one report is to show both
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    samples: int | None = None  # how many test images to certify
    smoothing: SmoothingConfig = SmoothingConfig()
    recheck: RecheckConfig = RecheckConfig()
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Certify one model."""
    recipe, rest = split_recipe(args)
    description = (
        "Certify the Gaussian-smoothed classifier (Cohen et al. 2019) and attack what was certified.\n\n"
        f"Example: amsdn certify {recipe.name} --smoothing.sigma 1/4 --samples 50\n\n{recipe_help()}"
    )
    options = parse(_defaults(recipe), rest, f"certify {recipe.name}", description)
    positive(options.samples, "--samples")
    device = pick_device(options.device)
    model = open_model(options.model, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, options.model)
    measured = Measured(model, options.model, dataset, options.out, device)
    certificates = certify(measured, options.smoothing, options.samples, options.recheck)
    print(_table(certificates, options.smoothing))
    print(f"rows: {options.out / 'cert.jsonl'}; cross-check: {options.out / 'crosscheck.json'}, no violation")


def _defaults(recipe: Recipe) -> CertifyOptions:
    root = Path("checkpoints") / recipe.name
    return CertifyOptions(
        model=str(root / "finetune" / "model"),
        data=recipe.data,
        out=root / "evaluation",
        samples=recipe.certified_samples,
        smoothing=recipe.smoothing,
        recheck=recipe.recheck,
    )


def _table(certificates: Sequence[CertRecord], config: SmoothingConfig) -> str:
    lines = [f"certified accuracy of the smoothed classifier, sigma {config.sigma:g}, {len(certificates)} images:"]
    for radius in RADII:
        lines.append(f"  l2 radius {radius:<4g}  {share([c.correct and c.radius >= radius for c in certificates])}")
    return "\n".join(lines)
