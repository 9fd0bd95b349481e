"""timm's networks are opened with normalisation inside, from their own files only, and everything else is refused in one line."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from amsdn.errors import InputError
from amsdn.evaluation.run_folder import model_fingerprint
from amsdn.models import hub
from amsdn.models.timm_model import load_timm

NAME = "resnet10t"


def network(classes: int = 7) -> nn.Module:
    """An untrained network whose batch norms are as if trained: otherwise its logits hardly depend on the image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classes)
        net = timm.create_model(NAME, num_classes=classes, pretrained=False)
        for tensor in (t for t in net.state_dict().values() if t.is_floating_point()):
            tensor.add_(0.1 * torch.rand_like(tensor))
    return net.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "net.safetensors"
    save_file(network().state_dict(), path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def test_the_wrapper_is_the_bare_network_on_normalised_images(weights: Path, images: torch.Tensor) -> None:
    model, bare = load_timm(NAME, weights), network()
    mean, std = (torch.tensor(bare.pretrained_cfg[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(model(images), bare((images - mean) / std))
    assert not any(m.training for m in model.modules())
    assert model.num_classes == 7
    own = load_timm(NAME, weights, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)
    torch.testing.assert_close(own(images), bare((images - mean) / std))
    assert (own(images) - model(images)).abs().max() > 1e-3


def test_gradients_go_through(weights: Path, images: torch.Tensor) -> None:
    x = images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(load_timm(NAME, weights)(x).square().sum(), x)
    assert gradient.abs().sum() > 0


def test_the_fingerprint_sees_name_normalisation_and_weights(weights: Path, tmp_path: Path) -> None:
    save_file(load_file(weights) | {"fc.bias": torch.ones(7)}, tmp_path / "other.safetensors")
    models = [
        load_timm(NAME, weights),
        load_timm(f"{NAME}.c3_in1k", weights),  # another network of timm's may have the same tensors
        load_timm(NAME, weights, std=(0.2, 0.2, 0.2)),
        load_timm(NAME, tmp_path / "other.safetensors"),
    ]
    assert len({model_fingerprint(m) for m in models}) == len(models)
    assert model_fingerprint(models[0]) == model_fingerprint(load_timm(NAME, weights))


def test_published_weights_come_from_the_hubs_cache(tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    published, asked = tmp_path / "model.safetensors", []
    save_file(network(1000).state_dict(), published)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, filename: asked.append((repo, filename)) or str(published))
    model = load_timm(f"{NAME}.c3_in1k")
    assert asked == [(f"timm/{NAME}.c3_in1k", "model.safetensors")]
    assert model.num_classes == 1000
    with torch.no_grad():
        assert torch.equal(model(images), load_timm(NAME, published)(images))
    save_file({"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, published)
    with pytest.raises(InputError, match="does not hold timm's weights of resnet10t") as caught:
        load_timm(NAME)
    one_line(caught)


def test_offline_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the long wait"))
    with pytest.raises(
        InputError, match=r"timm/resnet18\.a1_in1k from the hub \(ConnectionError\).*timm:resnet18@FILE\.safetensors"
    ) as caught:
        load_timm("resnet18")
    one_line(caught)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnt18", "no such network; did you mean resnet18"),
        ("hf-hub:timm/resnet18", "no such network"),
        ("local-dir:/tmp", "no such network"),
        ("resnet18.nonesuch", r"no such weights; known: .*resnet18\.a1_in1k"),
    ],
)
def test_names_that_timm_does_not_know(name: str, says: str, weights: Path) -> None:
    for file in (None, weights):
        with pytest.raises(InputError, match=says) as caught:
            load_timm(name, file)
        one_line(caught)


def test_files_that_are_not_these_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    whole = load_file(weights)
    (tmp_path / "garbage.safetensors").write_bytes(b"\x08" * 100)
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"fc.weight": [1]}))
    for name in ("net.pth", "net.pt", "net.bin", "net.npz"):
        (tmp_path / name).write_bytes(b"x")
    for name, tensors in {
        "missing.safetensors": {k: v for k, v in whole.items() if k not in ("conv1.0.weight", "layer1.0.bn1.bias")},
        "unexpected.safetensors": whole | {"zz.weight": torch.zeros(1)},
        "headless.safetensors": {k: v for k, v in whole.items() if not k.startswith("fc.")},
        "shape.safetensors": whole | {"conv1.0.weight": torch.zeros(1, 3, 3, 3)},
        "prefixed.safetensors": {f"module.{k}": v for k, v in whole.items()},
        "empty.safetensors": {},
    }.items():
        save_file(tensors, tmp_path / name)
    for name, says in {
        "none.safetensors": "No such file",
        "garbage.safetensors": "not a safetensors file",
        "pickle.safetensors": "not a safetensors file",
        "net.pth": "may be a pickle, which is never opened; convert it",
        "net.pt": "may be a pickle, which is never opened; convert it",
        "net.bin": "may be a pickle, which is never opened; convert it",
        "net.npz": "is no safetensors file; convert it",
        "missing.safetensors": r"lacks tensor 'conv1.0.weight' \(2 in all\); it must be the state dict of timm's resnet10t",
        "unexpected.safetensors": "has unexpected tensor 'zz.weight'",
        "headless.safetensors": "lacks tensor 'fc.weight', whose rows are the classes",
        "shape.safetensors": "'conv1.0.weight' has shape",
        "prefixed.safetensors": r"lacks tensor 'fc.weight'.*its first is 'module\.",
        "empty.safetensors": "it holds none",
    }.items():
        with pytest.raises(InputError, match=says) as caught:
            load_timm(NAME, tmp_path / name)
        assert one_line(caught).startswith(str(tmp_path / name))


def test_a_network_of_one_image_size_says_which(tmp_path: Path, images: torch.Tensor) -> None:
    name = "vit_tiny_patch16_224"
    save_file(timm.create_model(name, num_classes=2, pretrained=False).state_dict(), tmp_path / "vit.safetensors")
    model = load_timm(name, tmp_path / "vit.safetensors")
    with pytest.raises(InputError, match="takes images of 224x224, got 32x32; pass --image-size 224"):
        model(images)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 224, 224)).shape == (1, 2)
    assert dataclasses.asdict(model.config) == {"name": name, "num_classes": 2, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
