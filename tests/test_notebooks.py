"""The notebooks, run on the demo model."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

TOUR = ROOT / "notebooks" / "tour.ipynb"


def texts(notebook: Any) -> str:
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", "") + output.get("data", {}).get("text/plain", ""))
            found.append(output.get("data", {}).get("text/html", ""))
    return "\n".join(found)


def plots(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.filterwarnings("ignore")  # of the notebook's own packages
def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for name, value in environment(inline).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(TOUR, as_version=4)
    saved = texts(notebook), plots(notebook)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": ROOT}}).execute()
    for text, n_plots in (saved, (texts(notebook), plots(notebook))):
        assert "23 + 45 = 68." in text
        assert "The capital of France is Paris." in text.replace("|", "")
        assert "greedy: True   23 + 45 = 68." in text
        assert "rgba(255, 0, 0" in text
        assert n_plots == 3


def test_outputs_are_small() -> None:
    for path in Path(ROOT, "notebooks").glob("*.ipynb"):
        assert path.stat().st_size < 500_000
