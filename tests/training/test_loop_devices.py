"""What depends on the device and the precision: nobody waits for a GPU, perturbations stay float32, compiling changes no names."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from together import LOOP, Net, Probe, forty_images
from torch import Tensor, nn

from amsdn.attacks import Attack, PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.training.ema import EMA
from amsdn.training.history import Journal
from amsdn.training.loop import Batch, Stage, StepOutput, train
from amsdn.training.ranks import ALONE
from amsdn.training.run import Run, compile_backbones
from amsdn.training.settings import make_optimizer

ATTACKS: tuple[Attack, ...] = (
    PGDAttack(epsilon=4 / 255, alpha=2 / 255, num_steps=2, stop_when_fooled=False),
    PGDL2Attack(epsilon=0.5, alpha=0.25, num_steps=2, stop_when_fooled=False),
    PatchPGD(size=4, num_steps=2, alpha=0.25, stop_when_fooled=False),
    SparsePGD(k=6, num_steps=2, stop_when_fooled=False),
)


class Attacked(Stage):
    """A stage that keeps what its attack returned."""

    name = "attacked"

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.logits: Tensor | None = None

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        x_adv = self.attack.craft(model.eval(), batch.x, batch.y, batch.generator)
        self.pairs.append((x_adv, batch.x))
        return StepOutput(nn.functional.cross_entropy(model.train()(x_adv).float(), batch.y), {})


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)
def test_in_mixed_precision_an_attacked_image_is_float32_and_in_its_threat(attack: Attack, tiny_model: AMSDN, tmp_path: Path) -> None:
    stage = Attacked(attack)
    train(stage, tiny_model, forty_images(), replace(LOOP, epochs=0.25, mixed_precision=True), tmp_path)
    ((x_adv, x),) = stage.pairs
    assert x_adv.dtype == x.dtype == torch.float32
    assert attack.threat.contains(x_adv, x).all()
    assert not torch.equal(x_adv, x)
    assert not torch.equal(x_adv, x_adv.bfloat16().float()), "the images went through bfloat16"


def test_the_network_itself_runs_in_bfloat16_where_asked(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    class Watching(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(self.body(x).dtype)
            return super().forward(x)

    for mixed in (True, False):
        seen.clear()
        train(Probe(), Watching(), forty_images(), replace(LOOP, epochs=0.25, mixed_precision=mixed), tmp_path / str(mixed))
        assert seen == {torch.bfloat16 if mixed else torch.float32}


def test_compiling_keeps_names_and_leaves_the_average_a_copy(tiny_config: AMSDNConfig) -> None:
    """In place: no wrapper, so that what is saved can be loaded without it. Nothing is compiled before it is called."""
    model = AMSDN.from_config(tiny_config)
    names = list(model.state_dict())
    ema = EMA(model, 0.5)
    compile_backbones(model, ema.model)
    assert list(model.state_dict()) == list(ema.model.state_dict()) == names
    assert model.backbone._compiled_call_impl is not None
    assert ema.model.backbone._compiled_call_impl is not None
    assert EMA(model, 0.5).model.backbone._compiled_call_impl is None
    ema.update(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_run_ends_as_an_eager_one_up_to_rounding(tmp_path: Path) -> None:
    """A model without a backbone is compiled whole. Compiled dropout draws other numbers, so the network here has none."""
    ended = []
    for compiled in (False, True):
        loop = replace(LOOP, epochs=0.5, optimizer="sgd", compile=compiled)
        model = Net()
        model.head[0] = nn.Identity()
        ended.append(train(Probe(), model, forty_images(), loop, tmp_path / str(compiled)).model.state_dict())
    torch.testing.assert_close(ended[1], ended[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_on_a_gpu_waits_for_nothing(optimizer: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    stage = Probe()
    stage.step = asynchronous.__get__(stage)  # type: ignore[method-assign]
    loop = replace(LOOP, optimizer=optimizer, log_every=1000, checkpoint_every_s=1e9)
    run = Run(stage, Net().to(device), forty_images().to(device), loop, tmp_path, "settings", ALONE)
    for warm_up, step in zip(range(4), run.steps(), strict=False):
        torch.cuda.set_sync_debug_mode("error" if warm_up >= 2 else "default")
        try:
            sums, _ = run.gradient(step, [])
            run.update(sums)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.step == 4
    with Journal("probe", tmp_path, 0, 8, writes=False) as journal:
        run.save(journal)


def asynchronous(self: Probe, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
    """A step of a stage that looks at nothing on the host."""
    loss = nn.functional.cross_entropy(model(batch.x), batch.y)
    choice = torch.rand((), generator=batch.host)
    return StepOutput(loss, {"cross_entropy": loss.detach()}, {"index": batch.index, "choice": choice})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_on_a_gpu_the_optimizer_is_fused(optimizer: str) -> None:
    loop = replace(LOOP, optimizer=optimizer)
    assert make_optimizer(loop, list(Net().cuda().parameters())).defaults["fused"]
    assert not make_optimizer(loop, list(Net().parameters())).defaults["fused"]
