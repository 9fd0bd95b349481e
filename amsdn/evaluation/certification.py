"""Randomized smoothing: an l2 certificate for any classifier (Cohen, Rosenfeld & Kolter, ICML 2019).

The smoothed classifier answers with the class that the base classifier gives most often under Gaussian noise. What
is certified is the smoothed classifier, not the base classifier that attacks are run against.

Noise is added to images in [0,1] and the sum is not clipped: the proof needs exact Gaussian noise around the image,
so a base classifier must accept values outside [0,1] here. The proof also needs each noisy copy to be judged on its
own, so the model must be in eval mode (batch statistics would couple the copies) and must not compare images within a batch.
A model with randomness of its own is covered: its draws are then part of the noise, as long as they are fresh for each copy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.special import ndtri
from scipy.stats import binomtest  # type: ignore[attr-defined]
from torch import Tensor, nn
from tqdm import tqdm

from amsdn.errors import InputError
from amsdn.evaluation.run_folder import Samples, choose_ids, claim, data_fingerprint, model_fingerprint, writing_to
from amsdn.evaluation.statistics import clopper_pearson_lower
from amsdn.protocols import check_eval_mode, check_images, device_of
from amsdn.records import CertRecord, RecordLog, config_hash
from amsdn.utils.helpers import derive_seed, generator

ABSTAIN = -1
CERTIFICATE = "l2"
SETTINGS = "cert_config.json"
RECORDS = "cert.jsonl"


@dataclass(frozen=True)
class SmoothingConfig:
    """Cohen's parameters. A certificate at ``n`` samples cannot exceed sigma * Phi^-1(alpha ** (1 / n))."""

    sigma: float = 0.25  # standard deviation of the noise, in pixel units
    n0: int = 100  # samples that choose the class, then are thrown away
    n: int = 10_000  # fresh samples that bound its probability
    alpha: float = 0.001  # probability that one certificate is wrong
    batch_size: int = 1000  # noisy copies in memory at once; decides how the noise is drawn, so part of the configuration
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise InputError(f"smoothing: sigma must be positive, got {self.sigma}")
        if min(self.n0, self.n, self.batch_size) < 1:
            raise InputError(f"smoothing: n0, n and batch_size must be at least 1, got {self.n0}, {self.n} and {self.batch_size}")
        if not 0 < self.alpha < 1:
            raise InputError(f"smoothing: alpha must lie between 0 and 1, got {self.alpha}")


class Certificate(NamedTuple):
    """No image within ``radius`` (l2, pixel units) changes the smoothed prediction; -1 and radius 0 mean no claim."""

    prediction: int
    radius: float
    samples: int  # forward passes spent


class SmoothedClassifier:
    """The Gaussian-smoothed version of a classifier, judged by sampling. Noise is made on the model's device, batch by batch."""

    def __init__(self, model: nn.Module, sigma: float, batch_size: int = 1000) -> None:
        """Raises InputError where the model is in train mode or sigma is not positive."""
        check_eval_mode(model, "randomized smoothing")
        if not sigma > 0 or batch_size < 1:
            raise InputError(f"smoothing: sigma must be positive and batch_size at least 1, got {sigma} and {batch_size}")
        self.model, self.sigma, self.batch_size = model, sigma, batch_size

    def certify(self, x: Tensor, generator: torch.Generator, *, n0: int = 100, n: int = 10_000, alpha: float = 0.001) -> Certificate:
        """Certify one image x [3,H,W] (Cohen 2019, Algorithm 1, CERTIFY).

        With probability at least 1 - alpha over the noise the returned radius is true. Abstains when the lower bound
        does not exceed 1/2. ``n0`` samples choose the class and take no part in the bound, without which it would be invalid.
        """
        guess = int(self.counts(x, n0, generator).argmax())
        hits = int(self.counts(x, n, generator)[guess])
        p_lower = clopper_pearson_lower(hits, n, alpha)
        if p_lower <= 0.5:
            return Certificate(ABSTAIN, 0.0, n0 + n)
        return Certificate(guess, self.sigma * float(ndtri(p_lower)), n0 + n)

    def predict(self, x: Tensor, generator: torch.Generator, *, n: int = 1000, alpha: float = 0.001) -> int:
        """The smoothed prediction for one image x [3,H,W], or -1 (Cohen 2019, Algorithm 1, PREDICT).

        With probability at most alpha does this return a class that is not the most probable one (Proposition 1 there;
        the two-sided test between the two most frequent classes is Hung and Fithian's, 2019).
        """
        counts = self.counts(x, n, generator)
        if len(counts) < 2:
            return 0
        (first, second), classes = counts.topk(2)
        sure = binomtest(int(first), int(first + second), 0.5).pvalue <= alpha
        return int(classes[0]) if sure else ABSTAIN

    @torch.no_grad()
    def counts(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """How often each class is the answer among n noisy copies of x [3,H,W] -> [K] int64 on the CPU."""
        check_images(x[None], "randomized smoothing")
        x = x.to(device_of(self.model)).float()
        total: Tensor | None = None
        for start in range(0, n, self.batch_size):
            size = min(self.batch_size, n - start)
            noise = torch.randn((size, *x.shape), generator=generator, device=x.device)
            logits = self.model(noise.mul_(self.sigma).add_(x))  # in place: one batch of noise is all the memory this takes
            if not bool(logits.isfinite().all()):
                raise InputError("the model's logits are not finite on noisy images; it must accept values somewhat outside [0,1]")
            votes = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
            total = votes if total is None else total + votes
        assert total is not None, "n must be at least 1"
        return total.cpu()


def certify_split(
    model: nn.Module,
    split: Samples,
    out: Path,
    config: SmoothingConfig | None = None,
    *,
    sample_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> list[CertRecord]:
    """Certify the samples one by one into ``out/cert.jsonl`` and return their rows in order.

    Every sample has a noise seed of its own, so a run that was killed and is started again with the same arguments ends with
    the same rows (but for ``seconds``), and a later run may add samples. Raises InputError where ``out`` holds certificates of
    another model, data set or configuration.
    """
    config = config or SmoothingConfig()
    smoothed = SmoothedClassifier(model, config.sigma, config.batch_size)
    ids = choose_ids(split, sample_ids)
    key = config_hash("randomized smoothing", config)
    settings = {
        "model": model_fingerprint(model),
        "data": data_fingerprint(split),
        "configuration": {name: getattr(config, name) for name in SmoothingConfig.__dataclass_fields__},
    }
    with writing_to(out):
        claim(out, SETTINGS, settings, RECORDS)
        log = RecordLog(out / RECORDS, CertRecord)
    certified = sum(row.correct for row in log)
    missing = log.missing(ids, key, config.seed)
    with tqdm(
        total=len(ids), initial=len(ids) - len(missing), desc=f"certify sigma={config.sigma:g}", unit="image", disable=not progress
    ) as bar:
        for sample_id in missing:
            row = _certify_sample(smoothed, split, sample_id, key, config)
            with writing_to(out):
                log.append([row])
            certified += row.correct
            bar.update()
            bar.set_postfix_str(f"right and certified {certified / len(log):.1%}", refresh=False)
    return [log.rows[i, key, config.seed] for i in ids]


def _certify_sample(smoothed: SmoothedClassifier, split: Samples, sample_id: int, key: str, config: SmoothingConfig) -> CertRecord:
    started = time.perf_counter()
    images, labels = split.fetch(torch.tensor([sample_id]))
    device = device_of(smoothed.model)
    noise = generator(device, config.seed, key, sample_id)
    # A stochastic model may draw from the global generator: lend it a state of its own, so that a resumed run repeats it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed("model noise", config.seed, key, sample_id))
        found = smoothed.certify(images[0], noise, n0=config.n0, n=config.n, alpha=config.alpha)
    label = int(labels[0])
    return CertRecord(
        sample_id=sample_id,
        config_hash=key,
        seed=config.seed,
        certificate=CERTIFICATE,
        label=label,
        prediction=found.prediction,
        radius=found.radius,
        correct=found.prediction == label,
        samples=found.samples,
        seconds=round(time.perf_counter() - started, 4),
    )


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["certify", *sys.argv[1:]]))
