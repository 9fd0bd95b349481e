"""What to ask about one image for a certificate by double masking, and in which order, so that few passes decide it.

The script of an image is a generator: it yields blocks of pairs of nodes of the mask tree and is sent what the
classifier says under them. So it reads as if the image were alone, and what it asks cannot depend on the images that share its passes.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from amsdn.utils.masking import UNUSABLE, MaskTree, confidence_of, view_labels

FIRST_BLOCK = 4  # pairs of an image between two looks at whether one has failed; blocks double

Pair = tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """What the views of one image say."""

    votes: Tensor  # [M,K] logits of P[i][i]
    unanimous: bool
    label: int  # the unanimous class
    first_round: int  # passes for the votes
    detection_certified: bool
    certified: bool = False


class Views(NamedTuple):
    """What the classifier says of N views of one image: its class, whether the view stands for those below it, and whether that is sure."""

    logits: Tensor  # [N,K] on the CPU
    label: list[int]
    settled: list[bool]
    sound: list[bool]

    def part(self, start: int, stop: int) -> "Views":
        return Views(self.logits[start:stop], self.label[start:stop], self.settled[start:stop], self.sound[start:stop])

    def followed_by(self, more: "Views") -> "Views":
        return Views(torch.cat([self.logits, more.logits]), self.label + more.label, self.settled + more.settled, self.sound + more.sound)


def judge(logits: Tensor, finest: Tensor, confidence: float, tolerance: float) -> Views:
    """Views from their logits [N,K] and whether they are under finest masks [N] bool, which always settle what they are asked for."""
    sure = confidence_of(logits)
    settled = finest | (sure >= confidence)
    near = ~finest & ((sure - confidence).abs() < tolerance)
    tied = settled & (view_labels(logits, tolerance) == UNUSABLE)  # below the confidence the class does not matter
    return Views(logits, view_labels(logits).tolist(), settled.tolist(), (~near & ~tied).tolist())


Script = Generator[list[Pair], Views, Verdict]


def examine(tree: MaskTree) -> Script:
    """What to ask about one image, block by block: yields pairs of nodes, is sent what the views under them say."""
    asked: list[int] = []
    rows: list[Tensor] = []  # logits under the nodes asked
    voice: dict[int, Tensor] = {}  # node -> logits under it, of those that stand for a finest mask
    below: list[Pair] = []  # pairs of different masks under a node that was not confident
    sound, block = True, [(node, node) for node in tree.roots]
    while block:
        views = yield block
        sound = sound and all(views.sound)
        asked += [node for node, _ in block]
        rows.append(views.logits)
        following: list[Pair] = []
        for (node, _), row, settled in zip(block, views.logits, views.settled, strict=True):
            if settled:
                voice[node] = row
                continue
            pairs = tree.below(node, node)
            following += [pair for pair in pairs if pair[0] == pair[1]]
            below += [pair for pair in pairs if pair[0] != pair[1]]
        block = following
    votes = torch.stack([next(voice[node] for node in chain if node in voice) for chain in tree.ancestors.T.tolist()])
    labels = view_labels(votes)
    label = int(labels[0])
    unanimous = label != UNUSABLE and bool((labels == label).all())
    verdict = Verdict(votes, unanimous, label, len(asked), detection_certified=unanimous and sound)
    if not verdict.detection_certified:
        return verdict
    pairs = [(a, b) for a in tree.roots for b in tree.roots if a < b] + below
    guesses = _guesses(pairs, asked, torch.cat(rows), label)
    holds = yield from _all_hold(tree, list(zip(guesses, pairs, strict=True)), label)
    return replace(verdict, certified=holds)


def _all_hold(tree: MaskTree, waiting: list[tuple[float, Pair]], label: int) -> Generator[list[Pair], Views, bool]:
    """Whether all the pairs, or those below them where they are not confident, have the class ``label``; least guess first.

    For pairs below one that was looked at, the guess is the lead seen there.
    """
    heapify(waiting)
    size = FIRST_BLOCK
    while waiting:
        block = [heappop(waiting)[1] for _ in range(min(size, len(waiting)))]
        views = yield block
        if not all(views.sound) or any(settled and seen != label for settled, seen in zip(views.settled, views.label, strict=True)):
            return False
        open_views = [k for k, settled in enumerate(views.settled) if not settled]
        for k, guess in zip(open_views, _leads(views.logits[open_views], label).amin(1).tolist(), strict=True):
            for child in tree.below(*block[k]):
                heappush(waiting, (guess, child))
        size *= 2
    return True


def _guesses(pairs: list[Pair], asked: list[int], logits: Tensor, label: int) -> list[float]:
    """By how much each pair may favour ``label``, from logits [N,K] under the single nodes ``asked``.

    Under two masks logits change by about the sum of their changes under each one, measured here from the best single one.
    """
    if not pairs:
        return []
    leads = _leads(logits, label)
    row = {node: k for k, node in enumerate(asked)}
    first, second = torch.tensor([(row[a], row[b]) for a, b in pairs]).T
    guesses: list[float] = (leads[first] + leads[second] - leads.amax(0)).amin(1).tolist()
    return guesses


def _leads(logits: Tensor, label: int) -> Tensor:
    """By how much logits [N,K] favour ``label`` over each other class, [N,K]; only the order of questions hangs on it."""
    leads = (logits[:, label : label + 1] - logits).nan_to_num()
    leads[:, label] = torch.finfo(leads.dtype).max  # not infinite: it is subtracted
    return leads
