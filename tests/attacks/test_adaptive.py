"""BPDA and EOT: defences that only look robust fall, and random ones are not judged by one lucky draw."""

import pytest
import torch
from attack_toys import Linear, images
from torch import Tensor, nn

from amsdn.attacks import FGSM, NFGSM, PatchRS, PGDAttack, RandomNoise, Restarts, Victim
from amsdn.attacks.adaptive import bpda, expected_logits, vote_logits
from amsdn.attacks.base import RESCORE_DRAWS
from amsdn.threats import LinfBall


class Quantised(nn.Module):
    """A linear model behind rounding to 32 levels, whose gradient is zero everywhere. Its surrogate skips the rounding."""

    def __init__(self, honest: bool, straight_through: bool = False) -> None:
        super().__init__()
        self.net = Linear(bias=2.0)
        self.honest, self.straight_through = honest, straight_through
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 32).round() / 32)

    def differentiable_surrogate(self) -> nn.Module | None:
        if not self.honest:
            return None
        return StraightThrough(self) if self.straight_through else self.net


class StraightThrough(nn.Module):
    matches_forward = True

    def __init__(self, model: Quantised) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * 32).round() / 32
        return self.model.net(x + (rounded - x).detach())


def quantised_data() -> tuple[Tensor, Tensor]:
    x = images(8, 8, low=0.3, high=0.7)
    return x, Quantised(honest=False)(x).argmax(1)


def test_quantisation_stops_plain_pgd_and_bpda_breaks_it() -> None:
    x, y = quantised_data()
    attack = PGDAttack(0.1, 0.02, 10, random_start=False)
    plain = attack(Quantised(honest=False), x, y)
    assert not plain.success.any()
    assert torch.equal(plain.x_adv, x)
    assert attack(Quantised(honest=True), x, y).success.all()
    assert attack(Quantised(honest=True, straight_through=True), x, y).success.all()


def test_bpda_costs_a_second_forward_only_where_the_surrogate_differs() -> None:
    x, y = quantised_data()
    different = FGSM(0.1)(Quantised(honest=True), x, y)
    matching = FGSM(0.1)(Quantised(honest=True, straight_through=True), x, y)
    assert set(different.forwards.tolist()) == {3}
    assert set(matching.forwards.tolist()) == {2}
    assert set(different.backwards.tolist()) == set(matching.backwards.tolist()) == {1}


def test_bpda_has_the_models_value_to_the_bit_and_the_surrogates_gradient() -> None:
    model, (x, _) = Quantised(honest=True), quantised_data()
    leaf = x.requires_grad_(True)
    value = bpda(model, model.net)(leaf)
    assert torch.equal(value, model(x))
    (gradient,) = torch.autograd.grad(value[:, 0].sum(), leaf)
    torch.testing.assert_close(gradient, model.net.w.detach().expand_as(x))


def test_search_attacks_use_the_real_model_not_its_surrogate() -> None:
    class Wrong(Quantised):
        def differentiable_surrogate(self) -> nn.Module | None:
            raise_if_called = nn.Module()  # has no forward
            raise_if_called.matches_forward = True  # type: ignore[assignment]
            return raise_if_called

    x, y = quantised_data()
    assert PatchRS(4, 300)(Wrong(honest=True), x, y).success.all()


class Dropout(nn.Module):
    """A linear model that sees each value with probability 1/4, anew in every call."""

    def __init__(self, declared: bool) -> None:
        super().__init__()
        self.net, self.stochastic = Linear(size=16, bias=0.0), declared
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        seen = (torch.rand(x.shape) < 0.25) * 4.0
        return self.net(0.5 + (x - 0.5) * seen)


def test_eot_finds_what_one_draw_does_not() -> None:
    model = Dropout(declared=True)
    x = 0.5 + 0.05 * model.net.w.detach().sign().expand(8, -1, -1, -1)
    model.net.bias = -float(model.net(torch.full_like(x[:1], 0.5)).detach()[0, 0])  # the margin is now w.(x - 0.5)
    y = torch.zeros(8, dtype=torch.int64)
    one_draw = FGSM(0.09, eot_samples=1)(model, x, y)
    averaged = FGSM(0.09, eot_samples=24)(model, x, y)
    assert not one_draw.success.any()
    assert averaged.success.all()
    assert set(averaged.backwards.tolist()) == {24}


def test_parts_of_a_composite_keep_their_own_number_of_draws() -> None:
    x = images(2, 16, low=0.45, high=0.55)
    y = torch.zeros(2, dtype=torch.int64)
    model = Dropout(declared=True)
    model.net.bias = 500.0  # nobody fools this
    result = Restarts(NFGSM(0.01, eot_samples=3), 2, eot_samples=5)(model, x, y)
    assert result.backwards.tolist() == [6, 6]
    assert result.forwards.tolist() == [RESCORE_DRAWS + 2 * (3 + 5)] * 2


def test_undeclared_models_are_asked_once() -> None:
    x, y = quantised_data()
    assert set(FGSM(0.1, eot_samples=24)(Quantised(honest=False), x, y).backwards.tolist()) == {1}


class Coin(nn.Module):
    """Answers wrongly with probability ``wrong``, whatever the image."""

    stochastic = True

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        wrong = (torch.rand(len(x)) < self.wrong).long()
        return 10 * nn.functional.one_hot(wrong, 3).float() + 0 * x.flatten(1)[:, :3]


@pytest.mark.parametrize(("wrong", "success"), [(0.2, False), (0.85, True)])
def test_a_lucky_draw_is_no_success(wrong: float, success: bool) -> None:
    x, y = images(32, 8), torch.zeros(32, dtype=torch.int64)
    result = RandomNoise(LinfBall(0.1), 5, eot_samples=1)(Coin(wrong), x, y)
    assert (result.success == success).all()
    assert torch.equal(result.success, result.margin < 0)
    assert torch.equal(result.success, result.prediction != y)


def test_random_models_are_attacked_reproducibly_and_leave_global_randomness_alone() -> None:
    x, y = images(4, 16, low=0.45, high=0.55), torch.zeros(4, dtype=torch.int64)
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        runs.append(PGDAttack(num_steps=3, eot_samples=2)(Dropout(True), x, y, generator=torch.Generator().manual_seed(3)))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        state = torch.get_rng_state()
    assert torch.equal(runs[0].x_adv, runs[1].x_adv)
    assert torch.equal(runs[0].margin, runs[1].margin)


def test_expected_logits_are_the_log_of_the_mean_probability() -> None:
    draws = iter([torch.tensor([[0.0, 500.0]]), torch.tensor([[2.0, 0.0]])])
    value = expected_logits(lambda x: next(draws), torch.zeros(1), 2)
    p = (torch.tensor([[0.0, 1.0]]) + torch.tensor([[2.0, 0.0]]).softmax(1)) / 2
    torch.testing.assert_close(value, p.log())


def test_votes_decide_and_probability_breaks_ties() -> None:
    def vote(*answers: list[float]) -> list[float]:
        draws = iter(answers)
        return vote_logits(lambda x: torch.tensor([next(draws)]), torch.zeros(1), len(answers))[0].exp().tolist()

    close, sure = [0.1, 0.0], [0.0, 50.0]
    shares = vote(close, close, sure)
    assert shares[0] > shares[1]  # two votes beat one however sure
    assert sum(shares) == pytest.approx(1.0)
    shares = vote(close, sure)
    assert shares[1] > shares[0]


def test_eot_victim_counts_every_draw() -> None:
    x = images(2, 16)
    victim = Victim.of(Dropout(True), 2, x.device, eot_samples=5)
    victim.logits(x)
    victim.gradient(x, lambda z: z[:, 0])
    assert victim.forwards.tolist() == [10, 10]
    assert victim.backwards.tolist() == [5, 5]


class ConfidentMinority(nn.Module):
    """20 % of calls: a head whose confidence in the wrong class grows fast; 80 %: a soft head that must be pushed much further.

    The mean probability turns wrong long before most answers do, so an attack that stops at the mean stops too early.
    """

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        push = x.mean((1, 2, 3)) - 0.5
        confident, soft = 400 * (push - 0.01), 4 * (push - 0.1)
        wrong = torch.where(torch.rand(len(x)) < 0.2, confident, soft)
        return torch.stack([torch.zeros_like(wrong), wrong], 1)


def test_an_attack_on_a_random_model_goes_on_until_most_answers_are_wrong() -> None:
    x, y = torch.full((20, 3, 8, 8), 0.5), torch.zeros(20, dtype=torch.int64)
    result = PGDAttack(epsilon=0.2, alpha=0.01, num_steps=40, random_start=False)(ConfidentMinority().eval(), x, y)
    assert result.success.all()
    assert (result.forwards > 1).all()


class Wavering(nn.Module):
    """Answers wrongly with a probability that grows slowly with the push: 1/2 at 0.1, 95 % at 0.2."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        u = torch.rand(len(x))
        wrong = 30 * (x.mean((1, 2, 3)) - 0.6) + (u / (1 - u)).log()
        return torch.stack([torch.zeros_like(wrong), wrong], 1)


def test_an_attack_does_not_stop_at_a_lucky_vote() -> None:
    x, y = torch.full((200, 3, 4, 4), 0.5), torch.zeros(200, dtype=torch.int64)
    attack = PGDAttack(epsilon=0.2, alpha=0.005, num_steps=40, random_start=False)
    result = attack(Wavering().eval(), x, y)
    # A bare majority stops near the coin toss, and about four in ten of the final votes then go the other way.
    assert result.success.float().mean() > 0.9
    assert (result.spent > 0.1).float().mean() > 0.9
    assert result.spent.mean() < 0.16  # and it does stop, where the vote is clear
    # Where no vote can be that clear, the best image still counts: 23 steps end at a probability of 61 %.
    unsure = PGDAttack(epsilon=0.115, alpha=0.005, num_steps=23, random_start=False)(Wavering().eval(), x, y)
    assert unsure.success.float().mean() > 0.6
