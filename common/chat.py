"""
Instructions: what a model is asked, and what it is to answer, in DeepSeek's chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from common.data import (
    EOS,
    IGNORE,
    EvalSet,
    download,
    encode_with_bos,
    pad,
    read_lines,
    token_bytes,
)
from common.runtime import UsageError

TEMPLATE = "User: {question}\n\nAssistant:"  # DeepSeek-V2's chat; " answer" and eos follow


CHAT_TEMPLATE = (  # the same for transformers, in Jinja; text of the system stands in front
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}"
    "\n\n{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


HUB_INSTRUCTIONS = {"alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")}


def encode_chat(tokenizer: Tokenizer, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    """The ids of (question, answer) pairs in DeepSeek's chat template; the last answer may be
    None: it is the model's turn. Special tokens typed into a question stay text."""
    ids = encode_with_bos(tokenizer, "")
    for question, answer in turns:
        ids += encode_with_bos(tokenizer, TEMPLATE.format(question=question))[1:]
        if answer is not None:
            ids += [*encode_with_bos(tokenizer, f" {answer}")[1:], tokenizer.token_to_id(EOS)]
    return ids


def read_instructions(source: str) -> list[tuple[str, str]]:
    """(question, answer) pairs of a .json (a list) or .jsonl in Alpaca's form, or of a hub name.

    The question is `instruction` and, where there is one, `input` on the next line; the answer is
    `output`. Raises UsageError, naming file and row, for a row without them.
    """
    if source in HUB_INSTRUCTIONS:
        source = str(download(*HUB_INSTRUCTIONS[source]))
    text = "".join(read_lines(Path(source)))
    if source.endswith(".jsonl"):
        numbered = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
        rows = [
            (where, _json(f"{source} {where}", line)) for where, line in numbered if line.strip()
        ]
    else:
        rows = _json(source, text)
        if not isinstance(rows, list):
            raise UsageError(f"{source} must be a list of rows, not {type(rows).__name__}")
        rows = [(f"row {n}", row) for n, row in enumerate(rows, 1)]
    return [_pair(f"{source} {where}", row) for where, row in rows]


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}): mend or remove it") from error


def _pair(where: str, row: Any) -> tuple[str, str]:
    get = row.get if isinstance(row, dict) else lambda name: None
    question, more, answer = get("instruction"), get("input") or "", get("output")
    if not all(isinstance(text, str) for text in (question, more, answer)):
        raise UsageError(f'{where} is not an object with the texts "instruction" and "output"')
    try:
        (question + more + answer).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} holds half a surrogate pair") from error
    return "\n".join(part for part in (question, more) if part), answer


def hold_out(pairs: list[tuple[str, str]]) -> tuple[list, list]:
    """Pairs to train on and pairs held out: about every 25th question, by its hash, so that equal
    questions stay together. Raises UsageError where there are fewer than two."""

    def place(question: str) -> int:
        return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little")

    questions = sorted({question for question, _ in pairs}, key=place)
    if len(questions) < 2:
        raise UsageError(
            f"the data has {len(questions)} questions: give at least 2, one to be held out"
        )
    low = sum(place(question) < 2**64 // 25 for question in questions)
    chosen = set(questions[: min(max(1, low), len(questions) - 1)])
    train = [pair for pair in pairs if pair[0] not in chosen]
    return train, [pair for pair in pairs if pair[0] in chosen]


@dataclass
class Example:
    """A dialogue of one question and its answer, as tokens."""

    question: str
    ids: np.ndarray  # [n] int64: bos, the question in the template, the answer, eos
    answer: int  # where the answer begins


def make_examples(
    pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Example], dict[str, int]]:
    """Examples of at most seq_len inputs, and how many were not taken as they are: an answer too
    long is cut (and not followed by eos); one that is empty, or has no room, is left out."""
    examples, counts = [], {"cut": 0, "empty": 0, "no room": 0}
    for question, answer in pairs:
        if not answer.strip():
            counts["empty"] += 1
            continue
        start = len(encode_chat(tokenizer, [(question, None)]))
        if start >= seq_len:
            counts["no room"] += 1
            continue
        ids = np.array(encode_chat(tokenizer, [(question, answer.strip())]))
        counts["cut"] += len(ids) > seq_len + 1
        examples.append(Example(question, ids[: seq_len + 1], start))
    return examples, counts


def answers(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [b, t] of examples, padded on the right; only answers and eos count."""
    targets = [np.where(np.arange(1, len(e.ids)) < e.answer, IGNORE, e.ids[1:]) for e in examples]
    return pad([e.ids[:-1] for e in examples], 0), pad(targets, IGNORE)


class AnswerBatches:
    """Batches of examples of like length; `get_batch(step)` depends on seed and step alone."""

    def __init__(self, examples: list[Example], batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.per_epoch = -(-len(examples) // batch_size)
        self.epoch, self.order = -1, []  # order: for each batch of an epoch its examples

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step (from 0). In an epoch each example comes once, and some
        again where the last batch would not be full: pieces and processes want equal shares."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            rng, size = np.random.default_rng([self.seed, epoch]), self.batch_size
            order = np.resize(rng.permutation(len(self.examples)), self.per_epoch * size)
            # Sorted by length within 50 batches: little padding, and yet other company each time.
            groups = [
                sorted(order[i : i + 50 * size], key=lambda e: len(self.examples[e].ids))
                for i in range(0, len(order), 50 * size)
            ]
            batches = [g[i : i + size] for g in groups for i in range(0, len(g), size)]
            self.epoch, self.order = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return answers([self.examples[e] for e in self.order[place]])


def answer_eval_set(
    examples: list[Example], tokenizer: Tokenizer, batch_size: int, limit: int
) -> EvalSet:
    """Examples to be evaluated, up to `limit` tokens: those of answers, and their eos, count."""
    sizes, taken, said = token_bytes(tokenizer), [], []
    for example in examples:
        if len(said) < limit:
            taken.append(example)
            said += example.ids[example.answer :].tolist()
    taken.sort(key=lambda example: len(example.ids))
    groups = [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]
    return EvalSet([answers(group) for group in groups], len(said), int(sizes[said].sum()))
