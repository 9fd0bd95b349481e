"""Single steps of the searches: what a proposal may change, and by how much."""

import pytest
import torch
from attack_toys import images

from amsdn.attacks import PatchRS, SparsePGD, SparseRS
from amsdn.attacks.pixel_attacks import _largest
from amsdn.attacks.search_attacks import stage


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("query", "expected"), [(0, 0), (9, 0), (10, 1), (49, 1), (50, 2), (200, 3), (7999, 8), (8000, 9), (9999, 9)])
def test_schedule_and_its_rescaling(query: int, expected: int) -> None:
    assert stage(query, 10_000) == expected
    assert stage(query * 10, 100_000) == expected


@pytest.mark.parametrize(("query", "moved"), [(1, 16), (20, 8), (60, 4), (9000, 1)])
def test_sparse_rs_moves_the_scheduled_share_to_new_distinct_pixels(query: int, moved: int) -> None:
    attack, x = SparseRS(k=20, num_queries=10_000, alpha_init=0.8), images(8, 6)  # 20 of 36 pixels: collisions would show
    state = attack.start(x, seeded())
    where, colours = attack.propose(state, query, x, seeded(1))
    assert all(len(set(row)) == 20 for row in where.tolist())
    changed = (where != state[0]).sum(1)
    assert (changed == min(moved, 16)).all()
    kept = (where == state[0]).unsqueeze(1).expand_as(colours)
    assert torch.equal(colours[kept], state[1][kept])
    fresh = [set(new) - set(old) for new, old in zip(where.tolist(), state[0].tolist(), strict=True)]
    assert all(len(f) == min(moved, 16) for f in fresh)  # none of the moved pixels was in use
    assert set(colours.unique().tolist()) <= {0.0, 1.0}


def test_patch_rs_shifts_every_fourth_query_and_ever_less() -> None:
    attack, x = PatchRS(size=4, num_queries=1000), images(64, 32)
    content, corner = attack.start(x, seeded())
    for query, reach in ((4, 23), (500, 12), (996, 1)):
        new_content, new_corner = attack.propose((content, corner), query, x, seeded(query))
        assert torch.equal(new_content, content)
        assert (new_corner != corner).any()
        assert (new_corner - corner).abs().max() <= reach
        assert (new_corner >= 0).all()
        assert (new_corner <= 28).all()


def test_patch_rs_recolours_a_sub_square_of_the_scheduled_side() -> None:
    attack, x = PatchRS(size=8, num_queries=10_000, alpha_init=0.4), images(32, 16)
    content, corner = attack.start(x, seeded())
    assert set(content.unique().tolist()) == {0.0, 1.0}
    for query, side in ((1, 5), (11, 4), (51, 3)):
        new, same_corner = attack.propose((content, corner), query, x, seeded(query))
        assert torch.equal(same_corner, corner)
        changed = (new != content).any(1)
        assert changed.any(2).sum(1).max() <= side
        assert changed.any(1).sum(1).max() <= side
    new, _ = attack.propose((content, corner), 9001, x, seeded())
    assert ((new != content).flatten(1).sum(1) == 1).all()


def test_projected_sparse_pgd_teaches_only_the_pixels_in_use() -> None:
    x = images(2, 4, low=0.4, high=0.6)
    g, p, u = torch.ones_like(x), torch.zeros_like(x), torch.randn(2, 16, generator=seeded())
    mask = _largest(u, torch.tensor([3, 5]), 5)
    assert mask.sum(1).tolist() == [3, 5]
    soft, _ = SparsePGD(5, projected=False)._ascend(g, p, u, mask, x)
    hard, _ = SparsePGD(5, projected=True)._ascend(g, p, u, mask, x)
    used = mask.reshape(2, 1, 4, 4).expand_as(x)
    torch.testing.assert_close(soft, torch.full_like(x, 0.25))
    torch.testing.assert_close(hard, torch.where(used, 0.25, 0.0))


def test_sparse_pgd_climbs_the_mask_by_beta_root_pixels() -> None:
    x, g = images(2, 4), torch.randn(2, 3, 4, 4, generator=seeded(1))
    u = torch.randn(2, 16, generator=seeded(2))
    p = 0.1 * torch.ones_like(x)
    attack = SparsePGD(3, beta=0.5)
    for scale in (1.0, 1e-30):  # however small a confident model's gradient is
        _, new = attack._ascend(scale * g, p, u, _largest(u, torch.tensor([3, 3]), 3), x)
        slope = (g * p).sum(1).flatten(1) * u.sigmoid() * (1 - u.sigmoid())
        torch.testing.assert_close(new - u, 0.5 * 4 * slope / slope.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
