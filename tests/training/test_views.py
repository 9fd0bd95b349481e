"""Views show what certificates will ask: their masks, their fill, their noise, their parts; and losses weigh them as said."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.attacks import PatchPGD
from amsdn.data import ArraySplit
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.models.double_masking import DoubleMasking
from amsdn.protocols import mask_fill_of
from amsdn.training.defence import DefenceConfig, DefenceLoss, Scene, defence_step, supervised_step
from amsdn.training.finetune_attacks import freeze_statistics
from amsdn.training.objectives import divergence, mean_answer_entropy, noise_consistency
from amsdn.training.self_adaptive import Targets
from amsdn.training.views import CertifiableViews, Drawn, GaussianViews, GreedyCutout, PixelParts
from amsdn.utils.partition import part_views

SIZE = 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits of three classes, linear in the pixels; counts the images it was shown."""

    def __init__(self, mask_fill: tuple[float, float, float] = (0.1, 0.7, 0.4)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3 * SIZE * SIZE, generator=seeded(5)))
        self.mask_fill, self.shown, self.taped = mask_fill, 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.shown += len(x)
        self.taped |= torch.is_grad_enabled()
        return x.flatten(1) @ self.weight.T


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, SIZE, SIZE, generator=seeded(1)), torch.arange(count) % 3


def certificate_views(model: nn.Module, x: Tensor, cutout: GreedyCutout) -> Callable[[int, int], Tensor]:
    """x under masks i and j of the certificate, covered by hand with the fill that the model declares."""
    fill = tuple(mask_fill_of(model).flatten().tolist())
    defence = DoubleMasking(model, cutout.patch, cutout.masks_per_axis, fill=(fill[0], fill[1], fill[2]))
    masks = defence.masks(*x.shape[2:])

    def view(i: int, j: int) -> Tensor:
        out = x.clone()
        for channel in range(3):
            out[:, channel][:, (masks[i] | masks[j])[0]] = fill[channel]
        return out

    view.count = len(masks)  # type: ignore[attr-defined]
    return view


@pytest.mark.parametrize("patch", [3, (2, 4)])
def test_greedy_cutout_finds_the_worst_mask_and_then_the_worst_beside_it(patch: int | tuple[int, int]) -> None:
    model, (x, y) = Linear(), images(9)
    cutout = GreedyCutout(patch, masks_per_axis=3)
    found = cutout(model, x, y, seeded())
    assert not model.taped, "the search needs no gradients"
    view = certificate_views(model, x, cutout)
    count: int = view.count  # type: ignore[attr-defined]
    loss = torch.stack([F.cross_entropy(model(view(i, j)), y, reduction="none") for i in range(count) for j in range(count)])
    table = loss.reshape(count, count, len(x))
    for n in range(len(x)):
        first = int(table[:, :, n].diagonal().argmax())
        second = int(table[first, :, n].argmax())
        assert torch.equal(found[n], view(first, second)[n])
    firsts = table.diagonal(dim1=0, dim2=1).amax(1)
    assert (F.cross_entropy(model(found), y, reduction="none") >= firsts).all()


def test_every_random_cutout_is_a_pair_of_the_certificates_masks_in_its_fill_and_all_pairs_occur() -> None:
    model, (x, y) = Linear(), images(600)
    cutout = GreedyCutout(3, masks_per_axis=2, candidates=1)
    found, view = cutout(model, x, y, seeded()), certificate_views(model, x, cutout)
    assert model.shown == 0, "random masks ask the model nothing"
    hits = torch.stack([(view(i, j) == found).flatten(1).all(1) for i, j in itertools.combinations_with_replacement(range(4), 2)])
    assert hits.any(0).all()
    share = hits.float().mean(1)  # of the pairs 00 01 02 03 11 12 13 22 23 33: 1/16 for twins, 2/16 for the others
    expected = torch.tensor([1, 2, 2, 2, 1, 2, 2, 1, 2, 1]) / 16
    assert ((share - expected).abs() < 4 * (expected / 600).sqrt()).all()


def test_more_candidates_cost_more_passes_and_find_worse_views() -> None:
    x, y = images(60)
    mean, shown = [], []
    for candidates in (1, 3, None, 50):
        model = Linear()
        view = GreedyCutout(3, masks_per_axis=3, candidates=candidates)(model, x, y, seeded())
        shown.append(model.shown)
        mean.append(float(F.cross_entropy(model(view), y).detach()))
    assert shown == [0, 2 * 3 * 60, 2 * 9 * 60, 2 * 9 * 60]
    assert mean[0] < mean[1] < mean[2] == mean[3]


def test_of_several_random_pairs_the_worst_is_shown_and_every_pair_costs_one_pass() -> None:
    x, y = images(400)
    mean, shown = [], []
    for pairs in (1, 2, 6):
        model = Linear()
        found, view = GreedyCutout(3, masks_per_axis=2, pairs=pairs)(model, x, y, seeded()), certificate_views(model, x, GreedyCutout(3, 2))
        shown.append(model.shown)
        mean.append(float(F.cross_entropy(model(found), y).detach()))
        hits = torch.stack([(view(i, j) == found).flatten(1).all(1) for i, j in itertools.combinations_with_replacement(range(4), 2)])
        assert hits.any(0).all()
    assert shown == [0, 2 * 400, 6 * 400]
    assert mean[0] < mean[1] < mean[2]
    every = torch.stack([F.cross_entropy(model(view(i, j)), y, reduction="none") for i in range(4) for j in range(4)])
    many = GreedyCutout(3, masks_per_axis=2, pairs=300)(Linear(), x[:20], y[:20], seeded())
    torch.testing.assert_close(F.cross_entropy(model(many), y[:20], reduction="none"), every[:, :20].amax(0))


def test_candidates_of_an_image_are_all_different() -> None:
    drawn = GreedyCutout(3, 3, candidates=4)._drawn(50, 9, seeded())
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert set(drawn.flatten().tolist()) == set(range(9))


def test_greedy_cutout_judges_in_eval_mode_and_leaves_the_model_as_it_was(tiny_model: AMSDN) -> None:
    x, y = torch.rand(6, 3, 16, 16, generator=seeded()), torch.arange(6) % 2
    cutout = GreedyCutout(4, 2)
    together = cutout(tiny_model.eval(), x, y, seeded())
    freeze_statistics(tiny_model.train())  # some parts train, some do not
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    modes = [m.training for m in tiny_model.modules()]
    found = cutout(tiny_model, x, y, seeded())
    assert torch.equal(found, together)
    assert [m.training for m in tiny_model.modules()] == modes
    alone = [cutout(tiny_model.train(), x[n : n + 1], y[n : n + 1], seeded()) for n in range(6)]
    assert torch.equal(torch.cat(alone), together), "in train mode, an image's neighbours would choose its masks"
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tiny_model.parameters())
    assert not found.requires_grad


def test_the_model_gets_its_mode_back_when_judging_fails(tiny_model: AMSDN) -> None:
    with pytest.raises(IndexError):  # a label that the model does not know
        GreedyCutout(4, 2)(tiny_model.train(), torch.rand(2, 3, 16, 16), torch.tensor([0, 9]), seeded())
    assert all(m.training for m in tiny_model.modules())


def test_noisy_copies_share_their_deviation_and_are_not_clipped() -> None:
    x = torch.rand(400, 3, SIZE, SIZE, generator=seeded())
    out = GaussianViews((0.1, 0.4), copies=2)(nn.Identity(), x, torch.zeros(400), seeded())
    first, second = (out - x.repeat(2, 1, 1, 1)).flatten(1).chunk(2)
    sigma = first.std(1)
    assert (torch.minimum((sigma / 0.1 - 1).abs(), (sigma / 0.4 - 1).abs()) < 0.3).all()
    assert 0.4 < float((sigma > 0.2).float().mean()) < 0.6
    assert ((sigma > 0.2) == (second.std(1) > 0.2)).all()
    assert float((first * second).mean().abs()) < 0.002, "the copies' noise is independent"
    assert float(out.min()) < -0.2
    assert float(out.max()) > 1.2


def test_pixel_parts_are_single_parts_of_the_named_grids() -> None:
    x = torch.rand(300, 3, SIZE, SIZE, generator=seeded())
    grids = ((2, 2), (3, 1))
    found = PixelParts(grids)(nn.Identity(), x, torch.zeros(300), seeded())
    hits = torch.stack(
        [(part_views(x, torch.full((300,), part), grid) == found).flatten(1).all(1) for grid in grids for part in range(grid[0] * grid[1])]
    )
    assert hits.any(0).all()
    assert (hits.sum(1) > 10).all()


ALL = CertifiableViews(
    noised=0.25,
    masked=0.3,
    ablated=0.2,
    sigmas=(0.1,),
    consistency=3.0,
    cutouts=(GreedyCutout(3, 2, candidates=1), GreedyCutout(2, 3, candidates=1)),
    parts=PixelParts(((2, 2),)),
)


@pytest.mark.parametrize("batch", [2, 3, 7, 20, 64])
def test_shares_are_of_the_batch_and_leave_an_image_over(batch: int) -> None:
    x, y = images(batch)
    drawn = ALL.draw(Linear(), x, y, seeded())
    taken = {p.kind.name: p.images for p in drawn.portions}
    assert len(drawn.labels) == sum(taken.values()) < batch
    assert torch.equal(drawn.labels, y[: len(drawn.labels)])
    assert len(drawn.images) == sum(p.images * p.copies for p in drawn.portions)
    if batch >= 20:
        for name, share in (("noised", 0.25), ("masked", 0.3), ("ablated", 0.2)):
            assert abs(taken[name] - share * batch) <= 0.5
        assert [p.copies for p in drawn.portions] == [2, 1, 1]


def test_each_image_is_seen_as_its_own_kind_of_view() -> None:
    model, (x, y) = Linear(), images(20)
    drawn = ALL.draw(model, x, y, seeded())  # 5 noised twice, 3 masked by each cutout, 4 ablated
    noised, masked, ablated = drawn.images[:10], drawn.images[10:16], drawn.images[16:]
    assert 0.05 < float((noised - x[:5].repeat(2, 1, 1, 1)).std()) < 0.15
    for cutout, part in zip(ALL.cutouts, (slice(0, 3), slice(3, 6)), strict=True):
        view = certificate_views(model, x[5:11][part], cutout)
        pairs = itertools.combinations_with_replacement(range(view.count), 2)  # type: ignore[attr-defined]
        assert torch.stack([(view(i, j) == masked[part]).flatten(1).all(1) for i, j in pairs]).any(0).all()
    parts = torch.stack([(part_views(x[11:15], torch.full((4,), p), (2, 2)) == ablated).flatten(1).all(1) for p in range(4)])
    assert parts.any(0).all()


def test_views_do_not_change_the_images_they_are_made_of() -> None:
    x, y = images(20)
    before = x.clone()
    ALL.draw(Linear(), x, y, seeded())
    assert torch.equal(x, before)


def test_the_loss_is_the_mean_over_images_of_what_each_kind_costs() -> None:
    model, (x, y) = Linear(), images(20)
    drawn = ALL.draw(model, x, y, seeded())
    logits = model(drawn.images)
    first, second, masked, ablated = logits[:5], logits[5:10], logits[10:16], logits[16:]
    noise = (F.cross_entropy(first, y[:5]) + F.cross_entropy(second, y[:5])) / 2 + 3.0 * noise_consistency(first, second)
    mask, part = F.cross_entropy(masked, y[5:11], label_smoothing=0.1), F.cross_entropy(ablated, y[11:15], label_smoothing=0.1)
    found = ALL.loss(drawn, logits, 0.1)
    torch.testing.assert_close(found.loss, (5 * noise + 6 * mask + 4 * part) / 15)
    torch.testing.assert_close(found.metrics["accuracy_masked"], (masked.argmax(1) == y[5:11]).float().mean())
    assert not any(v.requires_grad for v in found.metrics.values())


def test_copies_agree_and_stay_decided_with_the_weights_given() -> None:
    model, (x, y) = Linear(), images(8)
    views = CertifiableViews(noised=0.5, sigmas=(0.3,), copies=3, consistency=10.0, entropy=0.5)
    drawn = views.draw(model, x, y, seeded())
    logits = model(drawn.images)
    copies = logits.chunk(3)
    expected = F.cross_entropy(logits, y[:4].repeat(3)) + 10 * noise_consistency(*copies) + 0.5 * mean_answer_entropy(*copies)
    torch.testing.assert_close(views.loss(drawn, logits, 0.1).loss, expected)


def test_masked_answers_are_pulled_to_the_whole_images_and_no_gradient_flows_into_those() -> None:
    model, (x, y) = Linear(), images(10)
    views = CertifiableViews(masked=0.6, unmasked_pull=2.0, cutouts=(GreedyCutout(3, 2, candidates=1), GreedyCutout(2, 3, candidates=1)))
    drawn = views.draw(model, x, y, seeded())
    assert model.shown == 6, "one forward of the masked images themselves, and none for random masks"
    logits = model(drawn.images)
    found = views.loss(drawn, logits, 0.1)
    whole, masked = model(x[:6]).softmax(1), logits.softmax(1)
    pull = (whole * (whole / masked).log()).sum(1).mean()
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, y[:6], label_smoothing=0.1) + 2.0 * pull)
    torch.testing.assert_close(found.metrics["divergence_masked"], pull.detach())
    (portion,) = drawn.portions
    assert portion.whole is not None
    assert not portion.whole.requires_grad
    # Of 2 KL(whole || masked) alone, the gradient by the masked logits is 2 (masked - whole) / 6.
    (gradient,) = torch.autograd.grad(2.0 * divergence(portion.whole, logits).mean(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, (2 * (masked - whole) / 6).detach())


def test_the_whole_images_answer_is_the_deployed_models_and_moves_no_statistics(tiny_model: AMSDN) -> None:
    x, y = torch.rand(10, 3, 16, 16, generator=seeded()), torch.arange(10) % 2
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    views = CertifiableViews(masked=0.5, unmasked_pull=1.0, cutouts=(GreedyCutout(4, 2, candidates=1),))
    (portion,) = views.draw(tiny_model.train(), x, y, seeded()).portions
    assert tiny_model.training
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(portion.whole, tiny_model.eval()(x[:5]))  # type: ignore[arg-type]


def test_clean_images_join_the_views_in_one_pass_and_all_weigh_the_same(tiny_model: AMSDN) -> None:
    views = CertifiableViews(noised=0.2, masked=0.3, ablated=0.1, cutouts=(GreedyCutout(4, 2, candidates=1),), parts=PixelParts(((2, 2),)))
    model, x, y = tiny_model.eval(), torch.rand(20, 3, 16, 16, generator=seeded()), torch.arange(20) % 2
    drawn = views.draw(model, x, y, seeded())
    config = DefenceConfig(loss=DefenceLoss(label_smoothing=0.0), views=views)
    found = supervised_step(model, config, scene(x, y, drawn, 0))
    torch.testing.assert_close(found.loss, F.cross_entropy(model(torch.cat([drawn.images, x[12:]])), y))
    assert set(found.metrics) == {"accuracy", *(f"{what}_{kind}" for what in ("accuracy", "cross_entropy") for kind in KINDS)}
    torch.testing.assert_close(found.metrics["accuracy"], (model(x[12:]).argmax(1) == y[12:]).float().mean())


def scene(x: Tensor, y: Tensor, drawn: Drawn, attacked: int) -> Scene:
    return Scene(x, y, Targets(torch.arange(len(y)), F.one_hot(y, 2).float()), drawn, attacked)


KINDS = ("noised", "masked", "ablated")


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_learns_from_no_view_and_the_attacked_images_are_others(kind: str, tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    shares = {kind: 0.3}
    views = CertifiableViews(**shares, cutouts=(GreedyCutout(4, 2, candidates=1),), parts=PixelParts(((2, 2),)))  # type: ignore[arg-type]
    model, (x, y) = tiny_model.eval(), tiny_split.fetch(torch.arange(10))
    attack = PatchPGD(size=4, num_steps=1, alpha=0.25, stop_when_fooled=False)
    config = DefenceConfig(views=views)
    drawn = views.draw(model, x, y, seeded())
    none = Drawn(x[:0], y[:0], ())
    alone = defence_step(model, model, attack, config, scene(x[3:], y[3:], none, 4), seeded(2))
    joined = defence_step(model, model, attack, config, scene(x, y, drawn, 4), seeded(2))
    for name, value in alone.metrics.items():
        torch.testing.assert_close(joined.metrics[name], value, msg=name)
    expected = 0.7 * alone.loss + 0.3 * views.loss(drawn, model.trace(drawn.images).logits, config.loss.label_smoothing).loss
    torch.testing.assert_close(joined.loss, expected)
    assert f"accuracy_{kind}" in joined.metrics


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianViews(()),
        lambda: GaussianViews((0.0,)),
        lambda: GaussianViews(copies=0),
        lambda: GreedyCutout(0),
        lambda: GreedyCutout((3, 0)),
        lambda: GreedyCutout(3, 0),
        lambda: GreedyCutout(3, candidates=0),
        lambda: GreedyCutout(3, pairs=0),
        lambda: PixelParts(()),
        lambda: PixelParts(((0, 2),)),
        lambda: CertifiableViews(noised=-0.1),
        lambda: CertifiableViews(masked=0.6, ablated=0.4),
        lambda: CertifiableViews(consistency=-1),
        lambda: CertifiableViews(entropy=-1),
        lambda: CertifiableViews(unmasked_pull=-1),
        lambda: CertifiableViews(consistency=1, copies=1),
        lambda: CertifiableViews(copies=0),
        lambda: CertifiableViews(cutouts=()),
        lambda: CertifiableViews(sigmas=(-1.0,)),
        lambda: GreedyCutout(9)(Linear(), *images(2), seeded()),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(make: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="views: ") as error:
        make()
    assert "\n" not in str(error.value)
