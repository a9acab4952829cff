"""
What a fine-tuning run learns, and how well it has learned: instructions or raw text, held-out tasks
that can be judged, and the scores before and after.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common import chat, data, stories
from common.runtime import UsageError
from common.trainer import RunOptions, eval_rows, evaluate, evaluating, write_sample
from deepseek import DeepSeek

TASKS, HELD_OUT_TASKS = 20_000, 300  # of the built-in instructions
LONGEST_ANSWER = 100  # tokens; the stories that built-in instructions ask for have up to 60


@dataclass
class FinetuneData:
    """What is to be learned, whatever kind of text it is."""

    get_batch: Callable[[int], tuple[Tensor, Tensor]]
    per_epoch: int  # batches
    held_out: data.EvalSet
    digest: str  # of the text
    about: str  # a line for the screen
    question: str | None = None  # held out, and answered while training; None for raw text
    tasks: Sequence[stories.Task] = ()  # held out, for the world's own judge
    retention_set: data.EvalSet | None = None  # stories, to see what is forgotten


def read_data(options: RunOptions, tokenizer: Tokenizer) -> FinetuneData:
    """What --data names. Raises UsageError."""
    if data.is_stories(options.data):
        return built_in(options, tokenizer)
    files, passed = data.find_corpus(options.data)
    rows = [path for path in files if path.suffix.lower() in data.ROWS]
    if not rows:
        return raw_text(options, tokenizer)
    dialogues, remarks = chat.read_dialogues(rows)
    remarks[data.PASSED_OVER] = passed + len(files) - len(rows)
    return instructions(options, tokenizer, *chat.hold_out(dialogues), remarks)


def instructions(
    options, tokenizer, train: list, held_out: list, passed_over: Counter, **more: Any
) -> FinetuneData:
    """Of dialogues; passed_over: how many rows were left out before, and why."""
    digest = hashlib.blake2b(repr((train, held_out)).encode()).hexdigest()
    examples, remarks = chat.make_examples(train, tokenizer, options.seq_len)
    kept, others = chat.make_examples(held_out, tokenizer, options.seq_len)
    about = f"{len(examples):,} instructions, {len(kept):,} held out"
    remarks = +(passed_over + remarks + others)  # those that are there
    about = ", ".join([about, *(f"{n:,} {what}" for what, n in remarks.items())])
    if not examples or not kept:
        what = f"{options.data} has too little that fits into {options.seq_len} tokens ({about})"
        raise UsageError(f"{what}: give different questions with answers, or a larger --seq_len")
    batches = chat.AnswerBatches(examples, options.batch_size, options.seed)
    sizes = np.cumsum([(example.targets != data.IGNORE).sum() for example in kept])
    some = [example[1:] for example in kept[: 1 + np.searchsorted(sizes, options.eval_tokens)]]
    val = data.make_eval_set(
        some, tokenizer, eval_rows(tokenizer.get_vocab_size(), options.seq_len)
    )
    more |= {"question": kept[0].question}
    return FinetuneData(batches.get_batch, batches.per_epoch, val, digest, about, **more)


def built_in(options: RunOptions, tokenizer: Tokenizer) -> FinetuneData:
    """The instructions of stories.py; held out are combinations of hero and thing."""
    count = data.count_of(options.data, TASKS, least=1)
    train = itertools.islice(stories.instructions(options.seed), count)
    tasks = list(itertools.islice(stories.instructions(0, held_out=True), HELD_OUT_TASKS))
    need = 1 + max(len(chat.encode_chat(tokenizer, [(task.instruction, None)])) for task in tasks)
    if options.seq_len < need:
        context = f"a context of {need} tokens, but there are {options.seq_len}"
        raise UsageError(f"the built-in instructions need {context}: train with a longer --seq_len")
    # These are told beyond all seeds that a training text takes.
    plain = data.encode_documents((stories.tell(10**9 + i).text for i in range(100)), tokenizer)
    retention_set = data.build_eval_set(plain, tokenizer, options.seq_len, 16)
    lesson = [
        [chat.Dialogue([(task.instruction, task.answer)]) for task in some]
        for some in (train, tasks)
    ]
    return instructions(
        options, tokenizer, *lesson, Counter(), tasks=tasks, retention_set=retention_set
    )


def raw_text(options: RunOptions, tokenizer: Tokenizer) -> FinetuneData:
    """Domain adaptation: documents as in pretraining, cut by the model's own tokenizer."""
    corpus = data.prepare(options.data, tokenizer, data.cache_folder(Path(options.out)))
    batches = data.Batches(corpus.train, options.batch_size, options.seq_len, options.seed)
    rows = eval_rows(tokenizer.get_vocab_size(), options.seq_len)
    val = data.build_eval_set(corpus.val, tokenizer, options.seq_len, rows, options.eval_tokens)
    about = f"{len(corpus.train.ids):,} tokens, {len(corpus.val.ids):,} held out"
    about += f", {corpus.remark}" if corpus.remark else ""
    return FinetuneData(batches.get_batch, batches.per_epoch, val, corpus.digest, about)


# ----------------------------------------------------------------------------------------------
# How well it does what it is told
# ----------------------------------------------------------------------------------------------


def answer(model: DeepSeek, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """The greedy answers to questions, of at most LONGEST_ANSWER tokens, fifty at a time. Where the
    context ends earlier, it ends for all fifty when the longest question is out of room."""
    prompts, said = [chat.encode_chat(tokenizer, [(question, None)]) for question in questions], []
    how = {"stop": model.config.eos_token_id, "vocab_size": tokenizer.get_vocab_size()}
    with evaluating(model):
        for at in range(0, len(prompts), 50):
            stream = model.generate(prompts[at : at + 50], LONGEST_ANSWER, temperature=0, **how)
            said += tokenizer.decode_batch(torch.stack(list(stream), 1).tolist())
    return [text.strip() for text in said]


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
    kinds = [task.kind for task in tasks]
    for kind, share in after["by_kind"].items():
        was = before["by_kind"][kind]
        lines.append(f"{kind:<16}{kinds.count(kind):>6}{was:>9.1%}{share:>9.1%}")
    lines.append(f"{'all':<16}{len(tasks):>6}{before['right']:>9.1%}{after['right']:>9.1%}")
    for i in map(kinds.index, after["by_kind"]):
        lines.append(f"\n{tasks[i].instruction}")
        for when, score in (("before", before), ("after", after)):
            text = score["answers"][i]
            mark = "right" if stories.is_right(tasks[i], text) else "wrong"
            lines.append(f"  {when}, {mark}: {' '.join(text.split())}")
    return "\n".join(lines)


def summarise(summary: dict[str, Any]) -> str:
    """The losses before and after."""
    names = {"val_loss": "held out, nats/token", "val_bpb": "held out, bits/byte"}
    names |= {"plain_loss": "plain stories, nats/token"}
    times = {"before": "before", "after": "after", "off": "with the adapter off"}
    lines = []
    for name, meaning in names.items():
        keys = {f"{name}_{time}": when for time, when in times.items()}
        losses = [f"{summary[key]:.4f} {when}" for key, when in keys.items() if key in summary]
        lines += [f"{meaning}: {', '.join(losses)}"] if losses else []
    return "\n".join(lines)
