"""The loop's promises: it learns, resumes exactly, refuses foreign states, stops on what is not finite and on signals."""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amsdn.data import ArraySplit
from amsdn.errors import InputError
from amsdn.training.checkpoint import STATE_FILE
from amsdn.training.loop import Batch, Interrupted, LoopConfig, Stage, StepOutput, TrainingDiverged, schedule, train

CONFIG = LoopConfig(epochs=3, batch_size=10, learning_rate=1e-2, mixed_precision=False, checkpoint_every_s=0)


class Plain(Stage):
    """Cross-entropy, with noise from both sources of randomness, a trained extra module and a memory."""

    name = "plain"

    def __init__(self, die_at: int | None = None, poison_at: int | None = None, signal_at: int | None = None) -> None:
        self.extra = nn.Linear(2, 2)
        nn.init.eye_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)
        self.seen = torch.zeros(2, dtype=torch.float64)
        self.steps, self.die_at, self.poison_at, self.signal_at = 0, die_at, poison_at, signal_at

    def extra_modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"extra": self.extra})

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        if self.steps == self.die_at:
            raise KeyboardInterrupt  # stands for a kill: nothing more is saved
        if self.steps == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        noise = torch.randn(batch.x.shape, generator=batch.generator) + torch.randn(batch.x.shape)
        seen = torch.bincount(batch.y, minlength=2)
        share = float((self.seen + seen)[0] / (self.seen + seen).sum())
        logits: Tensor = self.extra(model(batch.x + 0.01 * noise)) + 0.1 * teacher(batch.x) * share
        loss = nn.functional.cross_entropy(logits, batch.y)
        if self.steps == self.poison_at:
            loss = loss * math.nan
        self.steps += 1
        return StepOutput(loss, {"cross_entropy": loss.detach()}, memory={"seen": seen})

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        self.seen += torch.stack([m["seen"] for m in memories]).sum(0)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 2)
    )


def run(stage: Stage, split: ArraySplit, folder: Path, config: LoopConfig = CONFIG) -> dict[str, Tensor]:
    return train(stage, network(), split, config, folder).model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("die_at", [0, 1, 5, 11])
def test_a_run_killed_at_any_step_ends_bit_for_bit_as_an_undisturbed_one(
    die_at: int, optimizer: Any, tiny_split: ArraySplit, tmp_path: Path
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    undisturbed = run(Plain(), tiny_split, tmp_path / "a", config)
    with pytest.raises(KeyboardInterrupt):
        run(Plain(die_at=die_at), tiny_split, tmp_path / "b", config)
    resumed = Plain()
    assert same(run(resumed, tiny_split, tmp_path / "b", config), undisturbed)
    assert resumed.steps == 12 - die_at  # it really resumed, and did not start over
    assert float(resumed.seen.sum()) == 120


def test_rare_checkpoints_only_cost_repeated_steps(tiny_split: ArraySplit, tmp_path: Path) -> None:
    rare = replace(CONFIG, checkpoint_every_s=1e9)
    with pytest.raises(KeyboardInterrupt):
        run(Plain(die_at=7), tiny_split, tmp_path / "b", rare)
    assert same(run(Plain(), tiny_split, tmp_path / "b", rare), run(Plain(), tiny_split, tmp_path / "a"))


def test_a_finished_run_started_again_does_no_step_and_returns_the_same(tiny_split: ArraySplit, tmp_path: Path) -> None:
    first = run(Plain(), tiny_split, tmp_path)
    again = Plain()
    assert same(run(again, tiny_split, tmp_path), first)
    assert again.steps == 0


def test_every_epoch_sees_every_image_once(tiny_split: ArraySplit, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watch(Plain):
        def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
            seen.append(batch.x)
            return super().step(model, teacher, batch)

    run(Watch(), tiny_split, tmp_path, replace(CONFIG, epochs=1))
    images = torch.cat(seen).flatten(1)
    expected = tiny_split.fetch(torch.arange(40))[0].flatten(1)
    assert torch.equal(images[images[:, 0].argsort(stable=True)].sum(1).sort().values, expected.sum(1).sort().values)


def test_a_state_made_under_other_settings_is_refused(tiny_split: ArraySplit, tmp_path: Path) -> None:
    run(Plain(), tiny_split, tmp_path)
    with pytest.raises(InputError, match="made under other settings"):
        run(Plain(), tiny_split, tmp_path, replace(CONFIG, learning_rate=1e-3))
    run(Plain(), tiny_split, tmp_path, replace(CONFIG, checkpoint_every_s=5, log_every=3))  # these do not shape the result


@pytest.mark.parametrize("damage", ["truncate", "garbage", "pickle"])
def test_a_damaged_or_foreign_state_is_one_line(damage: str, tiny_split: ArraySplit, tmp_path: Path) -> None:
    run(Plain(), tiny_split, tmp_path)
    path = tmp_path / STATE_FILE
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint")
    else:
        path.write_bytes(b"cos\nsystem\n(S'touch /tmp/amsdn_pwned'\ntR.")
    with pytest.raises(InputError, match="delete it") as error:
        run(Plain(), tiny_split, tmp_path)
    assert "\n" not in str(error.value)
    assert not Path("/tmp/amsdn_pwned").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_cause_and_leaves_the_last_good_state(tiny_split: ArraySplit, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingDiverged, match=r"plain: not finite at step 4 of 12: cross_entropy|plain: not finite at step 4 of 12: the loss"
    ):
        run(Plain(poison_at=3), tiny_split, tmp_path / "b")
    assert same(run(Plain(), tiny_split, tmp_path / "b"), run(Plain(), tiny_split, tmp_path / "a"))


def test_sigterm_saves_and_says_how_to_go_on(tiny_split: ArraySplit, tmp_path: Path) -> None:
    rare = replace(CONFIG, checkpoint_every_s=1e9)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"SIGTERM after step 5 of 12.*go on") as stopped:
        run(Plain(signal_at=4), tiny_split, tmp_path / "b", rare)
    assert stopped.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    rest = Plain()
    assert same(run(rest, tiny_split, tmp_path / "b", rare), run(Plain(), tiny_split, tmp_path / "a"))
    assert rest.steps == 7


def test_it_learns_to_tell_dark_from_bright(tiny_split: ArraySplit, tmp_path: Path) -> None:
    model = train(Plain(), network(), tiny_split, replace(CONFIG, epochs=40, ema_decay=0.9), tmp_path).model
    x, y = tiny_split.fetch(torch.arange(40))
    assert (model(x).argmax(1) == y).all()


def test_mixed_precision_keeps_float32_weights(tiny_split: ArraySplit, tmp_path: Path) -> None:
    weights = run(Plain(), tiny_split, tmp_path, replace(CONFIG, mixed_precision=True))
    assert all(v.dtype == torch.float32 for v in weights.values() if v.is_floating_point())


def test_schedule_rises_to_one_and_falls_to_zero() -> None:
    values = [schedule(i / 100, 0.2) for i in range(101)]
    assert 0 < values[0] < 0.02
    assert abs(values[20] - 1) < 1e-9
    assert values[:21] == sorted(values[:21])
    assert values[20:] == sorted(values[20:], reverse=True)
    assert values[-1] < 1e-9


WRONG = [
    {"epochs": 0.0},
    {"epochs": math.nan},
    {"batch_size": 1},
    {"learning_rate": -1.0},
    {"learning_rate": math.inf},
    {"warmup": 1.0},
    {"clip_norm": 0.0},
    {"ema_decay": 2.0},
    {"log_every": 0},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_settings_that_cannot_train_are_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"loop.{next(iter(wrong))} cannot be"):
        replace(CONFIG, **wrong)


def test_a_single_image_is_nothing_to_train_on(tiny_split: ArraySplit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        train(Plain(), network(), tiny_split.subset(torch.tensor([0])), CONFIG, tmp_path)


def test_weights_that_are_not_finite_are_never_saved(tiny_split: ArraySplit, tmp_path: Path) -> None:
    class Bursting(Plain):
        """The last step's own loss is fine; the weights it leaves are not."""

        def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
            if self.steps == 11:
                with torch.no_grad():
                    next(model.buffers()).fill_(math.nan)
            return super().step(model, teacher, batch)

    with pytest.raises(TrainingDiverged, match="weights not finite after step 12 of 12"):
        run(Bursting(), tiny_split, tmp_path)
    assert run(Plain(), tiny_split, tmp_path)  # the last good state is still there


def test_tensorboard_curves_are_written_where_the_run_is(tiny_split: ArraySplit, tmp_path: Path) -> None:
    run(Plain(), tiny_split, tmp_path)
    assert list(tmp_path.glob("events.out.tfevents.*"))
