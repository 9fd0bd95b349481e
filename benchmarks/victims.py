"""What the benchmark and the comparison tests attack: a public ResNet-20, and a wrapper that counts for every library alike."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from amsdn.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
WEIGHTS = SHARED / "third_party" / "resnet20_cifar10.safetensors"
IMAGES = SHARED / "cifar10"  # labels.npz and <part>/test_NNN.webp, a column of 100 images each


def missing() -> str | None:
    """Why the public victim cannot be loaded on this machine, or None."""
    absent = [str(p) for p in (WEIGHTS, IMAGES / "labels.npz") if not p.exists()]
    return f"not on this machine: {', '.join(absent)}" if absent else None


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, zero channels around."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.pad = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> [B,C',H/stride,W/stride]."""
        shortcut = x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, for 32x32 images float32 [B,3,H,W] in [0,1] -> logits [B,10]; normalises inside."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.normalize(x))))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


def load_resnet20() -> ResNet20:
    """The public undefended network (akamaster/pytorch_resnet_cifar10, test accuracy 91.73 %), in eval mode, weights frozen."""
    model = ResNet20()
    absent, unknown = model.load_state_dict(load_file(WEIGHTS), strict=False)
    ours = {"normalize.mean", "normalize.std"}
    unread = [k for k in absent if k not in ours and not k.endswith("num_batches_tracked")]
    assert not unknown, f"{WEIGHTS} holds unknown weights {unknown}"
    assert not unread, f"{WEIGHTS} lacks {unread}"
    return model.eval().requires_grad_(False)


def load_cifar10(samples: int) -> tuple[Tensor, Tensor]:
    """The first ``samples`` official test images, float32 [N,3,32,32] in [0,1], and their labels int64 [N]."""
    files = sorted(IMAGES.glob("*/test_*.webp"), key=lambda f: f.name)[: -(-samples // 100)]
    images = np.concatenate([np.asarray(Image.open(f).convert("RGB")).reshape(-1, 32, 32, 3) for f in files])[:samples]
    labels = np.load(IMAGES / "labels.npz")["test"][: len(images)]
    assert len(images) == samples, f"{IMAGES} holds {len(images)} test images, {samples} were asked for"
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float().div(255).contiguous(), torch.from_numpy(labels).long()


class Counted(nn.Module):
    """A classifier that counts what is asked of it, whoever asks: images forwards, images backwards, seconds inside.

    A backward pass counts every image of the batch whose logits it starts from, once for each pass through the graph.
    ``seconds`` is the time between entering and leaving the model, in both directions; it means something on a CPU only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # peers put back the mode that they found
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.forwards = self.backwards = self.calls = 0
        self.seconds = 0.0
        self._entered = 0.0

    def forward(self, x: Tensor) -> Tensor:
        entered = time.perf_counter()
        watched = torch.is_grad_enabled() and x.requires_grad
        if watched:
            x = x.view_as(x)
            x.register_hook(self._leave)
        logits: Tensor = self.model(x)
        if watched:
            logits.register_hook(self._enter(len(x)))
        self.forwards += len(x)
        self.calls += 1
        self.seconds += time.perf_counter() - entered
        return logits

    def _enter(self, images: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.backwards += images
            self._entered = time.perf_counter()

        return hook

    def _leave(self, gradient: Tensor) -> None:
        self.seconds += time.perf_counter() - self._entered
