"""Properties of every attack on random images, budgets and models: the output stays in the threat model, whatever happens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amsdn import attacks as a
from amsdn.attacks import (
    DLR,
    FGSM,
    Attack,
    Cascade,
    CrossEntropy,
    Margin,
    PatchPGD,
    PatchRS,
    PGDAttack,
    PGDL2Attack,
    RandomNoise,
    Restarts,
    SparsePGD,
    SparseRS,
)
from amsdn.threats import L2Ball, LinfBall, PatchRegion, SparsePixels

quick = settings(max_examples=12, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
epsilons = st.floats(1e-3, 0.6)
counts = st.integers(1, 40)
sides = st.integers(1, 5)
losses = st.sampled_from([CrossEntropy(), Margin(), DLR()])
moves = st.sampled_from(["random", "full", "never"])
steps = st.integers(1, 5)

STRATEGIES: dict[str, st.SearchStrategy[Attack]] = {
    "fgsm": st.builds(FGSM, epsilons, losses),
    "pgd": st.builds(PGDAttack, epsilons, epsilons, steps, st.booleans(), losses),
    "pgd-l2": st.builds(PGDL2Attack, st.floats(1e-2, 5), st.floats(1e-2, 5), steps, st.booleans(), losses),
    "patch-pgd": st.builds(PatchPGD, sides, steps, epsilons, moves, st.integers(1, 2), st.integers(1, 7), st.integers(1, 3), losses),
    "patch-rs": st.builds(PatchRS, sides, st.integers(1, 25)),
    "sparse-pgd": st.builds(SparsePGD, counts, steps, st.booleans(), epsilons, epsilons, st.integers(1, 3), losses),
    "sparse-rs": st.builds(SparseRS, counts, st.integers(1, 25)),
    "noise": st.builds(
        RandomNoise, st.one_of(st.builds(LinfBall, epsilons), st.builds(L2Ball, epsilons), counts.map(SparsePixels), sides.map(PatchRegion))
    ),
    "n-fgsm": st.builds(a.NFGSM, epsilons),
    "mi-fgsm": st.builds(a.MIFGSM, epsilons, epsilons, steps),
    "pgd-l1": st.builds(a.PGDL1Attack, st.floats(1e-2, 60), st.floats(1e-2, 20), steps),
    "apgd": st.builds(a.APGDAttack, epsilons, st.integers(1, 12), losses),
    "apgd-l2": st.builds(a.APGDL2Attack, st.floats(1e-2, 5), st.integers(1, 12), losses),
    "apgd-l1": st.builds(a.APGDL1Attack, st.floats(1e-2, 60), st.integers(1, 12), losses),
    "apgd-t": st.builds(a.APGDTargetedAttack, epsilons, steps),
    "cw-l2": st.builds(lambda eps: a.CWL2(eps, 5, 2), st.floats(1e-2, 5)),
    "deepfool": st.builds(a.DeepFool, st.floats(1e-2, 5), steps),
    "fab": st.builds(a.FABAttack, epsilons, steps),
    "fab-l2": st.builds(a.FABL2Attack, st.floats(1e-2, 5), steps),
    "fab-l1-t": st.builds(a.FABTargetedL1Attack, st.floats(1e-2, 60), steps),
    "square": st.builds(a.SquareAttack, epsilons, st.integers(1, 25)),
    "square-l2": st.builds(a.SquareL2Attack, st.floats(1e-2, 5), st.integers(1, 25)),
    "patch-pgd-raced": st.builds(lambda size, n, count: PatchPGD.racing(size, n, count=count), sides, st.integers(1, 9), st.integers(1, 3)),
    "patch-rs-rectangles": st.builds(lambda h, w, n: PatchRS((h, w), 25, count=n), sides, sides, st.integers(1, 3)),
    "lavan": st.builds(a.LaVAN, sides, steps),
    "sparse-rs-guided": st.builds(a.GuidedSparseRS, counts, st.integers(1, 25)),
    "sigma-zero": st.builds(a.SigmaZero, counts, steps),
    "few-pixel": st.builds(lambda k, n: a.FewPixelDE(k, 8, n), st.integers(1, 4), steps),
    "restarts": st.builds(lambda k: Restarts(SparsePGD(k, 2), 2), counts),
    "cascade": st.builds(lambda size: Cascade((PatchPGD(size, 2), PatchRS(size, 5))), sides),
}


class Rough(nn.Module):
    """A random nonlinear classifier, badly scaled on purpose; ``poison`` makes its gradients or logits misbehave."""

    def __init__(self, pixels: int, seed: int, scale: float, poison: str) -> None:
        super().__init__()
        self.w = scale * torch.randn(3 * pixels, 4, generator=torch.Generator().manual_seed(seed))
        self.poison = poison
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = (x - 0.5).flatten(1) @ self.w
        if self.poison == "gradient":
            z = z + (x[:, :1, 0, 0] - 0.5).clamp(min=0).sqrt()  # infinite slope at the kink
        if self.poison == "nan":
            z = torch.where(x[:, :1, 0, 0] > 0.5, torch.nan, z)
        if self.poison == "flat":
            z = z.round()
        return z


@pytest.mark.parametrize("name", STRATEGIES)
@quick
@given(
    st.data(),
    seeds,
    st.integers(1, 4),
    st.sampled_from([(5, 5), (6, 9)]),
    st.sampled_from([1e-8, 1.0, 1e4]),
    st.sampled_from(["none", "gradient", "nan", "flat"]),
    st.booleans(),
)
def test_output_lies_in_the_threat_model(
    name: str, data: st.DataObject, seed: int, batch: int, shape: tuple[int, int], scale: float, poison: str, stop: bool
) -> None:
    attack = replace(data.draw(STRATEGIES[name]), stop_when_fooled=stop)
    generator = torch.Generator().manual_seed(seed)
    x = (1.2 * torch.rand(batch, 3, *shape, generator=generator) - 0.1).clamp(0, 1)  # some values on the walls
    model = Rough(shape[0] * shape[1], seed, scale, poison)
    y = torch.randint(4, (batch,), generator=generator)
    before = x.clone()
    result = attack(model, x, y, generator=generator)
    assert attack.threat.contains(result.x_adv, x).all()
    assert torch.equal(x, before)
    assert (result.forwards >= 1).all()
    clean_wrong = model(x).argmax(1) != y
    assert (result.success >= clean_wrong).all()
    assert torch.equal(result.x_adv[clean_wrong], x[clean_wrong])
    crafted = attack.craft(model, x, y, generator)
    assert attack.threat.contains(crafted, x).all()
