"""Stage two: adversarial training against patches and sparse pixels, every part of the defence at once.

The step is the one of ``amsdn.training.defence``: half of a batch stays clean (augmented), half is attacked, and a share may be
given to the views that certificates ask about. The first part of the run is clean.

``amsdn train`` or ``python -m amsdn.training.adversarial_train`` runs it.
"""

from dataclasses import dataclass, field

from amsdn.attacks import PatchPGD, SparsePGD
from amsdn.errors import InputError
from amsdn.training.attack_ranges import TrainingAttack
from amsdn.training.defence import DefenceConfig, DefenceStage, check_shares


def default_attacks() -> tuple[TrainingAttack, ...]:
    """Patches of two sizes and many pixels, with the few steps that training can afford."""
    return (
        PatchPGD(size=5, num_steps=4, alpha=0.25, stop_when_fooled=False),
        PatchPGD(size=8, num_steps=4, alpha=0.25, stop_when_fooled=False),
        SparsePGD(k=30, num_steps=4, stop_when_fooled=False),
    )


@dataclass(frozen=True)
class AdversarialTrainConfig(DefenceConfig):
    """Stage two. Without attacks it is plain supervised training, which makes the undefended control."""

    attacks: tuple[TrainingAttack, ...] = field(default_factory=default_attacks)
    clean_start: float = 0.15  # share of the run before the first attack, when gradients mean nothing yet

    def __post_init__(self) -> None:
        if self.attacks and self.attacked_share + self.views.share > 1 + 1e-9:
            raise InputError(
                f"train: attacked_share {self.attacked_share} and the views' shares {self.views.share:g} exceed the batch; make them smaller"
            )
        if not 0 < self.attacked_share <= 1 or not 0 <= self.clean_start <= 1:
            raise InputError(
                f"train: attacked_share must lie in (0, 1] and clean_start in [0, 1], got {self.attacked_share} and {self.clean_start}"
            )
        if self.attacks:
            check_shares(self, "train")
        super().__post_init__()


class AdversarialTraining(DefenceStage):
    """Clean at first, then one attack a batch."""

    name = "train"

    def __init__(self, config: AdversarialTrainConfig, images: int | None = None) -> None:
        super().__init__(config, images)
        self.clean_start = config.clean_start

    def attacks_at(self, progress: float) -> bool:
        return bool(self.config.attacks) and progress >= self.clean_start


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
