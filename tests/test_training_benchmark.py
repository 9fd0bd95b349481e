"""The benchmark of training: what it counts, on steps small enough to count by hand; that both loops do the same work; its tables."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch
import training
import training_machine
import training_plain
import training_steps
from torch import nn
from training_agreement import work_per_image
from training_machine import Marks, count_flops, count_operators, spread
from training_plain import PLAIN, Plain, batches, plain_loop, ratios
from training_steps import PGD10, Steps, Way, counted, forward_flops, fresh, images_per_second, kinds, models, step_flops
from training_tables import training_table

from amsdn.data import ArraySplit, Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import get_recipe
from amsdn.training.loop import Batch, StepOutput, schedule

WIDTH = 2
THIN = AMSDNConfig(variant="compact", width=WIDTH, fpn=False, attention=False, purification=False)
STEM = 2 * 3 * WIDTH * 9 * 32 * 32  # operations of the first convolution, whose images need no gradient when the network learns


def split(count: int = 32) -> ArraySplit:
    gen = torch.Generator().manual_seed(0)
    return ArraySplit(training_machine.random_images(count, 32, gen), torch.randint(0, 10, (count,), generator=gen))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_its_taps_forward_and_as_many_for_each_gradient(groups: int, stride: int) -> None:
    conv = nn.Conv2d(4, 8, 3, stride, padding=1, groups=groups)
    x = torch.rand(2, 4, 6, 6, requires_grad=True)
    once = 2 * 2 * (6 // stride) ** 2 * 8 * (4 // groups) * 9
    assert count_flops(lambda: conv(x)) == once
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * once
    assert count_flops(lambda: torch.autograd.grad(conv(x).sum(), x)) == 2 * once
    assert count_flops(lambda: conv(x.detach()).sum().backward()) == 2 * once


def test_a_transposed_convolution_counts_its_taps_by_its_input() -> None:
    conv = nn.ConvTranspose2d(4, 8, 2, 2)
    x = torch.rand(2, 4, 5, 5, requires_grad=True)
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * 2 * 2 * 25 * 4 * 8 * 4


def test_a_product_counts_its_terms_and_views_are_no_operators() -> None:
    a, b = torch.rand(3, 4), torch.rand(5, 4)
    assert count_flops(lambda: a @ b.T) == 2 * 3 * 4 * 5
    assert count_operators(lambda: a @ b.T) == 1


@pytest.mark.parametrize("peak", [training_machine.matmul_peak, training_machine.convolution_peak])
def test_a_peak_is_the_counted_operations_over_the_least_seconds(
    peak: Callable[[torch.device, torch.dtype], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def fastest(work: Callable[[], object], device: torch.device, repeats: int) -> float:
        counts.append(count_flops(work))
        return 4.0

    monkeypatch.setattr(training_machine, "_fastest", fastest)
    monkeypatch.setitem(training_machine.SIDES, "cpu", (4, 16, 8))
    assert peak(torch.device("cpu"), torch.float32) == max(counts) / 4


def test_the_fastest_call_is_told_without_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([100.0, 107.0, 110.0, 115.0])
    monkeypatch.setattr(Marks, "mark", lambda marks: marks._marks.append(next(moments)))
    calls: list[int] = []
    assert training_machine._fastest(lambda: calls.append(1), torch.device("cpu"), 3) == 3
    assert len(calls) == 4


def test_a_clean_step_costs_three_forwards_and_a_pgd_step_23() -> None:
    forward, recipe = forward_flops(THIN, 32), get_recipe("cifar10-cpu")
    assert step_flops(kinds(recipe)["clean"], THIN, split(), 8) == 3 * forward - STEM
    assert step_flops(kinds(recipe)["pgd-10"], THIN, split(), 8) == 23 * forward - STEM
    assert counted(THIN, 32, True, count_flops) / 2 == 3 * forward - STEM


def test_the_flagship_step_is_the_recipes_without_its_clean_start() -> None:
    recipe = get_recipe("cifar10-cpu")
    flagship = kinds(recipe)["flagship"]
    assert (flagship.attacks, flagship.views, flagship.loss) == (recipe.train.attacks, recipe.train.views, recipe.train.loss)
    assert flagship.clean_start == 0 < recipe.train.clean_start


def test_a_flagship_step_costs_the_mean_over_its_attacks() -> None:
    config = replace(kinds(get_recipe("cifar10-cpu"))["pgd-10"], attacks=(PGD10, replace(PGD10, num_steps=2)))
    assert step_flops(config, THIN, split(), 8) == (23 + 7) / 2 * forward_flops(THIN, 32) - STEM


def test_the_warm_steps_and_the_last_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(marks: Marks) -> None:  # the steps begin at 0, 10, 20, 30 ... seconds, the second at 11
        marks._marks.append(10.0 * len(marks) + (len(marks) == 1))

    monkeypatch.setattr(Marks, "mark", mark)
    speed = images_per_second(kinds(get_recipe("cifar10-cpu"))["clean"], THIN, Way(), split(), Steps(8, 2, 1), 0, process=False)
    assert speed == 8 * 2 / (30 - 11)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_way_lays_out_weights_and_images(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, seen = torch.channels_last if channels_last else torch.contiguous_format, []

    def step(stage: object, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        weights = [m.get_parameter("backbone.stem.0.weight") for m in (model, teacher)]
        seen.append(all(t.is_contiguous(memory_format=layout) for t in (batch.x, *weights)))
        return StepOutput(weights[0].sum(), {})

    monkeypatch.setattr(training_steps.AdversarialTraining, "step", step)
    monkeypatch.setattr(training_steps.AdversarialTraining, "remember", lambda *_: None)
    way = Way(channels_last=channels_last)
    images_per_second(kinds(get_recipe("cifar10-cpu"))["clean"], THIN, way, split(), Steps(8, 1, 1), 0, process=False)
    assert seen == [True] * 3


@pytest.mark.parametrize("on_device", [True, False])
def test_an_epoch_shows_every_image_once(on_device: bool) -> None:
    images = torch.arange(12, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(12, 3, 32, 32).contiguous()
    data = ArraySplit(images, torch.arange(12))
    source = batches(data, Augment(flip=True, shift=4), 4, on_device, 0, 0)
    shown = list(islice(source, 3))
    assert sorted(torch.cat([y for _, y in shown]).tolist()) == list(range(12))
    assert [len(y) for _, y in islice(batches(data, Augment(), 5, on_device, 0, 0), 5)] == [5] * 5  # what is left over is dropped
    for x, y in shown:
        assert torch.equal(255 * x, y.reshape(-1, 1, 1, 1).expand_as(x).float())


def test_both_loops_do_the_same_work_and_learn_the_same() -> None:
    pytest.importorskip("torchattacks")
    recipe, data = get_recipe("cifar10-cpu"), split()
    work = work_per_image(recipe, THIN, data, 16)
    assert work["plain"] == work["ours"] == (23 * forward_flops(THIN, 32) - STEM) / 1e9
    theirs, ours = fresh(THIN, data.device), fresh(THIN, data.device)
    for model, how in ((theirs, Plain()), (ours, Plain(on_device=True, channels_last=True, freeze=True, ours=True))):
        plain_loop(how, model, batches(data, Augment(flip=False, shift=0), 32, how.on_device, 0, 0), 3, Marks(data.device), 0)
    before = fresh(THIN, data.device).state_dict()
    for name, value in theirs.state_dict().items():
        moved = (value - before[name]).float().norm()
        # The same batch in another order and another start of the attack: the same way, give or take the start.
        assert (ours.state_dict()[name] - value).float().norm() <= 0.5 * moved + 1e-6, name


def test_the_plain_loops_attack_stays_in_the_same_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchattacks")
    model, data = fresh(THIN, torch.device("cpu")), split(8)
    x, y = data.fetch(torch.arange(8))
    model.train()
    for freeze in (False, True):
        attack = training_plain._attack(Plain(freeze=freeze), model, 0)
        change = (attack(x, y) - x).abs().max()
        assert 0.9 * PGD10.epsilon < change <= PGD10.epsilon + 1e-6
        assert model.training
        assert all(p.requires_grad for p in model.parameters())


def test_the_plain_loop_follows_our_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchattacks")
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(optimizer: torch.optim.AdamW, *rest: object) -> object:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(training_plain, "_attack", lambda *_: lambda x, y: x)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    data = split(8)
    plain_loop(Plain(), fresh(THIN, data.device), batches(data, Augment(), 8, True, 0, 0), 5, Marks(data.device), 0)
    assert rates == pytest.approx([2e-3 * schedule(i / 5, 0.1) for i in range(5)])


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([{PLAIN: 2.0, "a": 6.0}, {PLAIN: 10.0, "a": 20.0}]) == {"a": [3.0, 2.0]}
    assert spread([4.0, 1.0, 3.0]) == {"n": 3, "median": 3.0, "low": 1.0, "high": 4.0}


def test_a_gpu_measures_more_models() -> None:
    recipe = get_recipe("cifar10-cpu")
    assert list(models(recipe, torch.device("cpu"))) == ["compact"]
    found = models(recipe, torch.device("cuda"))
    assert list(found) == ["compact", "preact18", "pico", "tiny"]
    assert [found[m].stem_stride for m in ("pico", "tiny")] == [2, 2]


def test_impossible_sizes_are_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--batch", "64", "--samples", "32"]) == 1
    assert "--samples" in capsys.readouterr().err
    with pytest.raises(InputError):
        training.open_bench(training.parser().parse_args(["--batch", "2"]), torch.device("cpu"), 0)


def test_the_tables_state_the_share_of_the_right_peak() -> None:
    speed = {"n": 2, "median": 100.0, "low": 90.0, "high": 110.0}
    document = {
        "command": "training.py",
        "commit": "c",
        "date": "d",
        "hardware": "h",
        "clock": "the wall clock",
        "versions": {"torch": "2"},
        "settings": {"recipe": "r", "batch": 8, "workers": 0},
        "peak_gflops": {"fp32": 100.0, "bf16": 400.0},
        "gflop_per_image": {"compact, clean": 0.5},
        "steps": [{"model": "compact", "kind": "clean", "way": "w", "precision": p, "images_per_second": speed} for p in ("fp32", "bf16")],
        "passes": [
            {
                "model": "compact",
                "way": "w",
                "precision": "fp32",
                "images_per_second": {"forward": 50.0, "forward, CUDA graph": "no graph"},
                "gflop_per_image": {"forward": 0.2},
            }
        ],
        "beside": {"plain_images_per_second": speed, "times_as_fast": {"bf16": spread([2.0, 3.0])}},
        "agreement": None,
    }
    text = training_table(document)
    assert "| compact | clean | w | 100 (90 to 110) | 0.5 | 50 |" in text  # 100 x .5 of 100
    assert "| compact | clean | w | 100 (90 to 110) | 0.5 | 12 |" in text  # of 400
    assert "| compact | forward | w | 50 | 0.2 | 10 |" in text
    assert "not possible: no graph" in text
    assert "| bf16 | 2.50 (2.00 to 3.00) |" in text
    assert "Beside" not in training_table({**document, "beside": None})


@pytest.mark.slow
def test_the_quick_run_goes_through_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--quick", "--recipe", "cifar10-cpu", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "| compact | flagship | bf16, NCHW |" in printed
