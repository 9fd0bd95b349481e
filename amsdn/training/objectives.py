"""The losses that training adds to cross-entropy, each a small pure function.

Maps are supervised by where the image truly changed, purified features are pulled to those that an
averaged teacher sees on the clean image, and noisy copies are made to agree.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def level_targets(changed: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Where the image changed, [B,1,H,W] bool -> the target of each level's anomaly map, [B,1,h,w] in [0,1].

    On the finest level a cell is anomalous if any of its pixels changed (one pixel spoils a stride-2 cell).
    A coarser cell's target is the share of its finest-level cells that are: a location worth rebuilding is
    one that is mostly attacked, and a lone pixel must not condemn a quarter of the image.
    """
    finest = F.adaptive_max_pool2d(changed.float(), sizes[0])
    return [F.adaptive_avg_pool2d(finest, size) for size in sizes]


def anomaly_map_loss(level_logits: Sequence[Tensor], changed: Tensor, positive_weight: float = 4.0) -> Tensor:
    """Binary cross-entropy of every level's map against the true change, averaged over levels; scalar.

    Attacked cells are few, so they weigh ``positive_weight`` times as much as clean ones.
    """
    targets = level_targets(changed, [(m.shape[2], m.shape[3]) for m in level_logits])
    weight = targets[0].new_full((), positive_weight)
    terms = [F.binary_cross_entropy_with_logits(m.float(), t, pos_weight=weight) for m, t in zip(level_logits, targets, strict=True)]
    return torch.stack(terms).mean()


def detector_losses(level_logits: Sequence[Tensor], map_logits: Tensor, anomaly_logit: Tensor, changed: Tensor) -> dict[str, Tensor]:
    """The losses that teach a detector where and whether an image was changed [B,1,H,W].

    ``level_logits`` [B,1,h,w] a level, ``map_logits`` [B,1,H,W] of the image, ``anomaly_logit`` [B].
    """
    attacked = changed.flatten(1).any(1).float()
    return {
        "anomaly_map": (anomaly_map_loss(level_logits, changed) + anomaly_map_loss([map_logits], changed)) / 2,
        "detection": F.binary_cross_entropy_with_logits(anomaly_logit.float(), attacked),
    }


def feature_pull(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """1 - cosine similarity across channels, averaged over images and locations, then over levels [B,C] or [B,C,h,w]; scalar, 0 when they agree."""
    terms = [1 - F.cosine_similarity(s.float(), t.detach().float(), dim=1, eps=1e-6).mean() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(terms).mean()


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || answer) of each row of logits [B,K] and [B,K], in nats, [B]; gradients flow into both."""
    log_p, log_q = reference.float().log_softmax(1), logits.float().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def noise_consistency(*copies: Tensor) -> Tensor:
    """How far m noisy copies' predictions, logits [B,K] each, lie from their mean: KL(mean || each), averaged; scalar.

    The regulariser of Jeong and Shin 2020 (Consistency Regularization for Certified Robustness, eq. 4). Their loss is lambda
    times this plus eta times ``mean_answer_entropy``, with lambda 10 (5 to 20) and eta .5 as their code's defaults.
    """
    log_mean = _log_mean(copies)
    return torch.stack([(log_mean.exp() * (log_mean - c.float().log_softmax(1))).sum(1) for c in copies]).mean()


def mean_answer_entropy(*copies: Tensor) -> Tensor:
    """Entropy of the mean prediction over m noisy copies, logits [B,K] each, averaged over images; scalar, in nats.

    The second term of Jeong and Shin 2020: it keeps agreement from being reached by answers that say nothing.
    """
    log_mean = _log_mean(copies)
    return -(log_mean.exp() * log_mean).sum(1).mean()


def _log_mean(copies: Sequence[Tensor]) -> Tensor:
    """Log of the mean probabilities, [B,K]."""
    return torch.stack([c.float().log_softmax(1) for c in copies]).logsumexp(0) - math.log(len(copies))


def instance_logits(embedding: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Scaled cosine similarity of embeddings [B,E] to a bank [N,E] -> [B,N]: a classifier over the bank's images.

    Its cross-entropy with label i for image i is InfoNCE (van den Oord et al. 2018).
    """
    return F.normalize(embedding.float(), dim=1) @ F.normalize(bank.float(), dim=1).T / temperature


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of logits [B,K] whose argmax is y [B]; a detached scalar."""
    return (logits.detach().argmax(1) == y).float().mean()
