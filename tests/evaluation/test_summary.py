import json
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from evaluation_toys import cert_row, eval_row
from hypothesis import given
from hypothesis import strategies as st

from amsdn.errors import InputError
from amsdn.evaluation.detection import auroc
from amsdn.evaluation.statistics import proportion
from amsdn.evaluation.summary import certified_curve, default_radii, summarise
from amsdn.evaluation.table import complete_table
from amsdn.records import EvalRecord

ATTACKS = {"a5": ("sparse", 5.0), "b5": ("sparse", 5.0), "a9": ("sparse", 9.0), "p4": ("patch", 4.0)}


def rows_of(clean: Iterable[bool], **survives: Iterable[bool]) -> list[EvalRecord]:
    """One row per sample for clean and each named attack; True where the model is still right."""
    rows = [eval_row(i, correct=ok) for i, ok in enumerate(clean)]
    for name, results in survives.items():
        family, budget = ATTACKS[name]
        rows += [eval_row(i, name, correct=ok, family=family, budget=budget) for i, ok in enumerate(results)]
    return rows


def flags(text: str) -> list[bool]:
    return [c == "1" for c in text]


def count(share: dict[str, int]) -> tuple[int, int]:
    return share["successes"], share["n"]


def test_numbers_by_hand() -> None:
    rows = rows_of(flags("111110"), a5=flags("011110"), b5=flags("101110"), a9=flags("111010"), p4=flags("111100"))
    found = summarise(rows)
    assert found["samples"] == 6
    assert count(found["clean"]) == (5, 6)
    assert count(found["attacks"]["a5"]["robust_accuracy"]) == (4, 6)
    assert found["attacks"]["a5"]["successes"] == 1  # the clean-wrong sample is no success of the attack
    assert [(t["family"], t["budget"], t["attacks"], count(t["robust_accuracy"])) for t in found["threats"]] == [
        ("sparse", 5.0, ["a5", "b5"], (3, 6)),
        ("sparse", 9.0, ["a5", "b5", "a9"], (2, 6)),  # what broke at 5 is broken at 9
        ("patch", 4.0, ["p4"], (4, 6)),
    ]
    assert [(p["budget"], count(p["robust_accuracy"])) for p in found["curves"]["sparse"]] == [(5.0, (3, 6)), (9.0, (2, 6))]
    assert found["headline"] == {"sparse": 9.0, "patch": 4.0}
    assert count(found["union"]) == (1, 6)
    assert found["clean"] == proportion(5, 6).as_dict()


def test_a_clean_wrong_sample_is_broken_even_if_an_attack_happened_to_fix_it() -> None:
    found = summarise(rows_of(flags("10"), a5=flags("11")))
    assert count(found["attacks"]["a5"]["robust_accuracy"]) == count(found["union"]) == (1, 2)


def test_an_attack_that_spends_less_than_its_budget_counts_at_the_smaller_budget() -> None:
    rows = rows_of(flags("11"), a5=flags("11"))
    rows += [eval_row(i, "a9", correct=False, family="sparse", budget=9.0, spent=spent) for i, spent in enumerate((5.0, 6.0))]
    assert [count(p["robust_accuracy"]) for p in summarise(rows)["curves"]["sparse"]] == [(1, 2), (0, 2)]


def test_headline_budgets_can_be_chosen() -> None:
    rows = rows_of(flags("11"), a5=flags("01"), a9=flags("10"), p4=flags("11"))
    found = summarise(rows, headline={"sparse": 5, "patch": 4, "linf": 0.03, "l2": 0.5})
    assert found["headline"] == {"sparse": 5.0, "patch": 4.0}  # what was not evaluated cannot be claimed
    assert count(found["union"]) == (1, 2)
    assert summarise(rows, headline={"sparse": 7})["headline"] == {"sparse": 9.0}  # the largest that was
    assert summarise(rows, headline={"linf": 0.03})["headline"] == {"sparse": 9.0, "patch": 4.0}


def test_incomplete_samples_are_dropped_and_counted() -> None:
    rows = rows_of(flags("1111"), a5=flags("1100"))
    found = summarise([r for r in rows if (r.attack, r.sample_id) not in {("a5", 3), ("clean", 0)}])
    assert (found["samples"], found["dropped"]) == (2, 2)
    assert count(found["clean"]) == (2, 2)
    assert count(found["attacks"]["a5"]["robust_accuracy"]) == (1, 2)


def test_clean_rows_alone_are_a_result() -> None:
    found = summarise(rows_of(flags("110")))
    assert (count(found["clean"]), found["attacks"], found["union"], found["headline"]) == ((2, 3), {}, None, {})


@given(st.lists(st.tuples(*[st.booleans()] * 5), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_worst_cases_against_brute_force(samples: list[tuple[bool, ...]], shuffle: random.Random) -> None:
    clean, *survived = zip(*samples, strict=True)
    rows = rows_of(clean, **dict(zip(ATTACKS, survived, strict=True)))
    found = summarise(rows)
    n = len(samples)
    assert count(found["curves"]["sparse"][0]["robust_accuracy"]) == (sum(c and a and b for c, a, b, _, _ in samples), n)
    assert count(found["curves"]["sparse"][1]["robust_accuracy"]) == (sum(all(s[:4]) for s in samples), n)
    assert count(found["union"]) == (sum(all(s) for s in samples), n)
    shuffle.shuffle(rows)
    again = summarise(rows)
    assert (again["union"], again["clean"], again["headline"]) == (found["union"], found["clean"], found["headline"])
    assert {k: again["attacks"][k] for k in ATTACKS} == {k: found["attacks"][k] for k in ATTACKS}


def test_rejection_by_hand() -> None:
    """Twenty clean scores: at 5 % one may be rejected, at 1 % none; under attack sample 0 is right, 1 to 3 wrong with growing scores."""
    clean = [eval_row(i, correct=i != 19, anomaly_score=i / 100, detected=i > 18) for i in range(20)]
    scores = {1: 0.1, 2: 0.185, 3: 0.5}
    attacked = [
        eval_row(i, "a5", correct=i not in (1, 2, 3, 19), family="sparse", budget=5.0, anomaly_score=s, detected=s > 0.18)
        for i in range(20)
        for s in (scores.get(i, 0.0),)
    ]
    strict, usual = summarise(clean + attacked)["threats"][0]["rejecting"]
    assert (strict["fpr"], strict["threshold"], usual["fpr"], usual["threshold"]) == (0.01, 0.19, 0.05, 0.18)
    assert (count(strict["kept"]), count(usual["kept"])) == ((19, 20), (19, 20))  # the clean image that is rejected is wrong anyway
    assert (count(strict["safe"]), count(usual["safe"])) == ((17, 20), (18, 20))  # 19 is wrong clean: at 1 % it is accepted
    higher = [
        replace(row, detected=(row.anomaly_score or 0) > 0.3) for row in clean + attacked
    ]  # attacks aimed below .3: none is judged below
    at_5 = summarise(higher)["threats"][0]["rejecting"][1]
    assert (at_5["threshold"], count(at_5["safe"])) == (0.19, (17, 20))
    without = summarise([replace(row, anomaly_score=None) for row in clean + attacked])
    assert without["threats"][0]["rejecting"] is None


def test_classes_and_calibration_by_hand() -> None:
    rows = [replace(row, label=row.sample_id % 2, confidence=0.75) for row in rows_of(flags("1101"), a5=flags("1001"), p4=flags("0101"))]
    found = summarise(rows)
    even, odd = found["classes"]
    assert (even["label"], even["n"], count(even["clean"]), count(even["robust"]["sparse"]), count(even["robust"]["patch"])) == (
        0,
        2,
        (1, 2),
        (1, 2),
        (0, 2),
    )
    assert (odd["label"], count(odd["clean"]), count(odd["robust"]["sparse"]), count(odd["robust"]["patch"])) == (1, (2, 2), (1, 2), (2, 2))
    assert {name: told["error"] for name, told in found["calibration"].items()} == {"clean": 0.0, "a5": 0.25, "p4": 0.25}
    assert summarise(rows_of(flags("11")))["calibration"] == {}  # rows from before there was a confidence


def test_pointing_and_overlap_are_means_over_successful_attacks() -> None:
    rows = detected_rows([(0.1, 0.9)] * 4, clean="1111", attacked="0001", flagged="0000")
    rows = [replace(r, pointing=float(r.sample_id % 2), overlap=r.sample_id / 4) if r.attack == "a5" else r for r in rows]
    found = summarise(rows)["attacks"]["a5"]["localisation"]
    assert (found["pointing"]["value"], found["pointing"]["n"]) == (pytest.approx(1 / 3), 3)
    assert found["overlap"]["value"] == pytest.approx(0.25)
    assert found["overlap"]["low"] <= 0.25 <= found["overlap"]["high"]


def detected_rows(scores: list[tuple[float, float]], clean: str, attacked: str, flagged: str) -> list[EvalRecord]:
    """(clean score, attacked score) per sample; ``flagged`` is the model's own decision under attack."""
    rows = [
        eval_row(i, correct=ok, anomaly_score=s[0], detected=s[0] > 0.8) for i, (s, ok) in enumerate(zip(scores, flags(clean), strict=True))
    ]
    return rows + [
        eval_row(i, "a5", correct=ok, family="sparse", budget=5.0, anomaly_score=s[1], detected=flag, localisation=s[1])
        for i, (s, ok, flag) in enumerate(zip(scores, flags(attacked), flags(flagged), strict=True))
    ]


def test_detection_is_about_successful_attacks() -> None:
    scores = [(0.1, 0.9), (0.2, 0.15), (0.3, 0.7), (0.4, 0.99), (0.85, 0.0)]
    found = summarise(detected_rows(scores, clean="11110", attacked="00010", flagged="10010"))
    attack = found["attacks"]["a5"]
    detection = attack["detection"]
    same, attacked = [0.1, 0.2, 0.3], [0.9, 0.15, 0.7]  # samples 0..2: clean-correct, then fooled
    area = auroc(same, attacked)
    assert area is not None
    assert detection["auroc"] == {"value": area.value, "low": area.low, "high": area.high}
    assert area.value == 7 / 9
    assert (detection["fpr"], detection["threshold"]) == (0.05, 0.85)  # from all five clean images, of which none may be flagged
    assert count(detection["tpr"]) == (1, 3)
    assert count(detection["flagged"]) == (1, 3)
    assert count(attack["wrong_undetected"]) == (3, 5)  # samples 1, 2 and the clean-wrong one
    assert count(found["false_positives"]) == (1, 5)
    assert attack["localisation"] == {"mean": pytest.approx((0.9 + 0.15 + 0.7) / 3), "n": 3, "pointing": None, "overlap": None}


def test_unnoticed_is_the_worst_case_over_attacks_that_evade_and_those_that_do_not() -> None:
    rows = detected_rows([(0.1, 0.9)] * 4, clean="1101", attacked="0001", flagged="1010")  # sample 2 is wrong, unnoticed, without an attack
    quiet = [(True, False), (False, False), (True, True), (True, False)]  # (correct, detected): only sample 1 is wrong and passes
    joint = {"family": "sparse", "budget": 5.0, "evades": True, "anomaly_score": 0.2}
    rows += [eval_row(i, "joint", correct=ok, detected=seen, **joint) for i, (ok, seen) in enumerate(quiet)]
    (threat,) = summarise(rows)["threats"]
    assert count(threat["unnoticed"]) == (2, 4)  # 1 and 2; sample 0 was wrong but caught, by the only attack that broke it
    assert count(threat["robust_accuracy"]) == (1, 4)
    assert (threat["attacks"], threat["evading"]) == (["a5", "joint"], ["joint"])
    assert summarise(rows_of(flags("1"), a5=flags("0")))["threats"][0]["unnoticed"] is None


def test_detection_without_a_successful_attack_has_no_numbers() -> None:
    attack = summarise(detected_rows([(0.1, 0.9)], clean="1", attacked="1", flagged="1"))["attacks"]["a5"]
    assert attack["detection"]["auroc"] is None
    assert attack["detection"]["roc"] == []
    assert attack["detection"]["tpr"]["value"] is None
    assert attack["localisation"] is None


def test_no_detector() -> None:
    found = summarise(rows_of(flags("11"), a5=flags("01")))
    assert found["false_positives"] is None
    assert found["attacks"]["a5"]["detection"] is None
    assert found["attacks"]["a5"]["wrong_undetected"] is None


def test_queries_are_those_of_samples_that_had_to_be_attacked() -> None:
    rows = rows_of(flags("110"))
    rows += [eval_row(i, "a5", family="sparse", budget=5.0, forwards=f, backwards=b) for i, (f, b) in enumerate([(10, 4), (20, 0), (1, 0)])]
    attack = summarise(rows)["attacks"]["a5"]
    assert (attack["mean_forwards"], attack["mean_backwards"]) == (15, 2)


def test_certified_numbers() -> None:
    certificates = [cert_row(0, 0.5), cert_row(1, 0.25), cert_row(2, 0.9, prediction=2), cert_row(3, 0.0, prediction=-1)]
    found = summarise(rows_of(flags("1111")), certificates, radii={"l2": [0, 0.25, 0.26, 0.5, 0.6]})["certified"]["l2"]
    assert [(p["radius"], count(p["accuracy"])) for p in found["curve"]] == [
        (0, (2, 4)),
        (0.25, (2, 4)),
        (0.26, (1, 4)),
        (0.5, (1, 4)),
        (0.6, (0, 4)),
    ]
    assert (count(found["accuracy"]), count(found["abstained"])) == ((2, 4), (1, 4))
    assert (found["samples"], found["mean_samples"], found["mean_seconds"], found["seconds"]) == (4, 100, 0.5, 2.0)


def test_default_radii_reach_beyond_the_largest_and_hit_the_customary_ones() -> None:
    assert {0.0, 0.25, 0.5, 0.75, 1.0} <= set(default_radii("l2", 0.3))
    assert default_radii("l2", 1.32)[-1] == 1.35
    assert default_radii("l0", 3) == [0, 1, 2, 3, 4]
    assert certified_curve([cert_row(0, 1.32)], default_radii("l2", 1.32))[-1]["accuracy"]["value"] == 0


def test_the_summary_is_plain_json_without_nan() -> None:
    rows = detected_rows([(0.1, 0.9), (0.2, 0.1)], clean="10", attacked="00", flagged="10")
    found = summarise(rows, [cert_row()])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([eval_row(0, "a5", family="sparse", budget=5.0)], "no rows of the unattacked images"),
        ([], "no rows of the unattacked images"),
        ([eval_row(0), eval_row(0)], "two rows of attack 'clean' for sample 0"),
        ([eval_row(0), eval_row(1, config_hash="other")], "two configurations"),
        ([eval_row(0), eval_row(1, seed=1)], "two configurations or seeds"),
        ([eval_row(0), eval_row(1, "a5")], "no sample has rows for every attack"),
        ([eval_row(0), eval_row(0, "a5", label=2)], "disagree about labels"),
    ],
)
def test_rows_that_cannot_be_of_one_run(rows: list[EvalRecord], message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete_table(rows)


def test_certificates_of_two_runs() -> None:
    with pytest.raises(InputError, match="one run at a time"):
        summarise([eval_row()], [cert_row(0), cert_row(0)])
