"""Fine-tuning: what is asked, what counts, what is kept, and what a user can do wrong."""

import copy
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import MODEL, log_of, random_model, same, small

import finetune
from common import chat, checkpoint, data, lessons, rehearsal, stories
from common.runtime import UsageError
from deepseek import Config, DeepSeek, LoRALinear

PAIRS = [(f"How big is cat {n}?", f"Cat {n} is {'big' if n % 2 else 'small'}.") for n in range(120)]
DIALOGUES = [chat.Dialogue([pair]) for pair in PAIRS]
RUN_FILES = ["ckpt.pt", "log.jsonl", "curves.png", "run.lock"]


def rows(pairs):
    return [{"instruction": q, "input": "", "output": a} for q, a in pairs]


@pytest.fixture
def cats(tmp_path):
    path = tmp_path / "cats.json"
    path.write_text(json.dumps(rows(PAIRS)))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([chat.TEMPLATE, *(" ".join(pair) for pair in PAIRS)], 320)


def test_rows_in_the_form_of_alpaca_are_read(tmp_path):
    path = tmp_path / "a.json"
    good = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "more": 1},
        {"instruction": "Say hü.", "input": None, "output": ""},
        {"instruction": "Say hi.", "output": "hi"},
    ]
    path.write_text(json.dumps(good))
    expected = [("Add.\n1 and 2", "3"), ("Say hü.", ""), ("Say hi.", "hi")]
    assert chat.read_dialogues([path]) == ([chat.Dialogue([pair]) for pair in expected], {})
    for lacking in (
        {"output": "b"},
        {"instruction": "a", "input": 3, "output": "b"},
        {"messages": 1},
        *(good[2] | {"history": before} for before in (["q", "a"], [["q"]], [{"q": "", "a": ""}])),
    ):
        path.write_text(json.dumps([good[0], lacking]))
        with pytest.raises(UsageError, match='row 2 lacks an "instruction" and an "output"'):
            chat.read_dialogues([path])


def test_dialogues_of_several_turns_are_read(tmp_path):
    alpaca = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"}
    parts = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = {"messages": [{"role": role, "content": text} for role, text in parts]}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = {"conversations": [{"from": names[role], "value": text} for role, text in parts]}
    beside = {"conversations": shared["conversations"][1:], "system": "s"}
    none = {"messages": messages["messages"][1:3]}
    strange = [[*parts[:2], ("tool", "b")], parts[:2], parts[:1], [], parts[2:4], parts[1:2] * 2]
    rows = [{"messages": [{"role": r, "content": t} for r, t in some]} for some in strange]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [alpaca, messages, shared, beside, none, *rows])))
    dialogues, remarks = chat.read_dialogues([path])
    whole = chat.Dialogue([("a", "b"), ("c", "d")], "s")
    assert dialogues == [whole, whole, whole, whole, chat.Dialogue([("a", "b")])]
    assert remarks == {"left out with other roles than user and assistant in turn": 6}


def test_equal_questions_are_held_out_together_and_at_least_one():
    more = [chat.Dialogue([(q, f"{a} {i}")]) for q, a in PAIRS * 10 for i in range(2)]
    for some in (more, DIALOGUES[:2], DIALOGUES[5:7], DIALOGUES[:3]):
        taught, held_out = chat.hold_out(some)
        assert sorted(taught + held_out) == sorted(some) and taught
        assert not {d.turns[0][0] for d in taught} & {d.turns[0][0] for d in held_out}
        assert 0 < len(held_out) < max(2, 0.15 * len(some))


def test_the_answer_and_its_end_count_and_nothing_else(tokenizer):
    (example,), remarks = chat.make_examples([DIALOGUES[3]], tokenizer, 100)
    assert not any(remarks.values())
    text = "User: How big is cat 3?\n\nAssistant: Cat 3 is big."
    ids = [0, *tokenizer.encode(text).ids, 1]
    assert example.inputs.tolist() == ids[:-1]
    counted = example.targets[example.targets != data.IGNORE]
    assert tokenizer.decode(counted[:-1]) == " Cat 3 is big." and counted[-1] == 1
    assert example.targets[-len(counted) :].tolist() == ids[-len(counted) :]
    held_out = data.make_eval_set([example[1:]], tokenizer, 8)
    assert (held_out.tokens, held_out.bytes) == (len(counted), len(" Cat 3 is big."))


def test_all_answers_of_a_dialogue_count(tokenizer):
    dialogue = chat.Dialogue([("big?", "Cat."), ("How?", "is 3")], "cats only")
    (example,), _ = chat.make_examples([dialogue], tokenizer, 100)
    texts = "cats only\n\nUser: big?\n\nAssistant:", " Cat.", "User: How?\n\nAssistant:", " is 3"
    first, one, second, two = (tokenizer.encode(text).ids for text in texts)
    ids = [0, *first, *one, 1, *second, *two, 1]
    assert [*example.inputs, 1] == ids and example.question == "big?"
    counted = np.array([0] * (1 + len(first)) + [1] * (len(one) + 1) + [0] * len(second))
    counted = np.array([*counted, *[1] * (len(two) + 1)], bool)
    assert example.targets.tolist() == np.where(counted, ids, data.IGNORE)[1:].tolist()
    short = 1 + len(first) + len(one)  # a long dialogue keeps the beginning
    (example,), remarks = chat.make_examples([dialogue], tokenizer, short)
    assert remarks["cut"] == 1 and example.targets.tolist()[-1] == 1


def test_long_answers_are_cut_where_the_context_ends_and_empty_ones_left_out(tokenizer):
    question, said = PAIRS[0]
    prompt = len(chat.encode_chat(tokenizer, [(question, None)]))
    whole = chat.encode_chat(tokenizer, [(question, said)])
    pairs = [(question, f" {said}\n"), ("Nothing?", " \n")]
    dialogues = [chat.Dialogue([pair]) for pair in pairs]
    for seq_len, cut, no_room in (
        (prompt, 0, 1),  # generation needs a place for the answer, too
        (prompt + 1, 1, 0),
        (len(whole) - 2, 1, 0),
        (len(whole) - 1, 0, 0),  # eos is a target and no input
    ):
        examples, remarks = chat.make_examples(dialogues, tokenizer, seq_len)
        assert remarks["cut"] == cut and remarks["left out without an answer"] == 1
        assert remarks["left out with too long a question"] == no_room == 1 - len(examples)
        for example in examples:  # a cut answer does not end
            assert [*example.inputs, example.targets[-1]] == whole[: seq_len + 1]
            assert example.question == question


def test_an_epoch_has_each_example_once_in_full_batches_of_like_length_mixed_anew():
    lengths = np.random.default_rng(0).integers(6, 90, 500)
    ids = [np.arange(i + 2, i + 2 + length) for i, length in enumerate(lengths)]
    examples = [chat.Example("", row, row) for row in ids]  # the first id tells which one it is
    one, two = (chat.AnswerBatches(examples, 8, seed=1) for _ in range(2))
    epoch = [one.get_batch(step)[0] for step in range(one.per_epoch)]
    seen = Counter(int(i) for inputs in epoch for i in inputs[:, 0])
    assert len(seen) == 500 and sorted(seen.values()) == [1] * 496 + [2] * 4
    assert {len(inputs) for inputs in epoch} == {8}
    assert sum((inputs == 0).sum() for inputs in epoch) < 0.05 * lengths.sum()
    longest = [inputs.shape[1] for inputs in epoch]
    assert longest[:50] != sorted(longest[:50])  # batches of short and long ones come mixed
    company = {frozenset(inputs[:, 0].tolist()) for inputs in epoch}
    for batches in (one, chat.AnswerBatches(examples, 8, seed=2)):
        again = [batches.get_batch(step)[0][:, 0] for step in range(63, 126)]
        assert not company & {frozenset(inputs.tolist()) for inputs in again}
    for step in (3, 70, 3):  # it depends on nothing but seed and step
        assert all(map(torch.equal, one.get_batch(step), two.get_batch(step)))


@torch.no_grad()
def test_padding_changes_no_answers_loss():
    model = random_model(small())
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 96, (2, length)) for length in (5, 9, 20)]
    inputs, targets = data.pad(rows)
    alone = sum(
        model(*(torch.from_numpy(t)[None] for t in row)).loss * row.shape[1] for row in rows
    )
    assert model(inputs, targets).loss.item() == pytest.approx(alone.item() / 34, rel=1e-5)


def test_rehearsing_costs_the_divergence_from_the_base_per_token(trained):
    state = checkpoint.load_checkpoint(trained)
    base = checkpoint.build_model(state)
    model = copy.deepcopy(base)
    tokenizer = data.load_tokenizer(state["tokenizer"])
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    keep = rehearsal.Rehearsal(base, tokenizer, rehearsal.DOCUMENTS, 20, seed=0)  # all at once
    assert keep.ids.shape == keep.real.shape == (rehearsal.DOCUMENTS, 20)
    assert (keep.ids[:, 0] == 0).all() and len(keep.ids.unique(dim=0)) > 250
    assert not keep.real.all() and (keep.ids[keep.real] != 1).all()  # some ended, and nothing after
    total = 0.0
    for ids, real in zip(keep.ids, keep.real, strict=True):
        n = int(real.sum())  # up to the end of the document
        assert n == 20 or not real[n:].any()
        p, q = (m(ids[None, :n]).logits[0].double().softmax(-1) for m in (base, model))
        total += (p * (p / q).log()).sum()
    expected = rehearsal.EVERY * total / keep.real.sum()
    assert expected > 0.01
    assert keep.loss(model, 8, 0, 1).item() == pytest.approx(expected.item(), rel=1e-4)
    assert keep.loss(base, 8, 0, 1).abs() < 1e-6
    some = rehearsal.Rehearsal(base, tokenizer, 5, 20, seed=0)
    parts = [some.loss(model, 4, piece, 3) for piece in range(3)]
    assert sum(parts).item() == pytest.approx(some.loss(model, 4, 0, 1).item(), rel=1e-4)
    assert some.loss(model, 5, 0, 1) == 0 != some.loss(model, 0, 0, 1)
    assert some.loss(model, 0, 0, 1) != some.loss(model, 4, 0, 1)  # other documents


@pytest.mark.parametrize("full", ["", "--full"])
def test_a_run_learns_and_the_best_is_kept(run, trained, cats, tmp_path, full):
    before, out = trained.read_bytes(), tmp_path / "o"
    how = full or "--lora_rank 4 --alpha 6 --dropout 0.25"
    line = f"finetune --ckpt {trained} --data {cats} {how} --steps 30 --lr 0.03 --warmup 2"
    code, text, err = run(f"{line} --batch_size 8 --dtype float32 --out {out}")
    assert code == 0 and "held out, nats/token" in text, err
    kept = ["best.pt"] if full else ["adapter_model.safetensors", "adapter_config.json"]
    assert {path.name for path in out.iterdir()} == {*kept, *RUN_FILES}
    assert trained.read_bytes() == before
    header, *records, summary = log_of(out)
    assert [r["step"] for r in records] == list(range(1, 31))
    every = rehearsal.EVERY
    assert [r["rehearsal"] > 0 for r in records[1:]] == [i % every == 0 for i in range(1, 30)]
    assert summary["val_loss_after"] < summary["val_loss_before"] - 0.2
    best = min(r["val_loss"] for r in records if "val_loss" in r)
    assert summary["val_loss_after"] == pytest.approx(best, rel=1e-5)
    model, _ = checkpoint.open_model(str(trained), torch.device("cpu"), "auto")
    half, _ = checkpoint.open_model(str(trained), torch.device("cpu"), "bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    total, _ = model.num_parameters()
    ends = ("_proj.weight", "_mqa.weight")  # routed experts have no adapters
    rank = 4 * sum(sum(p.shape) for n, p in model.named_parameters() if n.endswith(ends))
    assert summary["trainable"] == (total if full else rank)

    prompt = "--chat --temperature 0 --max_new_tokens 9 --prompt Big?"
    if full:
        assert checkpoint.load_checkpoint(out / "best.pt")["optimizer"] is None
    place = f"--ckpt {out}/best.pt" if full else f"--ckpt {trained} --lora {out}"
    _, said, notes = run(f"sample {place} {prompt}")
    _, plain, note = run(f"sample --ckpt {trained} {prompt}")
    assert said != plain and "only a model of finetune.py --full answers" in note
    assert bool(full) or not notes
    assert f"next: python sample.py {place} --chat" in text

    state = checkpoint.load_checkpoint(out / "ckpt.pt", mmap=False)
    checkpoint.save_checkpoint(out / "ckpt.pt", state | {"best_val_loss": 0.0})  # the best is over
    assert run(f"finetune --resume --steps 40 --out {out}")[0] == 0
    *_, last, later = log_of(out)
    assert later["val_loss_after"] == summary["val_loss_after"]
    assert later["val_loss_after"] != pytest.approx(last["val_loss"], rel=1e-4)
    if full:
        return
    for adapters in (out, out / "ckpt.pt"):
        code, _, err = run(f"sample --ckpt {adapters} --prompt a")
        assert code == 2 and "adapters alone: give" in err and err.count("\n") == 1
    run(f"sample --ckpt {trained} --dtype bfloat16 --export {tmp_path}/other.pt")
    assert (
        "was trained beside" in run(f"sample --ckpt {tmp_path}/other.pt --lora {out} {prompt}")[2]
    )
    assert run(f"sample {place} --export {tmp_path}/hf")[0] == 0
    assert run(f"sample --ckpt {tmp_path}/hf {prompt}")[1] == said
    record = json.loads((out / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(trained)
    assert (record["r"], record["lora_alpha"]) == (4, 6.0)


@pytest.mark.parametrize("extra", ["--dropout 0.2 --dtype bfloat16 --grad_accum 2", "--full"])
def test_a_resumed_run_ends_with_the_same_bits(run, trained, cats, tmp_path, extra):
    line = f"finetune --ckpt {trained} --data {cats} --batch_size 8 --lr 0.01 --warmup 1 {extra}"
    line += " --schedule constant --log_level quiet --eval_every 3"
    assert run(f"{line} --steps 12 --out {tmp_path}/whole")[0] == 0
    assert run(f"{line} --steps 6 --out {tmp_path}/parts")[0] == 0
    assert run(f"finetune --resume --steps 12 --out {tmp_path}/parts")[0] == 0
    a, b = (checkpoint.load_checkpoint(tmp_path / n / "ckpt.pt") for n in ("whole", "parts"))
    for key in ("model", "optimizer", "rng", "best_val_loss"):
        assert same(a[key], b[key]), key
    log = tmp_path / "parts" / "log.jsonl"  # as if it had been killed before it was scored
    *lines, summary = log.read_text().splitlines()
    log.write_text("\n".join(lines) + "\n")
    assert run(f"finetune --resume --out {tmp_path}/parts")[0] == 0
    assert log_of(tmp_path / "parts")[-1] == json.loads(summary)
    _, said, _ = run(f"finetune --resume --out {tmp_path}/parts --log_level info")
    assert "finished: 12 steps" in said and log.read_text().splitlines()[-1] == summary


def test_raw_text_is_learned_with_the_models_own_tokenizer(run, trained, tmp_path):
    (tmp_path / "dogs.txt").write_text("The dog 7 sat on the rug. " * 400)
    line = f"finetune --ckpt {trained} --data {tmp_path}/dogs.txt --steps 20 --lr 0.03 --warmup 2"
    code, out, _ = run(f"{line} --batch_size 8 --out {tmp_path}/o")
    *_, summary = log_of(tmp_path / "o")
    assert code == 0 and "held out, bits/byte" in out
    assert summary["val_bpb_after"] < summary["val_bpb_before"] - 0.3
    stored = checkpoint.load_checkpoint(trained)["tokenizer"]
    assert checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt")["tokenizer"] == stored


def test_the_built_in_task_is_scored_by_kind_before_and_after(run, tmp_path, monkeypatch):
    held_out = itertools.islice(stories.instructions(0, held_out=True), 60)
    tasks, scorings = {task.instruction: task for task in held_out}, []

    def answer(model, tokenizer, questions):  # who and what_next wrong before, who wrong after
        scorings.extend([questions] * (len(questions) == 60))
        wrong = ("who", "what_next") if len(scorings) == 1 else ("who",)
        return ["Nobody." if tasks[q].kind in wrong else tasks[q].answer for q in questions]

    monkeypatch.setattr(lessons, "HELD_OUT_TASKS", 60)
    monkeypatch.setattr(lessons, "answer", answer)
    line = f"train {MODEL} --data stories:120 --steps 2 --seq_len 256 --out {tmp_path}/b"
    assert run(f"{line} --log_level quiet")[0] == 0
    line = f"finetune --ckpt {tmp_path}/b/ckpt.pt --data stories:40 --steps 2 --batch_size 8"
    code, out, _ = run(f"{line} --lora_rank 8 --dtype float32 --out {tmp_path}/o")
    assert code == 0 and "40 instructions, 60 held out" in out and len(scorings) == 2
    *_, summary = log_of(tmp_path / "o")
    asked = Counter(task.kind for task in tasks.values())
    after = 1 - asked["who"] / 60
    before = after - asked["what_next"] / 60
    assert summary["by_kind"] == {kind: float(kind != "who") for kind in stories.KINDS}
    assert summary["right_before"] == pytest.approx(before, abs=1e-4)
    assert summary["right_after"] == pytest.approx(after, abs=1e-4)
    table = [line.split() for line in out.splitlines() if line.endswith("%")]
    assert ["what_next", str(asked["what_next"]), "0.0%", "100.0%"] in table
    assert table[-1] == ["all", "60", f"{before:.1%}", f"{after:.1%}"]
    assert out.count("before, wrong: Nobody.") == 2 and out.count("after, wrong: Nobody.") == 1
    assert summary["plain_loss_off"] == summary["plain_loss_before"]
    assert summary["plain_loss_after"] != summary["plain_loss_before"]


def read_lesson(trained, **flags):
    tokenizer = data.load_tokenizer(checkpoint.load_checkpoint(trained)["tokenizer"])
    options = finetune.Options(**dict(seq_len=512) | flags)  # this tokenizer knows few words
    options = finetune.with_recipe(options, Config.preset("small"))
    lesson = lessons.read_data(options, tokenizer)
    return lesson, finetune.with_steps(options, lesson)


def test_what_is_held_out_is_not_taught_and_plain_stories_are_new(trained, cats, monkeypatch):
    seeds, tell = [], stories.tell
    monkeypatch.setattr(stories, "tell", lambda seed: seeds.append(seed) or tell(seed))
    taught, held_out = chat.hold_out(DIALOGUES)
    lesson, options = read_lesson(trained, data=str(cats))
    assert lesson.about.startswith(f"{len(taught)} instructions, {len(held_out)} held out")
    assert lesson.question == held_out[0].turns[0][0]
    assert options.steps == 3 * lesson.per_epoch == 24 and options.minutes is None
    assert (options.lr, options.warmup) == (finetune.RECIPE["lr"], 2)
    lesson, options = read_lesson(trained, data="stories:50")
    assert lesson.tasks == [*itertools.islice(stories.instructions(0, held_out=True), 300)]
    assert lesson.about.startswith("50 instructions, ") and options.minutes
    assert len(set(seeds)) == 100 and min(seeds) >= 10**9
    other, _ = read_lesson(trained, data="stories:50", seed=1)
    assert not torch.equal(other.get_batch(0)[0], lesson.get_batch(0)[0])


def test_the_recipe_is_for_what_was_not_typed(trained, cats):
    told = dict(steps=5, warmup=4, lr=0.1, batch_size=2, schedule="step")
    _, options = read_lesson(trained, data=str(cats), **told)
    assert told.items() <= vars(options).items() and options.beta2 == finetune.RECIPE["beta2"]
    cats.write_text(json.dumps(rows(PAIRS[:20])))
    _, options = read_lesson(trained, data=str(cats), full=True)
    assert (options.steps, options.warmup) == (6, 0)  # a few instructions are not all warm-up
    assert options.lr == finetune.FULL_RECIPE["lr"] != finetune.RECIPE["lr"]


def test_rows_of_a_model_with_a_long_context_are_no_longer_than_4096():
    assert finetune.with_recipe(finetune.Options(), Config.preset("v2")).seq_len == 4096


def test_rehearsal_keeps_the_ends_of_documents(monkeypatch):
    said = [torch.full([100], i) for i in (5, 6, 1, 7)]  # 1 = eos
    monkeypatch.setattr(DeepSeek, "generate", lambda *_, **__: iter(said))
    base, tokenizer = random_model(small(vocab_size=320)), data.train_tokenizer(["a b c"], 258)
    keep = rehearsal.Rehearsal(base, tokenizer, 2, 6, 0)
    assert keep.ids[0, :3].tolist() == [0, 5, 6] and keep.real.sum(1).unique().tolist() == [3]


@pytest.mark.parametrize("flags", ["--full --dtype bfloat16", "--dtype float32"])
def test_a_base_in_bf16_is_trained_or_computed_with_in_fp32(
    run, trained, cats, tmp_path, monkeypatch, flags
):
    assert run(f"sample --ckpt {trained} --dtype bfloat16 --export {tmp_path}/half.pt")[0] == 0
    opened, real = [], finetune.open_model
    monkeypatch.setattr(finetune, "open_model", lambda *a: opened.append(real(*a)) or opened[0])
    line = f"finetune --ckpt {tmp_path}/half.pt --data {cats} --rehearsal 0 --steps 1"
    assert run(f"{line} --batch_size 4 --out {tmp_path}/o {flags}")[0] == 0
    assert {p.dtype for p in opened[0][0].parameters()} == {torch.float32}


def test_adapters_drop_out_as_asked_and_need_memory_for_what_is_trained(
    run, trained, cats, tmp_path, monkeypatch
):
    runs, fixed, real = [], [], finetune.plan_pieces
    monkeypatch.setattr(
        finetune, "plan_pieces", lambda o, c, more, *a: fixed.append(more) or real(o, c, more, *a)
    )
    stop = lambda self, *_: runs.append(self) or setattr(self, "stop", True)  # noqa: E731
    monkeypatch.setattr(finetune.Trainer, "fit", stop)
    line = f"finetune --ckpt {trained} --data {cats} --rehearsal 0 --dropout 0.25"
    assert run(f"{line} --steps 3 --out {tmp_path}/o")[0] == 0
    model = runs[0].model
    assert {m.dropout.p for m in model.modules() if isinstance(m, LoRALinear)} == {0.25}
    assert fixed == [3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)]


def test_a_full_run_is_not_resumed_from_a_part_of_its_model(run, trained, cats, tmp_path):
    line = f"finetune --ckpt {trained} --data {cats} --rehearsal 0 --full --batch_size 4"
    assert run(f"{line} --steps 1 --out {tmp_path}/o")[0] == 0
    state = checkpoint.load_checkpoint(tmp_path / "o/ckpt.pt", mmap=False)
    del state["model"]["lm_head.weight"]
    checkpoint.save_checkpoint(tmp_path / "o/ckpt.pt", state)
    code, _, err = run(f"finetune --resume --steps 2 --out {tmp_path}/o")
    assert code == 2 and "does not fit its base" in err


def test_answers_are_greedy_to_eos_also_many_at_a_time(trained, tokenizer, monkeypatch):
    model = checkpoint.build_model(checkpoint.load_checkpoint(trained)).requires_grad_(False)
    torch.manual_seed(0)
    for p in model.parameters():  # so that what it says depends on what it is asked
        if p.dim() > 1:
            p.normal_(0, 0.3)
    model.lm_head.weight[1] *= 2  # eos, now and then
    monkeypatch.setattr(lessons, "LONGEST_ANSWER", 8)
    questions, expected, ended = ["a", "How big?", "b", "cat 7", "c", "Cat 8 is big."], [], 0
    for question in questions:
        ids = chat.encode_chat(tokenizer, [(question, None)])
        start = len(ids)
        while len(ids) < start + 8 and ids[-1] != 1:
            logits = model(torch.tensor([ids])).logits[0, -1, : tokenizer.get_vocab_size()]
            ids.append(int(logits.argmax()))
        ended += ids[-1] == 1
        expected.append(tokenizer.decode(ids[start:]).strip())
    assert 0 < ended < len(set(expected)) == len(questions)
    assert lessons.answer(model, tokenizer, questions) == expected
    assert lessons.answer(model, tokenizer, questions * 11) == expected * 11


@pytest.mark.parametrize(
    "line, message",
    [
        ("--data {tmp}/none.json", "none.json' does not exist"),
        ("--data {tmp}/wide.json", "wide.json is not UTF-8 text"),
        ("--data {cats} --resume --overwrite", "--resume and --overwrite exclude each other"),
        ("--data {tmp}/empty.json", "too little that fits into 32 tokens (0 instructions, 0 held"),
        ("--data stories:0", "N from 1"),
        ("--data stories", "need a context of"),
        ("--data {cats} --full --lora_rank 4", "--lora_rank is of adapters"),
        ("--data {cats} --overwrite --out {base}", "holds the base"),
        ("--data {cats} --target_modules nothing", "target 'nothing' is no linear layer"),
        ("--data {cats} --seq_len 64", "the model's context: give at most 32"),
        ("--data {cats} --grad_accum 3", "must be a multiple of --grad_accum 3"),
    ],
)
def test_bad_input_ends_in_one_sentence(run, trained, cats, tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(finetune, "Rehearsal", None)  # it takes minutes, and comes after
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "wide.json").write_text("[]", encoding="utf-16")
    line = line.format(tmp=tmp_path, cats=cats, base=trained.parent)
    before = trained.read_bytes()
    code, _, err = run(f"finetune --ckpt {trained} --out {tmp_path}/o {line}")
    assert code == 2 and trained.read_bytes() == before
    assert message in err and err.count("\n") == 1


def test_a_run_stopped_before_it_was_evaluated_can_be_sampled_and_resumed(
    run, trained, cats, tmp_path, monkeypatch
):
    def fit(self, *_):
        self.stop, self.steps = True, 5

    monkeypatch.setattr(finetune.Trainer, "fit", fit)
    line = f"finetune --ckpt {trained} --data {cats} --rehearsal 0 --out {tmp_path}/o"
    assert "--resume" in run(line)[1]
    assert run(f"sample --ckpt {trained} --lora {tmp_path}/o --max_new_tokens 1")[0] == 0
    # the checkpoint knows its base, which need not be the default, out/ckpt.pt
    finetune.check_flags(finetune.Options(out="out", resume=True), {})


def test_of_a_folder_of_rows_and_texts_the_rows_are_taught(trained, cats):
    (question, _), *_ = (dialogue.turns[0] for dialogue in chat.hold_out(DIALOGUES)[1])
    some = [(q, "" if q == question else a) for q, a in PAIRS]
    cats.rename(cats.with_suffix(".jsonl")).write_text("\n".join(map(json.dumps, rows(some))))
    (cats.parent / "README.txt").write_text("about cats")
    lesson, _ = read_lesson(trained, data=str(cats.parent))
    assert ", 1 left out without an answer" in lesson.about
    assert ", 1 hidden or other files passed over" in lesson.about


def test_a_run_is_resumed_on_its_own_text_and_base_or_overwritten(run, trained, cats, tmp_path):
    base, out = tmp_path / "base.pt", tmp_path / "o"
    shutil.copy(trained, base)
    line = f"finetune --ckpt {base} --data {cats} --steps 2 --batch_size 8 --out {out}"
    assert run(line)[0] == 0
    resume = f"finetune --resume --steps 3 --out {out}"

    def refused(line, message):
        code, _, err = run(line)
        assert code == 2 and message in err

    held_out = [dialogue.turns[0] for dialogue in chat.hold_out(DIALOGUES)[1]]
    other = [(q, a + "!" if (q, a) in held_out else a) for q, a in PAIRS]
    for changed in (PAIRS[:-1], other):
        cats.write_text(json.dumps(rows(changed)))
        refused(resume, "is not that of the run")
    cats.write_text(json.dumps(rows(PAIRS)))
    state = checkpoint.load_checkpoint(trained, mmap=False)
    state["model"]["lm_head.weight"][0, 0] += 1e-3
    checkpoint.save_checkpoint(base, state)
    refused(resume, "is not that of the run")
    shutil.copy(trained, base)
    refused(f"train --resume --steps 3 --out {out}", "is of a run of finetune.py")
    cats.rename(tmp_path / "moved.json")
    base.rename(tmp_path / "moved.pt")
    moved = f"--ckpt {tmp_path}/moved.pt --data {tmp_path}/moved.json"
    assert run(f"{resume} {moved}")[0] == 0
    again = f"finetune {moved} --full --steps 2 --batch_size 8 --out {out} --overwrite"
    assert run(again)[0] == 0
    assert {path.name for path in out.iterdir()} == {"best.pt", *RUN_FILES}  # and no adapter
