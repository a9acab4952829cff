"""Several processes under torchrun do together what one does alone."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import MODEL, ROOT, log_of

GROUPS = "--topk_method group_limited_greedy --n_group 2 --topk_group 1 --comm_loss_alpha 0.05"
TRAIN = f"train.py {MODEL} {GROUPS} --save_every 4 --lr 1e-3 --log_level quiet"


@pytest.fixture
def start(tmp_path, corpus):
    """start(processes, "train.py ...") -> the running command; its folder is the working one."""
    started = []

    def start(processes, line):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script, *arguments = line.format(corpus=corpus).split()
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / script)]
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def together(start):
    """together(processes, "train.py ...") runs it to its end."""

    def together(processes, line):
        process = start(processes, line)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return out

    return together


def weights(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["model"]


def difference(a, b):
    """The largest of two checkpoints' weights, relative to the largest weight of each tensor."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max()).item() for k in a)


# Many of 16 experts are idle in a batch of 4 x 8 tokens.
@pytest.mark.parametrize(
    "extra, engines",
    [("", ("", "--fsdp")), ("--grad_accum 2 --n_routed_experts 16 --seq_len 8", ("",))],
)
def test_two_processes_train_to_the_weights_and_the_log_of_one(together, tmp_path, extra, engines):
    line = f"{TRAIN} --data {{corpus}} --steps 10 {extra}"
    together(1, line + " --out one")
    one = log_of(tmp_path / "one")
    for engine in engines:
        folder = tmp_path / f"two{engine}"
        together(2, f"{line} {engine} --out {folder}")
        assert difference(tmp_path / "one", folder) < 1e-5
        two = log_of(folder)
        assert [r["step"] for r in two[1:]] == list(range(1, 11))
        for a, b in zip(one[1:], two[1:], strict=True):
            assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
            for name in ("loss", "aux_loss", "grad_norm", "expert_load_max", "val_loss"):
                assert name not in a or b[name] == pytest.approx(a[name], rel=1e-4), name
        assert one[-1]["expert_load"] == two[-1]["expert_load"]


def test_a_run_goes_on_with_another_number_of_processes(together, tmp_path):
    line = f"{TRAIN} --data {{corpus}} --schedule constant --warmup 0"
    together(1, f"{line} --steps 8 --out straight")
    for i, (first, second) in enumerate([("2 --fsdp", "1"), ("1", "2 --fsdp"), ("2", "1")]):
        halves = tmp_path / f"halves{i}"
        for part, more in ((first, f"{line} --steps 4"), (second, "train.py --resume --steps 8")):
            processes, _, fsdp = part.partition(" ")
            together(int(processes), f"{more} {fsdp} --out {halves} --log_level quiet")
        assert difference(tmp_path / "straight", halves) < 1e-5, (first, second)


def test_two_processes_fine_tune_to_the_adapter_of_one(together, tmp_path, trained):
    for processes, out in ((1, "one"), (2, "two")):
        line = f"finetune.py --ckpt {trained} --data {{corpus}} --steps 6 --batch_size 4"
        together(processes, f"{line} --log_level quiet --dtype float32 --lr 1e-3 --out {out}")
    # B starts at zero, so its first steps are Adam's: the sign of a gradient, however small
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-3
    one, two = (log_of(tmp_path / out)[-1] for out in ("one", "two"))
    assert two["val_loss_after"] == pytest.approx(one["val_loss_after"], rel=1e-5)


@pytest.mark.parametrize(
    "rows, batch", [(19, "--batch_size 4"), (25, "--batch_size 8 --grad_accum 4")]
)
def test_two_processes_tell_the_same_of_a_last_batch_that_is_not_full(
    together, tmp_path, trained, rows, batch
):
    said = [{"instruction": f"Say {n}", "output": f"cat {n} " * (n % 3 + 1)} for n in range(rows)]
    (tmp_path / "rows.json").write_text(json.dumps(said))
    for processes, out in ((1, "one"), (2, "two")):
        line = f"finetune.py --ckpt {trained} --data rows.json --steps 9 {batch} --lr 1e-3"
        together(processes, f"{line} --log_level quiet --dtype float32 --out {out}")
    one, two = (log_of(tmp_path / out) for out in ("one", "two"))
    for a, b in zip(one[1:-1], two[1:-1], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]
    assert two[-1]["val_loss_after"] == pytest.approx(one[-1]["val_loss_after"], rel=1e-4)


def workers(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def wait_for_lines(process, log, lines):
    while not (log.exists() and len(log.read_text().splitlines()) > lines):
        assert process.poll() is None
        time.sleep(0.2)


def test_ctrl_c_in_one_process_stops_all_after_the_same_step(start, tmp_path):
    loud = TRAIN.replace("--log_level quiet", "")
    process = start(2, f"{loud} --data {{corpus}} --minutes 60 --eval_every 5 --out out")
    wait_for_lines(process, tmp_path / "out" / "log.jsonl", 25)  # the number of steps is agreed on
    os.kill(workers(process)[-1], signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.count("stopped after step") == 1 and out.count("vocabulary") == 1  # said once
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_a_process_that_dies_ends_all_with_a_message(start, tmp_path):
    process = start(2, f"{TRAIN} --data {{corpus}} --steps 100000 --out out")
    wait_for_lines(process, tmp_path / "out" / "log.jsonl", 4)
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "exitcode" in err and "-9" in err
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_what_cannot_be_shared_out_is_a_sentence(run, start, corpus, tmp_path):
    code, _, err = run(f"train --data {corpus} --fsdp --out {tmp_path / 'x'}")
    assert code == 2 and "start them with torchrun" in err
    code, _, err = run(f"train --data {corpus} --low_memory --bias_update_speed 1 --out x")
    assert code == 2 and "without --bias_update_speed" in err
    process = start(2, f"{TRAIN} --data {{corpus}} --batch_size 5 --grad_accum 1 --out y")
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "train.py: --batch_size 5 must be a multiple of --grad_accum 1 times the 2" in err
