"""Seeds that depend on everything they are given, devices that are refused in one line, provenance that is there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amsdn.errors import InputError
from amsdn.utils.helpers import command_line, commit, derive_seed, generator, hardware, keep_freed_memory, pick_device, versions


@given(st.lists(st.integers() | st.text(), min_size=1))
def test_a_seed_is_what_torch_takes_and_repeats(parts: list[object]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)


def test_a_seed_depends_on_every_part_and_on_where_one_ends() -> None:
    seeds = [derive_seed(*p) for p in [(0,), (1,), (0, 0), (0, "a"), ("a", 0), ("ab", "c"), ("a", "bc")]]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(0, "train", 7) == 3424859427555556787, "a changed rule would break every recorded run"


def test_generators_of_the_same_parts_draw_the_same() -> None:
    draws = [torch.rand(4, generator=generator("cpu", *parts)) for parts in ((1, "a"), (1, "a"), (2, "a"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="--device abacus") as error:
        pick_device("abacus")
    assert "\n" not in str(error.value)


def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match="cuda:99: not usable"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="cuda:99: not usable"):
        pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")


def test_provenance_is_never_empty() -> None:
    assert commit()
    assert command_line()
    assert versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "CPU" in hardware(torch.device("cpu"))
    keep_freed_memory()
