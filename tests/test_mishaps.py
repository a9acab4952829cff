"""What a user's machine, disk, files and typing can do wrong: no run is lost, no text misleads."""

import ast
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, SCRIPTS, call, load, log_of, same

from common import trainer
from common.runlog import Log
from deepseek import Config, DeepSeek


def sweep(few: int, many: int):
    """Run a test with a few seeded cases, and under `pytest -m slow` with many."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])


# --- killed --------------------------------------------------------------------------------------


def call_and_die(line: str, module=None, name: str = "", n: int = 0) -> None:
    """Call a script, of which the n-th call of a function ends the process."""
    torch.set_num_threads(1)
    if module:
        real, calls = getattr(module, name), itertools.count(1)

        def counting(*args, **kwargs):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, name, counting)
    call(line)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed is a fork of this process")
@pytest.mark.parametrize(
    "line",
    [
        "train {model} --dtype bfloat16 --grad_accum 2 --token_drop_capacity 1.0 --n_group 2",
        "finetune --ckpt {trained} --batch_size 4 --dtype float32",
    ],
)
def test_a_run_killed_anywhere_ends_with_the_same_bits(
    run, undrawn, corpus, trained, tmp_path, monkeypatch, line
):
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    name = line.split()[0]
    line = f"{line} --data {corpus} --steps 24 --eval_every 6 --save_every 1"
    line = line.format(model=MODEL, trained=trained)
    moments = [(np, "save", 1)]  # the text is half prepared
    moments += [(torch, "save", 2), (os, "fsync", 2), (os, "replace", 3), (Log, "write", 2)]
    moments += [(DeepSeek, "forward", 5), (SCRIPTS[name], "evaluate", 2)]
    moments += [(trainer, "draw_curves", 1)]
    out, codes = tmp_path / "o", []
    for moment in [*moments, ()]:
        how = f"{name} --resume" if (out / "ckpt.pt").exists() else f"{line} --overwrite"
        fork = multiprocessing.get_context("fork").Process(
            target=call_and_die, args=(f"{how} --out {out}", *moment), daemon=True
        )
        fork.start()
        fork.join(120)
        codes.append(fork.exitcode)
    assert codes == [-signal.SIGKILL] * len(moments) + [0]
    assert run(f"{line} --out {tmp_path}/whole")[0] == 0
    ends = []
    for folder in (tmp_path / "whole", out):
        log = [{k: v for k, v in r.items() if k != "tok_per_s"} for r in log_of(folder)[1:]]
        ends.append((load(folder), log, [p.read_bytes() for p in sorted(folder.glob("adapter_*"))]))
    (a, *rest), (b, *rest_b) = ends
    for key in ("model", "optimizer", "rng", "step", "tokens", "best_val_loss"):
        assert same(a[key], b[key]), key
    assert rest == rest_b


# --- the disk ------------------------------------------------------------------------------------


@contextmanager
def no_file_above(size: int):
    """A disk on which no file can grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "size, line, message",
    [
        (7_500, "train {new} --vocab_size 300", "cache.*DEEPSEEK_CACHE"),
        (500, "train --resume --steps 4", r"log\.jsonl.*make room"),
        (20_000, "train --resume --steps 4 --save_every 9 --eval_every 1", r"curves\.png.*room"),
        (300_000, "train --resume --steps 4", r"ckpt\.pt.*takes 0\.4 MB.*checkpoint before it"),
        (20_000, "finetune {tuned} --overwrite", r"adapter_model\.safetensors cannot be written"),
    ],
)
def test_a_disk_that_fills_up_is_said_and_costs_nothing(
    run, corpus, trained, tmp_path, size, line, message
):
    out = shutil.copytree(trained.parent, tmp_path / "o")
    before = load(out)
    new = f"{MODEL} --data {corpus} --steps 4 --overwrite"
    tuned = f"--ckpt {trained} --data {corpus} --batch_size 4 --steps 4 --eval_every 2"
    line = f"{line.format(new=new, tuned=tuned)} --out {out}"
    with no_file_above(size):
        code, _, err = run(line)
    assert code == 2 and re.search(message, err) and err.count("\n") == 1, err
    if "--resume" in line:
        assert same(load(out), before)
    places = [*out.iterdir(), *Path(os.environ["DEEPSEEK_CACHE"]).iterdir()]
    assert not [path for path in places if re.search("tmp|partial", path.name)]
    assert run(line)[0] == 0
    assert [r["step"] for r in log_of(out)[1:5]] == [1, 2, 3, 4]  # no half line, none twice


# --- files from strangers ------------------------------------------------------------------------


ABSURD = [None, True, -1, 0, 1, 3, 10**30, 1e-300, 1e300, math.inf, math.nan, "x", [], {"a": 1}]


@sweep(30, 1000)
@pytest.mark.parametrize(
    "make, read, files",
    [
        ("train {model} --data {corpus} --steps 1 --out {out}", "{out}/ckpt.pt", ["ckpt.pt"]),
        (
            "sample --ckpt {trained} --export {out}",
            "{out}",
            ["config.json", "model.safetensors", "tokenizer.json"],
        ),
        (
            "finetune --ckpt {trained} --data {corpus} --steps 1 --batch_size 4 --out {out}",
            "{trained} --lora {out}",
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
    ],
    ids=["run", "export", "adapter"],
)
def test_a_damaged_file_is_refused_or_does_no_harm(
    run, undrawn, corpus, trained, tmp_path, make, read, files, cases
):
    """Cut at a random length, or with one byte or one setting changed: what changes a number in
    a *.safetensors, or a letter of a .json, nobody can notice."""
    names = dict(model=MODEL, corpus=corpus, trained=trained, out=tmp_path / "out")
    assert run(make.format(**names))[0] == 0
    line = f"sample --ckpt {read.format(**names)} --prompt The --temperature 0 --max_new_tokens 12"
    right = run(line)[1]
    rng, refused = random.Random(0), 0
    for case in range(cases):
        path = tmp_path / "out" / files[case % len(files)]
        how = rng.choice(["cut", "byte", "setting"])
        content = path.read_bytes()
        at = rng.randrange(len(content))
        changed = content[:at]
        if how == "setting" and path.name.endswith("config.json"):
            record = json.loads(content)
            record[rng.choice(list(record))] = rng.choice(ABSURD)
            changed = json.dumps(record).encode()
        elif how != "cut":
            changed += bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]
        path.write_bytes(changed)
        code, out, err = run(line)
        path.write_bytes(content)
        where = f"{path.name}, case {case}, byte {at}, {how}: {code} {out} {err}"
        unnoticed = code == 0 and how != "cut" and path.suffix != ".pt"
        assert (code, out) == (0, right) or code == 2 or unnoticed, where
        if code == 2:
            refused += 1
            assert err.startswith("sample.py: ") and err.count("\n") == 1, where
    assert refused > cases // 4


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_code_in_a_checkpoint_is_not_run(run, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(load(trained.parent) | {"tokens": Bomb()}, "bomb.pt")
    code, _, err = run("sample --ckpt bomb.pt")
    assert code == 2 and "cannot be read" in err and not Path("exploded").exists()
    torch.load("bomb.pt", weights_only=False)
    assert Path("exploded").exists()  # so the bomb is a real one


# --- typing --------------------------------------------------------------------------------------

WORDS = ["", "0", "-1", "1", "2", "3", "5", "32", "0.5", "0.001", "1e99", "nan", "inf"]
WORDS += ["none", "true", "auto", "{}", "tiny", "stories:1", "猫", "x" * 3000]
# What would take long, or read the whole disk, or is given
LEFT_OUT = {"out", "compile", "steps", "minutes", "low_memory", "device", "data", "ckpt"}
LEFT_OUT |= {"num_hidden_layers", "num_samples", "judge", "max_new_tokens"}


@sweep(1, 8)
@pytest.mark.parametrize(
    "line",
    [
        "train {model} --data {corpus} --out o --overwrite --steps 2",
        "finetune --ckpt {trained} --data {corpus} --out o --overwrite --steps 2",
        "sample --ckpt {trained} --max_new_tokens 3",
    ],
)
def test_a_script_takes_or_refuses_any_flag(
    run, undrawn, corpus, trained, tmp_path, monkeypatch, line, cases
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    name, *given = line.format(model=MODEL, corpus=corpus, trained=trained).split()
    rng, codes = random.Random(0), set()
    for f in [*fields(SCRIPTS[name].Options), *(fields(Config) if name == "train" else ())]:
        if not f.metadata or f.name in LEFT_OUT:
            continue
        words = [*WORDS, *(f.metadata.get("choices") or ())]
        for word in rng.sample(words, cases):
            flag = f"--{f.name}" + ("" if f.default is False else f"={word}")
            code, _, err = run([name, *given, flag])
            assert code == 0 or (code == 2 and err.count("\n") == 1), (flag, code, err)
            codes.add(code)
    assert codes == {0, 2}


# --- platforms -----------------------------------------------------------------------------------

PROGRAMS = [p for folder in (".", "common", "benchmarks") for p in (ROOT / folder).glob("*.py")]


def test_every_program_is_python_3_10_and_depends_on_no_unix():
    unix = r"import (fcntl|grp|posix|pty|pwd|syslog|termios|tty)\b|\bfork\("
    assert len(PROGRAMS) > 15
    for path in PROGRAMS:
        text = path.read_text(encoding="utf-8")
        ast.parse(text, feature_version=(3, 10))
        assert not re.search(unix, text), path


def test_without_a_home_or_a_network_and_with_a_poor_console(corpus, tmp_path):
    """Nor does any program of ours open a text without saying its encoding."""
    out = tmp_path / "o u t"
    lines = [
        ["train", *MODEL.split(), "--data", str(corpus), "--steps", "2", "--out", str(out)],
        ["sample", "--ckpt", str(out / "ckpt.pt"), "--export", str(out / "hf")],
        ["sample", "--ckpt", str(out / "hf"), "--chat"],
    ]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PROGRAMS]
    strict = [f"-Werror::EncodingWarning:{module}" for module in modules]
    environment = {k: v for k, v in os.environ.items() if k != "DEEPSEEK_CACHE"}
    environment |= {"HOME": "/proc/nowhere", "HF_HUB_OFFLINE": "1", "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    environment |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    program = f"from conftest import call\nfor line in {lines!r}: call(line)"
    done = subprocess.run(
        [sys.executable, *strict, "-c", program], cwd=tmp_path, env=environment,
        input=b"\xff\xfe hello\n", capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"> " in done.stdout and done.stdout.isascii()
    assert (out / "cache").is_dir()  # the fallback where there is no home
