"""Every notebook runs from top to bottom in an empty folder; what it claims, it asserts."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()


@pytest.mark.tutorial
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, tmp_path):
    execute(nbformat.read(path, as_version=4), tmp_path)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_stored_with_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert "site-packages" not in path.read_text(encoding="utf-8")  # warnings of the machine it was run on


@pytest.mark.tutorial
def test_a_false_claim_is_found(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3, 'false claim'")])
    with pytest.raises(CellExecutionError, match="false claim"):
        execute(notebook, tmp_path)
