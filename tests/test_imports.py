"""The one direction of imports (SPEC): leaves <- utils <- data, models, attacks <- training, evaluation <- recipes <- cli."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "amsdn"
LEAVES = {"errors", "checks", "protocols", "threats", "records"}
ALLOWED = {
    **{leaf: {"errors", "checks"} for leaf in LEAVES},
    "utils": LEAVES,
    "data": LEAVES | {"utils"},
    "models": LEAVES | {"utils"},
    "attacks": LEAVES | {"utils"},
    "training": LEAVES | {"utils", "data", "models", "attacks"},
    "evaluation": LEAVES | {"utils", "attacks"},
    "recipes": LEAVES | {"utils", "data", "models", "attacks", "training", "evaluation"},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))


def part_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(module: Path) -> set[str]:
    """Top-level parts of amsdn that the module imports, leaving out the `if __name__ == "__main__"` block."""
    tree = ast.parse(module.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.unparse(n.test))]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import at line {node.lineno}"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return {n.split(".")[1] for n in names if n.startswith("amsdn.")}


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    part = part_of(module)
    if part in ("cli", "commands", "__main__", "__init__"):
        return
    foreign = imported_parts(module) - {part, "__version__"}
    assert foreign <= ALLOWED[part], f"{module} imports {foreign - ALLOWED[part]}, which lies above {part}"
