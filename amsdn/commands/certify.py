"""``amsdn certify``: certificates against l2 changes, patches and few pixels, each cross-checked by attacks on what it certifies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amsdn.commands.certifying import Certifying, certify
from amsdn.commands.common import check_classes, default_model, open_data, open_model, read_json
from amsdn.commands.measuring import Measured
from amsdn.commands.options import parse, positive, recipe_help, split_recipe
from amsdn.commands.ranks import Workers
from amsdn.errors import InputError
from amsdn.evaluation.certification import RECORDS
from amsdn.evaluation.crosscheck import RESULT
from amsdn.evaluation.headline import describe_certified
from amsdn.evaluation.shards import Shard
from amsdn.evaluation.smoothing_attack import RecheckConfig
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.evaluation.statistics import share
from amsdn.evaluation.summary import headline_radii, summarise_certificates
from amsdn.recipes import Recipe
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.recipes.recipe import METHODS, Method
from amsdn.records import CertRecord
from amsdn.utils.helpers import pick_device


@dataclass(frozen=True)
class CertifyOptions:
    """Options of ``amsdn certify``."""

    data: str  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path  # the run folder; that of amsdn evaluate, if one report is to show both
    # A model folder, a shipped model's name, timm:NAME, timm:NAME@FILE.safetensors, FILE.onnx, or module:function that returns a torch
    # classifier. timm's normalisation is put inside, or :mean=R,G,B:std=R,G,B at the end; an ONNX file must hold its own.
    model: str | None = None
    certificates: tuple[Method, ...] = METHODS  # any of l2, patch, l0
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    samples: int | None = None  # how many test images to certify
    shard: str = "1/1"  # i/n: certify every n-th image from the i-th; when all n are done, run once more without it
    smoothing: SmoothingConfig = SmoothingConfig()
    patch: PatchDefence = PatchDefence()
    pixels: PixelDefence = PixelDefence()
    recheck: RecheckConfig = RecheckConfig()  # attacks on the smoothed classifier
    attacks: DefenceAttacks = DefenceAttacks()  # attacks on the other two certified classifiers
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Certify one model."""
    recipe, rest = split_recipe(args)
    description = (
        "Certify a classifier: smoothed against l2 changes (Cohen et al. 2019), under double masking against patches (Xiang et al. 2022), by votes\n"
        "over disjoint pixels against few of them (Hammoudeh and Lowd 2024); and attack what was certified.\n\n"
        f"Example: amsdn certify {recipe.name} --certificates patch l0 --patch.size 5 --samples 50\n\n{recipe_help()}"
    )
    options = parse(_defaults(recipe), rest, f"certify {recipe.name}", description)
    positive(options.samples, "--samples")
    workers = Workers.of_environment()
    shards = workers.shards(Shard.parse(options.shard))
    if not options.certificates:
        raise InputError(f"--certificates: name at least one of {', '.join(METHODS)}")
    device = pick_device(options.device)
    name = options.model or default_model(recipe.name)
    model = open_model(name, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, name)
    measured = Measured(model, name, dataset, options.out, device)
    how = Certifying(options.smoothing, options.recheck, options.patch, options.pixels, options.attacks)
    for shard in shards:
        certificates = certify(measured, options.certificates, how, options.samples, shard, progress=workers.first)
        if shard.whole:
            print(f"{_table(certificates)}\nmodel: {name}")
            print(f"rows: {options.out / RECORDS}; cross-check: {options.out / RESULT}, {_checked(options.out / RESULT)}")
        elif workers.count == 1:
            print(
                f"{_table(certificates)}\nshard {shard} is done; when all are, the same command without --shard attacks what was certified"
            )


def _defaults(recipe: Recipe) -> CertifyOptions:
    root = Path("checkpoints") / recipe.name
    return CertifyOptions(
        data=recipe.data,
        out=root / "evaluation",
        certificates=recipe.certificates,
        samples=recipe.certified_samples,
        smoothing=recipe.smoothing,
        patch=recipe.patch,
        pixels=recipe.pixels,
        recheck=recipe.recheck,
        attacks=recipe.defence_attacks,
    )


def _table(certificates: Sequence[CertRecord]) -> str:
    """Certified accuracy by certificate and radius, with its price."""
    lines = []
    for kind, found in summarise_certificates(certificates, {}).items():
        lines.append(
            f"{kind}: {found['samples']} images, {found['mean_samples']:.0f} passes and {found['mean_seconds']:.2g} s an image on average"
        )
        rows = [c for c in certificates if c.certificate == kind]
        if kind != "l2":  # whose answers abstain where nothing is certified
            lines.append(f"  {'right, certified or not':<28} {share([c.correct for c in rows])}")
        for radius in headline_radii(kind, found["largest"]):
            proved = share([c.correct and c.radius >= radius for c in rows])
            lines.append(f"  certified {describe_certified(kind, radius, found['largest']):<18} {proved}")
    return "\n".join(lines)


def _checked(path: Path) -> str:
    """What the cross-check found, over all kinds that the folder holds; those of earlier calls may hold violations."""
    kinds = read_json(path)["certificates"]
    broken = ", ".join(f"{found['violations']} for {kind}" for kind, found in kinds.items() if found["violations"])
    tried = ", ".join(f"{found['checks']} for {kind}" for kind, found in kinds.items())
    return f"{f'VIOLATIONS OF AN EARLIER CALL ({broken})' if broken else 'no violation'}; attacked images inside certified radii: {tried}"
