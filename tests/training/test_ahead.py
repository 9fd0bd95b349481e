"""Decoding ahead changes when images are read, and nothing else: not the batches, not who hears of a damaged file, not what is left behind."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from together import LOOP, Net, Probe, forty_images
from torch import Tensor

from amsdn.data import Split, load_dataset
from amsdn.errors import InputError
from amsdn.training.ahead import ReadAhead
from amsdn.training.loop import Batch, train
from amsdn.training.ranks import Ranks
from amsdn.training.run import Run

CPU = torch.device("cpu")


class Decoding(Split):
    """The forty images, as if they lay in files: notes which were decoded, in which order and by whom."""

    def __init__(self, damaged: int = -1) -> None:
        self.whole, self.damaged = forty_images(), damaged
        self.labels = self.whole.labels
        self.decoded: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.gate = threading.Event()  # closed: decoding waits
        self.gate.set()

    @property
    def decodes(self) -> bool:
        return True

    def decode(self, index: int) -> Tensor:
        self.decoded.append(index)
        self.threads.add(threading.current_thread())
        assert self.gate.wait(30)
        if index == self.damaged:
            raise InputError(f"image {index}: damaged")
        return self.whole.fetch(torch.tensor([index]))[0][0]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("training fetched images at once")

    def to(self, device: torch.device | str) -> Split:
        return self


def places(*numbers: int) -> list[Tensor]:
    return [torch.tensor(numbers)]


def test_images_come_as_the_split_gives_them_whoever_asks_in_whatever_pieces() -> None:
    split = Decoding()
    ahead = ReadAhead(split, CPU)
    ahead.announce(places(3, 1, 2), places(7, 3))
    for piece in ([3, 1, 2], [2, 3], [1], [7, 3]):
        for mine, whole in zip(ahead.fetch(torch.tensor(piece)), forty_images().fetch(torch.tensor(piece)), strict=True):
            assert torch.equal(mine, whole)
    assert sorted(split.decoded) == [1, 2, 3, 7], "an image was decoded twice"
    assert threading.current_thread() not in split.threads
    ahead.close()


def test_the_next_step_is_decoded_while_the_current_one_is_computed_and_older_images_are_forgotten() -> None:
    split = Decoding()
    ahead = ReadAhead(split, CPU)
    ahead.announce(places(0, 1), places(2, 3))
    ahead.fetch(torch.tensor([0, 1]))
    for image in ahead.images.values():
        image.result(30)  # nobody has asked for 2 and 3
    assert set(split.decoded) == {0, 1, 2, 3}
    ahead.announce(places(2, 3), places(4, 5))
    assert set(ahead.images) == {2, 3, 4, 5}
    ahead.close()


def test_closing_stops_what_has_not_begun_and_leaves_no_thread() -> None:
    split = Decoding()
    split.gate.clear()
    ahead = ReadAhead(split, CPU)
    ahead.announce([torch.arange(40)], [])
    threading.Timer(0.2, split.gate.set).start()
    ahead.close()
    assert not any(thread.is_alive() for thread in split.threads)
    assert len(split.decoded) < 40, "all was decoded before closing"
    ahead.close()


def weights(split: Split, folder: Path, stage: Probe, **settings: object) -> list[Tensor]:
    model = Net()
    train(stage, model, split, replace(LOOP, epochs=1, **settings), folder)  # type: ignore[arg-type]
    return list(model.state_dict().values())


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stop_at(step: int, what: Callable[[], None]) -> Callable[[int, Batch], None]:
    return lambda now, batch: what() if now == step else None


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_sees_the_same_batches_also_resumed_and_through_a_subset(tmp_path: Path) -> None:
    expected = weights(forty_images(), tmp_path / "held", Probe(), parts=2)
    for name, split in {"decoded": Decoding(), "subset": Decoding().subset(torch.arange(40))}.items():
        assert split.decodes
        assert same(weights(split, tmp_path / name, Probe(), parts=2), expected)
    split = Decoding()
    with pytest.raises(KeyboardInterrupt):
        weights(split, tmp_path / "cut", Probe(stop_at(2, interrupt)), parts=2)
    assert not any(thread.is_alive() for thread in split.threads), "a thread outlived the run"
    assert same(weights(split, tmp_path / "cut", Probe(), parts=2), expected)
    assert not any(thread.is_alive() for thread in split.threads)


def test_a_subset_decodes_its_own_images_and_an_array_none() -> None:
    subset = Decoding().subset(torch.tensor([5, 9])).subset(torch.tensor([1]))
    assert torch.equal(subset.decode(0), forty_images().fetch(torch.tensor([9]))[0][0])
    assert not forty_images().subset(torch.tensor([1])).decodes
    with pytest.raises(NotImplementedError):
        forty_images().decode(0)


def test_a_damaged_image_is_reported_at_its_own_step(tmp_path: Path) -> None:
    run = Run(Probe(), Net(), forty_images(), replace(LOOP, epochs=1), tmp_path / "order", "settings", Ranks())
    last = int(run._images(3)[4])  # of four steps
    stage, split = Probe(), Decoding(damaged=last)
    with pytest.raises(InputError, match=rf"^image {last}: damaged$"):
        weights(split, tmp_path / "run", stage)
    assert len(stage.remembered) == 3, "the steps before were not finished"
    assert not any(thread.is_alive() for thread in split.threads)


def test_a_retry_after_lack_of_memory_decodes_nothing_again(tmp_path: Path) -> None:
    def before(step: int, batch: Batch) -> None:
        if len(batch.x) > 5:
            raise torch.OutOfMemoryError("no room")

    split = Decoding()
    assert same(weights(split, tmp_path / "a", Probe(before)), weights(forty_images(), tmp_path / "b", Probe(), parts=2))
    assert sorted(split.decoded) == list(range(40))


def test_a_process_decodes_its_own_parts_alone(tmp_path: Path) -> None:
    split = Decoding()
    run = Run(Probe(), Net(), split, replace(LOOP, epochs=1, parts=2), tmp_path, "settings", Ranks())
    run.ranks = Alone(1, 2)
    step = next(run.steps())
    run.gradient(step, [])
    mine = [*run._images(0)[5:].tolist(), *run._images(1)[5:].tolist()]
    run.close()
    assert set(split.decoded) <= set(mine)
    assert set(mine[:5]) <= set(split.decoded)


class Alone(Ranks):
    """One of two processes, with nobody to talk to."""

    def agree(self, numbers):  # type: ignore[no-untyped-def]
        return list(numbers)

    def add_up(self, values: Tensor) -> None:
        pass

    def gather_tensor(self, value: Tensor) -> list[Tensor]:
        return [value, value]


def test_image_files_are_decoded_ahead_as_they_are_fetched(tmp_path: Path) -> None:
    for part, label in ((p, c) for p in ("train", "test") for c in ("a", "b")):
        for i in range(5):
            path = tmp_path / "data" / part / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (40 * i, 100 * (label == "a"), 7)).save(path)
    split = load_dataset(f"folder:{tmp_path / 'data'}", image_size=16, limit=6).test
    ahead, rows = ReadAhead(split, CPU), torch.tensor([4, 0, 5])
    assert split.decodes
    ahead.announce([rows], [])
    for mine, whole in zip(ahead.fetch(rows), split.fetch(rows), strict=True):
        assert torch.equal(mine, whole)
    ahead.close()
