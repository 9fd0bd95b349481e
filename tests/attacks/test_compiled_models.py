"""Compiled models, and models on a GPU: the same attack, and few recompilations although the batch shrinks."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from attack_toys import images, small_net
from detector_toys import GREY, conflicting
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from amsdn.attacks import APGDAttack, Attack, EvadeDetector, PatchPGD, PGDAttack, Restarts, SparsePGD, SparseRS

ATTACKS = [
    PGDAttack(0.03, 0.005, 12),
    APGDAttack(0.03, 12),
    SparsePGD(5, 12),
    PatchPGD(4, 10, move="random"),
    SparseRS(6, 60),
    Restarts(PGDAttack(0.03, 0.01, 5), 2),
]
every_kind = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Shrinking(nn.Module):
    """Notes the batch sizes that it is called with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sizes = net, set[int]()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.add(len(x))
        return self.net(x)


@every_kind
def test_a_compiled_model_is_attacked_as_the_eager_one_and_compiled_a_few_times(attack: Attack) -> None:
    """At most six: with and without gradients, each for a first batch size, for any other, and for a single image."""
    net, x = small_net(), images(16)
    y = net(x).argmax(1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    eager = attack(net, x, y)
    seen = Shrinking(compiled)
    result = attack(seen, x, y)
    for field in ("x_adv", "success", "forwards", "backwards"):
        assert torch.equal(getattr(result, field), getattr(eager, field)), field
    assert len(seen.sizes) >= 2, "the batch is meant to shrink here"
    assert counter.frame_count <= 6
    first = counter.frame_count
    for _ in range(2):  # the weights' gradients are switched off and on for each attack, and the first size comes again
        attack(compiled, x, y)
    assert counter.frame_count == first
    assert all(p.requires_grad for p in net.parameters())


def test_whatever_sizes_the_batch_takes_nothing_is_compiled_anew() -> None:
    net, x = small_net(), images(16)
    y = net(x).argmax(1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter)
    for size in (16, 13, 9, 5, 3, 2, 1, 7, 11):
        PGDAttack(0.02, 0.005, 4)(compiled, x[:size], y[:size])
    assert counter.frame_count <= 6


def test_a_compiled_detector_is_evaded() -> None:
    model = conflicting()
    compiled = torch.compile(model, backend="aot_eager")
    y = torch.zeros(1, dtype=torch.int64)
    attack = EvadeDetector(PGDAttack(0.1, 0.01, 40, random_start=False))
    result = attack(compiled, GREY, y)
    assert result.success.all()
    assert torch.equal(result.x_adv, attack(model, GREY, y).x_adv)


def test_declarations_of_a_compiled_model_are_seen() -> None:
    class Random(nn.Module):
        stochastic = True

        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def differentiable_surrogate(self) -> nn.Module:
            return self.net

    x = images(2)
    model = torch.compile(Random().eval(), backend="aot_eager")
    result = PGDAttack(1e-4, 1e-5, 2, eot_samples=3)(model, x, model(x).argmax(1))
    assert set(result.backwards.tolist()) == {6}
    assert (result.forwards >= 25 + 2 * 2 * 3).all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    net, x = small_net(), images(8)
    y = net(x).argmax(1)
    compiled = torch.compile(net, dynamic=True)
    attack = PGDAttack(0.03, 0.005, 8)
    eager, result = attack(net, x, y), attack(compiled, x, y)
    assert torch.equal(result.prediction, net(result.x_adv).argmax(1))
    assert float((result.success != eager.success).float().mean()) <= 1 / 8  # fused kernels round otherwise
    assert attack.threat.contains(result.x_adv, x).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_kind
@pytest.mark.parametrize("kind", ["plain", "channels_last", "bfloat16", "compiled"])
def test_on_a_gpu(attack: Attack, kind: str) -> None:
    net, x = small_net().cuda(), images(16).cuda()
    y = net(x).argmax(1)
    model: nn.Module = net
    if kind == "channels_last":
        model, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    elif kind == "bfloat16":
        model = Autocast(net).eval()
        y = model(x).argmax(1)
    elif kind == "compiled":
        model = torch.compile(net)
    result = attack(model, x, y, generator=torch.Generator("cuda").manual_seed(0))
    again = attack(model, x, y, generator=torch.Generator("cuda").manual_seed(0))
    assert result.x_adv.dtype == torch.float32
    assert result.x_adv.device.type == "cuda"
    assert attack.threat.contains(result.x_adv, x).all()
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
    assert result.success.any()
    assert torch.equal(result.success, again.success)


class Autocast(nn.Module):
    """Computes in bfloat16, as evaluation on a GPU may."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x)
