"""``amsdn pretrain``: stage one."""

from collections.abc import Sequence

from amsdn.commands.training import PretrainOptions, run_command


def run(args: Sequence[str]) -> None:
    """Pretrain without labels."""
    run_command(
        "pretrain",
        None,
        lambda recipe, out: PretrainOptions(data=recipe.data, out=out, model=recipe.model, stage=recipe.pretrain),
        args,
        "Stage one: self-supervised robustness pretraining (SSRT). No labels are used.",
    )
