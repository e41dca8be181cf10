"""The notebook runs top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/federated_mops.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("real_model")
def test_notebook_runs_top_to_bottom(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "Test perplexity, MoPs on SmolLM2-135M-Instruct" in shown
    assert "Test perplexity, FedPrompt on SmolLM2-135M-Instruct" in shown
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert shown.rstrip().endswith("115079 numbers")
