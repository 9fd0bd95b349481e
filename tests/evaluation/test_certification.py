import csv
import math
from pathlib import Path

import pytest
import torch
from evaluation_toys import HalfSpace, Images, Linear, Noisy, images
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.evaluation.certification import ABSTAIN, RECORDS, SmoothedClassifier, SmoothingConfig, certify_split
from amsdn.evaluation.statistics import proportion
from amsdn.evaluation.summary import certified_curve
from amsdn.records import CertRecord, read_records

COHEN = Path(__file__).parents[3] / "shared/data/third_party/cohen_cifar10_resnet110_sigma_0.25.tsv"
SIDE = 4


def half_space(seed: int = 0) -> HalfSpace:
    direction = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return HalfSpace(direction, float(0.5 * direction.sum() / direction.norm())).eval()


def points(model: HalfSpace, distances: list[float]) -> Tensor:
    """Images at these signed distances from the plane, around mid grey."""
    grey = torch.full((len(distances), 3, SIDE, SIDE), 0.5)
    step = torch.tensor(distances) - model.distance(grey)
    x = grey + step.reshape(-1, 1, 1, 1) * model.direction.reshape(3, SIDE, SIDE)
    assert x.min() >= 0
    assert x.max() <= 1
    return x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chance_of_more(p: float, n: int) -> float:
    """Three standard errors above p: what n trials of probability p stay under."""
    return p + 3 * math.sqrt(p * (1 - p) / n)


def test_a_half_space_is_never_over_certified_and_nearly_fully_certified() -> None:
    model = half_space()
    smoothed = SmoothedClassifier(model, 0.25)
    distances = [0.02 * i for i in range(-25, 26)]
    for i, (x, distance) in enumerate(zip(points(model, distances), distances, strict=True)):
        prediction, radius, samples = smoothed.certify(x, seeded(i), n0=100, n=4000, alpha=0.001)
        assert samples == 4100
        assert radius <= abs(distance) + 1e-6
        if abs(distance) > 0.05:
            assert prediction == int(distance > 0)
            assert radius > 0.9 * abs(distance) - 0.025


def test_the_radius_is_cohens_formula() -> None:
    """With every vote for one class, p_lower is alpha ** (1/n) in closed form."""
    model = half_space()
    prediction, radius, _ = SmoothedClassifier(model, 0.1).certify(points(model, [0.9])[0], seeded(0), n0=10, n=500, alpha=0.001)
    assert prediction == 1
    assert radius == pytest.approx(0.1 * ndtri(0.001 ** (1 / 500)))


def test_alpha_is_the_probability_of_an_untrue_radius() -> None:
    """On a coin of known bias the radius exceeds the truth in at most a share alpha of certificates, up to simulation error."""
    model, distance, sigma, alpha, trials = half_space(), 0.1, 0.25, 0.1, 500
    smoothed = SmoothedClassifier(model, sigma)
    x = points(model, [distance])[0]
    untrue = sum(smoothed.certify(x, seeded(i), n0=20, n=60, alpha=alpha).radius > distance + 1e-6 for i in range(trials))
    assert untrue / trials <= chance_of_more(alpha, trials)
    assert untrue > 0, "a bound that is never wrong at alpha 0.1 would be needlessly loose"


def test_on_the_boundary_any_claim_is_untrue_and_as_rare_as_alpha() -> None:
    """Fails if the samples that choose the class also bound it: the level would then be about twice alpha."""
    model, alpha, trials = half_space(), 0.2, 500
    smoothed = SmoothedClassifier(model, 0.25)
    x = points(model, [0.0])[0]
    claims = sum(smoothed.certify(x, seeded(i), n0=60, n=61, alpha=alpha).prediction != ABSTAIN for i in range(trials))
    assert claims / trials <= chance_of_more(alpha, trials)


def test_abstention_claims_nothing() -> None:
    model = half_space()
    found = SmoothedClassifier(model, 0.25).certify(points(model, [0.0])[0], seeded(1), n0=50, n=100, alpha=0.001)
    assert found == (ABSTAIN, 0.0, 150)


def test_predict_is_right_or_abstains() -> None:
    model, alpha, trials = half_space(), 0.1, 400
    smoothed = SmoothedClassifier(model, 0.25)
    near, far = points(model, [0.01, 0.3])
    assert smoothed.predict(far, seeded(0), n=200, alpha=1e-6) == 1
    answers = [smoothed.predict(near, seeded(i), n=50, alpha=alpha) for i in range(trials)]
    for i, answer in enumerate(answers[:50]):
        votes = smoothed.counts(near, 50, seeded(i))
        tail = math.fsum(math.comb(50, k) for k in range(int(votes.max()), 51)) / 2**50
        assert answer == (int(votes.argmax()) if 2 * tail <= alpha else ABSTAIN)
    assert answers.count(0) / trials <= chance_of_more(alpha, trials)
    assert answers.count(ABSTAIN) > trials / 2
    assert answers.count(1) > 0


class Watching(nn.Module):
    """Answers class 0 and remembers the batches it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


def test_noise_is_gaussian_fresh_unclipped_and_made_in_batches() -> None:
    model = Watching().eval()
    x = torch.full((3, SIDE, SIDE), 0.9)
    counts = SmoothedClassifier(model, 0.5, batch_size=64).counts(x, 1000, seeded(0))
    assert counts.tolist() == [1000, 0]
    assert [len(b) for b in model.seen] == [64] * 15 + [40]
    noise = torch.cat(model.seen) - x
    assert (noise + x).max() > 1.5
    assert (noise + x).min() < 0
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.5 / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)
    assert float((noise < 0.25).float().mean()) == pytest.approx(float(ndtr(0.5)), abs=0.01)
    assert len(torch.unique(noise[:, 0, 0, 0])) > 990
    assert torch.equal(x, torch.full((3, SIDE, SIDE), 0.9))


def test_batch_statistics_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))
    with pytest.raises(InputError, match="train mode"):
        SmoothedClassifier(model, 0.25)
    SmoothedClassifier(model.eval(), 0.25)


@pytest.mark.parametrize(
    "values", [{"sigma": 0.0}, {"sigma": float("nan")}, {"n": 0}, {"n0": 0}, {"batch_size": 0}, {"alpha": 0.0}, {"alpha": 1.0}]
)
def test_bad_settings(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match="smoothing"):
        SmoothingConfig(**values)  # type: ignore[arg-type]


def test_images_outside_the_box_and_unusable_logits() -> None:
    smoothed = SmoothedClassifier(half_space(), 0.25)
    with pytest.raises(InputError, match=r"\[0,1\]"):
        smoothed.certify(torch.full((3, SIDE, SIDE), 2.0), seeded(0))

    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    with pytest.raises(InputError, match="not finite on noisy images"):
        SmoothedClassifier(Broken(side=SIDE).eval(), 0.25).certify(torch.rand(3, SIDE, SIDE, generator=seeded(0)), seeded(0))


CONFIG = SmoothingConfig(sigma=0.1, n0=10, n=50, alpha=0.01, batch_size=32, seed=5)


def certify(model: nn.Module, split: Images, out: Path, config: SmoothingConfig = CONFIG, **changes: object) -> list[CertRecord]:
    return certify_split(model.eval(), split, out, config, progress=False, **changes)  # type: ignore[arg-type]


def without_time(rows: list[CertRecord]) -> list[tuple[object, ...]]:
    return [(r.key, r.certificate, r.label, r.prediction, r.radius, r.correct, r.samples) for r in rows]


def test_rows_of_a_split(tmp_path: Path) -> None:
    model = Linear()
    split = images(8, model)
    rows = certify(model, split, tmp_path)
    assert [r.sample_id for r in rows] == [*range(8)]
    assert [r.label for r in rows] == split.labels.tolist()
    assert all(r.correct == (r.prediction == r.label) for r in rows)
    assert all((r.radius > 0) == (r.prediction != ABSTAIN) for r in rows)
    assert {(r.certificate, r.samples, r.seed) for r in rows} == {("l2", 60, 5)}
    assert read_records(tmp_path / RECORDS, CertRecord) == rows


@pytest.mark.parametrize("model", [Linear(), Noisy()], ids=["plain", "stochastic"])
def test_a_file_cut_at_any_byte_resumes_to_the_same_rows(tmp_path: Path, model: nn.Module) -> None:
    split = images(3, Linear())
    rows = certify(model, split, tmp_path)
    whole = (tmp_path / RECORDS).read_bytes()
    for cut in range(0, len(whole) + 1, 1 if isinstance(model, Noisy) else 7):
        (tmp_path / RECORDS).write_bytes(whole[:cut])
        torch.manual_seed(cut)  # a process that starts again has another global state
        resumed = certify(model, split, tmp_path)
        assert without_time(resumed) == without_time(rows)
        assert read_records(tmp_path / RECORDS, CertRecord) == resumed


def test_samples_can_be_added_in_any_order(tmp_path: Path) -> None:
    model = Linear()
    split = images(6, model)
    certify(model, split, tmp_path / "a", sample_ids=[4, 1])
    later = certify(model, split, tmp_path / "a")
    assert without_time(later) == without_time(certify(model, split, tmp_path / "b"))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Linear(seed=1), CONFIG, "another model"),
        (Linear(), SmoothingConfig(sigma=0.2, n0=10, n=50, alpha=0.01, batch_size=32, seed=5), "another configuration"),
    ],
)
def test_certificates_are_never_mixed(tmp_path: Path, model: nn.Module, config: SmoothingConfig, message: str) -> None:
    certify(Linear(), images(3, Linear()), tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        certify(model, images(3, Linear()), tmp_path, config)
    assert "\n" not in str(caught.value)


def test_evaluation_and_certification_share_a_folder(tmp_path: Path) -> None:
    from amsdn.evaluation.evaluate import evaluate

    model = Linear().eval()
    split = images(3, model)
    certify(model, split, tmp_path)
    evaluate(model, split, {}, tmp_path, progress=False)
    assert without_time(certify(model, split, tmp_path)) == without_time(certify(model, split, tmp_path / "alone"))


@pytest.mark.skipif(not COHEN.exists(), reason=f"Cohen's published log is not at {COHEN}")
def test_cohens_published_log_gives_his_published_curve() -> None:
    with COHEN.open(newline="") as file:
        rows = [
            CertRecord(
                int(r["idx"]),
                "",
                0,
                "l2",
                int(r["label"]),
                int(r["predict"]),
                float(r["radius"]),
                r["correct"] == "1",
                100_100,
                float(r["time"]),
            )
            for r in csv.DictReader(file, delimiter="\t")
        ]
    assert len(rows) == 500
    curve = certified_curve(rows, [0.0, 0.25, 0.5, 0.75])
    assert [round(100 * p["accuracy"]["value"], 1) for p in curve] == [74.8, 60.0, 42.8, 26.6]
    assert curve[1]["accuracy"] == proportion(300, 500).as_dict()
