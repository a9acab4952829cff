"""The scripts as a user runs them: a run, its interruption, its resumption, and bad input."""

import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MODEL, ROOT, log_of, same

import sample
import train
from common import checkpoint, data, runlog, runtime, stories, trainer
from deepseek import Config, DeepSeek, Output, UsageError


def test_a_run_learns_and_leaves_what_it_promises(run, corpus, tmp_path):
    code, out, err = run(
        f"train {MODEL} --data {corpus} --steps 60 --lr 0.01 --warmup 5 --out {tmp_path}/o"
    )
    assert code == 0
    assert "parameters" in out and "bits/byte" in out and "python sample.py --ckpt" in out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "ckpt.pt",
        "curves.png",
        "log.jsonl",
        "run.lock",
    ]
    header, *records = log_of(tmp_path / "o")
    assert header["config"]["hidden_size"] == 32 and header["args"]["lr"] == 0.01
    assert [r["step"] for r in records] == list(range(1, 61))
    assert {"tokens", "loss", "aux_loss", "lr", "grad_norm", "tok_per_s", "expert_load_max"} < set(
        records[0]
    )
    evaluated = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluated] == list(range(6, 61, 6))
    assert evaluated[-1]["val_loss"] < 0.5 * math.log(320)
    assert records[-1]["tokens"] == 60 * 4 * 32
    assert 1 <= records[-1]["expert_load_max"] <= 4

    ckpt = f"--ckpt {tmp_path}/o/ckpt.pt"
    code, out, _ = run(f"sample {ckpt} --prompt The --seed 1 --num_samples 2")
    assert code == 0 and out.count("The cat") >= 1 and "---" in out
    assert run(f"sample {ckpt} --prompt The --seed 1 --num_samples 2")[1] == out
    held_out = tmp_path / "held.txt"
    ready = data.prepare(str(corpus), 320, Path(os.environ["DEEPSEEK_CACHE"]))
    spans = zip(ready.val.doc_offsets[:-1], ready.val.doc_offsets[1:], strict=True)
    held_out.write_text(
        data.SEPARATOR.join(ready.tokenizer.decode(ready.val.ids[a:b].tolist()) for a, b in spans)
    )
    code, out, _ = run(f"sample {ckpt} --score {held_out}")
    nats, bpb = float(out.split()[0]), float(out.split()[4])
    assert nats == pytest.approx(evaluated[-1]["val_loss"], abs=2e-4)
    assert bpb == pytest.approx(evaluated[-1]["val_bpb"], abs=2e-4)


@pytest.mark.parametrize(
    "extra", ["", "--dtype bfloat16 --grad_accum 2 --token_drop_capacity 1.0 --n_group 2"]
)
def test_a_resumed_run_ends_with_the_same_bits(run, corpus, tmp_path, extra):
    line = f"train {MODEL} {extra} --data {corpus} --log_level quiet --steps 12 --schedule constant"
    assert run(f"{line} --out {tmp_path}/whole")[0] == 0
    assert run(f"{line} --out {tmp_path}/parts --save_every 5")[0] == 0
    assert (
        run(f"{line.replace('--steps 12', '--steps 7')} --out {tmp_path}/parts --overwrite")[0] == 0
    )
    assert run(f"train --resume --steps 12 --out {tmp_path}/parts")[0] == 0
    a, b = (checkpoint.load_checkpoint(tmp_path / n / "ckpt.pt") for n in ("whole", "parts"))
    for key in ("model", "optimizer", "rng", "step", "tokens"):
        assert same(a[key], b[key]), key
    whole, parts = (
        [(r["step"], r["loss"]) for r in log_of(tmp_path / n)[1:]] for n in ("whole", "parts")
    )
    assert whole == parts


def test_ctrl_c_saves_and_resume_goes_on(corpus, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *MODEL.split(), "--data", str(corpus)]
    command += ["--steps", "100000", "--eval_every", "50000", "--out", str(tmp_path / "o")]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = tmp_path / "o" / "log.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if log.exists() and log.stat().st_size > 20_000:
            break
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, output
    assert "--resume" in output and "Traceback" not in output
    step = checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt")["step"]
    assert log_of(tmp_path / "o")[-1]["step"] == step > 10


def test_resume_takes_stored_flags_and_refuses_others(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --steps 4 --out {tmp_path}/o"
    assert run(line)[0] == 0
    code, out, _ = run(f"{line} --resume")
    assert code == 0 and "finished: 4 steps" in out
    code, _, err = run(f"train --resume --out {tmp_path}/o --lr 0.5")
    assert code == 2 and "--lr 0.5 differs" in err
    code, _, err = run(f"train --resume --out {tmp_path}/o --steps 3")
    assert code == 2 and "--steps 3 differs" in err
    assert run(f"train --resume --out {tmp_path}/o --steps 6 --log_level quiet") == (0, "", "")
    assert checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt")["step"] == 6


def test_minutes_fixes_the_number_of_steps(run, corpus, tmp_path):
    code, out, _ = run(f"train {MODEL} --data {corpus} --minutes 0.001 --out {tmp_path}/o")
    state = checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt")
    assert code == 0 and state["step"] == state["args"]["steps"] == 21


def test_a_run_in_the_way_is_never_written_over(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --steps 2 --out {tmp_path}/o"
    assert run(line)[0] == 0
    before = (tmp_path / "o" / "ckpt.pt").read_bytes()
    code, _, err = run(line)
    assert code == 2 and "holds another run" in err
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() == before
    assert run(f"{line} --overwrite --seed 3")[0] == 0
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() != before


@pytest.mark.parametrize(
    "line, message",
    [
        ("train --size huge", "invalid choice: 'huge'"),
        ("train --data stories:9", "N from 100"),
        ("train --data stories:x", "N from 100"),
        ("train --data {tmp}/none.txt", "neither a file"),
        ("train --data {tmp}/empty.txt", "is empty"),
        ("train --data {tmp}/binary.txt", "byte 1 is wrong"),
        ("train --data {tmp}/short.txt", "fewer than one row of seq_len"),
        ("train --data {text} --steps 0", "--steps: '0' is not a whole number of at least 1"),
        ("train --data {text} --steps 1.5", "--steps"),
        ("train --data {text} --lr nan", "--lr"),
        ("train --data {text} --lr -1", "--lr"),
        ("train --data {text} --minutes 0", "--minutes"),
        ("train --data {text} --steps 3 --minutes 3", "exclude each other"),
        ("train --data {text} --schedule never", "--schedule"),
        ("train --data {text} --device tpu", "device 'tpu' is unknown"),
        ("train --data {text} --dtype float16 --device cpu", "float16 needs a CUDA card"),
        ("train --data {text} --steps 3 --nonsense 1", "--nonsense"),
        ("train --data {text} --qk_rope_head_dim 7", "must be even"),
        ("train --data {text} --n_routed_experts 10 --n_group 3", "multiple of n_group"),
        ("train --data {text} --num_experts_per_tok 33", "at most 16"),
        ("train --data {text} --rope_scaling nonsense", "--rope_scaling"),
        ("train --data {text} --vocab_size 100", "must be at least 258"),
        ("train --data {text} --batch_size 5 --grad_accum 2", "multiple of --grad_accum 2"),
        ("train --data {text} --max_position_embeddings 16 --seq_len 32", "--seq_len 32 is more"),
        ("train --data {text} --out {tmp}/empty.txt", "cannot be written"),
        ("train --data {text} --size v2", "GiB of memory are needed"),
        ("train --resume --out {tmp}/nothing", "nothing to resume"),
        ("sample --ckpt {tmp}/none.pt", "does not exist"),
        ("sample --ckpt {tmp}/binary.txt", "is damaged or not one"),
        ("sample --ckpt {tmp}/alien.pt", "not a checkpoint of train.py"),
        ("sample --ckpt {ckpt} --temperature -1", "--temperature"),
        ("sample --ckpt {ckpt} --top_p 2", "--top_p"),
        ("sample --ckpt {ckpt} --top_k 0", "--top_k"),
        ("sample --ckpt {ckpt} --score {tmp}/none.txt", "is not a file"),
        ("sample --ckpt {tmp}", "has neither ckpt.pt nor config.json"),
        ("sample --ckpt {out}", "is a folder"),
        ("sample --ckpt {ckpt} --prompt {long}", "tokens and the context 32"),
        ("sample --ckpt {cut}", "is damaged or not one"),
    ],
)
def test_bad_input_ends_in_one_sentence(run, corpus, tmp_path, trained, line, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x7f\xff\x00\x01" * 100)
    (tmp_path / "short.txt").write_text("too short")
    torch.save({"weights": torch.ones(3)}, tmp_path / "alien.pt")
    (tmp_path / "cut.pt").write_bytes(trained.read_bytes()[:5000])
    places = dict(tmp=tmp_path, text=corpus, ckpt=trained, cut=tmp_path / "cut.pt", long="x" * 99)
    places["out"] = trained.parent
    line = line.format(**places)
    if line.startswith("train") and "--out" not in line:
        line += f" --out {tmp_path}/out"
    code, out, err = run(line)
    assert code == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_a_run_on_the_stories_shows_the_floor_and_is_judged(run, tmp_path):
    line = (
        f"train {MODEL} --data stories:120 --steps 4 --eval_every 2 --seq_len 256 --out {tmp_path}"
    )
    code, out, _ = run(line)
    header, *records = log_of(tmp_path)
    assert code == 0 and f"floor    {header['floor']:.4f} nats/token" in out
    assert 0.1 < header["floor"] < records[-1]["val_loss"]
    assert 0 <= records[-1]["val_recall"] < 0.5 and "facts recalled" in out
    assert {"name", "object", "place"} < set(records[-1]["val_recall_by_kind"])
    code, out, _ = run(f"sample --ckpt {tmp_path}/ckpt.pt --judge 3 --seed 0")
    assert code == 0 and "0 of 3 stories are valid" in out and "first mistakes: wording 3" in out


def test_the_check_counts_valid_stories_and_names_mistakes(capsys):
    told = [stories.tell(seed) for seed in range(3)]
    start, end, _ = [f for f in told[2].facts if f[2] == "name"][-1]
    right = told[2].text[start:end]
    other = next(name for name in ("Mia", "Ada", "Zoe") if name not in told[2].text)
    wrong = told[2].text[:start] + other + told[2].text[end:]
    assert right in told[2].text[:start]
    tokenizer = data.train_tokenizer([s.text for s in told], 600)
    rows = [[*tokenizer.encode(t).ids, 1] for t in (told[0].text, told[1].text, wrong)]
    longest = max(map(len, rows))
    rows = torch.tensor([row + [1] * (longest - len(row)) for row in rows])

    class Told:  # a model that writes these three texts
        config = Config.preset("tiny")

        def generate(self, prompts, limit, **_):
            yield from rows.T

    args = sample.make_parser().parse_args(["--judge", "3", "--temperature", "1"])
    sample.check(Told(), tokenizer, args, [0], torch.Generator())
    out = capsys.readouterr().out
    assert "2 of 3 stories are valid (66.7%)" in out
    assert "first mistakes: name 1" in out and f"after {start / len(wrong):.0%}" in out


def test_an_interrupted_save_leaves_the_old_checkpoint(trained, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(trained.read_bytes())

    def fail(state, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UsageError, match=r"ckpt.pt cannot be written.*0.0 MB and [\d.]+ MB"):
        checkpoint.save_checkpoint(path, {})
    assert path.read_bytes() == trained.read_bytes() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(torch, "save", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # which has nothing to do with the disk
        checkpoint.save_checkpoint(path, {})


def test_the_schedules():
    def rates(schedule):
        return [trainer.learning_rate(s, 100, 1.0, 10, schedule) for s in range(100)]

    step = rates("step")
    assert step[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert step[10] == step[59] == 1
    assert step[60] == step[89] == pytest.approx(0.316)
    assert step[90] == step[99] == pytest.approx(0.316**2)
    cosine = rates("cosine")
    assert trainer.learning_rate(150, 100, 1.0, 10, "cosine") == pytest.approx(0.1)
    assert cosine[55] == pytest.approx(0.55) and cosine[99] == pytest.approx(0.1, abs=0.01)
    assert rates("constant")[10:] == [1.0] * 90


def test_a_linear_schedule_falls_evenly_to_nothing():
    rates = [trainer.learning_rate(s, 110, 2.0, 10, "linear") for s in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10:] == pytest.approx([2 - 0.02 * s for s in range(100)])


@pytest.mark.parametrize(
    "able, expected",
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        (None, torch.float32),  # torch 2.11 cannot tell
    ],
)
def test_a_cpu_takes_bfloat16_only_where_it_computes_it(monkeypatch, able, expected):
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert runtime.choose_dtype("auto", torch.device("cpu")) == expected
    assert runtime.choose_dtype("float32", torch.device("cpu")) == torch.float32


def test_the_recipe_fills_in_what_was_not_typed():
    def chosen(line):
        args = train.make_parser().parse_args(line.split())
        train.with_recipe(args, {})
        return args.lr, args.beta2, args.schedule, args.batch_size, args.minutes, args.steps

    assert chosen("") == (*(train.RECIPES["tiny"][k] for k in ("lr", "beta2", "schedule",
        "batch_size", "minutes")), None)  # fmt: skip
    typed = "--lr 0.1 --beta2 0.5 --schedule step --batch_size 3 --steps 7"
    assert chosen(typed) == (0.1, 0.5, "step", 3, None, 7)
    assert chosen("--size 1b")[1:3] == (0.95, "step")  # the paper's


def test_recall_is_counted_by_kind(tmp_path):
    ready = data.prepare("stories:150", 1024, tmp_path)
    held_out = data.build_eval_set(ready.val, ready.tokenizer, 256, 4, stories=True)
    name = 1 + stories.FACT_KINDS.index("name")

    class Names(torch.nn.Module):  # a model that knows names and nothing else
        rows = iter(zip(held_out.rows, held_out.facts, strict=True))

        def forward(self, inputs):
            (_, targets), facts = next(self.rows)
            said = torch.where(facts == name, targets, 0)
            logits = torch.nn.functional.one_hot(said.clamp(min=0), 1024).float()
            return Output(logits, None, None, None)

    got = trainer.evaluate(Names(), held_out, torch.device("cpu"), torch.float32)
    kinds = got["val_recall_by_kind"]
    assert kinds["name"] == 1 and len(kinds) > 8
    assert all(share == 0 for kind, share in kinds.items() if kind != "name")
    counts = torch.cat([facts.flatten() for facts in held_out.facts]).bincount()
    expected = counts[name] / counts[1:].sum()
    assert got["val_recall"] == pytest.approx(expected.item(), abs=1e-4)


def test_weight_decay_acts_on_matrices_only():
    model = train.DeepSeek(Config.preset("tiny"))
    matrices, vectors = trainer.make_optimizer(model, 1e-3, 0.1, 0.95).param_groups
    assert matrices["weight_decay"] == 0.1 and all(p.dim() > 1 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(p.dim() == 1 for p in vectors["params"])
    assert matrices["betas"] == (0.9, 0.95)
    assert trainer.make_optimizer(model, 1e-3, 0.1, 0.9).param_groups[0]["betas"] == (0.9, 0.9)
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_evaluation_is_the_mean_over_tokens(trained):
    state = checkpoint.load_checkpoint(trained)
    model, tokenizer = checkpoint.build_model(state), data.load_tokenizer(state["tokenizer"])
    texts = ["The cat sat.", "It was a big cat on a mat, and it was small.", "Mat"]
    nats = count = n_bytes = 0
    ids = []
    for text in texts:  # each alone, no padding, no windows
        one = torch.tensor([[0, *tokenizer.encode(text).ids, 1]])
        ids += one[0].tolist()
        logprobs = model(one[:, :-1]).logits.log_softmax(-1)
        nats -= logprobs.gather(-1, one[:, 1:, None]).sum().item()
        count, n_bytes = count + one.shape[1] - 1, n_bytes + len(text)
    ids = data.np.array(ids)
    tokens = data.Tokens(ids, data.np.array([*data.np.flatnonzero(ids == 0), len(ids)]))
    held_out = data.build_eval_set(tokens, tokenizer, 32, batch_size=2)
    result = trainer.evaluate(model, held_out, torch.device("cpu"), torch.float32)
    assert result["val_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_a_step_is_the_step_written_out_by_hand(trained, tmp_path, accum):
    state = checkpoint.load_checkpoint(trained, mmap=False)
    config = Config(**state["config"] | {"aux_loss_alpha": 2.0})
    args = train.make_parser().parse_args(["--clip", "0.05", "--beta2", "0.95"])
    args.lr, args.warmup, args.steps, args.grad_accum = 0.01, 4, 10, accum  # in the warm-up
    args.out, args.overwrite = str(tmp_path), False
    inputs, targets = torch.randint(0, 320, (2, 4, 12))
    targets[0, 3:], targets[2] = data.IGNORE, data.IGNORE  # pieces with different counts
    device = torch.device("cpu")

    one, other = train.DeepSeek(config), train.DeepSeek(config)
    other.load_state_dict(one.state_dict())
    trainer = trainer.Trainer(args, one, data.load_tokenizer(state["tokenizer"]), "", device,
                            torch.float32, None)  # fmt: skip
    record, _ = trainer.train_step(inputs, targets)

    decayed = [p for p in other.parameters() if p.dim() > 1]
    rest = [p for p in other.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01 / 4, betas=(0.9, 0.95))
    out = other.train()(inputs, targets)
    (out.loss + out.aux_loss).backward()
    norm = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
    for p in other.parameters():
        p.grad *= min(1, 0.05 / norm)
    optimizer.step()
    assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    assert record["aux_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > 0.05
    assert record["lr"] == 0.01 / 4
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5), (p - q).abs().max()


def small_trainer(folder, trained, state=None, **flags):
    args = train.make_parser().parse_args(["--out", str(folder), "--log_level", "quiet"])
    vars(args).update(
        {"steps": 3, "lr": 0.01, "beta2": 0.95, "warmup": 2, "grad_accum": 1, **flags}
    )
    stored = checkpoint.load_checkpoint(trained, mmap=False)
    model = checkpoint.build_model(state or stored)
    tokenizer = data.load_tokenizer(stored["tokenizer"])
    return trainer.Trainer(args, model, tokenizer, "", torch.device("cpu"), torch.float32, state)


def test_a_best_that_could_not_be_kept_is_kept_later(trained, tmp_path, capsys):
    """Also where the later one is no better than the one that was lost; until then no checkpoint
    is written, for what comes before it could not be resumed without the best."""
    trainer = small_trainer(tmp_path, trained, steps=4, eval_every=1, save_every=1)
    ids, targets = torch.randint(0, 320, (2, 4, 12))
    losses, calls, saved = iter([3.0, 1.0, 2.0, 2.5, 2.5]), [], []  # the first is of no step

    def keep():
        calls.append(trainer.step)
        if trainer.step == 1:
            raise OSError(28, "No space left on device")
        assert not saved

    trainer.save = lambda: saved.append(trainer.step)
    trainer.fit(lambda step: (ids, targets), lambda: {"val_loss": next(losses)}, lambda: "", keep)
    assert calls == [1, 2] and saved == [2, 3, 4] and trainer.best == 2.0
    assert capsys.readouterr().err.count("the best so far cannot be written: No space") == 1


def test_loss_scaling_is_undone_before_clipping(trained, tmp_path):
    ids, targets = torch.randint(0, 320, (2, 4, 12))
    results = []
    for scale in (None, 1024.0):
        folder = tmp_path / str(scale)
        folder.mkdir()
        trainer = small_trainer(folder, trained, clip=0.1)
        if scale:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        record, _ = trainer.train_step(ids, targets)
        results.append((record["grad_norm"], trainer.model.lm_head.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_fit_takes_each_step_once_in_training_mode_and_goes_on(trained, tmp_path):
    trainer, steps, modes = small_trainer(tmp_path, trained, eval_every=1), [], []
    losses = iter([9.0, 3.0, 1.0, 2.0])

    def batch_at(step):
        steps.append(step)
        modes.append(trainer.model.training)
        return torch.randint(0, 320, (2, 4, 12))

    def evaluate():
        with trainer.evaluating(trainer.model):
            assert not trainer.model.training and not torch.is_grad_enabled()
        return {"val_loss": next(losses)}

    trainer.fit(batch_at, evaluate, lambda: "")
    assert steps == [0, 1, 2] and all(modes) and trainer.best == 1.0
    trainer.lock.release()
    state = checkpoint.load_checkpoint(tmp_path / "ckpt.pt", mmap=False)
    again = small_trainer(tmp_path, trained, state, steps=5)
    assert again.best == 1.0 and again.step == 3
    steps.clear()
    kept = []
    again.fit(batch_at, lambda: {"val_loss": 1.0}, lambda: "", lambda: kept.append(1))
    assert steps == [3, 4] and not kept  # no better than before


def test_resuming_drops_log_lines_behind_the_checkpoint(tmp_path):
    log = runlog.Log(tmp_path, {"args": {}})
    for step in range(1, 6):
        log.write({"step": step})
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # the last line is cut, if only by its end
    assert [r.get("step") for r in runlog.read_log(path)] == [None, 1, 2, 3, 4]
    runlog.Log(tmp_path, {"args": {}}, resume_at=3).write({"step": 4, "again": True})
    assert [r.get("step") for r in runlog.read_log(path)] == [None, 1, 2, 3, 4]
    path.unlink()  # by somebody, while the run goes on
    log.write({"step": 6})
    assert list(runlog.read_log(path)) == [{"args": {}}, {"step": 6}]


def test_a_diverging_run_stops_and_keeps_its_checkpoint(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --out {tmp_path}/o --save_every 1 --clip 1e30 --warmup 0"
    code, _, err = run(f"{line} --steps 50 --lr 1e30")
    assert code == 2 and "not finite in 5 steps in a row" in err and "--lr" in err
    assert checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt")["step"] >= 1


def test_a_changed_text_is_not_resumed_on(run, corpus, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(corpus.read_text())
    assert run(f"train {MODEL} --data {path} --out {tmp_path}/o --steps 2")[0] == 0
    path.write_text(corpus.read_text().replace("small", "great"))
    code, _, err = run(f"train --resume --steps 4 --out {tmp_path}/o")
    assert code == 2 and "has changed since the run began" in err


def test_every_flag_has_help_with_its_default():
    for parser in (train.make_parser(), sample.make_parser()):
        for action in parser._actions:
            assert action.help, action.dest
            if action.dest not in ("help", "data", *Config.describe()):
                assert "default" in action.help, action.dest
    flags = {a.dest for a in train.make_parser()._actions}
    assert set(Config.describe()) - {"bos_token_id", "eos_token_id"} <= flags


def test_the_bias_of_v3_is_trained_saved_and_resumed(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --bias_update_speed 0.001 --schedule constant"
    assert run(f"{line} --warmup 0 --steps 4 --out {tmp_path / 'a'}")[0] == 0
    assert run(f"{line} --warmup 0 --steps 2 --out {tmp_path / 'b'}")[0] == 0
    assert run(f"train --resume --steps 4 --out {tmp_path / 'b'}")[0] == 0
    a, b = (torch.load(tmp_path / x / "ckpt.pt", weights_only=True)["model"] for x in "ab")
    bias = a["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.abs().max() > 0 and same(a, b)
    code, _, err = run(f"sample --ckpt {tmp_path / 'a' / 'ckpt.pt'} --export {tmp_path / 'hf'}")
    assert code == 2 and "bias_update_speed = 0.001 cannot be exported" in err


def test_low_memory_trains_in_bf16_with_8_bit_moments_and_resumes_to_the_same_bits(
    run, corpus, tmp_path, monkeypatch
):
    pytest.importorskip("torchao")
    line = f"train {MODEL} --data {corpus} --low_memory --schedule constant --warmup 0 --lr 1e-2"
    line = line.replace("--hidden_size 32", "--hidden_size 64")  # a matrix below 4,096 stays whole
    assert run(f"{line} --steps 6 --out {tmp_path / 'a'}")[0] == 0
    assert run(f"{line} --steps 3 --out {tmp_path / 'b'}")[0] == 0
    for dtype in ("float32", "bfloat16"):
        code, out, _ = run(f"{line} --steps 1 --dtype {dtype} --out {tmp_path / dtype}")
        assert code == 0 and ("very slow" in out) == (dtype == "float32")
    assert run(f"train --resume --steps 6 --out {tmp_path / 'b'}")[0] == 0
    a, b = (checkpoint.load_checkpoint(tmp_path / x / "ckpt.pt") for x in "ab")
    assert {t.dtype for t in a["model"].values()} == {torch.bfloat16}
    moments = {type(m["exp_avg"]).__name__ for m in a["optimizer"]["state"].values()}
    assert "OptimState8bit" in moments and same(a["model"], b["model"])
    losses = [r["loss"] for r in log_of(tmp_path / "a")[1:]]
    assert losses[-1] < losses[0] - 0.5
    code, out, _ = run(f"sample --ckpt {tmp_path / 'a' / 'ckpt.pt'} --max_new_tokens 3")
    assert code == 0 and out
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    code, _, err = run(f"{line} --steps 3 --out {tmp_path / 'c'}")
    assert code == 2 and "--low_memory needs torchao: pip install torchao" in err


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_logged(trained, tmp_path, poisoned, capsys):
    trainer = small_trainer(tmp_path, trained, steps=4, eval_every=10)
    real, before, calls = trainer.forward, [], []

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        before.append(trainer.model.lm_head.weight.detach().clone())
        calls.append(1)
        if len(calls) == 2:
            bad = math.nan if poisoned == "loss" else 0.0
            loss = out.loss + bad * out.loss
            if poisoned == "gradient":
                loss.register_hook(lambda g: g * math.inf)
            return out._replace(loss=loss)
        return out

    trainer.forward = forward
    trainer.fit(lambda i: torch.randint(0, 320, (2, 4, 12)), lambda: {"val_loss": 1.0}, lambda: "")
    records = log_of(tmp_path)[1:]
    assert [r.get("skipped", False) for r in records] == [False, True, False, False]
    assert torch.equal(before[1], before[2]) and not torch.equal(before[2], before[3])
    assert "step 2: loss or gradient not finite, left out" in capsys.readouterr().err


def test_nothing_is_saved_between_steps_left_out_and_several_in_a_row_end_the_run(
    trained, tmp_path
):
    trainer = small_trainer(tmp_path, trained, steps=20, eval_every=100, save_every=1)
    real = trainer.forward

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        return out._replace(loss=out.loss * (math.nan if trainer.step >= 3 else 1))

    trainer.forward = forward
    with pytest.raises(runtime.UsageError, match="in 5 steps in a row, up to step 8"):
        batch_at = lambda i: torch.randint(0, 320, (2, 4, 12))  # noqa: E731
        trainer.fit(batch_at, lambda: {"val_loss": 1.0}, lambda: "")
    assert checkpoint.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3


def test_experts_that_starve_are_warned_of_once(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "CROWDED_STEPS", 3)
    trainer = small_trainer(tmp_path, trained)
    trainer.model.config = Config(**vars(trainer.model.config) | {"n_routed_experts": 32})
    bar = train.tqdm(disable=True)  # 2 of 32: at most 16 times the average
    loads = [15.0, 15.0, 3.0, 13.0, 12.5, 14.0, 15.0]
    records = [{"loss": 1.0, "expert_load_max": load} for load in loads]
    for record in records:
        trainer.check_health(record, bar)
    assert ["warning" in r for r in records] == [False] * 5 + [True, False]
    assert capsys.readouterr().err.count("try a higher --aux_loss_alpha") == 1


def test_two_runs_cannot_write_to_one_folder(trained, tmp_path):
    first = small_trainer(tmp_path, trained)
    with pytest.raises(runtime.UsageError, match="another run is writing to"):
        small_trainer(tmp_path, trained)
    first.lock.release()
    small_trainer(tmp_path, trained)


def test_a_process_that_is_not_the_first_writes_nothing_and_says_nothing(
    trained, tmp_path, monkeypatch, capsys
):
    (tmp_path / "best.pt").write_text("of an earlier run")
    monkeypatch.setattr(train, "rank", lambda: 1)
    monkeypatch.setattr(train, "world", lambda: 2)
    monkeypatch.setattr(train, "summed", lambda values: values)
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model: model)
    trainer = small_trainer(tmp_path, trained, log_level="info", overwrite=True, eval_every=1)
    first = torch.initial_seed()
    trainer.fit(lambda i: torch.randint(0, 320, (2, 4, 12)), lambda: {"val_loss": 1.0}, lambda: "")
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    said = capsys.readouterr()
    assert said.out == "" and "step" not in said.err
    assert first == trainer.args.seed + 1  # it drops tokens of other sequences than the first


def test_the_bias_follows_the_load_of_the_whole_batch(trained, tmp_path):
    state = checkpoint.load_checkpoint(trained, mmap=False)
    state["config"] |= {"bias_update_speed": 0.5}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    state["model"][bias] = torch.zeros(4)
    args = train.make_parser().parse_args(["--out", str(tmp_path)])
    args.steps, args.lr, args.beta2, args.warmup, args.grad_accum = 3, 1e-9, 0.95, 0, 4
    model = checkpoint.build_model(state)
    trainer = trainer.Trainer(args, model, None, "", torch.device("cpu"), torch.float32)
    inputs, targets = torch.randint(0, 320, (2, 4, 12))
    load = model(inputs).expert_load
    trainer.train_step(inputs, targets)
    expected = 0.5 * (load.mean() - load[0]).sign()
    clear = (load[0] - load.mean()).abs() > 1e-6
    assert clear.sum() >= 2 and torch.equal(model.state_dict()[bias][clear], expected[clear])


def test_a_step_below_the_spacing_of_bf16_is_taken_now_and_then():
    pytest.importorskip("torchao")
    layer = torch.nn.Linear(128, 128, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(layer.weight)  # spacing 1/256 below it
    optimizer = trainer.make_optimizer(layer, 1e-4, 0.0, 0.95, low_memory=True)
    torch.manual_seed(0)
    layer(torch.ones(1, 128, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    moved = (layer.weight < 1).float().mean().item()
    assert moved == pytest.approx(1e-4 * 256, rel=0.2)


def test_memory_of_8_bit_moments_is_counted():
    with torch.device("meta"):
        model = DeepSeek(Config.preset("1b"))
    plain = trainer.estimate_memory(model, 1, 256, True, torch.bfloat16)
    low = trainer.estimate_memory(model.to(torch.bfloat16), 1, 256, True, torch.bfloat16)
    n = model.num_parameters()[0]
    assert plain - low == pytest.approx(n * (16 - 6), rel=1e-6)
    args = train.make_parser().parse_args(["--low_memory"])
    train.with_recipe(args, {})
    assert args.checkpoint_activations


@pytest.mark.parametrize(
    "rows, checkpointing, measured", [(8, False, 22.7), (16, False, 32.2), (16, True, 16.5)]
)
def test_the_estimate_of_memory_is_near_what_a_card_took(rows, checkpointing, measured):
    shape = dict(moe_intermediate_size=320, n_routed_experts=64, num_experts_per_tok=6)
    with torch.device("meta"):  # as it was measured on an H100, in GiB, at rows of 1,024 tokens
        model = DeepSeek(Config.preset("1b", **shape))
    needed = trainer.estimate_memory(model, rows, 1024, checkpointing, torch.bfloat16)
    assert needed / 2**30 == pytest.approx(measured, rel=0.25)


def test_pieces_of_1b_are_of_four_rows_on_any_number_of_processes(monkeypatch):
    for processes, pieces in ((1, 16), (2, 8), (8, 2), (16, 1), (64, 1)):
        monkeypatch.setattr(train, "world", lambda n=processes: n)
        args = train.make_parser().parse_args(["--size", "1b"])
        train.with_recipe(args, {})
        assert args.grad_accum == pieces
        trainer.check_micro_batches(args)


def test_1b_as_typed_fits_into_24_gb():
    args = train.make_parser().parse_args(["--size", "1b"])
    train.with_recipe(args, {})
    with torch.device("meta"):
        model = DeepSeek(Config.preset("1b"))
    piece = args.batch_size // args.grad_accum
    needed = trainer.estimate_memory(model, piece, args.seq_len, False, torch.bfloat16)
    assert (piece, args.seq_len) == (4, 1024) and needed < 22.5 * 2**30


def test_a_recipe_goes_at_most_ten_times_through_a_text():
    for line, tokens, steps, warmup in (
        ("--size 1b", 10_000_000, 1526, 152),  # 100M tokens in steps of 64 x 1024
        ("--size 1b", 10**10, 50_000, 2_000),
        ("--size 1b --warmup 400", 10_000_000, 1526, 400),
        ("--size 1b --batch_size 2048", 10_000_000, 48, 4),
        ("--size small --warmup 3", 10_000, 7, 3),
        ("--size 1b --steps 9000", 10_000_000, 9_000, 900),
        ("--size tiny", 10_000, None, 100),
    ):
        args = train.make_parser().parse_args(line.split())
        train.with_recipe(args, {})
        typed = train.make_parser().explicit(line.split())
        rounds = train.limit_rounds(args, typed, tokens)
        assert (args.steps, args.warmup) == (steps, min(warmup, steps or warmup))
        expected = steps and steps * args.batch_size * args.seq_len / tokens
        assert rounds == pytest.approx(expected or 0.0)


class Clock:
    """A time.perf_counter that hardly moves by itself."""

    now = 0.0

    def __call__(self):
        self.now += 1e-3
        return self.now


def test_a_checkpoint_is_never_older_than_a_quarter_of_an_hour(run, corpus, tmp_path, monkeypatch):
    clock, times, real = Clock(), [], trainer.Trainer.train_step

    def step(self, *batch):
        clock.now += 6 * 60
        return real(self, *batch)

    monkeypatch.setattr(train.time, "perf_counter", clock)
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    monkeypatch.setattr(trainer.Trainer, "save", lambda self, name="": times.append(self.step))
    line = f"train {MODEL} --data {corpus} --steps 8 --eval_every 8 --save_every 8"
    assert run(f"{line} --out {tmp_path}/a")[0] == 0
    assert times == [3, 6, 8]  # the first after 18 minutes, the second 18 later


@pytest.mark.parametrize("late", [True, False])
def test_all_processes_save_when_one_of_them_is_late(tmp_path, monkeypatch, late):
    args = train.make_parser().parse_args(["--steps", "9", "--out", str(tmp_path)])
    train.with_recipe(args, {})
    model = DeepSeek(Config.preset("tiny", vocab_size=320, num_hidden_layers=2))
    tokenizer = data.train_tokenizer(["a b"], 258)
    trainer = trainer.Trainer(args, model, tokenizer, "", torch.device("cpu"), torch.float32)

    def others(numbers):  # loss, aux_loss, asked, late, ... of this process
        numbers[3] += late
        return numbers

    monkeypatch.setattr(train, "summed", others)
    rows = torch.zeros(8, 16, dtype=torch.long)
    trainer.train_step(rows, rows)
    assert trainer.overdue == late


def test_a_large_model_on_the_stories_is_told_what_that_means(run, tmp_path):
    small = "--num_hidden_layers 1 --n_routed_experts 4 --num_experts_per_tok 1 --hidden_size 48"
    line = f"train --size small {small} --data stories:100 --steps 2 --batch_size 2 --seq_len 64"
    code, out, _ = run(f"{line} --eval_tokens 300 --out {tmp_path}/o")
    assert code == 0 and "smaller than at its own vocabulary" in out
    assert "--data tinystories has more" in out


# --- how a script ends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "CUDA out of memory. Tried"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_how_a_script_ends(capsys, error, code, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        runtime.run_script(main)
    assert end.value.code == code and said in capsys.readouterr().err


def test_a_card_that_is_full_when_a_run_is_taken_up_is_not_a_damaged_checkpoint(
    run, corpus, tmp_path, monkeypatch
):
    line = f"train {MODEL} --data {corpus} --steps 2 --log_level quiet"
    assert run(f"{line} --out {tmp_path}/o")[0] == 0

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(trainer.Trainer, "take_up", full)
    code, _, err = run(f"train --resume --steps 4 --out {tmp_path}/o")
    assert code == 2 and "out of memory" in err and "do not fit" not in err


def test_a_process_of_several_leaves_at_once_having_said_all(monkeypatch, tmp_path):
    did = []
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: did.append("destroyed"))
    monkeypatch.setattr(train.os, "_exit", lambda code: did.append(code))
    with open(tmp_path / "out", "w") as out:  # buffered, as a pipe is
        monkeypatch.setattr(sys, "stdout", out)
        runtime.run_script(lambda: print("all done"))
        assert (tmp_path / "out").read_text() == "all done\n"
    assert did == ["destroyed", 0]
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)

    def refuse():
        raise runtime.UsageError("no")

    with pytest.raises(SystemExit, match="2"):
        runtime.run_script(refuse)
    assert did == ["destroyed", 0]


def test_a_machine_that_cannot_compile_gets_a_sentence(run, trained, monkeypatch):
    def fail(module):
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", fail)
    code, _, err = run(f"sample --ckpt {trained} --compile")
    assert code == 2
    assert err.splitlines()[-1].startswith("sample.py: torch.compile fails here (No working C++")

    def other(model):
        raise RuntimeError("ours")

    monkeypatch.setattr(sample, "warm_up", other)
    with pytest.raises(RuntimeError, match="ours"):
        run(f"sample --ckpt {trained} --compile")


def test_sample_hands_its_flags_on(run, trained, monkeypatch):
    asked = []

    def generate(self, prompts, new, **options):
        asked.append((len(prompts), new, options))
        return iter([])

    monkeypatch.setattr(DeepSeek, "generate", generate)
    flags = "--max_new_tokens 9 --temperature 0.5 --top_k 3 --top_p 0.7"
    assert run(f"sample --ckpt {trained} {flags}")[0] == 0
    assert run(f"sample --ckpt {trained} {flags} --compile")[0] == 0
    (plain, *warm, compiled) = asked
    assert all(options == dict(temperature=0, compiled=True) for _, _, options in warm) and warm
    for (rows, new, options), compile in ((plain, False), (compiled, True)):
        assert (rows, new, options.pop("compile")) == (1, 9, compile)
        assert options.pop("generator")
        assert options.pop("vocab_size") < 320  # the tokenizer's, without padding
        assert options == dict(temperature=0.5, top_k=3, top_p=0.7, stop=1)


@pytest.mark.parametrize("flag", ["--score x", "--export x"])
def test_compiling_is_for_sampling(run, trained, flag):
    code, _, err = run(f"sample --ckpt {trained} --compile {flag}")
    assert code == 2 and "leave it out" in err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept_for_the_next_step():
    program = """
import resource, torch, train
runtime.run_script(lambda: None)
for step in range(12):
    if step == 2:
        began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(2**18) for _ in range(16)]  # of a MiB each
    del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) < 4000  # given back, ten times 16 MiB are 40,960 pages


def test_every_script_keeps_its_freed_memory(monkeypatch):
    said = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: said.append("kept"))
    runtime.run_script(lambda: said.append("run"))
    assert said == ["kept", "run"]


def test_what_glibc_is_told_and_that_others_are_left_alone(monkeypatch):
    said = []

    class Libc:
        def mallopt(self, parameter, value):
            said.append((parameter, value))

    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: Libc())
    runtime.keep_freed_memory()
    assert said == [(-1, 2**31 - 1), (-3, 2**25)]  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: object())  # macOS, musl
    runtime.keep_freed_memory()
    for error in (TypeError, OSError):  # Windows

        def refused(name, error=error):
            raise error

        monkeypatch.setattr(train.ctypes, "CDLL", refused)
        runtime.keep_freed_memory()
