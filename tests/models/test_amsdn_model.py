"""The whole model: shapes, switches, one set of values by every road, and honest gradients."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amsdn.errors import InputError
from amsdn.models import AMSDN, AMSDNConfig
from amsdn.models.pooling import pooled
from amsdn.models.summary import parameter_count
from amsdn.protocols import Analysis, Detector, is_stochastic, surrogate_of

TINY = AMSDNConfig(variant="compact", width=4)


def images(batch: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def alarmed(config: AMSDNConfig = TINY, seed: int = 0) -> AMSDN:
    """A model in eval mode all of whose parameters are random, so that gates open here and there."""
    model = AMSDN.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for module in (model.attention, model.purifier) if module is not None for p in module.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TINY, 32), (TINY, 64), (TINY, 30), (replace(TINY, num_classes=3), 224), (AMSDNConfig(variant="preact18", fpn_channels=16), 32),
        (AMSDNConfig(variant="atto", fpn_channels=16), 32), (AMSDNConfig(variant="atto", fpn_channels=16, stem_stride=4), 224),
    ],
)  # fmt: skip
def test_shapes_at_every_size(config: AMSDNConfig, size: int) -> None:
    model = AMSDN.from_config(config).eval()
    x = images(2, size)
    with torch.no_grad():
        a = model.analyze(x)
    assert a.logits.shape == (2, config.num_classes)
    assert a.logits.dtype == torch.float32
    assert a.anomaly_map.shape == (2, 1, size, size)
    assert a.anomaly_score.shape == a.detected.shape == (2,)
    assert a.detected.dtype == torch.bool
    assert ((a.anomaly_map >= 0) & (a.anomaly_map <= 1)).all()
    assert [f.shape[2:] for f in a.features] == [m.shape[2:] for m in a.level_anomaly_logits]
    assert isinstance(a, Analysis)
    assert isinstance(model, Detector)


def test_every_road_gives_the_same_logits() -> None:
    for config in (TINY, replace(TINY, consistency_samples=3)):
        model, x = alarmed(config), images()
        surrogate = surrogate_of(model)
        assert surrogate is not None
        expected = model(x)
        assert torch.equal(expected, model(x))
        assert torch.equal(expected, surrogate(x))
        assert torch.equal(expected, model.analyze(x).logits)
        assert torch.equal(expected, surrogate.analyze(x).logits)
        if config.consistency_samples == 0:
            assert torch.equal(expected, model.trace(x).logits)
        opened = sum(float(g.detach().sum()) for g in model.trace(x).gates)
        assert opened > 0
    assert not is_stochastic(model)


def test_an_image_is_judged_alone() -> None:
    model, x = alarmed(replace(TINY, consistency_samples=2)), images(4)
    with torch.no_grad():
        together, alone = model.analyze(x), model.analyze(x[2:3])
    torch.testing.assert_close(together.logits[2:3], alone.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.anomaly_score[2:3], alone.anomaly_score, atol=1e-4, rtol=1e-4)


def test_the_surrogate_adds_gate_gradients_follows_the_weights_and_is_no_part_of_the_model() -> None:
    model, x = alarmed(), images().requires_grad_()
    surrogate = surrogate_of(model)
    assert surrogate is not None
    assert surrogate.matches_forward
    assert not surrogate.training
    (deployed,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    (through,) = torch.autograd.grad(surrogate(x)[:, 0].sum(), x)
    assert deployed.abs().sum() > 0
    assert not torch.allclose(deployed, through)
    assert not any("surrogate" in name for name in model.state_dict())
    with torch.no_grad():
        model.classifier.bias += 1.0
    assert torch.equal(surrogate(x), model(x))


@pytest.mark.parametrize("stage", ["fpn", "attention", "purification"])
def test_each_stage_can_be_switched_off(stage: str) -> None:
    full, ablated = AMSDN.from_config(TINY).eval(), AMSDN.from_config(replace(TINY, **{stage: False})).eval()
    assert parameter_count(ablated) < parameter_count(full)
    x = images()
    a = ablated.analyze(x)
    assert torch.equal(a.logits, ablated(x))
    ablated.trace(x).logits.sum().backward()
    assert (a.pyramid_attention is None) is (stage == "attention")
    assert (a.anomaly_logit is None) is (stage == "purification")


def test_without_purification_and_consistency_the_model_does_not_pretend_to_detect() -> None:
    model, x = AMSDN.from_config(replace(TINY, purification=False)).eval(), images()
    a = model.analyze(x)
    assert not model.has_detector
    assert surrogate_of(model) is None
    assert a.anomaly_score.tolist() == [0.0, 0.0]
    assert not a.anomaly_map.any()
    model.detection_threshold.fill_(-1.0)
    assert not model.analyze(x).detected.any()


def test_consistency_alone_scores_by_disagreement_and_together_by_both() -> None:
    x = images()
    alone = AMSDN.from_config(replace(TINY, purification=False, consistency_samples=3)).eval()
    a = alone.analyze(x)
    assert alone.has_detector
    assert a.agreement is not None
    torch.testing.assert_close(a.anomaly_score, 1 - a.agreement)
    both = alarmed(replace(TINY, consistency_samples=3))
    b = both.analyze(x)
    assert b.agreement is not None
    assert b.anomaly_logit is not None
    head = both.trace(x).anomaly_logit
    assert head is not None
    torch.testing.assert_close(b.anomaly_score, 1 - (1 - torch.sigmoid(head)) * b.agreement)
    torch.testing.assert_close(b.anomaly_score, torch.sigmoid(b.anomaly_logit))
    torch.testing.assert_close(b.logits.exp().sum(1), torch.ones(2))


def test_training_reaches_every_parameter() -> None:
    model = alarmed().train()
    t = model.trace(images(8))
    assert t.anomaly_logit is not None
    (t.logits.square().sum() + t.anomaly_logit.sum() + sum(a.sum() for a in t.level_anomaly_logits)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert t.embedding.shape == (8, 32)


def test_autocast_and_channels_last_on_the_cpu() -> None:
    model = AMSDN.from_config(TINY).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = images(4).to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough, again = model(x), model(x)
    assert rough.dtype == torch.float32
    assert torch.equal(rough, again)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        model.train().trace(x).logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_deep_copy_is_independent() -> None:
    model, x = alarmed(), images()
    twin = copy.deepcopy(model)
    before = twin(x)
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert torch.equal(twin(x), before)
    assert twin.config == model.config


def test_defaults_resolve_to_the_documented_values() -> None:
    assert AMSDN.from_config(TINY).config.fpn_channels == 8
    assert AMSDN(variant="atto").config == AMSDNConfig(variant="atto", stem_stride=2, fpn_channels=256)
    counts = {v: parameter_count(AMSDN(variant=v)) for v in ("compact", "preact18")}
    assert 2.0e6 < counts["compact"] < 3.0e6
    assert 11e6 < counts["preact18"] < 16e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes >= 2"), ({"consistency_samples": -1}, "consistency_samples >= 0"),
        ({"fpn_channels": 0}, "fpn_channels must be"), ({"purification_threshold": 1.5}, "purification_threshold must lie"),
        ({"std": (0.0, 1.0, 1.0)}, "positive stds"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        AMSDN(variant="compact", **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 15, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_images_that_cannot_be_seen_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"too small|must have shape"):
        AMSDN.from_config(TINY).eval()(torch.rand(shape))


@pytest.mark.parametrize(
    "module", ["amsdn", "backbone.convnext_fpn", "attention.adaptive_attention", "purification.selective_purifier"]
)  # fmt: skip
def test_each_component_prints_its_shapes_without_a_warning(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"import runpy; runpy.run_module('amsdn.models.{module}', run_name='__main__')"
    if module != "amsdn":  # one real process is enough; the others print in this one
        __import__(f"amsdn.models.{module}", fromlist=["main"]).main()
        out = capsys.readouterr().out
    else:
        done = subprocess.run([sys.executable, "-W", "error", "-m", "amsdn.models.amsdn"], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), code
        out = done.stdout
    assert "[1, " in out
    assert "parameters" in out
    assert "total" in out


def test_with_bounded_evidence_no_location_is_louder_than_another() -> None:
    gen = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 8, side, side, generator=gen) for side in (8, 4, 2, 1)]
    loud = [f.clone() for f in levels]
    for f in loud:
        f[:, :, 0, 0] *= 1000.0
    for weights in (None, [2 * torch.ones_like(f[:, :1]) for f in levels]):
        for number, (level, shouted) in enumerate(zip(levels, loud, strict=True)):
            weight = None if weights is None else weights[number]
            before, after = (pooled(f, weight, bounded=True) for f in (level, shouted))
            torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)
            assert (before.norm(dim=1) <= (1 if weights is None else 2) * level.shape[1] ** 0.5 + 1e-4).all()
    for level, shouted in zip(levels, loud, strict=True):
        torch.testing.assert_close(pooled(level, None, bounded=False), level.mean((2, 3)))
        assert (pooled(shouted, None, bounded=False) - level.mean((2, 3))).norm() > 10
