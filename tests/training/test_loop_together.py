"""Processes that train together end as one process does in as many parts, whatever happens to one of them."""

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from together import LOOP, Net, Probe, forty_images, keep, kept, outcome, run_together
from torch import Tensor, nn

from amsdn.attacks import PatchPGD, SparsePGD
from amsdn.data import Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.finetune_attacks import FinetuneConfig, Finetuning
from amsdn.training.history import HISTORY_FILE, read_history
from amsdn.training.loop import Batch, Interrupted, LoopConfig, ProcessGone, Stage, StepOutput, TrainingDiverged, train
from amsdn.training.pretrain_ssrt import SSRT, PretrainConfig
from amsdn.training.ranks import ALONE, Ranks, joined
from amsdn.training.views import CertifiableViews, GreedyCutout

CPU = torch.device("cpu")
STAGES = replace(LOOP, epochs=1, optimizer="sgd")  # AdamW would enlarge the rounding of gradients that are zero, as of a bias before a norm
OURS = AMSDNConfig(num_classes=2, variant="compact", width=2, fpn_channels=8)
ATTACKS = (PatchPGD(size=4, num_steps=1, alpha=0.25, stop_when_fooled=False), SparsePGD(k=6, num_steps=1, stop_when_fooled=False))
AUGMENT = Augment(flip=True, shift=1)
VIEWS = CertifiableViews(noised=0.2, masked=0.2, consistency=2.0, cutouts=(GreedyCutout(4, 2, candidates=2),))


def three_stages(folder: Path, loop: LoopConfig, ranks: Ranks) -> dict[str, Any]:
    """Our own model through pretraining, adversarial training and fine-tuning."""
    torch.manual_seed(3)
    model = AMSDN.from_config(OURS)
    stages: list[Stage] = [
        SSRT(PretrainConfig(loop=loop, augment=AUGMENT, attacks=ATTACKS, projection=8), model),
        AdversarialTraining(AdversarialTrainConfig(loop=loop, augment=AUGMENT, attacks=ATTACKS, clean_start=0.3)),
        Finetuning(FinetuneConfig(loop=loop, augment=AUGMENT, attacks=ATTACKS, views=VIEWS)),
    ]
    found = {}
    for stage in stages:
        trained = train(stage, model, forty_images(), loop, folder / stage.name, ranks=ranks)
        found[stage.name] = {"average": trained.model.state_dict(), "weights": dict(model.state_dict()), "state": stage.state()}
        found[stage.name] = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, found[stage.name])
    return found


def probe(folder: Path, loop: LoopConfig, ranks: Ranks, before: Callable[[int, Batch], None] = lambda step, batch: None) -> dict[str, Any]:
    model, stage = Net(), Probe(before)
    return outcome(train(stage, model, forty_images(), loop, folder, ranks=ranks), model, stage)


def refusing(most: int, rank: int) -> Callable[[int, Batch], None]:
    """Memory that holds ``most`` images, in one process."""

    def before(step: int, batch: Batch) -> None:
        if len(batch.x) > most and int(os.environ["RANK"]) == rank:
            raise torch.OutOfMemoryError(f"no room for {len(batch.x)} images")

    return before


def at(step: int, rank: int, act: Callable[[], Any]) -> Callable[[int, Batch], None]:
    """Do something in one process at the start of one step."""

    def before(now: int, batch: Batch) -> None:
        if now == step and int(os.environ["RANK"]) == rank:
            act()

    return before


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (InputError, Interrupted, ProcessGone, TrainingDiverged) as e:
        return f"{type(e).__name__}: {e}"
    return "nothing raised"


def refuse_and_recover(folder: Path, ranks: Ranks) -> None:
    """What two processes refuse together, each with the same words."""
    rare = replace(LOOP, checkpoint_every_s=1e9)
    stopping = at(3, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    keep(folder, "stopped", error_of(lambda: probe(folder / "stopped", rare, ranks, stopping)))
    keep(folder, "apart", error_of(lambda: probe(folder / ("stopped" if ranks.first else "elsewhere"), rare, ranks)))
    keep(folder, "settings", error_of(lambda: probe(folder / "settings", replace(LOOP, seed=ranks.rank), ranks)))
    keep(folder, "few", error_of(lambda: probe(folder / "few", replace(LOOP, batch_size=2), ranks)))
    keep(folder, "nan", error_of(lambda: train(Poisoned(), Net(), forty_images(), LOOP, folder / "nan", ranks=ranks)))
    other = Net() if ranks.first else shifted()
    keep(folder, "weights", error_of(lambda: train(Probe(), other, forty_images(), LOOP, folder / "weights", ranks=ranks)))


def everything(folder: Path) -> None:
    """All that two processes can do together without dying, in one go."""
    with joined(CPU) as ranks:
        keep(folder, "stages", three_stages(folder / "stages", STAGES, ranks))
        keep(folder, "uneven", probe(folder / "uneven", replace(LOOP, parts=4), ranks))
        keep(folder, "memory", probe(folder / "memory", LOOP, ranks, refusing(3, rank=1)))
        refuse_and_recover(folder, ranks)


class Poisoned(Probe):
    """A loss that is not a number in the second process's fourth step."""

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        output = super().step(model, teacher, batch)
        if len(self.remembered) == 3 and os.environ["RANK"] == "1":
            output.loss = output.loss * torch.nan
            output.metrics["cross_entropy"] = output.loss.detach()
        return output


def shifted() -> Net:
    model = Net()
    with torch.no_grad():
        model.never += 1
    return model


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    assert run_together(everything, 2, folder) == [0, 0]
    return folder


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_our_model_ends_every_stage_as_in_one_process(two: Path, tmp_path: Path) -> None:
    alone = three_stages(tmp_path, replace(STAGES, parts=2), ALONE)
    first, second = (kept(two, "stages", rank) for rank in (0, 1))
    same(first, second)
    close(first, alone)
    assert set(alone) == {"pretrain", "train", "finetune"}
    assert any("running_mean" in name for name in alone["train"]["weights"]), "the model has no batch statistics to average"


def test_uneven_parts_and_weights_that_not_every_part_uses_come_out_alike(two: Path, tmp_path: Path) -> None:
    alone = probe(tmp_path, replace(LOOP, parts=4), ALONE)
    first, second = (kept(two, "uneven", rank) for rank in (0, 1))
    for name in ("average", "weights", "remembered"):
        same(first[name], second[name])
        close(first[name], alone[name])
    assert [[len(i) for i in step] for step in alone["remembered"]] == [[3, 3, 2, 2]] * 8
    seen = [torch.cat(step) for step in alone["remembered"]]
    same(torch.cat(seen), torch.cat(alone["seen"]))  # the parts cut the batch and nothing else
    of_both = [torch.cat(found["seen"]).sort().values for found in (first, second)]
    same(torch.cat(of_both).sort().values, torch.cat(seen).sort().values)  # each part is computed once, by one of them
    assert not torch.equal(alone["weights"]["sometimes"], torch.ones(2, 2))
    same(alone["weights"]["never"], torch.ones(2, 2))  # no gradient: not even weight decay moves it
    same(first["weights"]["never"], torch.ones(2, 2))


def test_the_logged_metrics_are_those_of_all_processes(two: Path, tmp_path: Path) -> None:
    probe(tmp_path, replace(LOOP, parts=4), ALONE)
    rows, expected = read_history(two / "uneven" / HISTORY_FILE), read_history(tmp_path / HISTORY_FILE)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted | {"seconds": row["seconds"]}, rel=1e-4)
    assert {"even", "odd"} <= set().union(*expected), "no metric that only some parts know"


def test_where_one_process_lacks_memory_all_cut_their_parts(two: Path, tmp_path: Path) -> None:
    alone = probe(tmp_path, replace(LOOP, parts=4), ALONE)
    first, second = (kept(two, "memory", rank) for rank in (0, 1))
    for name in ("average", "weights", "remembered"):
        same(first[name], second[name])
        close(first[name], alone[name])


def test_a_signal_to_one_process_stops_all_after_the_same_step(two: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        assert "Interrupted: probe: stopped by SIGTERM after step 4 of 8" in kept(two, "stopped", rank)
    rest = probe(two / "stopped", replace(LOOP, checkpoint_every_s=1e9), ALONE)  # two began it, one ends it
    close(rest["weights"], probe(tmp_path, replace(LOOP, parts=2), ALONE)["weights"])
    assert len(rest["seen"]) == 8, "four steps of two parts"


REFUSALS = {
    "apart": r"InputError: .*see different states \(after steps \[0, 4\]\); put --out where all see it",
    "settings": "InputError: probe: processes were given different settings",
    "few": "InputError: probe: 2 images a step cannot be cut into 2 parts",
    "weights": "InputError: probe: processes start from different weights",
    "nan": r"TrainingDiverged: probe: not finite at step 4 of 8: cross_entropy \(loss nan",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_all_processes_refuse_together(case: str, two: Path) -> None:
    for rank in (0, 1):
        assert re.match(REFUSALS[case], kept(two, case, rank))


def dying(folder: Path, step: int) -> None:
    with joined(CPU) as ranks:
        keep(
            folder, "gone", error_of(lambda: probe(folder / "run", LOOP, ranks, at(step, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))))
        )


@pytest.mark.parametrize("world", [2, 3])
def test_those_who_are_left_name_the_process_that_died_and_can_go_on(world: int, tmp_path: Path) -> None:
    codes = run_together(dying, world, tmp_path, 3)
    assert codes == [0, -signal.SIGKILL, 0][:world]
    for rank in {0, 2} & set(range(world)):
        message = kept(tmp_path, "gone", rank)
        assert message.startswith(f"ProcessGone: process 1 of {world} (counted from 0) is gone; start again, or use torchrun")
    rest = probe(tmp_path / "run", LOOP, ALONE)
    close(rest["weights"], probe(tmp_path / "whole", replace(LOOP, parts=world), ALONE)["weights"])
    assert len(rest["remembered"]) == 8
    assert len(rest["seen"]) == 5 * world
