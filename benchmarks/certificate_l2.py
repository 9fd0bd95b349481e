"""Smoothing: how many samples an image takes, and what they certify, beside Cohen's fixed n.

Measured on the images of the benchmark, and replayed on those of Cohen's published log: there the hit probability of every
image is known well enough to draw its samples without a network, so that small losses show.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from certificate_bench import Bench, certified, mean_of
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr
from scipy.stats import binom

from amsdn.evaluation.smoothing import fixed_radius
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig, Tally
from amsdn.evaluation.statistics import clopper_pearson, share
from amsdn.records import CertRecord

Floats = NDArray[np.float64]
RADII = (0.25, 0.5)
REFERENCE = "fixed n"


def procedures(sigma: float, n: int, batch_size: int) -> dict[str, SmoothingConfig]:
    """The reference first, then ours: one target, several at once, and the largest radius. The same alpha and the same cap for all."""

    def ours(*radii: float) -> SmoothingConfig:
        return SmoothingConfig(sigma, radii, n=n, batch_size=batch_size, block=min(32, batch_size))

    return {
        REFERENCE: SmoothingConfig(sigma, (), fixed=True, n0=100, n=n, batch_size=batch_size, block=min(32, batch_size)),
        "sequential, r = .25": ours(0.25),
        "sequential, r = .5": ours(0.5),
        "sequential, r = 0, .25, .5, .75": ours(0.0, 0.25, 0.5, 0.75),
        "sequential, largest radius": ours(),
    }


def measure(bench: Bench, n: int, reference_images: int | None) -> list[dict[str, Any]]:
    """One line for each procedure on the benchmark's images; the dear ones on as many of them as their time allows."""
    lines: list[dict[str, Any]] = []
    reference: list[CertRecord] = []
    for name, config in procedures(bench.sigma, n, bench.batch_size).items():
        chunk = 1 if config.fixed else 128 if config.radii else 8  # at the end of a chunk some lanes of the batch are wasted
        most = reference_images if config.fixed else None
        folder = "l2-" + ("fixed" if config.fixed else "-".join(f"{r:g}" for r in config.radii) or "largest")
        rows = certified(bench, folder, SmoothingCertifier(bench.model, config), chunk, most)
        reference = reference or rows
        lines.append({"procedure": name, **summarise(rows), "certified": {}, "lost": {}})
        for r in RADII:
            if config.radii and r not in config.radii:
                continue
            lines[-1]["certified"][f"{r:g}"] = share([holds(row, r) for row in rows]).as_dict()
            lines[-1]["lost"][f"{r:g}"] = None if config.fixed else lost(reference, rows, r)
    return lines


def summarise(rows: Sequence[CertRecord]) -> dict[str, Any]:
    """Samples and seconds of certificates."""
    seconds, samples = sum(r.seconds for r in rows), sum(r.samples for r in rows)
    return {
        "images": len(rows),
        "samples": mean_of([r.samples for r in rows]),
        "median_samples": int(np.median([r.samples for r in rows])),
        "seconds_per_image": seconds / len(rows),
        "samples_per_second": samples / seconds,
    }


def holds(row: CertRecord, radius: float) -> bool:
    """Whether the image is answered rightly, with a certificate of at least this radius."""
    return row.correct and row.radius >= radius


def lost(reference: Sequence[CertRecord], ours: Sequence[CertRecord], radius: float) -> dict[str, Any]:
    """Certified accuracy lost against the reference, in points, on the images that both certified; with the interval of what only it certified."""
    theirs = {r.sample_id: holds(r, radius) for r in reference}
    pairs = [(theirs[r.sample_id], holds(r, radius)) for r in ours if r.sample_id in theirs]
    only_reference, only_ours = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    low, high = clopper_pearson(only_reference, len(pairs))
    points = 100 * (only_reference - only_ours) / max(len(pairs), 1)
    return {
        "n": len(pairs),
        "only_reference": only_reference,
        "only_ours": only_ours,
        "points": points,
        "low": 100 * low,
        "high": 100 * high,
    }


# --- replay -------------------------------------------------------------------------------------------------------------


def read_log(path: Path, sigma: float, n: int = 100_000, alpha: float = 0.001) -> tuple[Floats, NDArray[np.bool_]]:
    """(hit probability, rightly answered) of every image of Cohen's published log: the share of hits that gives the published radius.

    Where the log abstains, nothing but the bound's being at most 1/2 is known: p = 1/2 there, which costs more samples than less would.
    """
    with path.open(newline="") as file:
        rows = [(float(r["radius"]), r["correct"] == "1") for r in csv.DictReader(file, delimiter="\t")]
    radius, correct = (np.array(column) for column in zip(*rows, strict=True))
    low, high = np.zeros(len(rows)), np.full(len(rows), float(n))
    for _ in range(60):  # the hits whose bound is Phi(radius / sigma)
        middle = (low + high) / 2
        enough = betaincinv(np.maximum(middle, 1e-9), n - middle + 1, alpha) >= ndtr(radius / sigma)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(radius > 0, np.minimum(high, n) / n, 0.5), correct


def simulate(config: SmoothingConfig, p: Floats, draws: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """(certified radius, samples) [I] of images of hit probabilities p [I], by the judge, the blocks and the looks that certificates use.

    The class is taken as chosen well; the samples that choose it are counted. No certificate is radius -1.
    """
    judge, block = config.judge(), config.block
    states = [judge.start() for _ in p]
    hits, spent, n = np.zeros(len(p), dtype=np.int64), np.zeros(len(p), dtype=np.int64), 0
    live = np.arange(len(p))
    while len(live):
        blocks = -(-(judge.next_look(n) - n) // block)
        n += blocks * block
        hits[live] += draws.binomial(blocks * block, p[live])
        tally = Tally(hits[live], n - hits[live], np.full(len(live), n))
        over = judge.decided([states[i] for i in live], tally)
        spent[live] = n
        live = live[~over]
    found = [judge.radius(state, int(h), int(m)) for state, h, m in zip(states, hits, spent, strict=True)]
    return np.array([-1.0 if r is None else r for r in found]), spent + -(-config.n0 // block) * block


def expected_share(config: SmoothingConfig, p: Floats, correct: NDArray[np.bool_], radius: float) -> float:
    """The share of images that the fixed procedure answers rightly with this radius, in expectation: exact, not simulated."""
    low, high = 0, config.n + 1  # too few hits, enough (or out of reach)
    while high - low > 1:
        middle = (low + high) // 2
        found = fixed_radius(middle, config.n, config.alpha, config.sigma)
        low, high = (low, middle) if found is not None and found >= radius else (middle, high)
    return float((binom.sf(high - 1, config.n, p) * correct).mean())


def replay(path: Path, sigma: float, n: int, repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """One line for each of our procedures on the images of a published log, against the fixed one in expectation."""
    p, correct = read_log(path, sigma)
    reference, *ours = procedures(sigma, n, 1024).items()
    lines = []
    for name, config in ours:
        times = repeats if config.radii else min(repeats, 2)  # the largest radius takes twenty times the samples
        draws = np.random.default_rng(seed)
        radius, spent = simulate(config, np.tile(p, times), draws)
        radius = radius.reshape(times, -1)
        line: dict[str, Any] = {"procedure": name, "images": len(p), "repeats": times, "samples": float(spent.mean()), "lost": {}}
        for r in RADII:
            if config.radii and r not in config.radii:
                continue
            fixed = expected_share(reference[1], p, correct, r)
            certified_share = ((radius >= r) & correct).mean(1)
            line["lost"][f"{r:g}"] = {
                "fixed": fixed,
                "ours": float(certified_share.mean()),
                "points": mean_of(list(100 * (fixed - certified_share))),
            }
        lines.append(line)
    return lines
