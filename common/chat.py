"""
Instructions: what a model is asked, and what it is to answer, in DeepSeek's chat template.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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


class Dialogue(NamedTuple):
    """What was asked and answered, after a text of the system, if any."""

    turns: Sequence[tuple[str, str | None]]  # question, answer; None: it is the model's turn
    system: str = ""


def encode_turns(tokenizer: Tokenizer, dialogue: Dialogue) -> Iterator[tuple[list[int], bool]]:
    """A dialogue in DeepSeek's chat template, in pieces: ids, and whether they are an answer."""
    ids, before = encode_with_bos(tokenizer, ""), f"{dialogue.system}\n\n" * bool(dialogue.system)
    for question, answer in dialogue.turns:
        ids += encode_with_bos(tokenizer, before + TEMPLATE.format(question=question))[1:]
        yield ids, False
        if answer is not None:
            yield [*encode_with_bos(tokenizer, f" {answer}")[1:], tokenizer.token_to_id(EOS)], True
        ids, before = [], ""


def encode_chat(tokenizer: Tokenizer, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    """The ids of a dialogue's turns. Special tokens typed into a question stay text."""
    return [token for ids, _ in encode_turns(tokenizer, Dialogue(turns)) for token in ids]


ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
KNOWN_ROWS = 'an "instruction" and an "output", "messages" or "conversations"'


def texts_of(row: dict) -> list[str]:
    """The system's text of a row, or "", and questions and answers in turn; nothing where others
    speak, or not in turn. Rows are of three kinds: `messages` of roles, `conversations` as in
    ShareGPT, or Alpaca's `instruction`, `input` on the next line, `output`, with the turns before
    them in `history`."""
    said = row.get("messages", row.get("conversations"))
    if said is None:
        question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        before = row.get("history") or []
        if not all(isinstance(turn, list) and len(turn) == 2 for turn in before):
            raise TypeError("its history is no list of pairs")
        before = itertools.chain.from_iterable(before)
        return [row.get("system") or "", *before, question, row["output"]]
    roles = [m["role"] if "role" in m else m["from"] for m in said]
    roles = [ROLES.get(role, role) for role in roles]
    texts = [m["content"] if "content" in m else m["value"] for m in said]
    if roles[:1] != ["system"]:
        roles, texts = ["system", *roles], [row.get("system") or "", *texts]
    in_turn = roles[1:] == ["user", "assistant"] * (len(roles) // 2) and len(roles) > 1
    return texts if in_turn else []


def read_dialogues(files: Iterable[Path]) -> tuple[list[Dialogue], Counter]:
    """The dialogues of .json or .jsonl files, and how many rows were left out. Raises UsageError
    for a row of no kind that `texts_of` knows."""
    dialogues, remarks = [], Counter()
    for path in files:
        for texts in read_rows(path, KNOWN_ROWS, texts_of):
            if texts:
                turns = list(zip(texts[1::2], texts[2::2], strict=True))
                dialogues.append(Dialogue(turns, texts[0]))
            else:
                remarks["left out with other roles than user and assistant in turn"] += 1
    return dialogues, remarks


def hold_out(dialogues: Sequence[Dialogue]) -> tuple[list, list]:
    """Dialogues to train on and dialogues held out, those of equal first questions together."""
    _, below = scan(dialogue.turns[0][0] for dialogue in dialogues)
    parts = [], []
    for dialogue in dialogues:
        parts[mark(dialogue.turns[0][0]) < below].append(dialogue)
    return parts


class Example(NamedTuple):
    """A dialogue as tokens."""

    question: str  # the first
    inputs: np.ndarray  # [n] int64: bos, questions in the template, answers
    targets: np.ndarray  # [n] int64: the next token, IGNORE within questions; after answers eos


def make_examples(
    dialogues: Iterable[Dialogue], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Example], Counter]:
    """Examples of at most seq_len inputs, and how many were not taken as they are: a dialogue too
    long is cut (and not followed by eos); one with an empty answer, or no room for the first, is
    left out."""
    examples, remarks = [], Counter()
    for dialogue in dialogues:
        turns = [(question, answer.strip()) for question, answer in dialogue.turns]
        pieces = list(encode_turns(tokenizer, dialogue._replace(turns=turns)))
        ids = np.array([token for piece, _ in pieces for token in piece])
        is_answer = np.concatenate([np.full(len(piece), said) for piece, said in pieces])
        if not all(answer for _, answer in turns):
            remarks["left out without an answer"] += 1
        elif len(pieces[0][0]) >= seq_len:
            remarks["left out with too long a question"] += 1
        else:
            remarks["cut"] += len(ids) > seq_len + 1
            targets = np.where(is_answer, ids, IGNORE)
            examples.append(Example(turns[0][0], ids[:-1][:seq_len], targets[1:][:seq_len]))
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
