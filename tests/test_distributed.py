"""Several processes under torchrun do together what one does alone."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, call, log_of

from common import trainer

TRAIN = (
    f"train {MODEL} --topk_method group_limited_greedy --n_group 2 --topk_group 1"
    " --comm_loss_alpha 0.05 --lr 1e-3 --schedule constant --warmup 0 --log_level quiet"
)
ADAMW = f"{TRAIN} --optimizer adamw"  # as --fsdp does not go with muon
# Many of 16 experts are idle in a batch of 4 x 8 tokens.
IDLE = "--grad_accum 2 --n_routed_experts 16 --seq_len 8"
# (instructions, flags): the last batch of an epoch is not full, and has not as many tokens in each
# process, or none in some pieces
TUNE = {"odd": (19, "--batch_size 4"), "few": (25, "--batch_size 8 --grad_accum 4")}
# Several runs in one start, as a start takes longer than a run. The last ends as scripts do.
SEVERAL = """
import json, sys, finetune, train
from common import runtime, trainer
trainer.draw_curves = lambda *_: None  # which takes a second
lines = json.loads(sys.argv[1])
for line in lines:
    name, *arguments = line.split()
    sys.argv = [f"{name}.py", *arguments]
    main = {"train": train, "finetune": finetune}[name].main
    runtime.run_script(main) if line == lines[-1] else main()
"""


def torchrun(folder, script, *arguments):
    """Two processes, begun; their working folder is this one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launcher, str(script), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus, trained):
    """The folder of all runs, by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    whole, half = (f"{ADAMW} --data {corpus} --steps {steps}" for steps in (8, 4))
    idle = f"{TRAIN} --data {corpus} --steps 8 {IDLE}"
    again = "train --resume --steps 8 --log_level quiet"
    tuned = []
    for name, (rows, how) in TUNE.items():
        said = [dict(instruction=f"Say {n}", output="cat " * (n % 3 + 1)) for n in range(rows)]
        (folder / f"{name}.json").write_text(json.dumps(said))
        how += " --steps 9 --lr 1e-3 --dtype float32 --log_level quiet"
        tuned.append(f"finetune --ckpt {trained} --data {name}.json {how} --out {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(trainer, "draw_curves", lambda *_: None)
        for line in (f"{whole} --out one", f"{idle} --out idle", *tuned):
            call(line)
        call(f"{half} --out one_fsdp")
        together = [
            f"{whole} --out two",
            f"{whole} --out fsdp --fsdp",
            f"{idle} --out idle2",
            f"{again} --out one_fsdp --fsdp",
            f"{half} --out fsdp_one --fsdp",
            *(f"{line}2" for line in tuned),
            f"{whole} --out refused --batch_size 5 --grad_accum 1",
        ]
        (folder / "several.py").write_text(SEVERAL)
        process = torchrun(folder, folder / "several.py", json.dumps(together))
        _, err = process.communicate(timeout=300)
        assert process.returncode != 0  # the last is refused
        assert "train.py: --batch_size 5 must be a multiple of the 2" in err
        call(f"{again} --out fsdp_one")
    return folder


def check_same(a, b, weights_within=1e-5):
    """The same losses, expert load and weights, these relative to the largest of a tensor."""
    one, two = log_of(a)[1:], log_of(b)[1:]
    assert len(one) == len(two) >= 8
    for x, y in zip(one, two, strict=True):
        assert x.keys() == y.keys() and x.get("tokens") == y.get("tokens")
        for name in x.keys() - {"tok_per_s"}:
            near = dict(rel=0, abs=0) if name == "expert_load" else dict(rel=1e-4)
            if "rehearsal" in x:  # its differences of logarithms, near 0, are the noise of sums
                near["abs"] = 0.0011 if name == "expert_load" else 1e-7  # a load has three digits
            assert np.array(x[name]) == pytest.approx(np.array(y[name]), **near), (name, x, y)
    one, two = (torch.load(f / "ckpt.pt", weights_only=True)["model"] for f in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        difference = (one[name] - two[name]).abs().max() / one[name].abs().max()
        assert difference < weights_within, name


@pytest.mark.parametrize(
    "one, two",
    [("one", "two"), ("one", "fsdp"), ("idle", "idle2"), ("one", "fsdp_one"), ("one", "one_fsdp")],
)
def test_two_processes_train_to_the_weights_and_the_log_of_one(runs, one, two):
    check_same(runs / one, runs / two)
    last = log_of(runs / one)[-1]
    assert last.keys() > {"communication_balance", "grad_norm", "val_loss", "expert_load"}


@pytest.mark.slow  # compiles for a minute or two
def test_two_processes_with_compiled_blocks_train_to_the_weights_of_one(runs, corpus):
    ways = ["", "--fsdp", "--fsdp --checkpoint_activations --grad_accum 2"]
    lines = [
        f"{ADAMW} --data {corpus} --steps 8 --compile on {how} --out compiled{i}"
        for i, how in enumerate(ways)
    ]
    process = torchrun(runs, runs / "several.py", json.dumps(lines))
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    for i in range(len(ways)):
        assert log_of(runs / f"compiled{i}")[0]["args"]["compile"] == "on"
        state = torch.load(runs / f"compiled{i}" / "ckpt.pt", weights_only=True)
        assert state["args"]["compile"] == "on"  # it has not failed on the way
        check_same(runs / "one", runs / f"compiled{i}")


@pytest.mark.parametrize("name", TUNE)
def test_two_processes_fine_tune_to_the_adapter_of_one(runs, name):
    # B starts at zero, so its first steps are Adam's: the sign of a gradient, however small
    check_same(runs / name, runs / f"{name}2", weights_within=1e-3)
    assert "val_loss_after" in log_of(runs / name)[-1]


def test_ctrl_c_in_one_process_stops_all_after_the_same_step(corpus, tmp_path):
    line = f"{TRAIN} --data {corpus} --out out --minutes 60 --eval_every 5 --log_level info"
    process = torchrun(tmp_path, ROOT / "train.py", *line.split()[1:])
    log = tmp_path / "out" / "log.jsonl"
    try:
        while not (log.exists() and len(log.read_text().splitlines()) > 25):
            assert process.poll() is None  # by now the number of steps is agreed on
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and (tmp_path / "out" / "ckpt.pt").exists(), err
    assert out.count("vocabulary") == out.count("train.py --resume --out out goes on") == 1
