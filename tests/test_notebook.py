"""walkthrough.ipynb: it runs, its exercises can be solved, and it is committed as it ran."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import deepseek  # noqa: F401 - what the notebook shows is named so

PATH = ROOT / "walkthrough.ipynb"
NOTEBOOK = nbformat.read(PATH, 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell has shown, without its pictures."""
    data = [{"text/plain": o.get("text", ""), **o.get("data", {})} for o in cell.outputs]
    return "".join(v for d in data for k, v in d.items() if not k.startswith("image/")).strip()


def test_it_runs_from_top_to_bottom_and_its_solutions_are_right(monkeypatch):
    monkeypatch.setenv("WALKTHROUGH_FAST", "1")
    notebook = nbformat.from_dict(NOTEBOOK)
    for cell, below in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.metadata.get("exercise"):  # the solution is folded below it
            solution = re.search(r"```python\n(.*?)\n```", below.source, re.DOTALL).group(1)
            *_, check = cell.source.splitlines()
            cell.source = f"{solution}\n{check}"
    tried = "check('groups', None); check('groups', 2.0); check('groups', torch.tensor(2.25))"
    notebook.cells.append(nbformat.v4.new_code_cell(tried))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    verdicts = [shown(cell) for cell in notebook.cells if cell.metadata.get("exercise")]
    assert len(verdicts) >= 10 and set(verdicts) == {"right"}
    assert shown(notebook.cells[-1]).splitlines() == ["not solved yet", "not right yet", "right"]


def test_it_is_committed_as_it_ran_in_one_go_and_tells_no_paths_of_the_machine():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    drawn = [
        [cell, below]
        for cell, below in zip(NOTEBOOK.cells, NOTEBOOK.cells[1:], strict=False)
        if any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
    ]
    assert len(drawn) >= 13  # and each with a word on it
    assert {below.cell_type for _, below in drawn} == {"markdown"}
    assert {shown(cell) for cell in CODE if cell.metadata.get("exercise")} == {"not solved yet"}
    everything = "".join(c.source for c in NOTEBOOK.cells) + "".join(map(shown, CODE))
    assert not re.findall(r"(?<![\w<:/.)])/[\w.-]+/[\w.-]+|\b[A-Z]:\\", everything)  # any system's
    assert PATH.stat().st_size <= 3 * 2**20


def test_the_code_that_it_shows_is_that_of_deepseek_py():
    found = [
        (name, shown(cell))
        for cell in CODE
        for name in re.findall(r"^show\((.+)\)$", cell.source, re.MULTILINE)
    ]
    assert len(found) > 5
    for name, text in found:
        assert inspect.getsource(eval(name)) in text, name


@pytest.mark.parametrize("way", ["clone", "zip"])
def test_its_first_cell_gets_the_project(way, tmp_path, tmp_path_factory, monkeypatch):
    project = tmp_path_factory.mktemp("project")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(AssertionError, match="set REPOSITORY .* or upload a zip"):
        exec(CODE[0].source, {})
    (project / "deepseek.py").write_text("")
    source = CODE[0].source
    if way == "clone":
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "files"]):
            subprocess.run(["git", "-C", project, *command], check=True)
        source = source.replace('REPOSITORY = ""', f"REPOSITORY = {project.as_uri()!r}")
    else:  # a folder with all in it, as GitHub makes them
        shutil.make_archive(tmp_path / "main", "zip", project.parent, project.name)
    for _ in range(2):  # and again, as after a restart of the kernel
        monkeypatch.chdir(tmp_path)
        exec(source, {})
        assert Path("deepseek.py").exists() and sys.path[0] == str(Path.cwd())
