"""Fine-tuning: what is asked, what counts, what is kept, and what a user can do wrong."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import MODEL, log_of, same
from data import IGNORE, Example, UsageError

import finetune
from common import chat, checkpoint, data, stories, trainer
from deepseek import Config, load_lora

PAIRS = [(f"How big is cat {n}?", f"Cat {n} is {'big' if n % 2 else 'small'}.") for n in range(120)]


def rows(pairs):
    return [{"instruction": q, "input": "", "output": a} for q, a in pairs]


@pytest.fixture
def cats(tmp_path):
    path = tmp_path / "cats.json"
    path.write_text(json.dumps(rows(PAIRS)))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([" ".join(pair) for pair in PAIRS], 400)


# ----------------------------------------------------------------------------------------------
# Instructions as data
# ----------------------------------------------------------------------------------------------


def test_json_and_jsonl_in_alpacas_form_are_read(tmp_path):
    content = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "more": 1},
        {"instruction": "Say hi.", "output": "hi"},
        {"instruction": "Say hü.", "input": None, "output": ""},
    ]
    expected = [("Add.\n1 and 2", "3"), ("Say hi.", "hi"), ("Say hü.", "")]
    content[1]["instruction"] = expected_line = "Say\u2028hi."  # no end of a line in .jsonl
    expected[1] = (expected_line, "hi")
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in content)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert chat.read_instructions(str(tmp_path / "a.json")) == expected
    assert chat.read_instructions(str(tmp_path / "a.jsonl")) == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", '[{"instruction": "a", "output": "b"}, {"output": "b"}]', "a.json row 2 is not"),
        ("a.json", '[{"instruction": "a", "output": 3}]', "a.json row 1 is not"),
        ("a.json", '[{"instruction": "a", "input": 3, "output": "b"}]', "a.json row 1 is not"),
        ("a.json", '["a"]', "a.json row 1 is not"),
        ("a.json", '[{"instruction": "\\ud800", "output": "b"}]', "row 1 holds half a surrogate"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.json", "3", "must be a list of rows, not int"),
        ("a.json", '{"instruction": "a", "output": "b"}', "must be a list of rows, not dict"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{}\n', "a.jsonl line 3 is not"),
        ("a.jsonl", "{}\n{", "a.jsonl line 2 is not JSON"),
        ("a.json", b"\xff", "byte 0 is wrong"),
        ("b.json", "[]", "a.json cannot be read"),
    ],
)
def test_unusable_rows_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        chat.read_instructions(str(tmp_path / name.replace("b.", "a.")))


def test_alpaca_comes_from_the_hub(cats, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "download", lambda *what: asked.append(what) or cats)
    assert chat.read_instructions("alpaca") == PAIRS
    assert asked == [("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")]


def test_equal_questions_are_held_out_together_and_never_nothing():
    pairs = [(q, f"{a} {i}") for q, a in PAIRS * 10 for i in range(2)]
    taught, held_out = chat.hold_out(pairs)
    assert sorted(taught + held_out) == sorted(pairs)
    assert not {q for q, _ in taught} & {q for q, _ in held_out}
    assert 0 < len(held_out) < 0.15 * len(pairs)
    for few in (PAIRS[:2], PAIRS[5:7], PAIRS[:3], [("q5", "a"), ("q5", "b"), ("q68", "c")]):
        taught, held_out = chat.hold_out(few)
        assert taught and held_out and not {q for q, _ in taught} & {q for q, _ in held_out}
    with pytest.raises(UsageError, match="questions: give at least 2"):
        chat.hold_out(PAIRS[:1] * 5)


def test_the_answer_and_its_end_count_and_nothing_else(tokenizer):
    (example,), counts = chat.make_examples([PAIRS[3]], tokenizer, 100)
    assert not any(counts.values())
    text = "User: How big is cat 3?\n\nAssistant: Cat 3 is big."
    assert example.ids.tolist() == [0, *tokenizer.encode(text).ids, 1]
    inputs, targets = chat.answers([example])
    assert inputs.tolist() == [example.ids[:-1].tolist()]
    counted = targets[targets != IGNORE]
    assert tokenizer.decode(counted[:-1].tolist()) == " Cat 3 is big." and counted[-1] == 1
    assert torch.equal(targets[0, -len(counted) :], counted)


def test_special_tokens_typed_into_a_question_or_an_answer_stay_text(tokenizer):
    (example,), _ = chat.make_examples([(f"a{data.EOS}", f"b{data.BOS}c")], tokenizer, 200)
    assert (example.ids[0], example.ids[-1]) == (0, 1)
    assert not np.isin(example.ids[1:-1], [0, 1]).any()


def test_long_answers_are_cut_and_empty_ones_left_out_with_a_count(tokenizer):
    pairs = [PAIRS[0], ("Talk!", "cat " * 500), ("Nothing?", " \n"), ("big " * 500, "cat")]
    examples, counts = chat.make_examples(pairs, tokenizer, 50)
    assert counts == {"cut": 1, "empty": 1, "no room": 1}
    whole, cut = examples
    assert whole.ids[-1] == 1 and len(cut.ids) == 51
    assert cut.ids[-1] != 1  # a cut answer does not end
    inputs, targets = chat.answers(examples)
    assert inputs.shape == targets.shape == (2, 50)


def test_an_answer_is_cut_where_the_context_ends_and_not_earlier(tokenizer):
    question, said = PAIRS[0]
    prompt = len(chat.encode_chat(tokenizer, [(question, None)]))
    whole = chat.encode_chat(tokenizer, [(question, said)])
    for seq_len, cut, no_room in (
        (prompt, 0, 1),  # generation needs a place for the answer, too
        (prompt + 1, 1, 0),
        (len(whole) - 2, 1, 0),
        (len(whole) - 1, 0, 0),  # eos is a target and no input
    ):
        examples, counts = chat.make_examples([(question, f" {said}\n")], tokenizer, seq_len)
        assert counts == {"cut": cut, "empty": 0, "no room": no_room}, seq_len
    assert examples[0].ids.tolist() == whole and examples[0].question == question


def some_examples(n=500):
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 90, n)
    return [Example("", np.arange(i + 2, i + 2 + k), 3) for i, k in enumerate(lengths)]


def test_an_epoch_has_each_example_in_full_batches_of_like_length():
    examples = some_examples()
    batches = chat.AnswerBatches(examples, 8, seed=1)
    assert batches.per_epoch == 63
    padding, seen = 0, Counter()
    for step in range(63):
        inputs, _ = batches.get_batch(step)
        assert len(inputs) == 8
        padding += int((inputs == 0).sum())
        seen.update((inputs[:, 0] - 2).tolist())  # which examples they are
    assert set(seen) == set(range(500)) and sorted(seen.values()) == [1] * 496 + [2] * 4
    assert padding < 0.05 * sum(len(e.ids) for e in examples)


def test_an_epoch_mixes_lengths_and_company_anew():
    batches = chat.AnswerBatches(some_examples(), 8, seed=1)
    widths = [batches.get_batch(step)[0].shape[1] for step in range(63)]
    assert abs(np.corrcoef(np.arange(63), widths)[0, 1]) < 0.5
    epochs = [
        {frozenset(batches.get_batch(63 * e + s)[0][:, 0].tolist()) for s in range(63)}
        for e in (0, 1)
    ]
    assert not epochs[0] & epochs[1]


def test_batches_of_answers_depend_on_seed_and_step_alone():
    examples = some_examples()
    one, two = (chat.AnswerBatches(examples, 8, seed=1) for _ in range(2))
    for step in (3, 70, 3):
        a, b = one.at(step), two.at(step)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    other = chat.AnswerBatches(examples, 8, seed=2)
    assert not all(torch.equal(one.at(s)[0], other.at(s)[0]) for s in range(3))
    assert not all(torch.equal(one.at(s)[0], one.at(s + 63)[0]) for s in range(3))


def test_padding_changes_nothing(tokenizer, trained):
    model = checkpoint.build_model(checkpoint.load_checkpoint(trained))
    pairs = [("Big?", "Yes."), ("Cat 7?", "Cat 7 is big, very big."), ("Who?", "I")]
    examples, _ = chat.make_examples(pairs, tokenizer, 31)
    assert len({len(e.ids) for e in examples}) == 3
    with torch.no_grad():
        together = model(*(t.clamp(max=319) for t in chat.answers(examples))).loss
        alone = [model(*(t.clamp(max=319) for t in chat.answers([e]))).loss for e in examples]
    sizes = torch.tensor([float(len(e.ids) - e.answer) for e in examples])
    expected = (torch.stack(alone) * sizes).sum() / sizes.sum()
    assert together.item() == pytest.approx(expected.item(), rel=1e-5)
    windows = chat.answer_eval_set(examples, tokenizer, 2, 10**9)
    assert windows.tokens == sizes.sum() and len(windows.rows) == 2
    assert windows.bytes == sum(len(f" {a}") for _, a in pairs)


# ----------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["", "--full"])
def test_a_run_learns_and_the_best_is_kept(run, trained, cats, tmp_path, full):
    before = trained.read_bytes()
    out = tmp_path / "o"
    how = full or "--lora_rank 4 --alpha 6 --dropout 0.25"
    line = f"finetune --ckpt {trained} --data {cats} {how} --steps 30 --lr 0.03 --warmup 2"
    code, text, err = run(f"{line} --batch_size 8 --dtype float32 --out {out}")
    assert code == 0, err
    assert "instructions" in text and "held out, nats/token" in text
    adapter = {"adapter_model.safetensors", "adapter_config.json", "SHA256SUMS"}
    kept = {"best.pt"} if full else adapter
    assert {p.name for p in out.iterdir()} == kept | {
        "ckpt.pt",
        "log.jsonl",
        "curves.png",
        "run.lock",
    }
    assert trained.read_bytes() == before
    header, *records, summary = log_of(out)
    assert [r["step"] for r in records] == list(range(1, 31))
    assert summary["val_loss_after"] < summary["val_loss_before"] - 0.2
    best = min(r["val_loss"] for r in records if "val_loss" in r)
    assert summary["val_loss_after"] == pytest.approx(best, rel=1e-5)
    model, tokenizer = checkpoint.open_model(str(trained), torch.device("cpu"), "auto")
    total, _ = model.num_parameters()
    adapted = [  # every projection; routed experts have none
        module
        for name, module in model.named_modules()
        if name.endswith(("_proj", "_mqa")) and isinstance(module, torch.nn.Linear)
    ]
    rank = 4 * sum(sum(module.weight.shape) for module in adapted)
    assert any(module.in_features == model.config.intermediate_size for module in adapted)
    assert summary["trainable"] == (total if full else rank)
    assert summary["total"] == (total if full else total + rank)

    prompt = "--chat --temperature 0 --max_new_tokens 9 --prompt Big?"
    place = f"--ckpt {out}/best.pt" if full else f"--ckpt {trained} --lora {out}"
    assert run(f"sample {place} {prompt}")[1] != run(f"sample --ckpt {trained} {prompt}")[1]
    if full:
        return
    for adapters in (out, out / "ckpt.pt"):
        code, _, err = run(f"sample --ckpt {adapters} --prompt a")
        assert code == 2 and "adapters alone: give" in err and err.count("\n") == 1
    assert run(f"sample {place} --export {tmp_path}/hf")[0] == 0
    exported = run(f"sample --ckpt {tmp_path}/hf {prompt}")[1]
    assert exported == run(f"sample {place} {prompt}")[1]
    record = json.loads((out / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(trained)
    assert (record["r"], record["lora_alpha"]) == (4, 6.0)
    # The default targets have MLPs, where PEFT allows no dropout, which only training had.
    assert record["lora_dropout"] == 0 and record["target_parameters"]
    assert f"next: python sample.py {place} --chat" in text
    load_lora(model, out)
    adapted = model(torch.arange(20)[None]).logits
    merged, _ = checkpoint.open_model(f"{tmp_path}/hf", torch.device("cpu"), "auto")
    assert torch.allclose(merged(torch.arange(20)[None]).logits, adapted, atol=1e-5)


@pytest.mark.parametrize("extra", ["", "--dropout 0.2 --dtype bfloat16 --grad_accum 2", "--full"])
def test_a_resumed_run_ends_with_the_same_bits(run, trained, cats, tmp_path, extra):
    line = f"finetune --ckpt {trained} --data {cats} --batch_size 8 --lr 0.01 --warmup 1 {extra}"
    line += " --schedule constant --log_level quiet --eval_every 3"
    assert run(f"{line} --steps 12 --out {tmp_path}/whole")[0] == 0
    assert run(f"{line} --steps 6 --out {tmp_path}/parts")[0] == 0
    assert run(f"finetune --resume --steps 12 --out {tmp_path}/parts")[0] == 0
    a, b = (checkpoint.load_checkpoint(tmp_path / n / "ckpt.pt") for n in ("whole", "parts"))
    for key in ("model", "optimizer", "rng", "step", "tokens", "best_val_loss"):
        assert same(a[key], b[key]), key
    whole, parts = (log_of(tmp_path / n)[1:] for n in ("whole", "parts"))
    for key in ("step", "loss", "val_loss_after"):
        assert [r.get(key) for r in whole] == [r.get(key) for r in parts]
    code, out, _ = run(f"finetune --resume --out {tmp_path}/parts --log_level info")
    assert code == 0 and "finished: 12 steps" in out


@pytest.mark.parametrize("how", ["--lora_rank 2", "--full"])
def test_where_the_loss_rises_again_the_earlier_best_stays(run, trained, cats, tmp_path, how):
    line = f"finetune --ckpt {trained} --data {cats} --batch_size 8 --warmup 0 --dtype float32"
    line += f" --schedule constant --eval_every 1 {how} --out {tmp_path}/o"
    assert run(f"{line} --steps 4 --lr 0.01")[0] == 0
    kept = tmp_path / "o" / ("best.pt" if how == "--full" else "adapter_model.safetensors")
    before = kept.read_bytes()
    state = checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt", mmap=False)
    state["best_val_loss"] = 0.0  # as if no later step could be better
    checkpoint.save_checkpoint(tmp_path / "o" / "ckpt.pt", state)
    assert run(f"finetune --resume --steps 6 --out {tmp_path}/o")[0] == 0
    assert kept.read_bytes() == before
    *_, last = log_of(tmp_path / "o")
    source = str(kept if how == "--full" else trained)
    model, tokenizer = checkpoint.open_model(source, torch.device("cpu"), "auto")
    if how != "--full":
        load_lora(model, tmp_path / "o")
    held_out = chat.make_examples(
        chat.hold_out(chat.read_instructions(str(cats)))[1], tokenizer, 32
    )[0]
    windows = chat.answer_eval_set(held_out, tokenizer, 8, 10**9)
    loss = trainer.evaluate(model, windows, torch.device("cpu"), torch.float32)["val_loss"]
    assert last["val_loss_after"] == pytest.approx(loss, rel=1e-4)


def test_raw_text_is_learned_with_the_models_own_tokenizer(run, trained, tmp_path):
    (tmp_path / "dogs.txt").write_text("The dog 7 sat on the rug. " * 400)
    line = f"finetune --ckpt {trained} --data {tmp_path}/dogs.txt --steps 20 --lr 0.03 --warmup 2"
    code, out, _ = run(f"{line} --batch_size 8 --out {tmp_path}/o")
    *_, summary = log_of(tmp_path / "o")
    assert code == 0 and "held out, bits/byte" in out
    assert summary["val_bpb_after"] < summary["val_bpb_before"] - 0.3
    stored = checkpoint.load_checkpoint(trained)["tokenizer"]
    assert checkpoint.load_checkpoint(tmp_path / "o" / "ckpt.pt")["tokenizer"] == stored


def test_the_built_in_task_is_scored_before_and_after(run, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "HELD_OUT_TASKS", 24)
    line = f"train {MODEL} --data stories:120 --steps 2 --seq_len 256 --out {tmp_path}/b"
    assert run(f"{line} --log_level quiet")[0] == 0
    line = f"finetune --ckpt {tmp_path}/b/ckpt.pt --data stories:40 --steps 2 --batch_size 8"
    code, out, _ = run(f"{line} --lora_rank 8 --dtype float32 --out {tmp_path}/o")
    *_, summary = log_of(tmp_path / "o")
    assert code == 0 and "held-out tasks" in out and out.count("before, wrong:") == 5
    assert summary["right_before"] == summary["right_after"] == 0
    assert "40 instructions, 24 held out" in out
    assert set(summary["by_kind"]) == set(stories.KINDS)
    assert summary["plain_loss_off"] == summary["plain_loss_before"]
    assert summary["plain_loss_after"] != summary["plain_loss_before"]
    assert 0 < summary["trainable"] < 0.2 * summary["total"]


def test_answers_are_judged_by_kind(monkeypatch):
    tasks = [t for t, _ in zip(stories.instructions(3, held_out=True), range(60), strict=False)]
    said = [t.answer if t.kind != "who" else "Nobody." for t in tasks]
    monkeypatch.setattr(finetune, "answer", lambda *_: said)
    score = finetune.score_tasks(None, None, tasks)
    assert score["by_kind"]["who"] == 0
    assert {v for k, v in score["by_kind"].items() if k != "who"} == {1}
    who = sum(t.kind == "who" for t in tasks)
    assert score["right"] == pytest.approx(1 - who / 60, abs=1e-4)


def scored(right):
    kinds = {"where": right, "who": right / 2}
    return {"right": right, "by_kind": kinds, "answers": ["x"] * 40}


def test_before_is_before_and_after_is_after(run, tmp_path, monkeypatch, capsys):
    tasks = [t for t, _ in zip(stories.instructions(3), range(40), strict=False)]
    tasks = [t for t in tasks if t.kind in ("where", "who")]
    finetune.print_scores(tasks, scored(0.2), scored(0.9))
    table = capsys.readouterr().out
    assert [line.split()[-2:] for line in table.splitlines()[2:5]] == [
        ["20.0%", "90.0%"],
        ["10.0%", "45.0%"],
        ["20.0%", "90.0%"],
    ]
    line = f"train {MODEL} --data stories:120 --steps 2 --seq_len 256 --out {tmp_path}/b"
    assert run(f"{line} --log_level quiet")[0] == 0
    scores = iter([scored(0.2), scored(0.9)])
    monkeypatch.setattr(finetune, "judge", lambda *_: next(scores))
    line = f"finetune --ckpt {tmp_path}/b/ckpt.pt --data stories:40 --steps 2 --batch_size 8"
    assert run(f"{line} --out {tmp_path}/o --log_level quiet")[0] == 0
    *_, summary = log_of(tmp_path / "o")
    assert (summary["right_before"], summary["right_after"]) == (0.2, 0.9)
    assert summary["by_kind"] == scored(0.9)["by_kind"]


def read_lesson(trained, line):
    tokenizer = data.load_tokenizer(checkpoint.load_checkpoint(trained)["tokenizer"])
    args = finetune.make_parser().parse_args(line.split())
    args.seq_len = args.seq_len or 512  # this tokenizer knows few words
    finetune.with_recipe(args, Config.preset("tiny", max_position_embeddings=512))
    return finetune.read_data(args, tokenizer)


def test_what_is_held_out_is_not_taught(trained, cats):
    taught, held_out = chat.hold_out(PAIRS)
    lesson = read_lesson(trained, f"--data {cats} --seq_len 32 --batch_size 8")
    assert lesson.about.startswith(f"{len(taught)} instructions, {len(held_out)} held out")
    assert lesson.question == held_out[0][0]
    built_in = read_lesson(trained, "--data stories:50")
    tasks = stories.instructions(0, held_out=True)
    assert built_in.tasks == [t for t, _ in zip(tasks, range(300), strict=False)]
    assert built_in.about.startswith("50 instructions, ")
    other = read_lesson(trained, "--data stories:50 --seed 1")
    assert not torch.equal(other.batch_at(0)[0], built_in.batch_at(0)[0])


def test_the_plain_stories_are_none_that_were_trained_on(trained, monkeypatch):
    seeds, tell = [], stories.tell
    monkeypatch.setattr(stories, "tell", lambda seed: seeds.append(seed) or tell(seed))
    assert read_lesson(trained, "--data stories:50").plain.tokens > 10_000
    assert len(set(seeds)) == 100 and min(seeds) >= 10**9


def test_how_long_it_trains_unless_told(run, trained, cats, tmp_path, monkeypatch):
    seen = []

    def fit(trainer, *_):
        seen.append((trainer.args.steps, trainer.args.minutes, trainer.args.lr))
        trainer.stop = True

    monkeypatch.setattr(trainer.Trainer, "fit", fit)
    (tmp_path / "dogs.txt").write_text("The dog 7 sat on the rug. " * 400)
    epochs = []
    for source in (cats, tmp_path / "dogs.txt"):
        epochs.append(read_lesson(trained, f"--data {source} --seq_len 32").batches)
        line = f"finetune --ckpt {trained} --data {source} --out {tmp_path}/{len(seen)}"
        code, out, _ = run(line)
        assert code == 0 and "stopped after step 0, saved; python finetune.py --resume" in out
        assert "val_loss_after" not in log_of(tmp_path / str(len(seen) - 1))[-1]
    assert run(f"finetune --ckpt {trained} --data {cats} --full --out {tmp_path}/2")[0] == 0
    assert [steps for steps, _, _ in seen[:2]] == [3 * n for n in epochs] and epochs[1] > 3
    assert seen[2][2] == finetune.FULL_RECIPE["lr"] != seen[0][2] == finetune.RECIPE["lr"]


def test_answers_are_greedy_and_end_at_eos(tokenizer):
    asked = {}

    class Says(torch.nn.Module):  # " Cat", eos, and then what follows must not count
        config = Config.preset("tiny")

        def generate(self, prompts, limit, **how):
            asked.update(how, limit=limit)
            said = [*tokenizer.encode(" Cat").ids, 1]
            return (torch.tensor([token] * len(prompts)) for token in said)

    assert finetune.answer(Says(), tokenizer, ["a", "b"]) == ["Cat", "Cat"]
    assert asked == {
        "temperature": 0,
        "stop": 1,
        "vocab_size": tokenizer.get_vocab_size(),
        "limit": finetune.LONGEST_ANSWER,
    }


def test_answers_together_are_those_one_by_one(trained):
    state = checkpoint.load_checkpoint(trained)
    model, tokenizer = checkpoint.build_model(state), data.load_tokenizer(state["tokenizer"])
    questions = ["a", "What?", "b"]
    assert all(len(chat.encode_chat(tokenizer, [(q, None)])) < 31 for q in questions)
    together = finetune.answer(model, tokenizer, questions, rows=2)
    assert together == [finetune.answer(model, tokenizer, [q])[0] for q in questions]


def test_built_in_tasks_held_out_share_no_hero_and_thing_with_the_taught():
    def combinations(seed, held_out, n):
        tasks = stories.instructions(seed, held_out)
        return {(t.facts["hero"], t.facts["thing"]) for t, _ in zip(tasks, range(n), strict=False)}

    assert not combinations(0, False, 2000) & combinations(0, True, 300)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--data {tmp}/cats.csv", "must be stories, alpaca, a .json"),
        ("--data {tmp}/none.json", "none.json cannot be read"),
        ("--data {tmp}/empty.json", "questions: give at least 2"),
        ("--data {tmp}/none.txt", "neither a file"),
        ("--data stories:0", "N from 1"),
        ("--data {tmp}/long.json", "0 have an answer and fit into 32 tokens"),
        ("--data stories", "need a context of"),
        ("--data {cats} --full --lora_rank 4", "--lora_rank is of adapters"),
        ("--data {cats} --overwrite --out {base}", "holds the base"),
        ("--data {cats} --target_modules nothing", "target 'nothing' is no linear layer"),
        ("--data {cats} --lora_rank 0", "--lora_rank"),
        ("--data {cats} --alpha nan", "--alpha"),
        ("--data {cats} --dropout 1", "--dropout"),
        ("--data {cats} --steps 3 --minutes 3", "exclude each other"),
        ("--data {cats} --seq_len 64", "the model's context: give at most 32"),
        ("--data {cats} --batch_size 5 --grad_accum 2", "multiple of --grad_accum 2"),
        ("--data {cats} --ckpt {tmp}/none.pt", "does not exist"),
        ("--resume", "nothing to resume"),
    ],
)
def test_bad_input_ends_in_one_sentence(run, trained, cats, tmp_path, line, message):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "long.json").write_text(json.dumps(rows([("a " * 90, "b"), ("c " * 90, "d")])))
    line = line.format(tmp=tmp_path, cats=cats, base=trained.parent)
    line += "" if "--ckpt" in line else f" --ckpt {trained}"
    line += "" if "--out" in line else f" --out {tmp_path}/o"
    before = trained.read_bytes()
    code, _, err = run(f"finetune {line}")
    assert code == 2 and trained.read_bytes() == before
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


def test_another_base_or_text_is_not_resumed_on(run, trained, cats, tmp_path):
    base = tmp_path / "base.pt"
    shutil.copy(trained, base)
    line = f"finetune --ckpt {base} --data {cats} --steps 2 --batch_size 8 --out {tmp_path}/o"
    assert run(line)[0] == 0
    state = checkpoint.load_checkpoint(base, mmap=False)
    state["model"]["lm_head.weight"][0, 0] += 1e-3
    checkpoint.save_checkpoint(base, state)
    code, _, err = run(f"finetune --resume --steps 3 --out {tmp_path}/o")
    assert code == 2 and "has changed since the run began" in err
    shutil.copy(trained, base)
    other = [(q, a + "!" if (q, a) in chat.hold_out(PAIRS)[1] else a) for q, a in PAIRS]
    for changed in (PAIRS[:-1], other):
        cats.write_text(json.dumps(rows(changed)))
        assert run(f"finetune --resume --steps 3 --out {tmp_path}/o")[0] == 2
    cats.write_text(json.dumps(rows(PAIRS)))
    assert run(f"finetune --resume --steps 3 --out {tmp_path}/o")[0] == 0


def test_each_script_resumes_its_own_runs_only(run, trained, cats, tmp_path):
    line = f"finetune --ckpt {trained} --data {cats} --steps 2 --batch_size 8 --out {tmp_path}/o"
    assert run(line)[0] == 0
    code, _, err = run(f"train --resume --steps 3 --out {tmp_path}/o")
    assert code == 2 and "is of a run of finetune.py" in err
    code, _, err = run(f"finetune --resume --steps 3 --ckpt {trained} --out {trained.parent}/.")
    assert code == 2 and "holds the base" in err
    shutil.copytree(trained.parent, tmp_path / "pretrained")
    code, _, err = run(f"finetune --resume --steps 3 --out {tmp_path}/pretrained")
    assert code == 2 and "is of a run of train.py" in err


def test_a_run_killed_before_its_score_is_scored_on_resume(run, trained, cats, tmp_path):
    line = f"finetune --ckpt {trained} --data {cats} --steps 2 --batch_size 8 --out {tmp_path}/o"
    assert run(line)[0] == 0
    log = tmp_path / "o" / "log.jsonl"
    *lines, summary = log.read_text().splitlines()
    log.write_text("\n".join(lines) + "\n")
    assert run(f"finetune --resume --out {tmp_path}/o")[0] == 0
    assert log_of(tmp_path / "o")[-1] == json.loads(summary)
    code, out, _ = run(f"finetune --resume --out {tmp_path}/o")
    assert code == 0 and "finished: 2 steps" in out


def test_overwriting_removes_what_the_earlier_run_left(run, trained, cats, tmp_path):
    line = f"finetune --ckpt {trained} --data {cats} --steps 2 --batch_size 8 --out {tmp_path}/o"
    assert run(line)[0] == 0
    code, _, err = run(f"{line} --full")
    assert code == 2 and "holds another run" in err
    assert run(f"{line} --full --overwrite")[0] == 0
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert names == {"best.pt", "ckpt.pt", "log.jsonl", "curves.png", "run.lock"}


def test_a_few_instructions_are_not_all_warm_up(run, trained, cats, tmp_path):
    cats.write_text(json.dumps(rows(PAIRS[:20])))
    assert run(f"finetune --ckpt {trained} --data {cats} --out {tmp_path}/o")[0] == 0
    _, *records, _ = log_of(tmp_path / "o")
    assert len(records) == 6 and records[0]["lr"] == finetune.RECIPE["lr"]


def test_a_missing_or_unfit_adapter_is_said(run, trained, tmp_path):
    code, _, err = run(f"sample --ckpt {trained} --lora {tmp_path} --prompt a")
    assert code == 2 and "has no adapter_config.json" in err and err.count("\n") == 1
