"""``amsdn train``: stage two."""

from collections.abc import Sequence

from amsdn.commands.training import TrainOptions, run_command


def run(args: Sequence[str]) -> None:
    """Adversarial training."""
    run_command(
        "train",
        "pretrain",
        lambda recipe, out: TrainOptions(data=recipe.data, out=out, model=recipe.model, stage=recipe.train),
        args,
        "Stage two: adversarial training against patches and sparse pixels.",
    )
