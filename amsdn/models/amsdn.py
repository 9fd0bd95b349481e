"""The Adaptive Multi-Scale Defense Network: backbone, pyramid, attention, purification, consistency, head.

``python -m amsdn.models.amsdn`` prints shapes and parameter counts.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.attention.adaptive_attention import AdaptiveAttention
from amsdn.models.backbone.convnext_fpn import SMALL, FeaturePyramid, build_backbone
from amsdn.models.consistency import Occlusion, consistent_prediction, joint_anomaly_logit
from amsdn.models.detection import DetectionHead, conformal_threshold
from amsdn.models.double_masking import ChallengerMasking
from amsdn.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from amsdn.models.pooling import pooled
from amsdn.models.purification.selective_purifier import PurifierOutput, SelectivePurifier

LEVELS = 4


@dataclass(frozen=True)
class AMSDNConfig:
    """Everything that shapes an AMSDN; each stage can be switched off for an ablation."""

    num_classes: int = 10
    variant: str = "tiny"  # compact, preact18, tiny, nano, pico, atto or timm:NAME
    pretrained: bool | str = False  # True: timm's ImageNet weights; or the path of a safetensors file
    stem_stride: int | None = None  # ConvNeXt only; None: 4 if pretrained else 2 (which suits 32 px)
    width: int = 32  # compact only
    fpn_channels: int | None = None  # None: 256, for compact 2 * width
    fpn: bool = True
    attention: bool = True
    purification: bool = True
    purification_threshold: float = 0.5
    consistency_samples: int = 0  # at least so many occluded views per prediction; 0 switches the stage off
    bounded_evidence: bool = (
        False  # features of every location have unit length when pooled; only attention makes one louder, 8 times at most
    )
    drop_path: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Stages(NamedTuple):
    """What each stage handed on. Lists have one entry per level, finest first; they are empty where a stage is off."""

    features: list[Tensor]  # [B,C,h,w], before purification
    evidence: list[Tensor]  # [B,C], their means over locations, purified and weighted by attention
    embedding: Tensor  # [B,4C], what the classifier sees
    logits: Tensor  # [B,K] of the image itself, without consistency
    spatial_attention: list[Tensor]  # [B,1,h,w] in (0,2)
    pyramid_attention: Tensor | None  # [B,4,h,w] on the second level's grid, summing to 1 over the levels
    level_anomaly_logits: list[Tensor]  # [B,1,h,w]
    gates: list[Tensor]  # [B,1,h,w] in {0,1}


@dataclass(frozen=True)
class AMSDNTrace:
    """One differentiable pass, for training: see ``Stages`` for the lists. The last two are None without purification."""

    logits: Tensor  # [B,K]
    embedding: Tensor  # [B,E]
    evidence: list[Tensor]
    level_anomaly_logits: list[Tensor]
    gates: list[Tensor]
    anomaly_logit: Tensor | None  # [B]
    anomaly_map_logits: Tensor | None  # [B,1,H,W]


@dataclass(frozen=True)
class AMSDNAnalysis:
    """The decision on a batch and what each stage saw. Satisfies ``amsdn.protocols.Analysis``."""

    logits: Tensor  # [B,K]
    anomaly_score: Tensor  # [B] in [0,1]
    anomaly_logit: Tensor | None  # [B], of which the score is the sigmoid; None without purification and consistency
    detected: Tensor  # [B] bool
    anomaly_map: Tensor  # [B,1,H,W] in [0,1]; zeros without purification
    agreement: Tensor | None  # [B] in [0,1]; None without consistency
    spatial_attention: list[Tensor]
    pyramid_attention: Tensor | None  # None without attention
    level_anomaly_logits: list[Tensor]
    features: list[Tensor]


class AMSDN(nn.Module, PyTorchModelHubMixin, library_name="amsdn", tags=["adversarial-robustness"], license="mit"):
    """images float32 [B,3,H,W] in [0,1] -> logits float32 [B,K].

    The arguments are the fields of ``AMSDNConfig``. ``forward`` is the deployed model: hard gates, no gradient through
    them. ``analyze`` adds the detector's decision and maps, ``trace`` is one pass for training, and
    ``differentiable_surrogate`` is what an adaptive attack differentiates. In eval mode all are deterministic and treat every
    image of a batch alone. Raises InputError for a configuration that cannot be built or an image that is too small.
    """

    stochastic: ClassVar[bool] = False
    detection_threshold: Tensor
    false_positive_rate: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        variant: str = "tiny",
        pretrained: bool | str = False,
        stem_stride: int | None = None,
        width: int = 32,
        fpn_channels: int | None = None,
        fpn: bool = True,
        attention: bool = True,
        purification: bool = True,
        purification_threshold: float = 0.5,
        consistency_samples: int = 0,
        bounded_evidence: bool = False,
        drop_path: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if num_classes < 2 or consistency_samples < 0:
            raise InputError(f"AMSDN: needs num_classes >= 2 and consistency_samples >= 0, got {num_classes} and {consistency_samples}")
        if fpn_channels is not None and fpn_channels < 1:
            raise InputError(f"AMSDN: fpn_channels must be at least 1, got {fpn_channels}; leave it out for the variant's default")
        if stem_stride is None and variant not in SMALL and not variant.startswith("timm:"):
            stem_stride = 4 if pretrained else 2
        channels = fpn_channels or (2 * width if variant == "compact" else 256)

        self.normalize = Normalize(mean, std)
        self.backbone = build_backbone(variant, pretrained=pretrained, stem_stride=stem_stride, width=width, drop_path=drop_path)
        self.pyramid = FeaturePyramid(self.backbone.channels, channels, top_down=fpn)
        self.attention = AdaptiveAttention(channels, LEVELS) if attention else None
        self.purifier = SelectivePurifier(channels, purification_threshold, LEVELS) if purification else None
        self.detector = DetectionHead(LEVELS + 1) if purification else None
        self.norm = nn.LayerNorm(LEVELS * channels)
        self.classifier = nn.Linear(LEVELS * channels, num_classes)
        self.register_buffer("detection_threshold", torch.tensor(0.5))
        self.register_buffer("false_positive_rate", torch.tensor(0.0))  # 0: never calibrated

        self.config = AMSDNConfig(
            num_classes, variant, pretrained, stem_stride, width, channels, fpn, attention, purification,
            purification_threshold, consistency_samples, bounded_evidence, drop_path, _triple(mean), _triple(std),
        )  # fmt: skip
        self._hub_mixin_config = self.saved_config()

    @classmethod
    def from_config(cls, config: AMSDNConfig) -> Self:
        """The model that ``config`` describes, freshly initialised."""
        return cls(**asdict(config))

    def saved_config(self) -> dict[str, Any]:
        """The configuration that rebuilds this model around saved weights: as ``config``, but downloading nothing."""
        return asdict(self.config) | {"pretrained": False}

    @property
    def has_detector(self) -> bool:
        """Whether ``analyze`` can detect anything: with both purification and consistency off it never claims to."""
        return self.purifier is not None or self.config.consistency_samples > 0

    @property
    def mask_fill(self) -> Tensor:
        """The colour of covered pixels [1,3,1,1]: the one that normalises to zero. See ``amsdn.protocols.mask_fill_of``."""
        return self.normalize.mean

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)

    def predict(self, x: Tensor, *, straight_through: bool = False) -> Tensor:
        """logits [B,K] of images [B,3,H,W], consistency included; ``straight_through`` only changes gradients."""
        logits = self._stages(x, straight_through).logits
        return logits if self.config.consistency_samples == 0 else self._consistent(logits, x, straight_through)[0]

    def trace(self, x: Tensor, *, straight_through: bool = True) -> AMSDNTrace:
        """One pass with gradients through the gates, without consistency views (training pays for one view, not for all)."""
        s = self._stages(x, straight_through)
        anomaly_logit, map_logits = self._detect(s, x)
        return AMSDNTrace(
            s.logits, s.embedding, s.evidence, s.level_anomaly_logits, s.gates, anomaly_logit, map_logits
        )  # fmt: skip

    def analyze(self, x: Tensor, *, straight_through: bool = False) -> AMSDNAnalysis:
        """Logits as ``forward`` gives them, with the detector's view of images [B,3,H,W].

        anomaly_score = 1 - (1 - a) * agreement, where a is the detection head's probability (0 without purification)
        and agreement that of the least convinced occluded view (1 without consistency). Without either there is no detector: the score
        is 0 and nothing is detected.
        """
        s = self._stages(x, straight_through)
        anomaly_logit, map_logits = self._detect(s, x)
        score = s.logits.new_zeros(len(x)) if anomaly_logit is None else torch.sigmoid(anomaly_logit)
        anomaly_map = s.logits.new_zeros(len(x), 1, *x.shape[2:]) if map_logits is None else torch.sigmoid(map_logits)
        logits, agreement = s.logits, None
        if self.config.consistency_samples > 0:
            logits, agreement = self._consistent(logits, x, straight_through)
            anomaly_logit = joint_anomaly_logit(anomaly_logit, agreement)
            score = 1 - (1 - score) * agreement
        detected = (score > self.detection_threshold) & self.has_detector
        return AMSDNAnalysis(
            logits, score, anomaly_logit, detected, anomaly_map, agreement,
            s.spatial_attention, s.pyramid_attention, s.level_anomaly_logits, s.features,
        )  # fmt: skip

    @torch.no_grad()
    def calibrate(self, clean_scores: Tensor, false_positive_rate: float = 0.05) -> float:
        """Set the detection threshold from the anomaly scores [N] of held-out clean images; returns it.

        The rule is ``conformal_threshold``'s: at most the stated share of clean images scores above it. Scores must
        come from ``analyze`` at the precision of later use. Raises InputError.
        """
        threshold = conformal_threshold(clean_scores, false_positive_rate)
        self.detection_threshold.fill_(threshold)
        self.false_positive_rate.fill_(false_positive_rate)
        return threshold

    def differentiable_surrogate(self) -> "StraightThrough | None":
        """The same values with gradients through the purification gates and to all views of consistency, for BPDA; None without either."""
        return StraightThrough(self) if self.has_detector else None

    def verified(
        self,
        patch: int | tuple[int, int],
        masks_per_axis: int | tuple[int, int] = 6,
        *,
        coarser: tuple[int, ...] = (),
        confidence: float = 0.8,
        views_per_pass: int = 128,
    ) -> ChallengerMasking:
        """The verified mode of prediction consistency: this model, answering by double masking over the complete covering set.

        It shares this model's weights, fills masks with the colour that training used, and takes the place of the light consistency
        views, which are left out inside it. Every masked view is purified on its own, so the certificate covers purification. The
        arguments are those of ``ChallengerMasking``; raises InputError as it does.
        """
        return ChallengerMasking(
            self._single_view(), patch, masks_per_axis, self.mask_fill, views_per_pass, coarser=coarser, confidence=confidence
        )

    def occluded_views(self) -> Occlusion | None:
        """What consistency looks at, for an attack that knows it (``amsdn.protocols.OccludedViews``); None with it off."""
        samples = self.config.consistency_samples
        return Occlusion(self._single_view(), self.mask_fill, samples) if samples else None

    def _single_view(self) -> Self:
        """The same weights and buffers, answering without consistency."""
        plain = copy.copy(self)
        plain.config = replace(self.config, consistency_samples=0)
        return plain

    def _stages(self, x: Tensor, straight_through: bool) -> Stages:
        _check_shape(x, self.backbone.strides[-1])
        features = self.pyramid(self.backbone(self.normalize(x)))
        maps = None if self.attention is None else self.attention(features)
        evidence, anomaly_logits, gates = self._evidence(features, None if maps is None else maps.weights, straight_through)
        joined = torch.cat(evidence, dim=1)
        embedding = self.norm(joined if self.attention is None else self.attention.select(joined))
        logits = self.classifier(embedding).float()
        spatial, pyramid = ([], None) if maps is None else (maps.spatial, maps.pyramid)
        return Stages(features, evidence, embedding, logits, spatial, pyramid, anomaly_logits, gates)

    def _evidence(self, features: list[Tensor], attention: list[Tensor] | None, straight_through: bool) -> PurifierOutput:
        """What the levels [B,C,h,w] say on average over locations, each counting as attention's weights [B,1,h,w] and purification say."""
        bounded = self.config.bounded_evidence
        if self.purifier is None:
            weights: Sequence[Tensor | None] = attention or [None] * len(features)
            return PurifierOutput([pooled(f, w, bounded=bounded) for f, w in zip(features, weights, strict=True)], [], [])
        found: PurifierOutput = self.purifier(features, attention, bounded=bounded, straight_through=straight_through)
        return found

    def _detect(self, stages: Stages, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The anomaly logit [B] and the map's logits [B,1,H,W] of images x."""
        if self.purifier is None or self.detector is None:
            return None, None
        image_map = self.purifier.combine(stages.level_anomaly_logits, (x.shape[2], x.shape[3]))
        return self.detector([*stages.level_anomaly_logits, image_map]), image_map

    def _consistent(self, logits: Tensor, x: Tensor, straight_through: bool) -> tuple[Tensor, Tensor]:
        fill = self.mask_fill.to(x.dtype)

        def classify(view: Tensor) -> Tensor:
            return self._stages(view, straight_through).logits

        return consistent_prediction(logits, x, classify, self.config.consistency_samples, fill, straight_through=straight_through)


class StraightThrough(nn.Module):
    """An AMSDN with the same values whose purification gates, and least convinced view, pass gradients (BPDA, Athalye et al. 2018).

    It holds the model itself, so it follows its weights, device and mode; the model knows nothing of it.
    """

    matches_forward: ClassVar[bool] = True  # the forward values are the model's own, so attacks need no second pass

    def __init__(self, model: AMSDN) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.predict(x, straight_through=True)

    def analyze(self, x: Tensor) -> AMSDNAnalysis:
        """The model's analysis with gradients through the gates."""
        return self.model.analyze(x, straight_through=True)


def _check_shape(x: Tensor, smallest: int) -> None:
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"AMSDN: images must have shape [B,3,H,W], got {list(x.shape)}; stack them and repeat grey channels")
    if min(x.shape[2:]) < smallest:
        raise InputError(f"AMSDN: images of {x.shape[2]}x{x.shape[3]} are too small for four levels; use at least {smallest}x{smallest}")


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def main() -> None:
    """Print the shapes and sizes of the compact model on a 32 px image, and of the default model on a 224 px image."""
    from amsdn.models.summary import print_stage

    for variant, size in (("compact", 32), ("tiny", 224)):
        model = AMSDN(variant=variant).eval()
        images = torch.rand(1, 3, size, size)
        with torch.no_grad():
            a = model.analyze(images)
        levels = {"features": a.features, "anomaly logits": a.level_anomaly_logits}
        print_stage(model, {"images": images, **levels, "anomaly map": a.anomaly_map, "logits": a.logits, "score": a.anomaly_score})


if __name__ == "__main__":
    main()
