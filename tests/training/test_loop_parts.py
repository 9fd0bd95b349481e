"""A step in parts: what is averaged and how, with whose randomness, and what happens when memory runs out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from together import LOOP, Net, Probe, forty_images
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput, train
from amsdn.training.memory import is_out_of_memory, unless_out_of_memory
from amsdn.training.parts import PartedGradient, Step
from amsdn.training.ranks import ALONE


class Quadratic(nn.Module):
    """A weight w, a count of passes and the mean of what passed, starting at infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("limit", torch.tensor(torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            self.mean += 0.5 * (x.detach().mean() - self.mean)
        return self.weight * x.flatten(1).mean(1)


class Simple(Stage):
    """The mean of w times each image's mean: its gradient is the images' mean."""

    name = "simple"

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.restored = 0

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        self.batches.append(batch)
        loss = model(batch.x).mean()
        metrics = {"mean": loss.detach()} | ({"large": torch.tensor(8.0)} if len(batch.x) > 3 else {})
        return StepOutput(loss, metrics, {"index": batch.index}, self.restore)

    def restore(self) -> None:
        self.restored += 1


def parted(config: LoopConfig = LOOP) -> tuple[PartedGradient, Quadratic, Simple]:
    stage, model = Simple(), Quadratic()
    return PartedGradient(stage, model, nn.ModuleDict(), model, forty_images(), config), model, stage


STEP = Step(7, torch.randperm(40, generator=torch.Generator().manual_seed(5))[:10], 0.25)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_every_image_weighs_the_same_however_the_batch_is_cut(parts: int) -> None:
    gradient, model, stage = parted()
    sums = gradient.compute(STEP, parts, range(parts))
    assert (int(model.passes), float(model.mean)) == (0, 0.0), "the buffers have moved before all agree"
    gradient.combine(sums, gradient.used(), ALONE, equal=True)
    x = forty_images().fetch(STEP.images)[0]
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, x.mean().reshape(1))
    torch.testing.assert_close(sums.loss, 2 * x.mean())
    torch.testing.assert_close(model.mean, 0.5 * x.mean())  # each part starts from the step's own buffers
    assert int(model.passes) == 1
    assert float(model.limit) == torch.inf
    assert sums.average(ALONE) == pytest.approx({"mean": 2 * float(x.mean())} | ({"large": 8.0} if parts < 4 else {}))
    assert torch.equal(torch.cat([m["index"] for m in sums.memories]), STEP.images)
    assert stage.restored == parts


def test_parts_differ_in_their_randomness_but_not_in_the_hosts_choices() -> None:
    draws = []
    for seed in (0, 1):
        gradient, _, stage = parted(replace(LOOP, seed=seed))
        gradient.compute(STEP, 2, range(2))
        gradient.compute(replace(STEP, number=8), 2, range(2))
        gradient.compute(STEP, 2, [1])
        draws.append([(float(torch.rand((), generator=b.generator)), float(torch.rand((), generator=b.host))) for b in stage.batches])
    first, second = draws[0][:2]
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert draws[0][4] == second, "a part's randomness depends on what was computed before it"
    assert len({own for drawn in draws for own, _ in drawn[:4]}) == 8, "the same randomness in two steps or seeds"
    assert len({host for drawn in draws for _, host in drawn[:4]}) == 4


def test_the_global_generator_too_is_a_parts_own() -> None:
    seen: list[float] = []

    class Listening(Simple):
        def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
            seen.append(float(torch.rand(())))
            return super().step(model, teacher, batch)

    model = Quadratic()
    gradient = PartedGradient(Listening(), model, nn.ModuleDict(), model, forty_images(), LOOP)
    for mine in ([0, 1], [1], [0]):
        gradient.compute(STEP, 2, mine)
    assert seen == [seen[0], seen[1], seen[1], seen[0]]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("failing", ["in the step", "in the backward pass"])
def test_a_part_that_fails_leaves_nothing_behind(failing: str) -> None:
    gradient, model, stage = parted()

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no room")

    def step(model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        output = Simple.step(stage, model, teacher, batch)
        if len(stage.batches) == 2:
            if failing == "in the step":
                raise torch.OutOfMemoryError("no room")
            output.loss = Failing.apply(output.loss)
        return output

    stage.step = step  # type: ignore[method-assign]
    assert unless_out_of_memory(lambda: gradient.compute(STEP, 2, range(2))) is None
    assert model.weight.grad is None
    assert (int(model.passes), float(model.mean)) == (0, 0.0)
    assert stage.restored == (1 if failing == "in the step" else 2), "weights moved for the step are not put back"


def holding(most: int, error: Callable[[int], BaseException], first: int = 0) -> Callable[[int, Batch], None]:
    """Memory for ``most`` images, from step ``first`` on."""

    def before(step: int, batch: Batch) -> None:
        if step >= first and len(batch.x) > most:
            raise error(len(batch.x))

    return before


ERRORS = {
    "cuda": lambda n: torch.OutOfMemoryError(f"CUDA out of memory for {n}"),
    "cpu": lambda n: RuntimeError(
        f"[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate {n}"
    ),
    "python": lambda n: MemoryError(n),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_run_short_of_memory_ends_as_one_begun_in_that_many_parts(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, roomy = Net(), Net()
    stage = Probe(holding(3, ERRORS[kind]))
    ended = train(stage, short, forty_images(), LOOP, tmp_path / "short")
    assert "probe: out of memory at 10 images at once: going on with 2 parts of 5, the same 10 images a step" in capsys.readouterr().err
    expected = train(Probe(), roomy, forty_images(), replace(LOOP, parts=4), tmp_path / "roomy")
    for mine, theirs in ((short, roomy), (ended.model, expected.model)):
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ended.steps == 8
    assert len(stage.seen) == 2 + 8 * 4, "one try each in 1 and 2 parts, then 4 parts a step"


def test_the_number_of_parts_is_part_of_the_state(tmp_path: Path) -> None:
    whole = Net()
    train(Probe(holding(5, ERRORS["cuda"], first=2)), whole, forty_images(), LOOP, tmp_path / "whole")

    def dying(step: int, batch: Batch) -> None:
        holding(5, ERRORS["cuda"], first=2)(step, batch)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Probe(dying), Net(), forty_images(), LOOP, tmp_path / "cut")
    rest, stage = Net(), Probe()  # memory is plentiful again: the run goes on as it was all the same
    train(stage, rest, forty_images(), LOOP, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(rest.state_dict().values(), whole.state_dict().values(), strict=True))
    assert [len(step) for step in stage.remembered] == [1, 1] + [2] * 6


def test_a_batch_that_cannot_be_cut_further_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^probe: out of memory at 3 images at once, and fewer make no batch; use a smaller model"
    ) as error:
        train(Probe(holding(1, ERRORS["cuda"])), Net(), forty_images(), LOOP, tmp_path)
    assert "\n" not in str(error.value)
    assert error.value.__context__ is None, "the error holds on to the step that failed"
    with pytest.raises(InputError, match=r"loop\.parts cannot be 6"):
        replace(LOOP, parts=6)
    with pytest.raises(InputError, match="4 images a step cannot be cut into 3 parts"):
        train(Probe(), Net(), forty_images().subset(torch.arange(4)), replace(LOOP, parts=3), tmp_path)


def test_what_failed_is_freed_before_the_next_try() -> None:
    import weakref

    held: list[weakref.ref[nn.Module]] = []

    def compute() -> None:
        big = nn.Linear(1, 1)  # stands for the graph: a local of a frame in the traceback
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError

    assert unless_out_of_memory(compute) is None
    assert held[0]() is None


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
    with pytest.raises(RuntimeError, match="shapes"):
        unless_out_of_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_cpu_memory_that_is_really_not_there_is_recognised() -> None:
    assert unless_out_of_memory(lambda: torch.empty(2**60)) is None
