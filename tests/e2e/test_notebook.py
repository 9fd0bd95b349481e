"""The tutorial notebook: committed clean, valid, and running from top to bottom in a kernel of its own."""

import asyncio
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import amsdn
from amsdn.attacks import ATTACKS
from amsdn.cli import COMMANDS
from amsdn.recipes import RECIPES

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "AMSDN_Colab.ipynb"
CELL_TIMEOUT_S = 240  # against hanging for ever; the whole notebook takes far less
MISSING = "needs the notebook extra: pip install -e '.[notebook]'"

# Appended to the copy that is run: what a reader would look at, as one line of JSON.
PROBE = """
import json
print(json.dumps({
    "python": sys.executable,
    "package": str(Path(importlib.import_module("amsdn").__file__).parent),
    "detector": [model.has_detector, twin.has_detector],
    "train": len(data.train),
    "attacked": [len(r.x_adv) for r in (patched, sparse, pgd)],
    "inside": [bool(a.threat.contains(r.x_adv, images).all())
               for a, r in ((patch_attack, patched), (sparse_attack, sparse), (pgd_attack, pgd))],
    "records": [[r.attack, r.sample_id] for r in records],
    "twin_records": [[r.attack, r.sample_id] for r in twin_records],
    "certificates": [c.sample_id for c in certificates],
    "report": str(report.resolve()),
    "large": large.config.num_classes,
}))
"""


def committed() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_bytes())


def test_it_is_committed_without_traces_of_a_run() -> None:
    notebook = committed()
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}, cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


def test_cells_have_ids_that_a_person_chose() -> None:
    """Editors make up eight hex digits, or a UUID, for a cell without an id; those change whenever a tool rewrites the file."""
    ids = [cell["id"] for cell in committed()["cells"]]
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if not re.fullmatch(r"[a-z]+(-[a-z]+)*", i) or re.fullmatch(r"[0-9a-f]{8}", i)]


def test_it_is_valid_in_format_4_5() -> None:
    nbformat = pytest.importorskip("nbformat", reason=MISSING)
    notebook = nbformat.reads(NOTEBOOK.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)


def test_the_commands_it_names_exist() -> None:
    text = "\n".join("".join(cell["source"]) for cell in committed()["cells"] if cell["cell_type"] == "markdown")
    lines = re.findall(r"^amsdn .*$", text, re.MULTILINE)
    words = [shlex.split(line, comments=True)[1:] for line in lines]
    assert {w[0] for w in words} == set(COMMANDS)
    for command, *rest in words:
        if rest and command not in ("compare", "report", "predict", "patch"):
            assert rest[0] in (ATTACKS if command == "attack" else RECIPES), [command, *rest]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason=MISSING)
    for module in ("nbclient", "ipykernel"):
        pytest.importorskip(module, reason=MISSING)
    monkeypatch.setenv("AMSDN_NOTEBOOK_QUICK", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a backend set for the tests would keep figures out of the notebook
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):  # the user's own set-up has no say, and stays as it is
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.reads(NOTEBOOK.read_text(encoding="utf-8"), as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE, id="probe"))

    pid = asyncio.run(execute(notebook, tmp_path))

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    check_variables(json.loads(outputs["probe"][-1].text), tmp_path)
    assert {name for name, found in outputs.items() if any("image/png" in o.get("data", {}) for o in found)} == {
        "data", "patch", "sparse", "pgd"
    }  # fmt: skip
    assert any("iframe" in o.get("data", {}).get("text/html", "") for o in outputs["report"])
    said = "".join(o.get("text", "") for found in outputs.values() for o in found)
    assert "Warning" not in said, said


async def execute(notebook: Any, folder: Path) -> int:
    """Run every cell in a kernel of this very interpreter; returns the process id that the kernel had.

    The kernel is ended whatever happens here; should this process be killed, the kernel notices and ends itself
    (ipykernel polls for its parent).
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    # Without folders to look in, "python3" can only be this interpreter, whatever the machine has installed.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=manager, timeout=CELL_TIMEOUT_S, resources={"metadata": {"path": str(folder)}})
    try:
        async with client.async_setup_kernel():
            pid = manager.provisioner.pid  # type: ignore[union-attr]
            await client.async_execute(reset_kc=False)
    finally:
        if client.kc is not None:
            client.kc.stop_channels()  # the kernel manager is ours, so nbclient leaves its sockets open
        await manager.shutdown_kernel(now=True)
    return int(pid)


def check_variables(found: dict[str, Any], folder: Path) -> None:
    assert found["python"] == sys.executable
    assert Path(found["package"]) == Path(amsdn.__file__).parent
    assert found["detector"] == [True, False]
    assert found["train"] == 1197
    assert found["attacked"] == [8, 8, 8]
    assert found["inside"] == [True, True, True]
    rows = [[attack, sample] for attack in ("clean", "patch-pgd", "sparse-rs", "pgd") for sample in range(8)]
    assert found["records"] == rows
    assert found["twin_records"] == rows
    assert found["certificates"] == [0, 1, 2, 0, 0, 1, 1, 2, 2, 0, 1, 2]  # l2, patch with its detection, l0
    assert found["large"] == 100
    report = Path(found["report"])
    assert report.is_relative_to(folder.resolve())
    page = report.read_text(encoding="utf-8")
    assert "undefended twin" in page
    assert len((report.parent / "AMSDN" / "eval.jsonl").read_text().splitlines()) == len(rows)
