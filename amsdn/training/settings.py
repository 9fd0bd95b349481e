"""How long and how fast to learn: the loop's settings, its schedule and its optimizer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from amsdn.errors import InputError

SMALLEST_PART = 2  # images: batch statistics of one image are none


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to learn. The schedule is a linear warm-up, then a cosine to zero."""

    epochs: float = 10.0
    batch_size: int = 128  # images a step, however many parts and processes compute it
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05  # matrices and filters only, never norms and biases
    warmup: float = 0.1  # share of the steps
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    mixed_precision: bool = True  # bfloat16 autocast around a step; weights, image perturbations and losses stay float32
    parts: int = 1  # a batch is computed in at least so many equal parts, each with batch statistics of its own
    compile: bool = False  # compile the model's backbone; pays on a GPU once a few minutes of compiling are earned back
    seed: int = 0
    checkpoint_every_s: float = 30.0
    log_every: int = 20  # steps

    def __post_init__(self) -> None:
        sound = {
            "epochs": 0 < self.epochs < math.inf,
            "batch_size": self.batch_size >= SMALLEST_PART,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup < 1,
            "clip_norm": self.clip_norm > 0,
            "ema_decay": 0 <= self.ema_decay < 1,
            "parts": 1 <= self.parts <= self.batch_size // SMALLEST_PART,
            "log_every": self.log_every >= 1,
        }
        for name, fine in sound.items():
            if not fine:
                raise InputError(f"loop.{name} cannot be {getattr(self, name)}; see its default in the recipe")

    def shaping(self) -> dict[str, Any]:
        """The settings that shape the result: not how often it is saved or logged."""
        return {k: v for k, v in vars(self).items() if k not in ("checkpoint_every_s", "log_every")}


def schedule(progress: float, warmup: float) -> float:
    """The share of the peak learning rate at ``progress`` in [0,1): linear up over ``warmup``, then a half cosine to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def make_optimizer(config: LoopConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names; on CUDA its fused form, which updates all weights in a few kernels."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = True if all(p.is_cuda for p in parameters) else None  # None: torch's own choice, as on the CPU ever since
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
