"""TRADES: the cost by hand, the attack climbs the divergence, gradients reach both answers, and what cannot climb is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.attacks import FGSM, NFGSM, PatchPGD, PGDAttack, SparsePGD
from amsdn.attacks.losses import Goal
from amsdn.errors import InputError
from amsdn.training.attack_ranges import OneStepSparse, PatchSizes
from amsdn.training.self_adaptive import Targets
from amsdn.training.trades import Divergence, LabelEntropy, Trades


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int, rows: int = 4, classes: int = 3) -> Tensor:
    return torch.randn(rows, classes, generator=seeded(seed))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 36, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_trades_is_natural_cross_entropy_plus_beta_times_the_divergence_of_the_attacked_from_the_clean_answer() -> None:
    attacked, clean = logits(0), logits(1)
    targets = Targets(torch.arange(6), F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), 3).float())
    found = Trades(beta=6.0)(attacked, clean, targets, 2, 0.1)
    p, q = clean.softmax(1), attacked.softmax(1)
    torch.testing.assert_close(found.label, F.cross_entropy(clean, torch.tensor([2, 0, 1, 2]), label_smoothing=0.1, reduction="none"))
    torch.testing.assert_close(found.moved, 6 * (p * (p / q).log()).sum(1))


def test_the_default_is_cross_entropy_of_the_attacked_image_and_nothing_else() -> None:
    attacked = logits(0)
    targets = Targets(torch.arange(4), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float())
    found = LabelEntropy()(attacked, None, targets, 0, 0.1)
    torch.testing.assert_close(found.label, F.cross_entropy(attacked, torch.tensor([0, 1, 2, 0]), label_smoothing=0.1, reduction="none"))
    assert not found.moved.any()
    attack = PGDAttack()
    assert LabelEntropy().arm(attack, Small(), torch.rand(1, 3, 8, 8)) is attack


def test_gradients_reach_both_answers() -> None:
    attacked, clean = logits(0).requires_grad_(), logits(1).requires_grad_()
    targets = Targets(torch.arange(4), torch.full((4, 3), 1 / 3))
    cost = Trades()(attacked, clean, targets, 0, 0.0).moved.sum()
    first, second = torch.autograd.grad(cost, [attacked, clean])
    # d KL(p||q) / d logits: of q it is q - p, of p it is p (log p/q - KL); all times beta.
    p, q = clean.detach().softmax(1), attacked.detach().softmax(1)
    divergence = (p * (p / q).log()).sum(1, keepdim=True)
    torch.testing.assert_close(first, 6 * (q - p))
    torch.testing.assert_close(second, 6 * p * ((p / q).log() - divergence))


def test_the_attacks_loss_is_the_divergence_from_the_deployed_answer_and_climbing_it_beats_cross_entropy_at_it() -> None:
    model, x, y = Small().train(), torch.rand(12, 3, 8, 8, generator=seeded(3)), torch.arange(12) % 3
    attack = PGDAttack(epsilon=0.05, alpha=0.02, num_steps=8, stop_when_fooled=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    armed = Trades().arm(attack, model, x)
    assert isinstance(armed, PGDAttack)
    assert isinstance(armed.loss, Divergence)
    assert (armed.epsilon, armed.num_steps, armed.stop_when_fooled) == (0.05, 8, False)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "a look at the clean images moves no statistics"
    model.eval()
    with torch.no_grad():
        clean = model(x)
    assert torch.equal(armed.loss.reference, clean)
    assert not armed.loss.reference.requires_grad
    rise = []
    for each in (armed, attack):
        x_adv = each.craft(model, x, y, seeded(4))
        with torch.no_grad():
            rise.append(float(Divergence(clean)(model(x_adv), Goal(y)).mean()))
    assert rise[0] > rise[1] > 0


def test_sparse_trades_may_keep_the_attacks_own_loss() -> None:
    model, x = Small(), torch.rand(2, 3, 8, 8)
    attack = SparsePGD(4, 2, stop_when_fooled=False)
    own = Trades(climb_divergence=False)
    assert own.arm(attack, model, x) is attack
    armed = Trades().arm(OneStepSparse(4).draw(seeded()), model, x)
    assert armed.craft(model.eval(), x, torch.tensor([0, 1]), seeded()).shape == x.shape


def test_attacks_that_start_where_the_divergence_has_no_gradient_are_refused() -> None:
    for fine in (PGDAttack(), PatchPGD(4), SparsePGD(4), NFGSM(), PatchSizes(), OneStepSparse()):
        Trades().check(fine)
    for stuck in (FGSM(), PGDAttack(random_start=False)):
        with pytest.raises(InputError, match="objective: TRADES") as error:
            Trades().check(stuck)
        assert "\n" not in str(error.value)
        Trades(climb_divergence=False).check(stuck)
        LabelEntropy().check(stuck)
    with pytest.raises(InputError, match="objective: beta"):
        Trades(beta=0)


def test_the_divergence_refuses_a_batch_that_lost_samples() -> None:
    with pytest.raises(AssertionError, match="answers for"):
        Divergence(logits(0, 3))(logits(1, 2), Goal(torch.tensor([0, 1])))
