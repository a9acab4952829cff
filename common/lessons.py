"""
What a fine-tuning run learns, and how well it has learned: instructions or raw text, held-out tasks
that can be judged, and the scores before and after.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common import chat, data, stories
from common.runtime import UsageError
from common.trainer import RunOptions, eval_rows, evaluate, evaluating, write_sample
from deepseek import DeepSeek

TASKS, HELD_OUT_TASKS = 20_000, 300  # of the built-in instructions
LONGEST_ANSWER = 100  # tokens; the stories that built-in instructions ask for have up to 60


# ----------------------------------------------------------------------------------------------
# What it is taught: instructions, or raw text
# ----------------------------------------------------------------------------------------------


@dataclass
class FinetuneData:
    """What is to be learned, whatever kind of text it is."""

    get_batch: Callable[[int], tuple[Tensor, Tensor]]
    per_epoch: int  # batches
    held_out: data.EvalSet
    digest: str  # of the text
    about: str  # a line for the screen
    question: str | None = None  # held out, and answered while training; None for raw text
    tasks: list[stories.Task] = field(default_factory=list)  # held out, for the world's own judge
    retention_set: data.EvalSet | None = None  # stories, to see what is forgotten


def read_data(options: RunOptions, tokenizer: Tokenizer) -> FinetuneData:
    """What --data names. Raises UsageError."""
    if data.is_stories(options.data):
        return built_in(options, tokenizer)
    if options.data in chat.HUB_INSTRUCTIONS or Path(options.data).suffix in (".json", ".jsonl"):
        train, held_out = chat.hold_out(chat.read_instructions(options.data))
        return instructions(options, tokenizer, train, held_out)
    if options.data.endswith(".txt") or Path(options.data).is_dir():
        return raw_text(options, tokenizer)
    raise UsageError(
        f"--data {options.data!r} must be stories, {', '.join(chat.HUB_INSTRUCTIONS)}, a .json or"
        " .jsonl of instructions, or a .txt"
    )


def instructions(
    options: RunOptions, tokenizer: Tokenizer, train: list, held_out: list
) -> FinetuneData:
    """Of (question, answer) pairs."""
    digest = hashlib.blake2b(repr((train, held_out)).encode()).hexdigest()
    examples, counts = chat.make_examples(train, tokenizer, options.seq_len)
    kept, _ = chat.make_examples(held_out, tokenizer, options.seq_len)
    if not examples or not kept:
        raise UsageError(
            f"of the {len(train)} instructions in {options.data}, {len(examples)} have an answer"
            f" and fit into {options.seq_len} tokens, of the {len(held_out)} held out {len(kept)}:"
            " give more or shorter ones, or a larger --seq_len"
        )
    batches = chat.AnswerBatches(examples, options.batch_size, options.seed)
    remarks = {"cut": "answers cut", "empty": "left out without an answer"}
    remarks["no room"] = "left out with too long a question"
    about = [f"{len(examples):,} instructions, {len(kept):,} held out"]
    about += [f"{counts[kind]:,} {text}" for kind, text in remarks.items() if counts[kind]]
    rows = eval_rows(tokenizer.get_vocab_size(), options.seq_len)
    held_out = chat.answer_eval_set(kept, tokenizer, rows, options.eval_tokens)
    about, question = ", ".join(about), kept[0].question
    return FinetuneData(batches.get_batch, batches.per_epoch, held_out, digest, about, question)


def built_in(options: RunOptions, tokenizer: Tokenizer) -> FinetuneData:
    """The instructions of stories.py; held out are combinations of hero and thing."""
    count = options.data.partition(":")[2] or str(TASKS)
    if not count.isdecimal() or not 1 <= int(count) <= 10**7:
        raise UsageError(f"data {options.data!r} must be stories, or stories:N, N from 1 to 10**7")
    train = itertools.islice(stories.instructions(options.seed), int(count))
    tasks = list(itertools.islice(stories.instructions(0, held_out=True), HELD_OUT_TASKS))
    pairs = [[(task.instruction, task.answer) for task in some] for some in (train, tasks)]
    need = 1 + max(len(chat.encode_chat(tokenizer, [(question, None)])) for question, _ in pairs[1])
    if options.seq_len < need:
        raise UsageError(
            f"the built-in instructions need a context of {need} tokens, but there are"
            f" {options.seq_len}: train a model with a longer --seq_len"
        )
    # These are told beyond all seeds that a training text takes.
    plain = data.tokenize((stories.tell(10**9 + i).text for i in range(100)), tokenizer)
    found = instructions(options, tokenizer, *pairs)
    retention_set = data.build_eval_set(plain, tokenizer, options.seq_len, 16)
    return replace(found, tasks=tasks, retention_set=retention_set)


def raw_text(options: RunOptions, tokenizer: Tokenizer) -> FinetuneData:
    """Domain adaptation: documents as in pretraining, cut by the model's own tokenizer."""
    corpus = data.prepare(options.data, tokenizer, data.cache_folder(Path(options.out)))
    batches = data.Batches(corpus.train, options.batch_size, options.seq_len, options.seed)
    rows = eval_rows(tokenizer.get_vocab_size(), options.seq_len)
    held_out = data.build_eval_set(
        corpus.val, tokenizer, options.seq_len, rows, options.eval_tokens
    )
    if not held_out.tokens:
        raise UsageError(f"{options.data} is too short to hold anything out: give more text")
    about = f"{len(corpus.train.ids):,} tokens, {len(corpus.val.ids):,} held out"
    return FinetuneData(batches.get_batch, batches.per_epoch, held_out, corpus.digest, about)


# ----------------------------------------------------------------------------------------------
# How well it does what it is told
# ----------------------------------------------------------------------------------------------


def answer(
    model: DeepSeek, tokenizer: Tokenizer, questions: list[str], rows: int = 50
) -> list[str]:
    """The greedy answers to questions, of at most LONGEST_ANSWER tokens, so many at a time.

    Where the context ends earlier, it ends for a batch when its longest question is out of room.
    """
    prompts = [chat.encode_chat(tokenizer, [(question, None)]) for question in questions]
    order, said = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    with evaluating(model):
        for at in range(0, len(order), rows):
            chosen = order[at : at + rows]
            stream = model.generate(
                [prompts[i] for i in chosen],
                LONGEST_ANSWER,
                temperature=0,
                stop=model.config.eos_token_id,
                vocab_size=tokenizer.get_vocab_size(),
            )
            texts = tokenizer.decode_batch(torch.stack(list(stream), 1).tolist())
            said |= dict(zip(chosen, texts, strict=True))
    return [said[i].strip() for i in range(len(prompts))]


def score_tasks(model: DeepSeek, tokenizer: Tokenizer, tasks: list[stories.Task]) -> dict[str, Any]:
    """The share of tasks answered right, in all and by kind, and the answers."""
    answers = answer(model, tokenizer, [task.instruction for task in tasks])
    right, asked = Counter(), Counter(task.kind for task in tasks)
    for task, text in zip(tasks, answers, strict=True):
        right[task.kind] += stories.is_right(task, text)
    by_kind = {kind: round(right[kind] / n, 4) for kind, n in sorted(asked.items())}
    return {"right": round(right.total() / len(tasks), 4), "by_kind": by_kind, "answers": answers}


def evaluate_all(model: DeepSeek, tokenizer, lesson: FinetuneData, device, dtype) -> dict[str, Any]:
    """Everything that is compared before and after."""
    result = evaluate(model, lesson.held_out, device, dtype)
    if lesson.tasks:
        result |= score_tasks(model, tokenizer, lesson.tasks)
        result["plain_loss"] = evaluate(model, lesson.retention_set, device, dtype)["val_loss"]
    return result


def example(model: DeepSeek, tokenizer: Tokenizer, question: str | None) -> str:
    """What the model says now, on one line."""
    if question is None:
        return " ".join(write_sample(model, tokenizer, model.lm_head.weight.device).split())
    said = " ".join(answer(model, tokenizer, [question])[0].split())
    return f"{' '.join(question.split())[:100]} -> {said[:100]}"


def score_table(tasks: list[stories.Task], before: dict, after: dict) -> str:
    """The shares by kind, and of each kind one task with the answer before and after."""
    lines = [f"\n{'held-out tasks':<16}{'asked':>6}{'before':>9}{'after':>9}"]
    for kind in [*after["by_kind"], "all"]:
        asked = sum(kind in (task.kind, "all") for task in tasks)
        shares = [s["right"] if kind == "all" else s["by_kind"][kind] for s in (before, after)]
        lines.append(f"{kind:<16}{asked:>6}{shares[0]:>9.1%}{shares[1]:>9.1%}")
    for kind in after["by_kind"]:
        i = [task.kind for task in tasks].index(kind)
        lines.append(f"\n{tasks[i].instruction}")
        for when, score in (("before", before), ("after", after)):
            text = " ".join(score["answers"][i].split())
            mark = "right" if stories.is_right(tasks[i], score["answers"][i]) else "wrong"
            lines.append(f"  {when}, {mark}: {text[:200]}{'...' if len(text) > 200 else ''}")
    return "\n".join(lines)


def summarise(summary: dict[str, Any]) -> str:
    """The losses before and after."""
    names = {"val_loss": "held out, nats/token", "val_bpb": "held out, bits/byte"}
    names |= {"plain_loss": "plain stories, nats/token"}
    lines = []
    for name, meaning in names.items():
        if f"{name}_before" in summary:
            line = f"{meaning}: {summary[f'{name}_before']:.4f} before"
            line += f", {summary[f'{name}_after']:.4f} after"
            if off := summary.get(f"{name}_off"):
                line += f", {off:.4f} with the adapter off"
            lines.append(line)
    return "\n".join(lines)
