"""Stage one: self-supervised robustness training (SSRT). No labels are used.

An averaged teacher embeds every clean image of the batch; the student must recognise each image, from
another augmentation and under attack, among all of them (InfoNCE, van den Oord et al. 2018, with a teacher
that follows as in He et al. 2020, MoCo). The adversary attacks exactly that recognition: "which image is
this" is a classifier over the batch, so every attack of the suite works on it unchanged, gradients passing
through the whole defence. Where the attack changed the image is known, so the anomaly maps learn too.

``amsdn pretrain`` or ``python -m amsdn.training.pretrain_ssrt`` runs it.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.attacks import PatchPGD, SparsePGD
from amsdn.data.augment import Augment
from amsdn.models.amsdn import AMSDN
from amsdn.threats import changed_pixels
from amsdn.training.attack_mix import attack_of, draw
from amsdn.training.attack_ranges import TrainingAttack
from amsdn.training.defence import craft, detector_terms
from amsdn.training.objectives import accuracy, instance_logits
from amsdn.training.settings import LoopConfig
from amsdn.training.stage import Batch, Stage, StepOutput


def default_attacks() -> tuple[TrainingAttack, ...]:
    """One cheap patch and one cheap sparse attack."""
    return (
        PatchPGD(size=8, num_steps=2, alpha=0.5, stop_when_fooled=False),
        SparsePGD(k=30, num_steps=2, stop_when_fooled=False),
    )


@dataclass(frozen=True)
class PretrainConfig:
    """Stage one."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=2))
    augment: Augment = field(default_factory=Augment)
    attacks: tuple[TrainingAttack, ...] = field(default_factory=default_attacks)
    temperature: float = 0.2
    projection: int = 64  # dimensions in which images are compared
    anomaly_map: float = 0.5
    detection: float = 0.2


class InstanceClassifier(nn.Module):
    """Which of the batch's images is this? Images [B,3,H,W] -> similarity to each of the bank's N, [B,N]."""

    def __init__(self, model: AMSDN, projector: nn.Module, bank: Tensor, temperature: float) -> None:
        super().__init__()
        self.model, self.projector, self.bank, self.temperature = model, projector, bank, temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.recognise(self.model.trace(x).embedding)

    def recognise(self, embedding: Tensor) -> Tensor:
        return instance_logits(self.projector(embedding), self.bank, self.temperature)


class SSRT(Stage):
    """Self-supervised robustness training."""

    name = "pretrain"

    def __init__(self, config: PretrainConfig, model: AMSDN) -> None:
        self.config = config
        width = model.classifier.in_features
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.projection))

    def extra_modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"projector": self.projector})

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        assert isinstance(model, AMSDN)
        assert isinstance(teacher, AMSDN)
        config, generator = self.config, batch.generator
        with torch.no_grad():
            bank = self.projector(teacher.trace(config.augment(batch.x, generator)).embedding)
        recognition = InstanceClassifier(model, self.projector, bank, config.temperature)
        x, instance = config.augment(batch.x, generator), torch.arange(len(batch.x), device=batch.x.device)
        attack = attack_of(config.attacks[draw([1.0] * len(config.attacks), batch.host)], batch.host)
        half = len(x) // 2
        x_adv = craft(recognition, attack, x[:half], instance[:half], generator)
        trace = model.trace(torch.cat([x_adv, x[half:]]))
        logits = recognition.recognise(trace.embedding)
        terms = {"info_nce": F.cross_entropy(logits, instance)}
        loss = terms["info_nce"]
        for name, term in detector_terms(trace, attack, changed_pixels(x_adv, x[:half])).items():
            terms[name] = term
            loss = loss + getattr(config, name) * term
        metrics = {name: value.detach() for name, value in terms.items()}
        metrics |= {"accuracy_attacked": accuracy(logits[:half], instance[:half]), "accuracy": accuracy(logits[half:], instance[half:])}
        return StepOutput(loss, metrics)


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
