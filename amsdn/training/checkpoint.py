"""Training state on disk: everything an interrupted run needs to end as if it had not been interrupted.

The state is one file, replaced atomically and read with ``weights_only=True``, so that opening it runs no
code. Randomness is not stored: every step derives its own from (seed, stage, step).
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amsdn.errors import InputError
from amsdn.records import write_atomic

STATE_FILE = "training_state.pt"
FORMAT = 2
KEYS = ("step", "parts", "seconds", "model", "extra", "ema", "ema_updates", "optimizer", "stage")  # what a run takes up again


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and strings, nested in dicts and lists, as the folder's training state."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(folder / STATE_FILE, buffer.getvalue())


def load_state(folder: Path, settings_hash: str) -> dict[str, Any] | None:
    """The folder's training state on the CPU, or None where there is none.

    Raises InputError for a damaged file, a pickle that holds code, and a state made under other settings.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found_format, found_hash = state["format"], state["settings"]
        if found_format == FORMAT:
            missing = [key for key in KEYS if key not in state]
            if missing:
                raise KeyError(missing[0])
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: no training state of AMSDN, or damaged ({type(e).__name__}); delete it to start this stage afresh"
        ) from e
    if found_format != FORMAT:
        raise InputError(f"{path}: training state of format {found_format}, this version reads {FORMAT}; delete it to start afresh")
    if found_hash != settings_hash:
        raise InputError(
            f"{path}: made under other settings ({found_hash}, now {settings_hash}); use another --out, or delete it to start afresh"
        )
    return dict(state)


def weights_digest(*modules: nn.Module) -> str:
    """Sixteen hex digits of all weights and buffers, by name; equal where these are, bit for bit."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
