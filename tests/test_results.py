"""The README's tables are what the evidence in results/ gives, and every result says where it came from."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from summary import drawn

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").glob("*.json"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("results")


def test_tables_are_drawn_from_the_evidence(script: ModuleType) -> None:
    assert script.main(["check"]) == 0


def test_the_tables_of_the_docs_are_drawn_from_the_benchmarks() -> None:
    assert load("benchmark_tables").main(["check"]) == 0


def test_the_table_of_peers_is_drawn_from_the_benchmark() -> None:
    document = json.loads((ROOT / "results" / "benchmarks" / "attacks.json").read_text())
    page = (ROOT / "docs" / "attacks" / "peers.md").read_text()
    assert drawn(document, page) == page


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
