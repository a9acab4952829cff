"""README and docs: every command is taken by its program, and every linked file is there."""

import re
import shlex
import sys
from contextlib import nullcontext

import nbformat
import pytest
from conftest import ROOT

import finetune
import sample
import train
from benchmarks import scaling, speed
from common.runtime import parse_flags

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = {
    "train.py": train.Options,
    "finetune.py": finetune.Options,
    "sample.py": sample.Options,
    "benchmarks.speed": speed.Options,
    "benchmarks.scaling": scaling.Options,
}
COMMAND = re.compile(r"(?:python -m|python|torchrun \S+) (\S+)((?: (?!#)\S+)*)")


def commands_of(text):
    """(program, arguments) of the commands in fenced blocks and between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in lines:
        for program, arguments in COMMAND.findall(" ".join(line.split())):
            if program in OPTIONS:
                yield program, shlex.split(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page, monkeypatch):
    for program, arguments in commands_of(page.read_text(encoding="utf-8")):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) if "--help" in arguments else nullcontext() as ended:
            parse_flags(OPTIONS[program], "")
        assert not ended or ended.value.code == 0


def test_commands_are_found_and_a_wrong_one_is_noticed(monkeypatch):
    found = [command for page in PAGES for command in commands_of(page.read_text("utf-8"))]
    assert len(found) > 30 and {program for program, _ in found} == {*OPTIONS}
    ((program, arguments),) = commands_of("as `python train.py\n--sise 1b`, or not")
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit):
        parse_flags(OPTIONS[program], "")


def test_every_linked_file_is_there():
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", 4)
    texts[ROOT / "walkthrough.ipynb"] = "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )
    links = [
        (page, link)
        for page, text in texts.items()
        for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
        if not link.startswith("https://")
    ]
    assert len(links) > 10
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]
