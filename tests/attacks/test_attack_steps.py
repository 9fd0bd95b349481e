"""Single steps of the searches: what a proposal may change, and by how much."""

import torch
from attack_toys import images

from amsdn.attacks import SparsePGD
from amsdn.attacks.pixel_attacks import _largest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
