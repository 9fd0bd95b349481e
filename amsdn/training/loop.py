"""The one training loop. A stage is a configuration, a step and its loss; everything else happens here.

Each step's data order and randomness are functions of (seed, stage, step, part), so a run that was killed at any moment and
started again ends with the weights of an undisturbed run, bit for bit on one CPU. A batch may be computed in several parts, by
one process or by many (``torchrun``): the same samples, the same result up to rounding (see ``parts`` and ``ranks``). Where
memory runs out, a batch is cut into more parts and the run goes on with the same images a step (see ``memory``).
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from torch import nn

from amsdn.data import Split
from amsdn.records import config_hash
from amsdn.training.divergence import TrainingDiverged
from amsdn.training.history import Journal
from amsdn.training.ranks import ALONE, ProcessGone, Ranks
from amsdn.training.run import Run
from amsdn.training.settings import LoopConfig, schedule
from amsdn.training.signals import Interrupted, watch_signals
from amsdn.training.stage import Batch, Stage, StepOutput

__all__ = [
    "Batch",
    "Interrupted",
    "LoopConfig",
    "ProcessGone",
    "Stage",
    "StepOutput",
    "Trained",
    "TrainingDiverged",
    "schedule",
    "train",
]


@dataclass(frozen=True)
class Trained:
    """What a run ended with: the averaged model in eval mode, and what it took, summed over all legs of a resumed run."""

    model: nn.Module
    seconds: float  # of training that led to the result; steps that a kill took back are not counted
    steps: int
    images: int  # seen in all, repetitions counted


def train(
    stage: Stage, model: nn.Module, split: Split, config: LoopConfig, folder: Path, *, settings: Any = None, ranks: Ranks = ALONE
) -> Trained:
    """Train ``model`` in place on ``split``, resuming from ``folder`` if a run was cut short there.

    Returns the same averaged model in every one of ``ranks``. ``settings`` is whatever else shapes the result; a state made
    under other settings is refused. Raises TrainingDiverged, Interrupted, ProcessGone, and InputError for unusable input.
    """
    run = Run(stage, model, split, config, folder, config_hash(stage.name, config.shaping(), settings, len(split)), ranks)
    with closing(run), watch_signals() as caught, Journal(stage.name, folder, run.step, run.total, writes=ranks.first) as journal:
        for step in run.steps():
            sums, agreed = run.gradient(step, caught)
            norm = run.update(sums)
            run.log(sums, norm, journal)
            if agreed.save or agreed.stop_signal:
                run.save(journal)
            if agreed.stop_signal:
                raise Interrupted(
                    f"{stage.name}: stopped by {Signals(agreed.stop_signal).name} after step {run.step} of {run.total}; "
                    "start the same command again to go on",
                    agreed.stop_signal,
                )
        run.save(journal)
    return Trained(run.ema.model, run.seconds(), run.step, run.step * run.batch_size)
