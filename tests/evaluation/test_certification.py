"""The engine: every sample once, in whatever company, order, shard or number of runs; its rules for those that certify."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import Images, Linear, Noisy, PairCertifier, PairConfig, images
from torch import nn

from amsdn.errors import InputError
from amsdn.evaluation.certification import RECORDS, certify_split, read_certificates
from amsdn.evaluation.certifier import ABSTAIN, Certifier, Claim, Sample
from amsdn.evaluation.evaluate import evaluate
from amsdn.evaluation.shards import Shard
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.records import CertRecord, Key, read_records

FIXED = SmoothingConfig(sigma=0.1, n0=10, n=50, alpha=0.01, fixed=True, block=10, batch_size=30, seed=5)
SEQUENTIAL = replace(FIXED, fixed=False, radii=(0.0, 0.05, 0.1))


def certify(model: nn.Module, split: Images, out: Path, config: SmoothingConfig = FIXED, **changes: Any) -> list[CertRecord]:
    return certify_split(SmoothingCertifier(model.eval(), config), split, out, progress=False, **changes)


def certify_pairs(out: Path, count: int = 7, config: PairConfig | None = None, **changes: Any) -> list[CertRecord]:
    model = Linear().eval()
    return certify_split(PairCertifier(model, config), images(count, model), out, progress=False, **changes)


def without_time(rows: list[CertRecord]) -> list[CertRecord]:
    return [replace(row, seconds=0.0) for row in rows]


# --- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FIXED, SEQUENTIAL], ids=["fixed", "sequential"])
def test_rows_of_a_split(tmp_path: Path, config: SmoothingConfig) -> None:
    model = Linear()
    split = images(8, model)
    rows = certify(model, split, tmp_path, config)
    assert [r.sample_id for r in rows] == [*range(8)]
    assert [r.label for r in rows] == split.labels.tolist()
    assert all(r.correct == (r.prediction == r.label) for r in rows)
    assert all(r.radius == 0 for r in rows if r.prediction == ABSTAIN)
    assert {(r.certificate, r.seed) for r in rows} == {("l2", 5)}
    assert {r.samples for r in rows} == {60} or not config.fixed
    assert sorted(read_records(tmp_path / RECORDS, CertRecord), key=lambda r: r.sample_id) == rows


def test_several_certificates_of_a_sample(tmp_path: Path) -> None:
    rows = certify_pairs(tmp_path)
    assert [(r.sample_id, r.certificate) for r in rows] == [(i, kind) for i in range(7) for kind in PairCertifier.kinds]
    assert {r.prediction == ABSTAIN for r in rows if r.certificate == "patch-detection"} == {True, False}
    assert len({r.key for r in rows}) == 14
    assert [(r.certificate, r.sample_id) for r in read_certificates(tmp_path)] == [
        (kind, i) for kind in PairCertifier.kinds for i in range(7)
    ]


def test_labels_never_reach_the_certifier(tmp_path: Path) -> None:
    assert Sample._fields == ("sample_id", "image")
    model = Linear().eval()
    split = images(6, model)
    other = Images(split.images, (split.labels + 1) % 3)
    for make in (lambda: PairCertifier(model), lambda: SmoothingCertifier(model, SEQUENTIAL)):
        name = make().kinds[0]
        rows, others = (certify_split(make(), s, tmp_path / f"{name}-{i}", progress=False) for i, s in enumerate((split, other)))
        assert [(r.prediction, r.radius, r.samples) for r in rows] == [(r.prediction, r.radius, r.samples) for r in others]
        assert any(r.correct for r in rows) != all(r.correct == o.correct for r, o in zip(rows, others, strict=True))


# --- going on -----------------------------------------------------------------------------------------------------------


def cuts(whole: bytes, step: int) -> list[int]:
    """Every ``step``-th byte, and those around each end of a line."""
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    return sorted({*range(0, len(whole) + 1, step), *(end + d for end in ends for d in (-1, 0, 1) if end + d <= len(whole))})


@pytest.mark.parametrize(("model", "config", "step"), [(Linear(), FIXED, 41), (Linear(), SEQUENTIAL, 41), (Noisy(), FIXED, 83)])
def test_a_file_cut_at_any_byte_resumes_to_the_same_rows(tmp_path: Path, model: nn.Module, config: SmoothingConfig, step: int) -> None:
    split = images(3, Linear())
    rows = certify(model, split, tmp_path, config)
    whole = (tmp_path / RECORDS).read_bytes()
    for cut in cuts(whole, step):
        (tmp_path / RECORDS).write_bytes(whole[:cut])
        torch.manual_seed(cut)  # a process that starts again has another global state
        resumed = certify(model, split, tmp_path, config)
        assert without_time(resumed) == without_time(rows)
        assert sorted(read_records(tmp_path / RECORDS, CertRecord), key=lambda r: r.sample_id) == resumed


def test_a_torn_row_of_a_pair_is_made_again_and_the_other_not_doubled(tmp_path: Path) -> None:
    rows = certify_pairs(tmp_path, count=3)
    whole = (tmp_path / RECORDS).read_bytes()
    for cut in cuts(whole, 13):
        (tmp_path / RECORDS).write_bytes(whole[:cut])
        assert certify_pairs(tmp_path, count=3) == rows
        written = read_records(tmp_path / RECORDS, CertRecord)
        assert len(written) == len({row.key for row in written}) == 6
        assert {row.key: row for row in written} == {row.key: row for row in rows}


def test_only_what_is_missing_is_certified(tmp_path: Path) -> None:
    certify_pairs(tmp_path, sample_ids=[4, 1])
    model = Linear().eval()
    certifier = PairCertifier(model)
    rows = certify_split(certifier, images(7, model), tmp_path, progress=False)
    assert [sample.sample_id for sample in certifier.pulled] == [0, 2, 3, 5, 6]
    assert rows == certify_pairs(tmp_path / "whole")


def test_what_is_returned_is_what_was_written_first(tmp_path: Path) -> None:
    """Of a pair with one row missing both are certified again; the row that stood keeps its place and its time."""

    class Slower(PairCertifier):
        def claims(self, sample: Sample) -> dict[str, Claim]:
            return {kind: claim._replace(seconds=9.0) for kind, claim in super().claims(sample).items()}

    certify_pairs(tmp_path, count=1)
    path, model = tmp_path / RECORDS, Linear().eval()
    path.write_bytes(path.read_bytes()[:-2])
    rows = certify_split(Slower(model), images(1, model), tmp_path, progress=False)
    assert rows == read_records(path, CertRecord)
    assert [row.seconds for row in rows] == [0.01, 9.0]


def test_samples_can_be_added_in_any_order(tmp_path: Path) -> None:
    model = Linear()
    split = images(6, model)
    certify(model, split, tmp_path / "a", SEQUENTIAL, sample_ids=[4, 1])
    later = certify(model, split, tmp_path / "a", SEQUENTIAL)
    assert without_time(later) == without_time(certify(model, split, tmp_path / "b", SEQUENTIAL))


# --- shards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shards_together_are_the_whole(tmp_path: Path, count: int) -> None:
    model = Linear()
    split = images(7, model)
    whole = certify(model, split, tmp_path / "whole", SEQUENTIAL) + certify_pairs(tmp_path / "whole")
    shards = tmp_path / "shards"
    for i in range(count, 0, -1):
        mine = certify(model, split, shards, SEQUENTIAL, shard=Shard(i, count))
        assert [row.sample_id for row in mine] == [*range(7)][i - 1 :: count]
        certify_pairs(shards, shard=Shard(i, count))
    assert len(list(shards.glob("cert*.jsonl"))) == min(count, 7)
    before = {path: path.read_bytes() for path in shards.glob("cert*.jsonl")}
    assert without_time(certify(NeverAsked(), split, shards, SEQUENTIAL) + certify_pairs(shards)) == without_time(whole)
    assert {path: path.read_bytes() for path in shards.glob("cert*.jsonl")} == before
    assert without_time(read_certificates(shards)) == without_time(read_certificates(tmp_path / "whole"))


class NeverAsked(Linear):
    """Linear by its fingerprint, but must not be asked."""

    __module__, __qualname__ = Linear.__module__, Linear.__qualname__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is left to certify")


def test_a_torn_shard_is_completed_by_an_unsharded_run(tmp_path: Path) -> None:
    expected = certify_pairs(tmp_path / "whole")
    certify_pairs(tmp_path, shard=Shard(1, 2))
    certify_pairs(tmp_path, shard=Shard(2, 2))
    torn = tmp_path / "cert.2-of-2.jsonl"
    torn.write_bytes(torn.read_bytes()[:-40])
    assert certify_pairs(tmp_path) == expected
    assert certify_pairs(tmp_path, shard=Shard(2, 2)) == expected[2:4] + expected[6:8] + expected[10:12]
    rows = [row for path in tmp_path.glob("cert*.jsonl") for row in read_records(path, CertRecord)]
    assert len(rows) == len({row.key for row in rows}) == 14


def test_two_files_that_agree_are_one_and_two_that_contradict_are_refused(tmp_path: Path) -> None:
    rows = certify_pairs(tmp_path)
    copy = tmp_path / "cert.1-of-9.jsonl"
    copy.write_bytes((tmp_path / RECORDS).read_bytes().replace(b'"seconds": 0.01', b'"seconds": 7.5'))
    assert {row.key for row in read_certificates(tmp_path)} == {row.key for row in rows}
    assert len(read_certificates(tmp_path)) == len(rows)
    copy.write_bytes((tmp_path / RECORDS).read_bytes().replace(b'"radius": 2.0', b'"radius": 3.0'))
    for use in (lambda: read_certificates(tmp_path), lambda: certify_pairs(tmp_path)):
        with pytest.raises(InputError, match="contradicts another file") as caught:
            use()
        assert "\n" not in str(caught.value)


# --- folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Linear(seed=1), FIXED, "another model"),
        (Linear(), replace(FIXED, sigma=0.2), "another configuration"),
        (Linear(), SEQUENTIAL, "another conf"),
    ],
)
def test_certificates_are_never_mixed(tmp_path: Path, model: nn.Module, config: SmoothingConfig, message: str) -> None:
    certify(Linear(), images(3, Linear()), tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        certify(model, images(3, Linear()), tmp_path, config)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="another data"):
        certify(Linear(), images(3, Linear(), seed=1), tmp_path)


def test_methods_and_evaluation_share_a_folder(tmp_path: Path) -> None:
    model = Linear().eval()
    split = images(7, model)
    certify(model, split, tmp_path)
    evaluate(model, split, {}, tmp_path, progress=False)
    pairs = certify_pairs(tmp_path)
    with pytest.raises(InputError, match="another configuration"):
        certify_pairs(tmp_path, config=PairConfig(more=1))
    assert without_time(certify(model, split, tmp_path)) == without_time(certify(model, split, tmp_path / "alone"))
    assert certify_pairs(tmp_path / "other") == pairs
    assert [row.certificate for row in read_certificates(tmp_path)] == ["l2"] * 7 + ["patch"] * 7 + ["patch-detection"] * 7


def test_a_model_in_train_mode_and_strange_images(tmp_path: Path) -> None:
    model = Linear()
    with pytest.raises(InputError, match="train mode"):
        certify_split(PairCertifier(model), images(3, model), tmp_path, progress=False)
    split = images(3, model)
    split.images[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"sample 1: pixels"):
        certify_split(PairCertifier(model.eval()), split, tmp_path, progress=False)


# --- certifiers that break the rules -------------------------------------------------------------------------------------


def breaking(how: Any) -> type[PairCertifier]:
    """A certifier whose results pass through ``how``."""

    class Breaking(PairCertifier):
        def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
            return iter(how(list(super().certify(samples))))

    return Breaking


def with_claim(claim: Claim) -> Any:
    return lambda found: [*found[:-1], (found[-1][0], {**found[-1][1], "patch": claim})]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda found: found[1:], r"claimed nothing of samples \[2\]"),
        (lambda found: [*found, found[0]], "twice"),
        (lambda found: [*found, (99, found[0][1])], "not given: 99"),
        (lambda found: [(found[0][0], {"patch": found[0][1]["patch"]})], r"\['patch'\], not"),
        (lambda found: [(found[0][0], {**found[0][1], "l0": found[0][1]["patch"]})], "'l0'"),
        (with_claim(Claim(1, float("nan"), 1, 0.0)), "not a claim"),
        (with_claim(Claim(1, float("inf"), 1, 0.0)), "not a claim"),
        (with_claim(Claim(1, -0.5, 1, 0.0)), "not a claim"),
        (with_claim(Claim(ABSTAIN, 0.5, 1, 0.0)), "not a claim"),
        (with_claim(Claim(-2, 0.0, 1, 0.0)), "not a claim"),
    ],
)
def test_broken_rules_are_noticed(tmp_path: Path, how: Any, message: str) -> None:
    model = Linear().eval()
    with pytest.raises(AssertionError, match=message):
        certify_split(breaking(how)(model), images(3, model), tmp_path, progress=False)


def test_a_certifier_that_pulls_no_sample_is_noticed(tmp_path: Path) -> None:
    class Idle(PairCertifier):
        def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
            return iter(())

    model = Linear().eval()
    with pytest.raises(AssertionError, match=r"claimed nothing of samples \[0, 1, 2\]"):
        certify_split(Idle(model), images(3, model), tmp_path, progress=False)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_what_was_written_before_an_error_stays(tmp_path: Path, error: BaseException) -> None:
    class Failing(PairCertifier):
        def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
            for count, found in enumerate(super().certify(samples)):
                if count == 4:
                    raise error
                yield found

    model = Linear().eval()
    with pytest.raises(type(error)):
        certify_split(Failing(model), images(7, model), tmp_path, progress=False)
    kept: dict[Key, CertRecord] = {row.key: row for row in read_certificates(tmp_path)}
    assert sorted({row.sample_id for row in kept.values()}) == [0, 1, 2, 5]
    rows = certify_pairs(tmp_path)
    assert rows == certify_pairs(tmp_path / "undisturbed")
    assert all(kept.get(row.key, row) == row for row in rows)


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amsdn import records

    calls = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    expected = certify_pairs(tmp_path / "undisturbed")
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(records.os, "fsync", full)
        with pytest.raises(InputError, match="No space left") as caught:
            certify_pairs(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert certify_pairs(tmp_path / "run") == expected


def test_the_default_seed_of_a_certifier() -> None:
    assert Certifier.seed == 0
