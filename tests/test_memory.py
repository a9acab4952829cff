"""What is free, what is needed, cutting a batch by trying, and the optimizer for little memory."""

import copy
import time
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import MODEL, log_of, random_model, same, small

import train
from common import data, memory, trainer
from common.optimizers import make_optimizer
from common.runtime import UsageError
from deepseek import Config, DeepSeek

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def batch_at(step):
    numbers = torch.Generator().manual_seed(step)
    return torch.randint(0, 96, (2, 8, 12), generator=numbers).unbind()


def evaluation():
    rows = [(torch.zeros(6, 12, dtype=torch.long), torch.ones(6, 12, dtype=torch.long))]
    return data.EvalSet(rows, 72, 72)


class Card:
    """Stands in for a card: a model, an optimizer, that run out of memory above some size."""

    def __init__(self, folder, **flags):
        recipe = dict(steps=4, lr=0.01, beta2=0.95, warmup=2, schedule="step", batch_size=8)
        flags = dict(grad_accum=1, seq_len=12) | recipe | flags
        folder.mkdir()
        options = train.Options(out=str(folder), eval_every=2, **flags)
        drops = dict(n_group=4, topk_group=2, token_drop_capacity=1.0)  # draws random numbers
        self.model = random_model(small(**drops))
        tokenizer = data.train_tokenizer(["a b c"], 258)
        self.run = trainer.Trainer(options, self.model, tokenizer, "", CPU, torch.float32)
        self.calls = 0

    def fails(self, when) -> None:
        """Let the model fail when(rows, calls so far, less) says so. less: whether activations are
        checkpointed, None in an evaluation."""

        def check(module, args, kwargs):
            self.calls += 1
            if when(len(args[0]), self.calls, kwargs.get("checkpoint_activations")):
                raise FULL

        self.model.register_forward_pre_hook(check, with_kwargs=True)

    def fit(self):
        self.run.on_card = True
        held_out = evaluation()
        judge = lambda: trainer.evaluate(self.model, held_out, CPU, torch.float32)  # noqa: E731
        self.run.fit(batch_at, judge, lambda: "")
        return self.model.state_dict()


@pytest.fixture
def any_piece(monkeypatch):
    """Pieces of a single row are not too small."""
    monkeypatch.setattr(trainer, "SMALL_PIECE", 12)


@pytest.mark.parametrize(
    "strikes, pieces, less",
    [
        (lambda rows, calls, less: rows > 4, 2, False),
        (lambda rows, calls, less: rows > 2, 4, False),  # also in evaluations, of six rows
        (lambda rows, calls, less: calls == 3, 2, False),  # after the evaluation, a second piece
        (lambda rows, calls, less: rows > 2 or less is False, 4, True),
    ],
)
def test_what_does_not_fit_is_cut_finer_to_the_bits_of_as_many_pieces(
    strikes, pieces, less, tmp_path, any_piece
):
    card = Card(tmp_path / "a", grad_accum=1)
    card.fails(strikes)
    torch.manual_seed(7)
    found = card.fit()
    by_hand = Card(tmp_path / "b", grad_accum=pieces, checkpoint_activations=less)
    torch.manual_seed(7)
    assert same(found, by_hand.fit())
    state = trainer.load_checkpoint(tmp_path / "a" / "ckpt.pt")  # with which --resume begins
    assert state["args"]["grad_accum"] == pieces and state["args"]["checkpoint_activations"] == less
    header, *records = log_of(tmp_path / "a")
    found = [r for r in records if "grad_accum" in r]  # which are no steps
    assert found[-1] == {"grad_accum": pieces, "checkpoint_activations": less}
    assert [r["step"] for r in records if "step" in r] == [1, 2, 3, 4]


def test_before_pieces_are_small_fewer_activations_are_kept(tmp_path, monkeypatch):
    def ways(**flags):
        run = Card(tmp_path / str(len(list(tmp_path.iterdir()))), **flags).run
        found = []
        while run.take_less():
            found.append((run.options.grad_accum, run.options.checkpoint_activations))
        return found

    checkpointed = [(n, True) for n in (1, 2, 4, 8)]
    monkeypatch.setattr(trainer, "SMALL_PIECE", 24)  # of a batch of 8 x 12 a quarter
    assert ways() == [(2, False), (4, False), *checkpointed]
    assert ways(grad_accum=4) == checkpointed[2:]  # as many at least as were typed
    assert ways(grad_accum=2, checkpoint_activations=True) == checkpointed[2:]
    monkeypatch.setattr(trainer, "SMALL_PIECE", 1000)
    assert ways() == checkpointed


def test_a_step_that_outgrows_the_memory_later_is_taken_again_in_more_pieces(tmp_path, any_piece):
    card, by_hand = (Card(tmp_path / name, grad_accum=2) for name in "ab")
    torch.manual_seed(7)
    expected = [by_hand.run.train_step(*batch_at(step))[0]["loss"] for step in range(2)]
    assert by_hand.run.take_less()
    expected += [by_hand.run.train_step(*batch_at(step))[0]["loss"] for step in range(2, 4)]
    card.fails(lambda rows, calls, less: calls == 6)  # the second piece of the third step
    torch.manual_seed(7)
    assert [card.run.train_step(*batch_at(step))[0]["loss"] for step in range(4)] == expected
    assert same(card.model.state_dict(), by_hand.model.state_dict())
    assert card.run.options.grad_accum == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_there_before_the_first_step_and_change_nothing(tmp_path, optimizer):
    card, plain = (Card(tmp_path / name, optimizer=optimizer) for name in "ab")
    before = copy.deepcopy(card.model.state_dict())
    card.run.allocate_moments()
    assert same(card.model.state_dict(), before)
    for p in card.model.parameters():
        moments = card.run.optimizer.state[p]
        assert moments and not any(t.any() for t in moments.values())
    kinds = {name for moments in card.run.optimizer.state.values() for name in moments}
    assert ("momentum_buffer" in kinds) == (optimizer == "muon")
    for each in (card, plain):
        torch.manual_seed(0)
        each.run.train_step(*batch_at(0))
    assert same(card.model.state_dict(), plain.model.state_dict())
    card.run.optimizer.step = lambda: (_ for _ in ()).throw(FULL)
    card.run.optimizer.state.clear()
    with pytest.raises(UsageError, match="memory runs out at --grad_accum 8"):
        card.run.fit_memory(*batch_at(0))


def test_trying_and_compiling_change_neither_moments_nor_random_numbers(tmp_path):
    card = Card(tmp_path / "a")
    card.run.train_step(*batch_at(0))  # as a resumed run has moments already
    moments = copy.deepcopy(card.run.optimizer.state_dict()["state"])
    numbers = torch.get_rng_state()
    for work in (card.run.fit_memory, card.run.compile_now):
        work(*batch_at(1))
        assert same(card.run.optimizer.state_dict()["state"], moments)
        assert torch.equal(torch.get_rng_state(), numbers)


def test_moments_of_little_memory_begin_at_the_first_step(tmp_path):
    tried, plain = (Card(tmp_path / name, low_memory=True) for name in "ab")
    for card in (tried, plain):
        card.model.bfloat16()
    tried.run.fit_memory(*batch_at(0))
    for card in (tried, plain):
        torch.manual_seed(0)
        card.run.train_step(*batch_at(0))
    assert same(tried.model.state_dict(), plain.model.state_dict())


def test_all_processes_take_less_when_one_fails_and_none_waits_while_trying(tmp_path, any_piece):
    card, others = Card(tmp_path / "a"), iter([1.0, 0.0])
    card.run.forward = Mock(side_effect=AssertionError)  # which exchanges gradients
    card.run.agree = lambda value: value + next(others)
    card.run.fit_memory(*batch_at(0))
    assert card.run.options.grad_accum == 2


def test_one_of_several_that_outgrows_its_memory_later_ends_the_run(tmp_path, monkeypatch):
    card = Card(tmp_path / "a")
    card.fails(lambda *_: True)
    monkeypatch.setattr(trainer, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="--grad_accum 1:"):
        card.run.train_step(*batch_at(0))


def test_moments_that_were_made_in_part_are_made_again(tmp_path):
    card = Card(tmp_path / "a")
    real, parameters = card.run.optimizer.step, list(card.model.parameters())
    calls = []

    def step():
        real()
        calls.append(1)
        if len(calls) == 1:
            for p in parameters[3:]:
                del card.run.optimizer.state[p]
            raise FULL

    card.run.optimizer.step = step
    card.run.fit_memory(*batch_at(0))
    assert all(card.run.optimizer.state.get(p) for p in parameters)


def test_the_estimate_is_near_what_a_card_took():
    shape = dict(moe_intermediate_size=320, n_routed_experts=64, num_experts_per_tok=6)
    config = Config.preset("1b", **shape)
    with torch.device("meta"):  # as it was measured on an H100, in GiB, at rows of 1,024 tokens
        fixed = memory.fixed_memory(DeepSeek(config))
        low = memory.fixed_memory(DeepSeek(config).to(torch.bfloat16))
    for rows, checkpointing, measured in ((8, False, 22.7), (16, False, 32.2), (16, True, 16.5)):
        more = memory.activation_memory(config, rows, 1024, checkpointing, torch.bfloat16)
        assert (fixed + more) / 2**30 == pytest.approx(measured, rel=0.25)
    assert fixed == 2 * low


def test_a_sharded_evaluation_that_does_not_fit_ends_and_lets_nobody_wait(monkeypatch):
    model = random_model(small())
    model.register_forward_pre_hook(Mock(side_effect=FULL))
    calls = model._forward_pre_hooks[next(iter(model._forward_pre_hooks))]
    for sharded, tried in ((False, 3), (True, 1)):  # 6 rows, 3, 1: the single one is the last
        monkeypatch.setattr(trainer, "FSDPModule", type(model) if sharded else Mock)
        monkeypatch.setattr(trainer, "evaluating", lambda model: nullcontext())
        calls.reset_mock()
        with pytest.raises(torch.OutOfMemoryError):
            trainer.evaluate(model, evaluation(), CPU, torch.float32)
        assert calls.call_count == tried


def test_a_text_without_tags_is_evaluated_without_all_its_logits():
    model, logits = random_model(small()), []
    model.register_forward_hook(lambda module, args, out: logits.append(out.logits))
    trainer.evaluate(model, evaluation(), CPU, torch.float32)
    assert logits == [None]


@pytest.mark.parametrize("processes, pieces", [(1, 16), (2, 16), (4, 16)])
def test_on_a_cpu_the_estimate_chooses_the_pieces(processes, pieces, monkeypatch):
    monkeypatch.setattr(memory, "world_size", lambda: processes)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    config = Config.preset("tiny")
    rows = 64 // processes // pieces
    needed = memory.activation_memory(config, rows, 256, False, torch.float32) + 10**6
    options, free = train.Options(batch_size=64, seq_len=256), processes * needed + 1
    assert memory.plan_pieces(options, config, 10**6, CPU, torch.float32)[0] == pieces
    free /= 1000
    with pytest.raises(UsageError, match="smaller model or --seq_len, more --grad_accum, or"):
        memory.plan_pieces(options, config, 10**3, CPU, torch.float32)
    with pytest.raises(UsageError, match="smaller model$"):  # nothing else would make it fit
        memory.plan_pieces(options, config, 10**9, CPU, torch.float32)
    options = train.Options(batch_size=64, seq_len=256, grad_accum=7)
    with pytest.raises(UsageError, match=f"--grad_accum 7 times the {processes} processes"):
        memory.plan_pieces(options, config, 10**6, CPU, torch.float32)


def pieces_with(monkeypatch, free, fixed, processes, device=CPU, **flags):
    monkeypatch.setattr(memory, "world_size", lambda: processes)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    options = train.Options(batch_size=64, seq_len=256, **flags)
    return memory.plan_pieces(options, Config.preset("tiny"), fixed, device, torch.float32)[0]


@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_one_byte_less_takes_one_piece_more(monkeypatch, processes, less):
    config, rows = Config.preset("tiny"), 64 // processes
    each = memory.activation_memory(config, rows, 256, less, torch.float32) + 10**6
    for free, pieces in ((processes * each, 1), (processes * each - 1, 2)):
        assert pieces == pieces_with(
            monkeypatch, free, 10**6, processes, checkpoint_activations=less
        )


def test_sharded_processes_share_what_is_fixed(monkeypatch):
    card = torch.device("cuda", 0)
    pieces_with(monkeypatch, 10**11, 15 * 10**10, 2, card, fsdp=True)
    with pytest.raises(UsageError):
        pieces_with(monkeypatch, 10**11, 15 * 10**10, 2, card)


def test_what_is_fixed_is_what_a_step_leaves_in_memory():
    model = random_model(small()).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    adamw = make_optimizer(model, 0.01, 0.1, 0.95)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, ids).loss.backward()
    adamw.step()
    moments = [t for state in adamw.state.values() for t in state.values() if t.dim()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    left = sum(t.nbytes for t in [*model.parameters(), *gradients, *moments])
    assert memory.fixed_memory(model) == left


def test_on_a_card_it_begins_with_the_whole_batch_unless_it_is_sharded(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 6 * 10**8)
    monkeypatch.setattr(memory, "world_size", lambda: 2)
    card, config = torch.device("cuda", 0), Config.preset("tiny")
    for fsdp in (False, True):
        options = train.Options(batch_size=64, seq_len=256, fsdp=fsdp)
        pieces, _ = memory.plan_pieces(options, config, 10**8, card, torch.float32)
        assert (pieces > 1) == fsdp


def test_a_container_has_the_memory_that_its_limit_leaves(tmp_path, monkeypatch):
    whole = memory.free_memory(CPU)
    assert whole > 2**28
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2**27}\nfile 5\n")
    assert memory.free_memory(CPU) == 2**27
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) > 2**28
    (tmp_path / "memory").mkdir()  # as older systems tell it
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{2**28}\n")
    (tmp_path / "memory/memory.stat").write_text(f"cache 5\nrss 7\ntotal_rss {2**26}\n")
    assert memory.free_memory(CPU) == 3 * 2**26


def test_a_model_that_cannot_fit_is_refused_before_any_text_is_read(run, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "prepare", lambda *_, **__: pytest.fail("text was read"))
    began = time.perf_counter()
    code, _, err = run(f"train --size v2 --out {tmp_path}/o")
    assert code == 2 and "GiB of memory are needed" in err
    assert time.perf_counter() - began < 20  # a second where nothing else runs


# --- weights and moments in bf16 ----------------------------------------------------------------


def test_low_memory_trains_in_bf16_and_resumes_to_the_same_bits(run, corpus, tmp_path):
    line = f"train {MODEL} --data {corpus} --low_memory --schedule constant --warmup 0 --lr 1e-2"
    assert "very slow" in run(f"{line} --steps 6 --out {tmp_path}/a")[1]
    assert run(f"{line} --steps 3 --out {tmp_path}/b")[0] == 0
    assert run(f"train --resume --steps 6 --out {tmp_path}/b")[0] == 0
    a, b = (trainer.load_checkpoint(tmp_path / name / "ckpt.pt") for name in "ab")
    moments = [m["exp_avg"] for m in a["optimizer"]["state"].values()]
    assert {t.dtype for t in [*a["model"].values(), *moments]} == {torch.bfloat16}
    assert same(a["model"], b["model"]) and a["tokens"] == b["tokens"]
    losses = [r["loss"] for r in log_of(tmp_path / "a")[1:]]
    assert losses[-1] < losses[0] - 0.5
    assert run(f"sample --ckpt {tmp_path}/a/ckpt.pt --max_new_tokens 3")[0] == 0
