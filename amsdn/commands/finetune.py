"""``amsdn finetune``: stage three."""

from collections.abc import Sequence

from amsdn.commands.training import FinetuneOptions, run_command


def run(args: Sequence[str]) -> None:
    """Fine-tuning against several attacks."""
    run_command(
        "finetune",
        "train",
        lambda recipe, out: FinetuneOptions(data=recipe.data, out=out, model=recipe.model, stage=recipe.finetune),
        args,
        "Stage three: fine-tuning against several attacks, drawn in proportion to the model's running error.",
    )
