"""The rules of double and challenger masking on tables of predictions alone; see ``double_masking`` for the proofs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.utils.masking import UNUSABLE


def majority(votes: Tensor, classes: int) -> Tensor:
    """The class [B] of most votes [B,M] that are not ``UNUSABLE``; of several, or without a vote, the smallest index."""
    return F.one_hot(votes - UNUSABLE, classes + 1)[:, :, 1:].sum(1).argmax(1)


def answer(table: Tensor, classes: int) -> Tensor:
    """Algorithm 1 on complete, symmetric tables P [B,M,M] of two-mask predictions -> answers [B].

    The order of the disagreers makes no difference: masks i and k cannot confirm different classes, since P[i][k] = P[k][i].
    """
    votes = table.diagonal(dim1=1, dim2=2)
    most = majority(votes, classes)
    confirmed = (votes != most.unsqueeze(1)) & (votes != UNUSABLE) & (table == votes.unsqueeze(2)).all(2)
    first = confirmed.int().argmax(1, keepdim=True)
    return torch.where(confirmed.any(1), votes.gather(1, first).squeeze(1), most)


def meetings(votes: Tensor, live: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who meets next: (images, masks of the leading class, masks of another class), three [N]; no mask twice, none without need.

    ``votes`` and ``live`` are [B,M], ``logits`` [B,M,K]. An image whose live masks agree has no meeting, any other has at least one.
    """
    classes = logits.shape[2]
    leading = majority(torch.where(live, votes, UNUSABLE), classes).unsqueeze(1)
    champions, challengers = live & (votes == leading), live & (votes != leading)
    rival = majority(torch.where(challengers, votes, UNUSABLE), classes).unsqueeze(1)
    logits = logits.nan_to_num()  # only the order hangs on these numbers
    strength = (_of(logits, leading) - _of(logits, rival)).masked_fill(~champions, -torch.inf)
    lead = logits.topk(min(2, classes), dim=2).values
    sureness = (lead[:, :, 0] - lead[:, :, -1]).masked_fill(~challengers, -torch.inf)
    count = torch.minimum(champions.sum(1), challengers.sum(1))
    rows, turn = (torch.arange(votes.shape[1], device=votes.device) < count.unsqueeze(1)).nonzero(as_tuple=True)
    first, second = (worth.argsort(dim=1, descending=True, stable=True)[rows, turn] for worth in (strength, sureness))
    return rows, first, second


def _of(logits: Tensor, label: Tensor) -> Tensor:
    """logits [B,M,K] of the class ``label`` [B,1] of each image, [B,M]."""
    return logits.gather(2, label.unsqueeze(2).expand(-1, logits.shape[1], 1)).squeeze(2)
