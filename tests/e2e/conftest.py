"""The command line as a user meets it, on a network and a data set that cost almost nothing."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from amsdn.cli import main
from amsdn.commands.common import write_about
from amsdn.data import load_dataset
from amsdn.models.amsdn import AMSDN
from amsdn.models.storage import save_model


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Shell:
    """Runs ``amsdn ARGS`` in this process, in a folder of its own."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *args: object) -> Outcome:
        self.capfd.readouterr()
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:  # tyro's own refusals
            code = int(e.code or 0)
        captured = self.capfd.readouterr()
        return Outcome(code, captured.out, captured.err)


@pytest.fixture
def amsdn(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMSDN_DATA", raising=False)
    return Shell(capfd)


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 16 px images, dark and bright: 60 for training, 12 for testing."""
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 12)):
        labels = np.arange(n, dtype=np.uint8) % 2
        images = rng.integers(0, 100, (n, 16, 16, 3), dtype=np.uint8) + 120 * labels[:, None, None, None]
        np.save(folder / f"{split}_images.npy", images.astype(np.uint8))
        np.save(folder / f"{split}_labels.npy", labels)
    (folder / "classes.txt").write_text("dark\nbright\n")
    return folder


@pytest.fixture(scope="session")
def model_folder(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny AMSDN with a calibrated detector, saved as a training stage saves it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AMSDN(num_classes=2, variant="compact", width=2, fpn_channels=8).eval()
    model.calibrate(torch.rand(100, generator=torch.Generator().manual_seed(0)), 0.05)
    save_model(model, folder)
    write_about(folder, load_dataset(f"arrays:{arrays}"))
    return folder
