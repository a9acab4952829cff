"""
Instructions: what a model is asked, and what it is to answer, in DeepSeek's chat template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from common.data import EOS, IGNORE, encode_with_bos, mark, pad, read_rows, scan

TEMPLATE = "User: {question}\n\nAssistant:"  # DeepSeek-V2's chat; " answer" and eos follow
CHAT_TEMPLATE = (  # the same for transformers, in Jinja; text of the system stands in front
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}"
    "\n\n{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def encode_chat(tokenizer: Tokenizer, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    """The ids of (question, answer) pairs in DeepSeek's chat template; the last answer may be
    None: it is the model's turn. Special tokens typed into a question stay text."""
    ids = encode_with_bos(tokenizer, "")
    for question, answer in turns:
        ids += encode_with_bos(tokenizer, TEMPLATE.format(question=question))[1:]
        if answer is not None:
            ids += [*encode_with_bos(tokenizer, f" {answer}")[1:], tokenizer.token_to_id(EOS)]
    return ids


def read_instructions(path: Path) -> list[tuple[str, str]]:
    """(question, answer) pairs of a .json (a list) or .jsonl in Alpaca's form: the question is
    `instruction` and, where there is one, `input` on the next line; the answer is `output`."""

    def pick(row: dict) -> list[str]:
        return [row["instruction"], row.get("input") or "", row["output"]]

    rows = read_rows(path, 'an "instruction" and an "output"', pick)
    return [("\n".join(filter(None, question)), answer) for *question, answer in rows]


def hold_out(pairs: list[tuple[str, str]]) -> tuple[list, list]:
    """Pairs to train on and pairs held out, equal questions together."""
    _, below = scan(question for question, _ in pairs)
    parts = [], []
    for question, answer in pairs:
        parts[mark(question) < below].append((question, answer))
    return parts


class Example(NamedTuple):
    """A dialogue of one question and its answer, as tokens."""

    question: str
    inputs: np.ndarray  # [n] int64: bos, the question in the template, the answer
    targets: np.ndarray  # [n] int64: the next token, IGNORE within the question; at the end eos


def make_examples(
    pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Example], Counter]:
    """Examples of at most seq_len inputs, and how many were not taken as they are: an answer too
    long is cut (and not followed by eos); one that is empty, or has no room, is left out."""
    examples, remarks = [], Counter()
    for question, answer in pairs:
        start = len(encode_chat(tokenizer, [(question, None)]))
        ids = np.array(encode_chat(tokenizer, [(question, answer.strip())]))
        if not answer.strip():
            remarks["left out without an answer"] += 1
        elif start >= seq_len:
            remarks["left out with too long a question"] += 1
        else:
            remarks["answers cut"] += len(ids) > seq_len + 1
            targets = np.where(np.arange(len(ids)) < start, IGNORE, ids)
            examples.append(Example(question, ids[:-1][:seq_len], targets[1:][:seq_len]))
    return examples, remarks


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
                sorted(order[i : i + 50 * size], key=lambda e: len(self.examples[e].inputs))
                for i in range(0, len(order), 50 * size)
            ]
            batches = [g[i : i + size] for g in groups for i in range(0, len(g), size)]
            self.epoch, self.order = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return pad([self.examples[e][1:] for e in self.order[place]])
