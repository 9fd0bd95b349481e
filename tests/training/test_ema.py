"""The average follows its closed form."""

import torch
from torch import nn

from amsdn.training.ema import EMA


def test_first_updates_use_the_warm_up_decay_and_later_ones_the_set_decay() -> None:
    ema = EMA(nn.Linear(1, 1), decay=0.5)
    decays = []
    for _ in range(20):
        decays.append(ema.decay_now())
        ema.updates += 1
    assert decays[0] == 0.1
    assert decays[1] == 2 / 11
    assert decays[-1] == 0.5
    assert decays == sorted(decays)


def test_weights_follow_the_recursion_and_whole_number_buffers_are_copied() -> None:
    model = nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.fill_(float(step))
        model.num_batches_tracked.fill_(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        ema.update(model)
    assert torch.allclose(ema.model.weight, expected)
    assert int(ema.model.num_batches_tracked) == 4


def test_the_shadow_is_a_teacher() -> None:
    ema = EMA(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), decay=0.9)
    assert not any(m.training for m in ema.model.modules())
    assert not any(p.requires_grad for p in ema.model.parameters())
