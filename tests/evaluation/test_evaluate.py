import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_toys import CLASSES, SIDE, Detecting, FlipPixels, Images, Linear, Noisy, by_key, images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amsdn.attacks import EvadeDetector, PGDAttack, Targeted
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import RECORDS, EvaluateConfig, evaluate, hash_of
from amsdn.evaluation.run_folder import model_fingerprint
from amsdn.evaluation.summary import summarise
from amsdn.records import EvalRecord, read_records

CONFIG = EvaluateConfig(seed=3, batch_size=4, keep_examples=3)
ATTACKS = {"flip-1": FlipPixels(1), "flip-20": FlipPixels(20)}


def run(model: nn.Module, split: Images, out: Path, config: EvaluateConfig = CONFIG, **changes: object) -> list[EvalRecord]:
    arguments: dict[str, object] = {"attacks": ATTACKS, "progress": False, **changes}
    return evaluate(model.eval(), split, out=out, config=config, **arguments)  # type: ignore[arg-type]


def test_rows_say_what_happened(tmp_path: Path) -> None:
    model = Linear()
    split = images(10, model)
    rows = run(model, split, tmp_path)
    assert [r.attack for r in rows] == ["clean"] * 10 + ["flip-1"] * 10 + ["flip-20"] * 10
    assert [r.sample_id for r in rows] == [*range(10)] * 3
    assert [r.label for r in rows[:10]] == split.labels.tolist()
    assert [r.correct for r in rows[:10]] == [False, False] + [True] * 8
    assert {(r.family, r.budget, r.spent, r.forwards, r.backwards) for r in rows[:10]} == {("clean", 0.0, 0.0, 1, 0)}
    assert {(r.family, r.budget) for r in rows[20:]} == {("sparse", 20.0)}
    assert all(r.correct == (r.prediction == r.label) and r.correct == (r.margin > 0) for r in rows)
    assert all(r.spent == (0 if i % 10 < 2 else r.budget) for i, r in enumerate(rows[10:]))  # broken samples are not attacked
    assert not all(r.correct for r in rows[22:]), "the toy attack is meant to break something"
    assert any(r.correct for r in rows[22:])
    assert {(r.anomaly_score, r.detected, r.localisation) for r in rows} == {(None, None, None)}
    assert by_key(read_records(tmp_path / RECORDS, EvalRecord)) == by_key(rows)


def test_a_closed_form_attack_gives_closed_form_rows(tmp_path: Path) -> None:
    model = Linear(classes=2)
    split = images(6, model, wrong=0)
    eps = 4 / 255
    rows = run(model, split, tmp_path, attacks={"pgd": PGDAttack(epsilon=eps, alpha=eps, num_steps=3)})
    difference = float((model.weight[0] - model.weight[1]).abs().sum())
    for before, after in zip(rows[:6], rows[6:], strict=True):
        assert after.correct == (before.margin > eps * difference)
        assert after.spent <= eps + 1e-6


def test_a_detector_is_recorded(tmp_path: Path) -> None:
    model = Detecting()
    rows = run(model, images(6, model), tmp_path)
    clean, attacked = rows[:6], rows[12:]
    assert {(r.anomaly_score, r.detected, r.localisation) for r in clean} == {(0.0, False, None)}
    for row in attacked:
        assert row.anomaly_score == pytest.approx(row.spent / SIDE**2)
        assert row.detected == (row.spent > 0)
        assert row.localisation == (1.0 if row.spent else None)  # the toy map is exactly the changed pixels


def test_correct_is_about_the_label_and_success_about_the_attackers_goal(tmp_path: Path) -> None:
    model = Detecting()
    split = images(24, model)
    attacks = {"plain": FlipPixels(20), "towards-1": Targeted(FlipPixels(20), 1), "evade": EvadeDetector(FlipPixels(20))}
    rows = run(model, split, tmp_path, attacks=attacks)
    by_name = {name: [r for r in rows if r.attack == name] for name in ("clean", *attacks)}
    assert all(r.correct == (r.prediction == r.label) for r in rows)
    assert {(r.success, r.evades) for r in by_name["clean"]} == {(None, False)}
    assert all(r.success == (not r.correct) and not r.evades for r in by_name["plain"])
    assert all(r.success == (r.prediction == 1 != r.label) and not r.evades for r in by_name["towards-1"])
    assert all(r.success == (not r.correct and not r.detected) and r.evades for r in by_name["evade"])
    for name in ("towards-1", "evade"):  # a failed attack may leave the answer wrong all the same
        assert any(not r.correct and not r.success for r in by_name[name])
    found = summarise(rows)["attacks"]
    assert found["towards-1"]["robust_accuracy"]["successes"] == sum(
        r.correct and before.correct for r, before in zip(by_name["towards-1"], by_name["clean"], strict=True)
    )
    assert found["evade"]["wrong_undetected"]["successes"] == sum(bool(r.success) for r in by_name["evade"])
    fresh = tmp_path / "resumed"
    run(model, split, fresh, attacks=attacks)
    lines = (fresh / RECORDS).read_bytes().splitlines(keepends=True)
    (fresh / RECORDS).write_bytes(b"".join(lines[:33]) + lines[33][:40])
    assert run(model, split, fresh, attacks=attacks) == rows


def test_a_random_detector_decides_by_most_of_its_calls(tmp_path: Path) -> None:
    class Unsure(Detecting):
        stochastic = True

        def analyze(self, x: Tensor) -> SimpleNamespace:
            score = torch.where(x.mean((1, 2, 3)) > 0.5, 0.8, 0.2)
            rings = torch.rand(len(x)) < score
            return SimpleNamespace(logits=self(x), anomaly_score=score, detected=rings, anomaly_map=rings.reshape(-1, 1, 1, 1) * x[:, :1])

    model = Unsure()
    split = images(20, model)
    split.images[::2] *= 0.5
    rows = run(model, split, tmp_path, attacks={})
    assert [r.detected for r in rows] == (split.images.mean((1, 2, 3)) > 0.5).tolist()
    assert {r.detected for r in rows} == {True, False}


def test_localisation_is_only_asked_of_local_attacks(tmp_path: Path) -> None:
    model = Detecting()
    rows = run(model, images(4, model), tmp_path, attacks={"pgd": PGDAttack(epsilon=4 / 255)})
    assert {r.localisation for r in rows} == {None}


def test_examples_hold_the_first_samples(tmp_path: Path) -> None:
    model = Detecting()
    split = images(6, model)
    rows = run(model, split, tmp_path, config=EvaluateConfig(batch_size=2, keep_examples=3))
    assert sorted(p.name for p in (tmp_path / "examples").iterdir()) == ["flip-1.npz", "flip-20.npz"]
    with np.load(tmp_path / "examples" / "flip-20.npz", allow_pickle=False) as kept:
        arrays = dict(kept)
    adversarial = torch.from_numpy(arrays["adversarial"])
    assert arrays["ids"].tolist() == [0, 1, 2]
    assert arrays["clean"].dtype == arrays["adversarial"].dtype == np.float32
    assert torch.equal(torch.from_numpy(arrays["clean"]), split.images[:3])
    assert arrays["label"].tolist() == split.labels[:3].tolist()
    assert arrays["prediction"].tolist() == [r.prediction for r in rows[12:15]] == model(adversarial).argmax(1).tolist()
    assert arrays["clean_prediction"].tolist() == [r.prediction for r in rows[:3]]
    assert arrays["adv_confidence"] == pytest.approx(model(adversarial).softmax(1).amax(1).numpy())
    assert arrays["clean_confidence"] == pytest.approx(model(split.images[:3]).softmax(1).amax(1).numpy())
    assert torch.equal(torch.from_numpy(arrays["anomaly_map_adv"]), model.analyze(adversarial).anomaly_map)
    assert arrays["anomaly_map_clean"].shape == (3, 1, SIDE, SIDE)


def test_examples_come_back_the_same_if_lost(tmp_path: Path) -> None:
    model = Linear()
    split = images(10, model)
    run(model, split, tmp_path)
    picture, records = tmp_path / "examples" / "flip-20.npz", (tmp_path / RECORDS).read_bytes()
    before = picture.read_bytes()
    picture.unlink()
    run(model, split, tmp_path)
    assert picture.read_bytes() == before
    assert (tmp_path / RECORDS).read_bytes() == records
    with np.load(picture, allow_pickle=False) as arrays:
        assert "anomaly_map_adv" not in arrays


def test_a_finished_run_asks_nothing_of_the_model_again(tmp_path: Path) -> None:
    model = Linear()
    split = images(10, model)
    rows = run(model, split, tmp_path)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert run(model, split, tmp_path) == rows
    assert calls == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The records of a run of a stochastic model, which is the hardest to repeat, and a folder to replay it in."""
    model = Noisy()
    out = tmp_path_factory.mktemp("undisturbed")
    run(model, images(5, Linear()), out, attacks={"flip": FlipPixels(3)}, config=EvaluateConfig(batch_size=2, keep_examples=0))
    return (out / RECORDS).read_bytes(), out


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_at_any_byte_resumes_to_the_same_bytes(undisturbed: tuple[bytes, Path], data: st.DataObject) -> None:
    whole, out = undisturbed
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    near_an_end = st.sampled_from(ends).flatmap(lambda end: st.integers(end - 1, end + 1))
    cut = data.draw(st.one_of(near_an_end, st.integers(0, len(whole))))
    (out / RECORDS).write_bytes(whole[:cut])
    torch.manual_seed(cut)  # a process that starts again has another global state
    run(Noisy(), images(5, Linear()), out, attacks={"flip": FlipPixels(3)}, config=EvaluateConfig(batch_size=2, keep_examples=0))
    assert (out / RECORDS).read_bytes() == whole


def test_only_the_missing_rows_of_a_chunk_are_added(tmp_path: Path) -> None:
    model = Linear()
    split = images(10, model)
    rows = run(model, split, tmp_path)
    lines = (tmp_path / RECORDS).read_bytes().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if i not in (1, 14, 29)]
    (tmp_path / RECORDS).write_bytes(b"".join(kept))
    assert run(model, split, tmp_path) == rows
    assert (tmp_path / RECORDS).read_bytes().splitlines(keepends=True) == [*kept, lines[1], lines[14], lines[29]]


def test_an_attack_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    model = Linear()
    split = images(6, model)
    first = run(model, split, tmp_path / "grown", attacks={"flip-20": FlipPixels(20)})
    both = run(model, split, tmp_path / "grown")
    assert [r for r in both if r.attack != "flip-1"] == first
    assert both == run(model, split, tmp_path / "fresh")


def test_the_seed_matters_and_nothing_else_does(tmp_path: Path) -> None:
    model = Linear()
    split = images(10, model)
    rows = run(model, split, tmp_path / "a")
    torch.rand(7)  # moves the global generator
    assert run(model, split, tmp_path / "b") == rows
    other = run(model, split, tmp_path / "c", config=EvaluateConfig(seed=4, batch_size=4, keep_examples=3))
    assert [r.margin for r in other[10:]] != [r.margin for r in rows[10:]]


def test_a_subset_of_samples(tmp_path: Path) -> None:
    model = Linear()
    rows = run(model, images(10, model), tmp_path, sample_ids=[7, 2, 5])
    assert [r.sample_id for r in rows] == [7, 2, 5] * 3


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    run(Noisy(), images(4, Linear()), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": EvaluateConfig(seed=3, batch_size=5, keep_examples=3)}, r"another batch_size \(4, now 5\)"),
        ({"config": EvaluateConfig(seed=4, batch_size=4, keep_examples=3)}, r"another seed \(3, now 4\)"),
        ({"model": Linear(seed=1)}, "another model"),
        ({"sample_ids": range(9)}, r"another samples \(0\.\.9, now 0\.\.8\)"),
        ({"split": images(10, Linear(), seed=5)}, "another data"),
        ({"attacks": {"flip-1": FlipPixels(2)}}, "another attack named 'flip-1'"),
        ({"attacks": {"other": FlipPixels(1)}}, "in the run there as 'flip-1'"),
    ],
)
def test_runs_are_never_mixed(tmp_path: Path, change: dict[str, object], message: str) -> None:
    model = Linear()
    split = images(10, model)
    run(model, split, tmp_path)
    records = (tmp_path / RECORDS).read_bytes()
    with pytest.raises(InputError, match=message) as caught:
        run(**{"model": model, "split": split, "out": tmp_path, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert (tmp_path / RECORDS).read_bytes() == records


def test_records_without_settings_are_refused(tmp_path: Path) -> None:
    model = Linear()
    run(model, images(4, model), tmp_path)
    (tmp_path / "eval_config.json").unlink()
    with pytest.raises(InputError, match="cannot be resumed"):
        run(model, images(4, model), tmp_path)


def test_broken_settings_are_refused(tmp_path: Path) -> None:
    model = Linear()
    for text in ("{", "[]", "3"):
        (tmp_path / "eval_config.json").write_text(text)
        with pytest.raises(InputError, match="not a settings file"):
            run(model, images(4, model), tmp_path)


@pytest.mark.parametrize("name", ["clean", "a/b", "", "../x", ".hidden", "a b"])
def test_names_that_cannot_be_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        run(Linear(), images(4, Linear()), tmp_path, attacks={name: FlipPixels(1)})
    assert not any(tmp_path.iterdir())


def test_the_same_attack_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="twice"):
        run(Linear(), images(4, Linear()), tmp_path, attacks={"a": FlipPixels(1), "b": FlipPixels(1)})


class NotFinite(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / torch.tensor([1.0, 1.0, 0.0])


def broken_images(value: float) -> Images:
    split = images(4, Linear())
    split.images[3, 0, 0, 0] = value
    return split


@pytest.mark.parametrize(
    ("model", "split", "message"),
    [
        (Linear(), broken_images(1.5), r"must lie in \[0,1\]"),
        (Linear(), broken_images(float("nan")), r"must lie in \[0,1\]"),
        (NotFinite(), images(4, Linear()), "not finite on clean samples"),
        (Linear(), Images(images(4, Linear()).images, torch.tensor([0, 1, 2, CLASSES])), "3 classes but the data has label 3"),
        (Linear(), Images(torch.empty(0, 3, SIDE, SIDE), torch.empty(0, dtype=torch.long)), "no images"),
    ],
)
def test_unusable_input_is_one_clear_line(tmp_path: Path, model: nn.Module, split: Images, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(model, split, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[], [0, 0], [-1], [4]])
def test_sample_ids_must_exist_once(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(InputError, match=r"0\.\.3"):
        run(Linear(), images(4, Linear()), tmp_path, sample_ids=ids)


def test_train_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train mode"):
        evaluate(Linear().train(), images(4, Linear()), {}, tmp_path, progress=False)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write the run there"):
        run(Linear(), images(4, Linear()), tmp_path / "file")


def test_a_full_disk_is_one_line_and_the_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Linear()
    split = images(10, model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("amsdn.records.os.fsync", full)
        patch.setattr("amsdn.evaluation.run_folder.write_json", lambda path, value: path.write_text(json.dumps(value)))
        with pytest.raises(InputError, match="No space left on device"):
            run(model, split, tmp_path)
    assert run(model, split, tmp_path) == run(model, split, tmp_path.with_name("fresh"))


def test_bad_settings() -> None:
    for values in ({"batch_size": 0}, {"keep_examples": -1}):
        with pytest.raises(InputError, match="at least"):
            EvaluateConfig(**values)


def test_fingerprint_sees_every_tensor_and_the_kind_of_model() -> None:
    a, b = Linear(), Linear()
    assert model_fingerprint(a) == model_fingerprint(b)
    b.weight[1, 5] += 1e-6
    assert model_fingerprint(a) != model_fingerprint(b)
    assert model_fingerprint(Detecting()) != model_fingerprint(a)
    assert model_fingerprint(Linear().to(torch.bfloat16)) != model_fingerprint(a)
    scalar = nn.BatchNorm2d(3)  # has a 0-dimensional buffer
    assert model_fingerprint(scalar) == model_fingerprint(nn.BatchNorm2d(3))
    scalar.num_batches_tracked += 1
    assert model_fingerprint(scalar) != model_fingerprint(nn.BatchNorm2d(3))


def test_attack_hash_is_its_configuration() -> None:
    assert hash_of(FlipPixels(1)) == hash_of(FlipPixels(1)) != hash_of(FlipPixels(2)) != hash_of(None)


def test_defences_around_one_model_are_told_apart() -> None:
    """Their parameters are the model's; what differs lies in their configuration."""
    from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
    from amsdn.models.pixel_partition import PixelPartition

    model = Linear(side=8).eval()
    defences = [
        model,
        *(
            ChallengerMasking(model, 2, masks, coarser=c, confidence=p)
            for masks, c, p in ((2, (), 0.8), (3, (), 0.8), (2, (2,), 0.8), (2, (2,), 0.9))
        ),
        DoubleMasking(model, 2, 2),
        PixelPartition(model, 2, 2),
        PixelPartition(model, 2, 4),
        PixelPartition(model, 2, 4, tolerance=0.01),
    ]
    fingerprints = [model_fingerprint(defence) for defence in defences]
    assert len(set(fingerprints)) == len(defences)
