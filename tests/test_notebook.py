"""walkthrough.ipynb: it runs, its exercises can be solved, and it is committed as it ran."""

import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "walkthrough.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, 4)


def texts(cell):
    """What a cell has shown, without its pictures."""
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (v for k, v in output.get("data", {}).items() if not k.startswith("image/"))


def solved(notebook):
    """The notebook with every exercise answered by the solution folded below it."""
    for cell, below in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.metadata.get("exercise"):
            solution = re.search(r"```python\n(.*?)\n```", below.source, re.DOTALL).group(1)
            assert cell.source.count("answer = None") == 1
            cell.source = cell.source.replace("answer = None", solution)
    return notebook


def test_it_runs_from_top_to_bottom_and_its_solutions_are_right(notebook, monkeypatch):
    monkeypatch.setenv("WALKTHROUGH_FAST", "1")
    notebook = solved(notebook)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()  # raises for the first cell that does
    verdicts = ["".join(texts(c)).strip() for c in notebook.cells if c.metadata.get("exercise")]
    assert len(verdicts) >= 10 and set(verdicts) == {"right"}


def test_an_exercise_without_an_answer_and_one_with_a_wrong_answer_are_told(notebook):
    source = next(c.source for c in notebook.cells if "def check(" in c.source)
    check = source[source.index("def check(") : source.index("def bars(")]
    namespace = {}
    exec(f"import torch\n{check}", namespace)
    said = []
    namespace["print"] = said.append
    for answer in (None, 2.0, 1.0):
        namespace["check"](answer, 1.0)
    assert said == ["not solved yet", "not right yet", "right"]


def test_it_is_committed_with_its_outputs(notebook):
    drawn = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert cell.execution_count, f"never ran: {cell.source[:80]}"
        assert not [o for o in cell.outputs if o.output_type == "error"]
        drawn += sum("image/png" in o.get("data", {}) for o in cell.outputs)
        if cell.metadata.get("exercise"):
            assert "".join(texts(cell)).strip() == "not solved yet"
    assert drawn >= 14
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # in one go


def test_it_is_small_and_tells_no_paths_of_the_machine_it_ran_on(notebook):
    assert os.path.getsize(PATH) <= 3 * 2**20
    everything = "".join(c.source + "".join(texts(c)) for c in notebook.cells)
    found = re.findall(r"(?<![\w<:/.)])/[\w.-]+/[\w.-]+|\b[A-Z]:\\", everything)
    assert not found  # absolute paths, of whatever system


def test_its_first_cell_says_what_is_missing(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = next(c for c in notebook.cells if c.cell_type == "code")
    with pytest.raises(
        AssertionError, match="deepseek.py, stories.py, data.py, train.py not found"
    ):
        exec(first.source, {})
