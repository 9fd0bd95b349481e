"""Whether our loop and the plain one do the same work: the same operations an image, the same budget, the same learning."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_machine import Marks, count_flops
from training_plain import LEARNING_RATE, WEIGHT_DECAY, Plain, batches, plain_loop
from training_steps import PGD10, Steps, Way, fresh, kinds, loop_config, run_steps

from amsdn.data import ArraySplit, Dataset
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import Recipe
from amsdn.utils.helpers import generator


def agreement(recipe: Recipe, model: AMSDNConfig, data: Dataset, seeds: int, steps: int, batch: int) -> dict[str, Any]:
    """Both loops in fp32 from the same weights for the same number of steps; what the two models then lose under PGD-10 on held-out images.

    Operations are counted over one step of each; the change of an image is the greatest that either loop's attack made.
    """
    assert isinstance(data.train, ArraySplit)
    runs = [_learn(recipe, model, data, seed, steps, batch) for seed in range(seeds)]
    before = [judge(fresh(model, data.train.device), data, seed) for seed in range(seeds)]
    work = work_per_image(recipe, model, data.train, batch)
    return {
        "data": data.name,
        "steps": steps,
        "batch": batch,
        "width": model.width,
        "runs": [{"before": b, **r} for b, r in zip(before, runs, strict=True)],
        "gflop_per_image": work,
    }


def work_per_image(recipe: Recipe, model: AMSDNConfig, split: ArraySplit, batch: int) -> dict[str, float]:
    """Counted operations for an image of one step, plain and ours, in units of 1e9."""
    config, device = kinds(recipe)["pgd-10"], split.device
    source: Iterator[tuple[Tensor, Tensor]] = batches(split, recipe.train.augment, batch, False, 0, 0)
    made = fresh(model, device)
    plain = count_flops(lambda: plain_loop(Plain(), made, source, 1, Marks(device), 0))
    loop = loop_config(Way(), Steps(batch, 0, 0), len(split), 0)
    ours = count_flops(lambda: run_steps(config, fresh(model, device), split, loop, Marks(device), True))
    return {"plain": plain / batch / 1e9, "ours": ours / batch / 1e9}


def judge(model: nn.Module, data: Dataset, seed: int) -> dict[str, float]:
    """Cross-entropy and accuracy on held-out images under the training's own attack, and the greatest change it made of a pixel value."""
    x, y = data.val.fetch(torch.arange(min(len(data.val), 200)))
    model.eval()
    x_adv = PGD10.craft(model, x, y, generator(x.device, "judge", seed))
    with torch.no_grad():
        logits = model(x_adv)
    return {
        "loss": float(F.cross_entropy(logits, y)),
        "accuracy": float((logits.argmax(1) == y).float().mean()),
        "change": float((x_adv - x).abs().max()),
    }


def _learn(recipe: Recipe, model: AMSDNConfig, data: Dataset, seed: int, steps: int, batch: int) -> dict[str, Any]:
    assert isinstance(data.train, ArraySplit)
    config, device = kinds(recipe)["pgd-10"], data.train.device
    theirs, ours = fresh(model, device), fresh(model, device)
    plain_loop(Plain(), theirs, batches(data.train, config.augment, batch, False, 0, seed), steps, Marks(device), seed)
    loop = loop_config(Way(), Steps(batch, steps - 1, 0), len(data.train), seed)
    assert (loop.learning_rate, loop.weight_decay) == (LEARNING_RATE, WEIGHT_DECAY), "the plain loop copies the loop's defaults"
    run_steps(config, ours, data.train, loop, Marks(device), True)
    return {"plain": judge(theirs, data, seed), "ours": judge(ours, data, seed)}
