"""The peer libraries' attacks behind one signature, so that the benchmark and the tests run them as their users would.

Each is ``(model, x [B,3,H,W], y [B], **settings) -> x_adv [B,3,H,W]``, registered under a family and a library. The
settings of a family are the same for every library; where a library cannot express one, the adapter says so. The
whole batch is one batch everywhere. ``run_peer`` seeds the global generators that all of these draw from.
"""

import importlib.util
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Peer = Callable[..., Tensor]
PEERS: dict[tuple[str, str], Peer] = {}
MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "art": "art", "secml-torch": "secmlt"}  # library -> module
PACKAGES = {**{n: n for n in MODULES}, "art": "adversarial-robustness-toolbox"}  # library -> package


def installed(library: str) -> bool:
    """Whether the library can be imported here."""
    return importlib.util.find_spec(MODULES[library]) is not None


def libraries(family: str) -> list[str]:
    """The libraries that have an attack of the family, installed or not."""
    return [library for name, library in PEERS if name == family]


def run_peer(family: str, library: str, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, **settings: Any) -> Tensor:
    """The library's attack on a copy of x; reproducible, and silent about deprecations that are not ours to fix."""
    with quietly(seed):
        return PEERS[family, library](model, x.clone(), y.clone(), **settings).detach().float()


@contextmanager
def quietly(seed: int) -> Iterator[None]:
    """Seeds the global generators that the libraries draw from, and leaves their warnings out."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the libraries draw from the global generator
    random.seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _peer(family: str, library: str) -> Callable[[Peer], Peer]:
    def register(function: Peer) -> Peer:
        PEERS[family, library] = function
        return function

    return register


# torchattacks 3.5


@_peer("fgsm", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    from torchattacks import FGSM

    return FGSM(model, eps=epsilon)(x, y)


@_peer("pgd", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from torchattacks import PGD

    return PGD(model, eps=epsilon, alpha=alpha, steps=num_steps)(x, y)


@_peer("pgd-l2", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from torchattacks import PGDL2

    return PGDL2(model, eps=epsilon, alpha=alpha, steps=num_steps)(x, y)


@_peer("mi-fgsm", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from torchattacks import MIFGSM

    return MIFGSM(model, eps=epsilon, alpha=alpha, steps=num_steps)(x, y)


@_peer("apgd-ce", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int, norm: str = "Linf") -> Tensor:
    from torchattacks import APGD

    return APGD(model, norm=norm, eps=epsilon, steps=num_steps)(x, y)


@_peer("apgd-t", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int, norm: str = "Linf", n_targets: int = 9) -> Tensor:
    from torchattacks import APGDT

    return APGDT(model, norm=norm, eps=epsilon, steps=num_steps, n_classes=n_targets + 1)(x, y)


@_peer("fab", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int, norm: str = "Linf") -> Tensor:
    from torchattacks import FAB

    return FAB(model, norm=norm, eps=epsilon, steps=num_steps)(x, y)


@_peer("fab-t", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int, norm: str = "Linf") -> Tensor:
    from torchattacks import FAB

    return FAB(model, norm=norm, eps=epsilon, steps=num_steps, multi_targeted=True)(x, y)


@_peer("square", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_queries: int, norm: str = "Linf") -> Tensor:
    from torchattacks import Square

    return Square(model, norm=norm, eps=epsilon, n_queries=num_queries)(x, y)


@_peer("autoattack", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int, num_queries: int) -> Tensor:
    """Its AutoAttack leaves APGD and FAB at 10 steps, where the paper takes 100: the same cascade at the given budget."""
    from torchattacks import APGD, APGDT, FAB, MultiAttack, Square

    steps = {"eps": epsilon, "steps": num_steps}
    parts = [
        APGD(model, **steps),
        APGDT(model, **steps),
        FAB(model, **steps, multi_targeted=True),
        Square(model, eps=epsilon, n_queries=num_queries),
    ]
    return MultiAttack(parts)(x, y)


@_peer("cw", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, searches: int, initial_const: float, learning_rate: float) -> Tensor:
    """Without a search over the constant: it takes the middle of the searched range and all the steps at once."""
    from torchattacks import CW

    return CW(model, c=1, steps=num_steps * searches, lr=learning_rate)(x, y)


@_peer("deepfool", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, overshoot: float) -> Tensor:
    from torchattacks import DeepFool

    return DeepFool(model, steps=num_steps, overshoot=overshoot)(x, y)


@_peer("few-pixel", "torchattacks")
def _(model: nn.Module, x: Tensor, y: Tensor, *, k: int, population: int, num_steps: int) -> Tensor:
    """Its population is a multiple of the 5 k searched numbers, so it is rounded down to one."""
    from torchattacks import OnePixel

    return OnePixel(model, pixels=k, steps=num_steps, popsize=population)(x, y)


# foolbox 3.3


def _foolbox(model: nn.Module, x: Tensor, y: Tensor, attack: Any, epsilon: float | None) -> Tensor:
    import foolbox

    return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=epsilon)[1]  # type: ignore[no-any-return]


@_peer("fgsm", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    from foolbox.attacks import FGSM

    return _foolbox(model, x, y, FGSM(), epsilon)


@_peer("pgd", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from foolbox.attacks import LinfPGD

    return _foolbox(model, x, y, LinfPGD(abs_stepsize=alpha, steps=num_steps), epsilon)


@_peer("pgd-l2", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from foolbox.attacks import L2PGD

    return _foolbox(model, x, y, L2PGD(abs_stepsize=alpha, steps=num_steps), epsilon)


@_peer("pgd-l1", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from foolbox.attacks.sparse_l1_descent_attack import SparseL1DescentAttack

    return _foolbox(model, x, y, SparseL1DescentAttack(abs_stepsize=alpha, steps=num_steps, random_start=True), epsilon)


@_peer("mi-fgsm", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from foolbox.attacks.mi_fgsm import LinfMomentumIterativeFastGradientMethod

    return _foolbox(model, x, y, LinfMomentumIterativeFastGradientMethod(abs_stepsize=alpha, steps=num_steps), epsilon)


@_peer("cw", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, searches: int, initial_const: float, learning_rate: float) -> Tensor:
    from foolbox.attacks import L2CarliniWagnerAttack

    attack = L2CarliniWagnerAttack(searches, num_steps, stepsize=learning_rate, initial_const=initial_const)
    return _foolbox(model, x, y, attack, None)


@_peer("deepfool", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, overshoot: float) -> Tensor:
    from foolbox.attacks import L2DeepFoolAttack

    return _foolbox(model, x, y, L2DeepFoolAttack(steps=num_steps, overshoot=overshoot), None)


@_peer("l0", "foolbox")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int) -> Tensor:
    """FMN counts channel values, not pixels."""
    from foolbox.attacks import L0FMNAttack

    return _foolbox(model, x, y, L0FMNAttack(steps=num_steps), None)


# ART 1.20: NumPy in and out


def _art(model: nn.Module, x: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    kind = "gpu" if x.is_cuda else "cpu"
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=kind)


def _art_run(attack: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(attack.generate(x.cpu().numpy(), y.cpu().numpy()))).to(x)


@_peer("fgsm", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    from art.attacks.evasion import FastGradientMethod

    return _art_run(FastGradientMethod(_art(model, x), eps=epsilon, batch_size=len(x)), x, y)


@_peer("pgd", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    kind = {"eps": epsilon, "eps_step": alpha, "max_iter": num_steps, "num_random_init": 1, "batch_size": len(x), "verbose": False}
    return _art_run(ProjectedGradientDescentPyTorch(_art(model, x), norm=np.inf, **kind), x, y)


@_peer("pgd-l2", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    kind = {"eps": epsilon, "eps_step": alpha, "max_iter": num_steps, "num_random_init": 1, "batch_size": len(x), "verbose": False}
    return _art_run(ProjectedGradientDescentPyTorch(_art(model, x), norm=2, **kind), x, y)


@_peer("pgd-l1", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    kind = {"eps": epsilon, "eps_step": alpha, "max_iter": num_steps, "num_random_init": 1, "batch_size": len(x), "verbose": False}
    return _art_run(ProjectedGradientDescentPyTorch(_art(model, x), norm=1, **kind), x, y)


@_peer("mi-fgsm", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    from art.attacks.evasion import MomentumIterativeMethod

    kind = {"eps": epsilon, "eps_step": alpha, "max_iter": num_steps, "batch_size": len(x), "verbose": False}
    return _art_run(MomentumIterativeMethod(_art(model, x), **kind), x, y)


@_peer("apgd-ce", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_steps: int, norm: str = "Linf") -> Tensor:
    from art.attacks.evasion import AutoProjectedGradientDescent

    kind = {"eps": epsilon, "eps_step": 2 * epsilon, "max_iter": num_steps, "nb_random_init": 1, "batch_size": len(x), "verbose": False}
    p = np.inf if norm == "Linf" else 2
    return _art_run(AutoProjectedGradientDescent(_art(model, x), norm=p, loss_type="cross_entropy", **kind), x, y)


@_peer("square", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, num_queries: int, norm: str = "Linf") -> Tensor:
    from art.attacks.evasion import SquareAttack

    kind = {"eps": epsilon, "max_iter": num_queries, "p_init": 0.8, "nb_restarts": 1, "batch_size": len(x), "verbose": False}
    return _art_run(SquareAttack(_art(model, x), norm=np.inf if norm == "Linf" else 2, **kind), x, y)


@_peer("cw", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, searches: int, initial_const: float, learning_rate: float) -> Tensor:
    from art.attacks.evasion import CarliniL2Method

    kind = {"binary_search_steps": searches, "max_iter": num_steps, "initial_const": initial_const, "learning_rate": learning_rate}
    return _art_run(CarliniL2Method(_art(model, x), **kind, batch_size=len(x), verbose=False), x, y)


@_peer("deepfool", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int, overshoot: float) -> Tensor:
    from art.attacks.evasion import DeepFool

    return _art_run(DeepFool(_art(model, x), max_iter=num_steps, epsilon=overshoot, batch_size=len(x), verbose=False), x, y)


@_peer("few-pixel", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, k: int, population: int, num_steps: int) -> Tensor:
    """Its population is fixed at 400 (max(1, 400 // (5 k)) x 5 k members)."""
    from art.attacks.evasion import PixelAttack

    return _art_run(PixelAttack(_art(model, x), th=k, es=1, max_iter=num_steps), x, y)


@_peer("patch", "art")
def _(model: nn.Module, x: Tensor, y: Tensor, *, size: int, step: float, num_steps: int) -> Tensor:
    """Its patch is universal: one run for each image makes it a per-image patch, at the centre, where the user puts it."""
    from art.attacks.evasion import AdversarialPatchPyTorch

    classifier, corner, out = _art(model, x), (x.shape[2] - size) // 2, []
    for image, label in zip(x, y, strict=True):
        attack = AdversarialPatchPyTorch(
            classifier,
            rotation_max=0.0,
            scale_min=0.99,
            scale_max=1.0,
            learning_rate=step,
            max_iter=num_steps,
            batch_size=1,
            patch_shape=(3, size, size),
            patch_location=(corner, corner),
            patch_type="square",
            optimizer="pgd",
            targeted=False,
            verbose=False,
        )
        patch, _ = attack.generate(image[None].cpu().numpy(), label[None].cpu().numpy())
        shown = image.clone()
        shown[:, corner : corner + size, corner : corner + size] = torch.from_numpy(patch).to(x).clamp(0, 1)
        out.append(shown)
    return torch.stack(out)


# secml-torch 1.5: its C&W and DeepFool are foolbox's, so only what it writes itself stands here


def _secml(model: nn.Module, x: Tensor, y: Tensor, attack: Any) -> Tensor:
    from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
    from torch.utils.data import DataLoader, TensorDataset

    batches = attack(BasePyTorchClassifier(model), DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return torch.cat([batch for batch, _ in batches])


def _secml_pgd(norm: str, epsilon: float, alpha: float, num_steps: int) -> Any:
    from secmlt.adv.backends import Backends
    from secmlt.adv.evasion.pgd import PGD

    return PGD(norm, epsilon, num_steps, alpha, random_start=True, backend=Backends.NATIVE)


@_peer("pgd", "secml-torch")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    return _secml(model, x, y, _secml_pgd("linf", epsilon, alpha, num_steps))


@_peer("pgd-l2", "secml-torch")
def _(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, alpha: float, num_steps: int) -> Tensor:
    return _secml(model, x, y, _secml_pgd("l2", epsilon, alpha, num_steps))


@_peer("l0", "secml-torch")
def _(model: nn.Module, x: Tensor, y: Tensor, *, num_steps: int) -> Tensor:
    """FMN counts channel values, not pixels."""
    from secmlt.adv.backends import Backends
    from secmlt.adv.evasion.fmn import FMN

    return _secml(model, x, y, FMN("l0", num_steps, step_size=1.0, backend=Backends.NATIVE))
