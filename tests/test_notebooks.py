"""The notebooks of examples/ run from top to bottom, on small numbers."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples"
SMALL = {  # what the test puts into the cell that is tagged "parameters"
    "first_steps.ipynb": "DRAWN, SCREENED = 12, 2",
    "tune_and_retrieve.ipynb": "STEPS, DRAWN = 2, 32",
}


def test_every_notebook_is_run():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # the repository holds none
    [parameters] = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = SMALL[name]
    NotebookClient(notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.data.get("text/html", "") for cell in code for output in cell.outputs if "data" in output]
    assert any("data:image/png;base64" in html for html in shown)  # crystals are drawn
    assert not list(tmp_path.iterdir())  # and nothing is left behind
