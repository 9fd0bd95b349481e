"""Trained weights that come with AMSDN: a folder for each, known by its name wherever a model folder can be named.

An installed package carries them as ``amsdn/weights``; in a source tree, ``pip install -e`` included, they lie in ``weights`` beside the
package. Each holds what ``save_model`` writes, ``about.json`` (the names of the classes) and its card ``README.md``.
"""

from pathlib import Path

PREFERRED = "cifar10-cpu"  # what is used where no model is named and none was trained
_PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """Where the shipped models lie. The folder may be missing, in an installation without weights."""
    source_tree = _PACKAGE.parent
    return source_tree / "weights" if (source_tree / "pyproject.toml").exists() else _PACKAGE / "weights"


def shipped_models() -> dict[str, Path]:
    """The folders of the shipped models by name, in alphabetical order."""
    return {config.parent.name: config.parent for config in sorted(shipped_folder().glob("*/config.json"))}


def locate(model: Path | str) -> Path:
    """The folder that ``model`` names: a folder that exists, before a shipped model of that name; else ``model`` as it is."""
    path = Path(model)
    return path if path.exists() else shipped_models().get(str(model), path)
