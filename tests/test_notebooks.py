"""The notebooks: stripped in git, and run from top to bottom on the toybox, without the cells that download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOWNLOAD = "download"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_all_four_are_there() -> None:
    assert [path.stem[3:] for path in NOTEBOOKS] == ["compose", "train_gates", "benchmark", "your_own_loras"]


@every_notebook
def test_it_is_stripped_and_valid(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert cell.outputs == []
            # What comes from the Hub is tagged, and nothing else.
            hub = "stable-diffusion-v1-5/" in cell.source
            assert not hub or DOWNLOAD in cell.metadata.get("tags", [])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # jupyter's own
@every_notebook
def test_it_runs_offline(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if DOWNLOAD not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in shown)  # pictures in it
