"""What evaluation and certification share: samples by id, fingerprints, and a run folder that refuses to mix runs."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.records import canonical, config_hash, write_json


class Samples(Protocol):
    """Anything that hands out labelled images by index, such as a data split."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor, /) -> tuple[Tensor, Tensor]:
        """indices int64 [B] -> images float32 [B,3,H,W] in [0,1], labels int64 [B]; the same every time."""
        ...


def model_fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits of the class, the configuration (a dataclass at ``model.config``) and every weight and buffer.

    A plain module's threshold that is neither in its config nor in a buffer is not seen.
    """
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        digest.update(json.dumps(canonical(config), sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        _update(digest, value)
    return digest.hexdigest()[:16]


def data_fingerprint(split: Samples) -> str:
    """Sixteen hex digits of the first sixteen images and labels: enough to tell one data set from another."""
    digest = hashlib.sha256()
    for tensor in split.fetch(torch.arange(min(16, len(split)))):
        _update(digest, tensor)
    return digest.hexdigest()[:16]


def choose_ids(split: Samples, sample_ids: Sequence[int] | None) -> list[int]:
    """The sample ids to work on, all of the split by default; raises InputError where they repeat or do not exist."""
    if len(split) == 0:
        raise InputError("the split has no images; check the data set and --limit")
    if sample_ids is None:
        return list(range(len(split)))
    ids = [int(i) for i in sample_ids]
    if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= len(split):
        raise InputError(f"sample ids must be distinct, at least one, and lie in 0..{len(split) - 1}; got {_brief(ids)}")
    return ids


def id_range(ids: Sequence[int]) -> str:
    """A list of ids as short text that tells lists apart: their span if they are consecutive, else their number and hash."""
    if list(ids) == list(range(ids[0], ids[0] + len(ids))):
        return f"{ids[0]}..{ids[-1]}"
    return f"{len(ids)} ids {config_hash(list(ids))}"


def claim(out: Path, name: str, settings: dict[str, Any], records: str | None = None) -> None:
    """Write the settings of a run to ``out/name``, or check that the run already there had the same ones.

    Raises InputError where they differ, naming the first setting that does, and where files of the pattern ``records`` lie there
    without settings.
    """
    path = out / name
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        orphan = min((path.name for path in out.glob(records)), default=None) if records is not None else None
        if orphan is not None:
            raise InputError(f"{out}: has {orphan} but no {name}, so it cannot be resumed; delete {orphan} or choose another folder")
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_bytes())
        differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    except (ValueError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: not a settings file ({e}); delete the folder to start afresh") from e
    if differing:
        key, was, now = _difference(differing[0], found.get(differing[0]), wanted.get(differing[0]))
        raise InputError(
            f"{out}: holds a run with another {key} ({_brief(was)}, now {_brief(now)}); use the same {key} to resume it, or another folder"
        )


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The first setting that differs inside ``key``, by its dotted name, and its two values."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = next(name for name in {**now, **was} if now.get(name) != was.get(name))
        return _difference(f"{key}.{inner}", was.get(inner), now.get(inner))
    return key, was, now


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one InputError; what was written stays and the run can be resumed."""
    try:
        yield
    except OSError as e:
        raise InputError(f"{out}: cannot write the run there ({e.strerror or e}); make room or choose another folder, then rerun") from e


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    else:
        digest.update(repr(value).encode())


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
