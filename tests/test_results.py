"""The README's tables are what the evidence in results/ gives, and every result says where it came from."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").glob("*.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_script", ROOT / "scripts" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_drawn_from_the_evidence(script: ModuleType) -> None:
    assert script.main(["check"]) == 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_every_number_has_its_count_interval_and_origin(path: Path) -> None:
    result = json.loads(path.read_text())
    for row in result["headline"]:
        for cell in filter(None, row["cells"].values()):
            assert cell["n"] > 0
            assert cell["low"] <= cell["value"] <= cell["high"]
    for run in result["runs"].values():
        assert run["command"]
        assert run["commit"] not in (None, "unknown")
        assert run["date"]
        assert run["hardware"]
        assert run["seconds"]
