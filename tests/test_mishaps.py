"""What a user's machine, disk, files and typing can do wrong: no run is lost, no text misleads."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, log_of, same

import train

KILLER = Path(__file__).with_name("killer.py")
SWEEP = pytest.mark.slow  # of the full number of cases


def sweep(few: int, many: int):
    """Run a test with a few seeded cases, and under `pytest -m slow` with many."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=SWEEP)])


# ----------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------


def moments(cases: int, seconds: float) -> list:
    """Moments of a run: half of them drawn, the others in the middle of writing or evaluating."""
    rng = random.Random(cases)
    calls = ["torch.save", "os.replace", "os.fsync", "train.evaluate", "train.draw_curves"]
    named = [[name, 1 + rng.randrange(3)] for name in calls * cases][: cases // 2]
    return [rng.uniform(0, seconds) for _ in range(cases - len(named))] + named


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killer forks")
@sweep(4, 20)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "finetune"])
def test_a_run_killed_anywhere_ends_with_the_same_bits(corpus, trained, tmp_path, kind, cases):
    line = f"--steps 24 --eval_every 6 --save_every 1 --log_level quiet --out {tmp_path}/o"
    if kind == "finetune":
        rows = [{"instruction": f"Where is cat {n}?", "output": f"On mat {n}."} for n in range(60)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        line += f" --ckpt {trained} --data {tmp_path}/rows.json --batch_size 4 --dtype float32"
    else:
        line += f" {MODEL.replace('float32', kind)} --data {corpus}"
    script = "finetune" if kind == "finetune" else "train"
    ends = []
    for when in ([], moments(cases, 2.0)):
        command = [sys.executable, str(KILLER), script, json.dumps(line.split()), json.dumps(when)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        state = train.load_checkpoint(tmp_path / "o" / "ckpt.pt", mmap=False)
        records = [r for r in log_of(tmp_path / "o")[1:] if "loss" in r]
        losses = [(r["step"], r["loss"], r.get("val_loss")) for r in records]
        kept = [p.read_bytes() for p in sorted((tmp_path / "o").glob("adapter_*"))]
        ends.append((state, losses, kept))
        (tmp_path / "o").rename(tmp_path / f"o{len(when)}")
    assert f"killed {cases}" in done.stdout or cases > 4  # the last ones may find it finished
    (a, losses, kept), (b, losses_b, kept_b) = ends
    for key in ("model", "optimizer", "rng", "step", "tokens", "best_val_loss"):
        assert same(a[key], b[key]), key
    assert losses == losses_b and [step for step, *_ in losses] == list(range(1, 25))
    assert kept == kept_b
