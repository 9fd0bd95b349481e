"""``amsdn predict``: classify image files, say whether they look attacked, and draw where."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from amsdn.commands.common import default_model, read_about
from amsdn.commands.options import parse
from amsdn.errors import InputError
from amsdn.evaluation.certifier import Sample
from amsdn.evaluation.figures import heat_overlay
from amsdn.evaluation.patch_certificate import PatchCertifier
from amsdn.models.amsdn import AMSDN
from amsdn.models.shipped import PREFERRED, shipped_models
from amsdn.models.storage import load_model
from amsdn.recipes import DEFAULT
from amsdn.recipes.defences import PatchDefence
from amsdn.utils.helpers import pick_device
from amsdn.utils.images import read_image, save_image


@dataclass(frozen=True)
class PredictOptions:
    """Options of ``amsdn predict``."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # image files
    model: str | None = None  # a folder that a training stage wrote, or a shipped model's name; default: see above
    out: Path = Path("predictions")  # where the heat maps go
    patch: int | None = None  # also answer under double masking, and say whether any patch of this side could change that answer
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Predict every image; nothing is written before all of them have been read."""
    description = (
        "Classify image files and draw where they look attacked.\n\nExample: amsdn predict photo.png --model checkpoints/digits-demo/finetune/model\n\n"
        f"Shipped models: {', '.join(shipped_models()) or 'none in this installation'}. Without --model: what {DEFAULT} trained last under "
        f"checkpoints/, else {PREFERRED}."
    )
    options = parse(PredictOptions(), args, "predict", description)
    if not options.images:
        raise InputError("no image given; name at least one file, for instance amsdn predict photo.png --model DIR")
    device = pick_device(options.device)
    name = options.model or default_model(DEFAULT, instead=PREFERRED)
    model = load_model(name, device)
    classes, image_size = read_about(name)
    images = torch.stack([read_image(path, image_size, rgb_only=True) for path in options.images]).to(device)
    if options.model is None:
        print(f"model: {name}")
    proved = _certified(model, images, classes, options.patch)
    with torch.no_grad():
        analysis = model.analyze(images)
    for index, path in enumerate(options.images):
        heat = _draw(model, images[index], analysis.anomaly_map[index], options.out / f"{index:03d}-{path.stem}-heat.png")
        confidence, label = analysis.logits[index].float().softmax(0).max(0)
        print(f"{path}: {classes[int(label)]}, confidence {float(confidence):.1%}, {_verdict(model, analysis, index)}{proved[index]}{heat}")


def _certified(model: AMSDN, images: Tensor, classes: Sequence[str], size: int | None) -> list[str]:
    """For each image, the certified classifier's answer and whether one patch of this side could change it; nothing without a size."""
    if size is None:
        return [""] * len(images)
    certifier = PatchCertifier(PatchDefence(size).around(model))
    said = [""] * len(images)
    for i, claims in certifier.certify(Sample(i, image) for i, image in enumerate(images)):
        claim = claims["patch"]
        proof = f"no {size}x{size} patch can change that" if claim.radius else f"a {size}x{size} patch might change that"
        said[i] = f"; under double masking {classes[claim.prediction]}, {proof}"
    return said


def _verdict(model: AMSDN, analysis: object, index: int) -> str:
    if not model.has_detector:
        return "no detector in this model"
    score, detected = float(analysis.anomaly_score[index]), bool(analysis.detected[index])  # type: ignore[attr-defined]
    decision = "LOOKS ATTACKED" if detected else "looks clean"
    return f"anomaly score {score:.3f} (flagged above {float(model.detection_threshold):.3f}), {decision}"


def _draw(model: AMSDN, image: Tensor, anomaly_map: Tensor, path: Path) -> str:
    if not model.has_detector:
        return ""
    overlay = heat_overlay(image.permute(1, 2, 0).cpu().numpy(), anomaly_map[0].cpu().numpy())
    save_image(torch.from_numpy(overlay).permute(2, 0, 1), path)
    return f", heat map {path}"
