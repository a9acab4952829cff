"""A run of training: what it learns, leaves and says; its steps, evaluation, recipes, memory."""

import copy
import itertools
import math
import signal
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import MODEL, load, log_of, same
from matplotlib.figure import Figure

import train
from common import checkpoint, data, optimizers, runlog, trainer
from common.runtime import UsageError
from deepseek import Config, DeepSeek, Output

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("undrawn")


def batch_at(step):
    """Random inputs and targets."""
    numbers = torch.Generator().manual_seed(step)
    return torch.randint(0, 320, (2, 4, 12), generator=numbers).unbind()


def small_trainer(folder, trained, state=None, model=None, dtype=torch.float32, **flags):
    recipe = dict(steps=3, lr=0.01, beta2=0.95, warmup=2, grad_accum=1, schedule="step")
    options = train.Options(**dict(out=str(folder), log_level="quiet") | recipe | flags)
    stored = load(trained.parent)
    model = model or checkpoint.build_model(state or stored)
    tokenizer = data.load_tokenizer(stored["tokenizer"])
    return trainer.Trainer(options, model, tokenizer, "", CPU, dtype, state)


def fit(run, evaluate=lambda: {"val_loss": 1.0}, get_batch=batch_at):
    return run.fit(get_batch, evaluate, lambda: "")


def test_a_run_learns_and_leaves_what_it_promises(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --steps 60 --lr 0.01 --warmup 5 --out {tmp_path}/o"
    code, out, _ = run(line)
    assert code == 0
    assert "parameters" in out and "bits/byte" in out and "python sample.py --ckpt" in out
    left = ["ckpt.pt", "curves.png", "log.jsonl", "run.lock"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == left
    header, *records = log_of(tmp_path / "o")
    assert header["config"]["hidden_size"] == 32 and header["args"]["lr"] == 0.01
    assert [r["step"] for r in records] == list(range(1, 61))
    figures = "tokens loss aux_loss expert_balance lr grad_norm tok_per_s expert_load_max"
    assert set(figures.split()) < set(records[0])
    evaluated = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluated] == list(range(6, 61, 6))
    assert evaluated[-1]["val_loss"] < 0.5 * math.log(320)
    assert np.sum(evaluated[-1]["expert_load"], 1) == pytest.approx(1, abs=0.01)
    assert records[-1]["tokens"] == 60 * 4 * 32 and 1 <= records[-1]["expert_load_max"] <= 4

    before = (tmp_path / "o" / "ckpt.pt").read_bytes()
    code, _, err = run(line)
    assert code == 2 and "holds another run" in err
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() == before

    ckpt = f"--ckpt {tmp_path}/o/ckpt.pt"
    code, out, _ = run(f"sample {ckpt} --prompt The --seed 1 --num_samples 2")
    assert code == 0 and out.count("The cat") >= 1 and "---" in out
    assert run(f"sample {ckpt} --prompt The --seed 1 --num_samples 2")[1] == out

    assert run(f"{line} --overwrite --seed 3".replace("--steps 60", "--steps 1"))[0] == 0
    assert len(log_of(tmp_path / "o")) == 2 and load(tmp_path / "o")["step"] == 1


def test_minutes_fixes_the_number_of_steps(run, corpus, tmp_path):
    code, out, _ = run(f"train {MODEL} --data {corpus} --minutes 0.001 --out {tmp_path}/o")
    assert "only 21 steps fit into --minutes 0.001, so the rate stays low" in out
    state = load(tmp_path / "o")
    assert code == 0 and state["step"] == state["args"]["steps"] == 21


@pytest.mark.usefixtures("undrawn")
def test_minutes_of_a_run_resumed_before_they_were_measured_are_measured_again(trained, tmp_path):
    run = small_trainer(tmp_path, trained, steps=None, minutes=0.001)
    run.step = 15
    fit(run)
    assert run.step == run.steps == 36


@pytest.mark.parametrize("rehearsing, least", [(0.0, 0.8), (0.4, 0.7)])  # in every fourth step
def test_minutes_are_used_up_though_the_first_steps_and_evaluation_are_slow(
    trained, tmp_path, monkeypatch, rehearsing, least
):
    clock = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    run = small_trainer(tmp_path, trained, steps=None, minutes=5.0, eval_tokens=24 * 48)
    seconds = 24 * 0.1 * 0.3  # of an evaluation: as many tokens as 24 steps, forward only

    def train_step(inputs, targets):
        clock[0] += 1.0 if run.step < 8 else 0.1 + (run.step % 4 == 0) * rehearsing  # seconds
        run.step += 1
        return {"step": run.step, "loss": 1.0, "tok_per_s": 1.0}, torch.zeros(1, 4)

    def evaluate():
        clock[0] += 12.0 if run.step == 0 else seconds
        return {"val_loss": 1.0}

    monkeypatch.setattr(run, "train_step", train_step)
    monkeypatch.setattr(run, "save", lambda: None)
    run.fit(batch_at, evaluate, lambda: "")
    assert least * 300 < clock[0] <= 300


def test_a_run_on_the_stories_shows_the_floor_and_is_judged(run, tmp_path):
    line = f"train --size small {MODEL} --data stories:120 --steps 4 --eval_every 2 --seq_len 256"
    code, out, _ = run(f"{line} --out {tmp_path}")
    header, *records = log_of(tmp_path)
    assert code == 0 and f"floor    {header['entropy_floor']:.4f} nats/token" in out
    assert 0.1 < header["entropy_floor"] < records[-1]["val_loss"]
    assert 0 <= records[-1]["val_recall"] < 0.5 and "facts recalled" in out
    assert {"name", "object", "place"} < set(records[-1]["val_recall_by_kind"])
    assert "little text for small" in out and "--data tinystories has more" in out
    runlog.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    runlog.draw_curves(tmp_path / "removed.jsonl", tmp_path / "none.png")  # does nothing
    axis = Figure().subplots()
    header = {"args": {"size": "tiny", "data": "a.txt"}}
    runlog.draw_loss(axis, [{"step": 1, "loss": 2.0}], header)  # stopped before an evaluation
    assert [text.get_text() for text in axis.get_legend().texts] == ["training, running mean"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    code, out, _ = run(f"sample --ckpt {tmp_path}/ckpt.pt --judge 3 --seed 0")
    assert code == 0 and "0 of 3 stories are valid" in out and "first mistakes: wording 3" in out
    assert "0 of 2" in run(f"sample --ckpt {tmp_path}/ckpt.pt --judge 2 --max_new_tokens 0")[1]


@pytest.mark.parametrize("accum, scale", [(1, None), (2, 1024.0), (4, None)])
def test_two_steps_are_those_written_out_by_hand(trained, tmp_path, accum, scale):
    config = Config.from_dict(load(trained.parent)["config"] | {"aux_loss_alpha": 2.0})
    one, other = DeepSeek(config), DeepSeek(config).train()
    other.load_state_dict(one.state_dict())
    flags = dict(clip=0.05, warmup=4, steps=10, grad_accum=accum, weight_decay=1.0)
    run = small_trainer(tmp_path, trained, model=one, **flags)
    if scale:  # as in fp16; undone before clipping
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    norms = [p for p in other.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 1.0}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(2):
        inputs, targets = batch_at(step)
        targets[0, 3:] = targets[2] = data.IGNORE  # pieces with different counts
        record, _ = run.train_step(inputs, targets)
        optimizer.zero_grad()
        out = other(inputs, targets)
        (out.loss + out.aux_loss).backward()
        norm = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
        for p in other.parameters():
            p.grad *= min(1, 0.05 / norm)
        for group in optimizer.param_groups:  # in the warm-up
            group["lr"] = 0.01 * (step + 1) / 4
        optimizer.step()
        assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-4)
        assert record["aux_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-4)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > 0.05
        assert record["lr"] == 0.01 * (step + 1) / 4
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=4e-5), (p - q).abs().max()


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_five_end_the_run(
    trained, tmp_path, poisoned, capsys
):
    run = small_trainer(tmp_path, trained, steps=20, eval_every=100, save_every=1)
    real, before = run.forward, []

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        before.append(run.model.lm_head.weight.detach().clone())
        if run.step in (1, *range(4, 20)):
            loss = out.loss * (math.nan if poisoned == "loss" else 1)
            if poisoned == "gradient":
                loss.register_hook(lambda g: g * math.inf)
            return out._replace(losses=out.losses | {"cross_entropy": loss})
        return out

    run.forward = forward
    with pytest.raises(UsageError, match="in 5 steps in a row, up to step 9"):
        fit(run)
    skipped = [r.get("skipped", False) for r in log_of(tmp_path)[1:]]
    assert skipped == [False, True, False, False, True, True, True, True]
    assert same(before[1], before[2]) and same(before[4], before[8])
    assert not same(before[2], before[3])
    assert "step 2: loss or gradient not finite, left out" in capsys.readouterr().err
    assert load(tmp_path)["step"] == 4  # nothing is saved between steps left out


def test_a_gradient_out_of_the_range_of_fp16_only_scales_less_the_next_time(trained, tmp_path):
    run = small_trainer(tmp_path, trained)
    run.scaler, forward = torch.amp.GradScaler("cpu", init_scale=1024.0), run.forward
    before = copy.deepcopy(run.model.state_dict())

    def overflowing(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.losses["cross_entropy"].register_hook(lambda gradient: gradient * math.inf)
        return out

    run.forward = overflowing
    record, _ = run.train_step(*batch_at(0))
    assert "skipped" not in record and run.scaler.get_scale() == 512.0
    assert same(run.model.state_dict(), before)


def test_the_load_of_experts_is_a_share_whatever_the_pieces(trained, tmp_path):
    whole, pieces = (
        small_trainer(tmp_path / str(n), trained, grad_accum=n).train_step(*batch_at(0))[1]
        for n in (1, 2)
    )
    assert torch.allclose(whole, pieces, atol=1e-6)
    assert torch.allclose(whole.sum(1), torch.ones(len(whole)))


@pytest.mark.usefixtures("undrawn")
def test_a_run_stopped_before_its_first_step_or_by_one_left_out_is_saved(trained, tmp_path):
    def evaluate():
        if run.step == 0:
            signal.raise_signal(signal.SIGTERM)
        return {"val_loss": 1.0}

    run = small_trainer(tmp_path / "first", trained)
    fit(run, evaluate)
    assert run.step == 0 and load(tmp_path / "first")["step"] == 0

    def get_batch(step):
        signal.raise_signal(signal.SIGTERM)
        return batch_at(step)

    run = small_trainer(tmp_path / "left_out", trained)
    run.model.lm_head.weight.data.fill_(math.nan)
    fit(run, get_batch=get_batch)
    assert run.skipped_steps == 1 and load(tmp_path / "left_out")["step"] == 1


def test_fit_trains_in_training_mode_and_keeps_the_best_also_of_before_a_resume(trained, tmp_path):
    losses, modes, kept = iter([9.0, 3.0, 1.0, 2.0, 1.0, 0.5]), [], []  # the first is of no step

    def get_batch(step):
        modes.append((step, run.model.training))
        return batch_at(step)

    def evaluate():
        with trainer.evaluating(run.model):
            assert not run.model.training and not torch.is_grad_enabled()
        return {"val_loss": next(losses)}

    def keep_best():
        kept.append(run.step)

    for steps in (3, 5):
        state = load(tmp_path) if steps == 5 else None
        run = small_trainer(tmp_path, trained, state, steps=steps, eval_every=1)
        run.fit(get_batch, evaluate, lambda: "", keep_best)
    assert modes == [(step, True) for step in range(5)] and kept == [1, 2, 5]


@pytest.mark.parametrize("presses", [0, 1, 2])
def test_a_signal_stops_after_the_step_and_two_at_once_and_handlers_are_as_before(
    trained, tmp_path, presses
):
    def mine(*_):
        raise AssertionError("the trainer's own should be in place")

    def get_batch(step):
        for _ in range(presses if step == 1 else 0):
            signal.raise_signal(signal.SIGTERM)
        return batch_at(step)

    run, both = small_trainer(tmp_path, trained, eval_every=9), (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(which, mine) for which in both]
    try:
        with pytest.raises(KeyboardInterrupt) if presses == 2 else nullcontext():
            fit(run, get_batch=get_batch)
    finally:
        after = [signal.signal(*pair) for pair in zip(both, before, strict=True)]
    assert after == [mine, mine] and run.step == (3, 2, 1)[presses]
    assert presses == 2 or load(tmp_path)["step"] == run.step


def test_checkpoints_are_at_most_15_minutes_old_and_curves_drawn_once_a_minute(
    trained, tmp_path, monkeypatch
):
    run = small_trainer(tmp_path, trained, steps=80, eval_every=1, save_every=80)
    drawn, saved, real, ticks = [], [], run.save, itertools.count(1, 1e-6)
    run.saved_at = 0

    def save():
        saved.append(run.step)
        real()

    run.save = save
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: 26 * run.step + next(ticks))
    monkeypatch.setattr(trainer, "draw_curves", lambda *_: drawn.append(run.step))
    fit(run)
    assert saved == [36, 72, 80] and drawn == [*range(1, 80, 3), 80]


def test_all_processes_save_when_another_is_late(trained, tmp_path, monkeypatch):
    run = small_trainer(tmp_path, trained)
    late = torch.zeros(8).index_fill(0, torch.tensor(3), 1)  # after two losses and who would stop
    monkeypatch.setattr(trainer, "all_reduce_sum", lambda numbers: numbers + late)
    run.train_step(*batch_at(0))
    assert run.overdue and not run.stop


def test_another_process_deletes_nothing_and_drops_other_tokens(trained, tmp_path, monkeypatch):
    (tmp_path / "best.pt").write_text("of an earlier run")
    monkeypatch.setattr(trainer, "rank", lambda: 1)
    run = small_trainer(tmp_path, trained, overwrite=True)
    run.save()
    assert {p.name for p in tmp_path.iterdir()} == {"best.pt", "log.jsonl"}
    assert torch.initial_seed() == run.options.seed + 1


def test_a_score_is_the_mean_over_tokens_each_text_read_alone(run, trained, tmp_path):
    model, tokenizer = checkpoint.open_model(str(trained), CPU, "auto")
    texts = ["The cat sat.", "It was a big cat on a mat, and it was small.", "Mat", "Cat. " * 40]
    (tmp_path / "texts.txt").write_text(data.SEPARATOR.join(texts))
    nats = count = 0
    for text in texts:
        one = torch.tensor([[0, *tokenizer.encode(text.strip()).ids, 1]])
        for i in range(1, one.shape[1]):  # one after the other, from 17 to 32 tokens before it
            start = max(0, math.ceil((i - 32) / 16)) * 16
            nats -= model(one[:, start:i]).logits[0, -1].log_softmax(-1)[one[0, i]].item()
        count += one.shape[1] - 1
    _, out, _ = run(f"sample --ckpt {trained} --score {tmp_path}/texts.txt")
    loss, bits = float(out.split()[0]), float(out.split()[4])
    assert loss == pytest.approx(nats / count, abs=6e-5)
    assert bits == pytest.approx(nats / math.log(2) / len("".join(texts).strip()), abs=6e-5)


def test_recall_is_counted_by_kind():
    tags = torch.tensor([[[1, 2, 0], [1, 1, 2]], [[2, 0, 1], [0, 0, 0]]])
    targets = torch.arange(12).view(2, 2, 3)  # so names are 0, 3, 4, 8 and places 1, 5, 6
    said = torch.tensor([[[0, 5, 2], [3, 4, 1]], [[6, 0, 0], [0, 0, 0]]])
    logits = torch.nn.functional.one_hot(said, 12).float()
    logits[..., 11] = 3  # it would rather have worded it otherwise
    logits[0, 0, 0, 1] = logits[1, 0, 0, 3] = 2  # or said something of the other kind
    answers = iter(logits)
    model = torch.nn.Module()
    model.forward = lambda inputs: Output(next(answers), {}, None)
    kinds = ("name", "place", "none of this")
    held_out = data.EvalSet(
        list(zip(targets, targets, strict=True)), 12, 1, None, list(tags), kinds
    )
    got = trainer.evaluate(model, held_out, CPU, torch.float32)
    assert got["val_recall_by_kind"] == {"name": 0.75, "place": 0.3333}
    assert got["val_recall"] == 0.5714  # 4 of 7


def options_of(**typed):
    config = Config.preset(typed.get("size", "tiny"), **train.SPECIAL)
    return train.with_recipe(train.Options(**typed), config)


def test_weights_that_are_not_finite_are_said_in_one_sentence(run, trained, tmp_path):
    state = load(trained.parent)
    model, tokenizer = checkpoint.build_model(state), data.load_tokenizer(state["tokenizer"])
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    checkpoint.save_model(tmp_path / "broken.pt", model, tokenizer)
    code, _, err = run(f"sample --ckpt {tmp_path}/broken.pt")
    assert code == 2 and err.count("\n") == 1 and "not finite" in err
    assert trainer.write_sample(model, tokenizer, CPU, "Once") == "Once"  # a run goes on


def test_the_recipe_fills_in_what_was_not_typed():
    def chosen(**typed):
        o = options_of(**typed)
        return o.lr, o.beta2, o.schedule, o.batch_size, o.minutes, o.steps, o.induction_init

    assert chosen() == (5e-3, 0.99, "linear", 8, 5.0, None, 0.4)
    typed = dict(lr=0.1, beta2=0.5, schedule="step", batch_size=3, steps=7, induction_init=0.1)
    assert chosen(**typed) == (0.1, 0.5, "step", 3, None, 7, 0.1)
    assert chosen(size="v2") == (2.4e-4, 0.95, "step", 9216, None, 215_000, 0)  # the paper's
    assert options_of(low_memory=True).checkpoint_activations
    assert options_of().optimizer == "muon" and options_of(size="v2").optimizer == "adamw"
    for typed in (dict(low_memory=True), dict(fsdp=True), dict(optimizer="adamw")):
        assert options_of(**typed).optimizer == "adamw" and options_of(**typed).lr == 1.5e-3
    assert options_of(size="1b", optimizer="muon").lr == options_of(size="1b").lr
    assert options_of().long_lr == 3.5e-3
    for typed in (dict(lr=4e-3), dict(optimizer="adamw"), dict(size="1b", optimizer="muon")):
        assert options_of(**typed).long_lr is None


def test_a_long_run_has_a_lower_rate_also_when_its_length_is_found_by_minutes(trained, tmp_path):
    flags = dict(lr=0.4, long_lr=0.1, warmup=0, schedule="linear")
    for steps, rate in ((None, 0.4), (2000, 0.4), (2001, 0.1)):
        run = small_trainer(tmp_path / str(steps), trained, steps=steps, **flags)
        assert run.train_step(*batch_at(0))[0]["lr"] == rate
    run = small_trainer(tmp_path / "b", trained, steps=2001, **flags | dict(long_lr=None))
    assert run.train_step(*batch_at(0))[0]["lr"] == 0.4


def test_what_was_typed_and_the_official_context_of_training_are_kept():
    for typed in ({}, dict(checkpoint_activations=True)):
        assert options_of(**typed).checkpoint_activations == bool(typed)
    assert options_of(size="v2").seq_len == options_of(size="v2-lite").seq_len == 4096
    tokenizer = Mock(get_vocab_size=lambda: 257, token_to_id=lambda name: 0)
    options = options_of(seq_len=48, config={"vocab_size": 300})
    config = train.choose_config(options, tokenizer)
    assert (config.vocab_size, config.max_position_embeddings) == (320, 48)


def test_flags_that_do_not_go_together_are_refused(monkeypatch):
    low = options_of(low_memory=True)
    train.check_flags(low, torch.bfloat16)
    with pytest.raises(UsageError, match="this card does not compute"):
        train.check_flags(low, torch.float16)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="do not go with --optimizer muon"):
        train.check_flags(options_of(fsdp=True, optimizer="muon"), torch.bfloat16)
    with pytest.raises(UsageError, match="--low_memory is for one process"):
        train.check_flags(options_of(fsdp=True, low_memory=True), torch.bfloat16)
    monkeypatch.setattr(train, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="--low_memory is for one process"):
        train.check_flags(low, torch.bfloat16)


def test_a_run_is_not_resumed_with_another_tokenizer(run, trained, tmp_path):
    state = load(trained.parent)
    other = state["tokenizer"].replace('"version":"1.0"', '"version": "1.0"')
    checkpoint.save_checkpoint(tmp_path / "ckpt.pt", state | {"tokenizer": other})
    code, _, err = run(f"train --resume --steps 3 --out {tmp_path}")
    assert other != state["tokenizer"] and code == 2 and "cuts the text otherwise" in err


def test_a_run_has_the_optimizer_that_its_flags_name(trained, tmp_path):
    assert "momentum_buffer" in load(trained.parent)["optimizer"]["state"][20]  # of train.py itself
    muon = small_trainer(tmp_path / "a", trained, optimizer="muon", dtype=torch.bfloat16).optimizer
    assert isinstance(muon, optimizers.Muon) and muon.dtype == torch.bfloat16
    for flags in (dict(optimizer="adamw"), dict()):  # there is none in a run of finetune.py
        adamw = small_trainer(tmp_path / f"b{len(flags)}", trained, **flags).optimizer
        assert type(adamw) is torch.optim.AdamW


def test_a_recipe_goes_at_most_ten_times_through_a_text():
    for typed, tokens, steps, warmup in (
        (dict(size="1b"), 10_000_000, 1526, 152),  # 100M tokens in steps of 64 x 1024
        (dict(size="1b"), 10**10, 50_000, 2_000),
        (dict(size="1b", warmup=400), 10_000_000, 1526, 400),
        (dict(size="1b", batch_size=2048), 10_000_000, 48, 4),
        (dict(size="1b", steps=9000), 10_000_000, 9_000, 900),
        (dict(), 10_000, None, 100),
    ):
        options = train.limit_rounds(options_of(**typed), typed, tokens)
        assert (options.steps, options.warmup) == (steps, warmup)


@pytest.mark.parametrize("breaks", [None, "backend", "tracing"])
def test_blocks_and_loss_are_compiled_for_training_alone_and_a_failure_is_survived(
    breaks, run, corpus, tmp_path, monkeypatch
):
    compiled, real = [], torch.nn.Module.compile
    tracer = {"__name__": "torch._dynamo.symbolic_convert"}
    exec("def trace(fails): assert not fails", tracer)

    def backend(graph, inputs):
        if breaks:
            raise torch._inductor.exc.InvalidCxxCompiler()
        compiled.append([tuple(t.shape) for t in inputs])
        return graph.forward

    def call(module, *args, **kwargs):
        tracer["trace"](fails=torch.is_grad_enabled())
        return module._call_impl(*args, **kwargs)

    def fail(*_):
        raise AssertionError

    def compile(module, dynamic, options):
        assert dynamic is False and all(hasattr(torch._inductor.config, n) for n in options)
        real(module, backend=backend, dynamic=dynamic)
        if breaks == "tracing":
            module._compiled_call_impl = partial(call, module)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    torch._dynamo.reset()
    line = f"train {MODEL} --data {corpus} --steps 4 --eval_every 2".replace("float32", "bfloat16")
    code, out, err = run(f"{line} --out {tmp_path}/a --compile on")
    assert code == 0, err
    said = "fails here, goes on without: " if breaks else "took "
    assert f"compile  {said}" in out
    stored = load(tmp_path / "a")
    assert stored["args"]["compile"] == ("off" if breaks else "on")
    assert len(compiled) <= 5  # dense, MoE, loss, with pieces
    assert any((320, 32) in shapes for shapes in compiled) == (not breaks)  # the head, in the loss
    assert run(f"{line} --out {tmp_path}/b")[0] == 0  # auto: such a short run is not compiled
    assert load(tmp_path / "b")["args"]["compile"] == "off"
    assert same(stored["model"], load(tmp_path / "b")["model"])  # the backend changes nothing
    assert run(f"sample --ckpt {tmp_path}/a/ckpt.pt --max_new_tokens 3")[0] == 0
    if breaks == "tracing":  # then the optimizer is not compiled either
        monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
        assert run(f"{line} --out {tmp_path}/c --compile on --low_memory")[0] == 0


def test_auto_compiles_what_is_long_enough_and_gains():
    def chosen(dtype=torch.bfloat16, device=CPU, **flags):
        return trainer.choose_compile(train.Options(**flags), device, dtype)[0]

    assert chosen(minutes=5.0) and chosen(steps=1000) and chosen(steps=1, compile="on")
    assert chosen(minutes=4.0) and not chosen(minutes=3.9) and not chosen(steps=999)
    assert not chosen(steps=1000, compile="off") and not chosen(torch.float32, steps=1000)
    assert not chosen(steps=1000, device=torch.device("mps"))
