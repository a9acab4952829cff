"""
Text to tokens to batches.

    corpus    documents, read piece by piece: a 2 GB text never lies in memory
    tokenizer byte-level BPE, trained on the training part; every Unicode string survives it
    tokens    memory-mapped files of uint16 or uint32, a document being bos + text + eos
    batches   a pure function of (seed, step), so that a resumed run sees what it would have seen

Prepared tokens lie in ~/.cache/deepseek-py (or $DEEPSEEK_CACHE), under a name made from the
text's own hash: a changed text or vocabulary is prepared anew, an unchanged one never twice.
"""

from __future__ import annotations

import array
import codecs
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from stories import SAID, parse, tell

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # spelt as in DeepSeek-V2
TEMPLATE = "User: {question}\n\nAssistant:"  # DeepSeek-V2's chat; " answer" and eos follow
CHAT_TEMPLATE = (  # the same for transformers, in Jinja; text of the system stands in front
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}"
    "\n\n{% elif m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt, as TinyStories has it
FORMAT = 2  # of the prepared files; another number means: prepare again
PIECE = 2**20  # characters of a long document that are handled at a time
TOKENIZER_TEXT = 100 * 2**20  # characters that the tokenizer learns from, spread over the corpus
IGNORE = -100  # a target that counts nothing
FACT_KINDS = tuple(SAID)  # of what stories recall: name, object, place, ...

HUB = {"tinystories": ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt")}
HUB_INSTRUCTIONS = {"alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")}


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence for the user."""


# ----------------------------------------------------------------------------------------------
# Corpora: where documents come from
# ----------------------------------------------------------------------------------------------


def find_corpus(source: str, cache: Path) -> list[Path]:
    """The files behind a --data value: a .txt, a .jsonl, a folder of .txt, a hub corpus, or the
    built-in stories, which are written down in the cache first."""
    if source.partition(":")[0] == "stories":
        return [write_stories(source, cache)]
    if source in HUB:
        return [download(*HUB[source])]
    path = Path(source)
    if path.is_dir():
        if not (files := sorted(path.rglob("*.txt"))):
            raise DataError(f"folder {source} holds no .txt file: put the texts there")
        return files
    if not path.is_file():
        raise DataError(
            f"data {source!r} is neither a file, nor a folder, nor one of stories, {', '.join(HUB)}"
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"data {source!r} must end in .txt or .jsonl, or be a folder of .txt")
    return [path]


def write_stories(source: str, cache: Path) -> Path:
    """A .txt of `stories` (50,000 of them) or `stories:N`: those of the seeds 0, 1, 2, ..."""
    number = source.partition(":")[2] or "50000"
    if not number.isdecimal() or not 100 <= int(number) <= 100_000_000:
        raise DataError(
            f"data {source!r} must be stories, or stories:N with N from 100 to 100000000"
        )
    # The hash is that of the first hundred: another storyteller writes another file.
    sample = SEPARATOR.join(tell(seed).text for seed in range(100))
    mark = hashlib.blake2b(sample.encode()).hexdigest()[:12]
    path = cache / f"stories-{number}-{mark}.txt"
    if not path.is_file():
        with built_beside(path) as partial, open(partial, "w", encoding="ascii", newline="\n") as f:
            seeds = range(int(number))
            for seed in tqdm(seeds, desc="telling", unit="story", leave=False, disable=None):
                f.write((SEPARATOR if seed else "") + tell(seed).text)
    return path


@contextmanager
def built_beside(target: Path, folder: bool = False) -> Iterator[Path]:
    """A name to write a file (or a folder) of the cache under; complete, it becomes `target`. So a
    half-written one is never found, whatever ends the process. Raises DataError on a full disk."""
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(suffix=".partial", dir=target.parent)
        partial = Path(beside) / target.name
        if folder:
            partial.mkdir()
        yield partial
        for path in partial.iterdir() if folder else [partial]:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # so that not even a power cut leaves it half written
        try:
            os.rename(partial, target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    except OSError as error:
        raise DataError(
            f"the cache {target.parent} cannot be written ({error.strerror}): make room, or set"
            " DEEPSEEK_CACHE to a folder that has some"
        ) from error
    finally:
        if beside:
            shutil.rmtree(beside, ignore_errors=True)


def download(repo: str, name: str) -> Path:
    """One file of a data set on the Hugging Face hub, kept (and resumed) in the hub's cache."""
    import huggingface_hub  # comes with tokenizers
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset"))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise DataError(
            f"{repo} cannot be downloaded ({type(error).__name__}: no network?): "
            f"fetch {name} elsewhere and give its path with --data"
        ) from error


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in chunks; a wrong byte ends in a DataError with its position."""
    decoder, position = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(PIECE):
                pending = len(decoder.getstate()[0])
                yield decoder.decode(chunk)
                position += len(chunk)
            pending = len(decoder.getstate()[0])
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = position - pending + error.start
        raise DataError(f"{path} is not UTF-8 text: byte {at} is wrong; convert it") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def read_documents(files: list[Path]) -> Iterator[tuple[int, str]]:
    """(document number, piece of its text), a long document in several pieces, none empty."""
    document = 0
    for path in files:
        read = _jsonl_documents if path.suffix == ".jsonl" else _txt_documents
        for ends, text in read(path):
            if text:
                yield document, text
            document += ends


def _txt_documents(path: Path) -> Iterator[tuple[bool, str]]:
    buffer, started = "", False
    for chunk in read_text(path):
        *complete, buffer = (buffer + chunk).split(SEPARATOR)
        for text in complete:
            yield True, text.rstrip() if started else text.strip()
            started = False
        if len(buffer) > PIECE + len(SEPARATOR):
            end = len(buffer) - len(SEPARATOR)  # behind it a separator may have begun
            line = buffer.rfind("\n", PIECE // 2, end)  # better not within a word
            cut = line if line >= 0 else end
            yield False, buffer[:cut] if started else buffer[:cut].lstrip()
            buffer, started = buffer[cut:], True
    yield True, buffer.rstrip() if started else buffer.strip()


def _jsonl_documents(path: Path) -> Iterator[tuple[bool, str]]:
    buffer, number = "", 0

    def parse(line: str) -> str:
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise DataError(f'{path} line {number} is not a JSON object with a "text"')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path} line {number} holds half a surrogate pair") from error
        return text.strip()

    for chunk in _with_end(read_text(path)):
        *complete, buffer = (buffer + chunk).split("\n")
        for line in complete:
            number += 1
            if line.strip():
                yield True, parse(line)


def _with_end(chunks: Iterable[str]) -> Iterator[str]:
    yield from chunks
    yield "\n"  # so that the last line ends like the others


@dataclass
class Scan:
    """What one pass over a corpus finds out."""

    digest: str  # hash of all text
    characters: int
    documents: int
    heldout: dict[int, int]  # document -> the character from which on it is held out


def scan(pieces: Iterable[tuple[int, str]]) -> Scan:
    """Hash a corpus and choose what is held out of training: about every 25th document, by the
    hash of its text, so that equal documents stay on one side; of fewer than 20 different documents
    the last twentieth of each."""
    whole, lengths, number = hashlib.blake2b(), array.array("Q"), None
    numbers, marks = array.array("Q"), array.array("Q")  # of each document, the hash as a number

    def close() -> None:
        if number is not None:
            whole.update(own.digest())
            marks.append(int.from_bytes(own.digest()[:8], "little"))

    for document, text in pieces:
        if document != number:
            close()
            number, own = document, hashlib.blake2b()
            lengths.append(0)
            numbers.append(document)
        own.update(text.encode())
        lengths[-1] += len(text)
    close()
    different = set()
    for mark in marks:
        different.add(mark)
        if len(different) == 20:
            break
    if len(different) == 20:
        below = max(2**64 // 25, min(marks) + 1)  # one document at least, and all that equal it
        heldout = {n: 0 for n, mark in zip(numbers, marks, strict=True) if mark < below}
    else:
        heldout = {n: length - length // 20 for n, length in zip(numbers, lengths, strict=True)}
    return Scan(whole.hexdigest(), sum(lengths), len(lengths), heldout)


def split(
    pieces: Iterable[tuple[int, str]], heldout: dict[int, int]
) -> Iterator[tuple[str, int, str]]:
    """Mark each piece as ("train" or "val", document, text)."""
    number, at = -1, 0
    for document, text in pieces:
        if document != number:
            number, at = document, 0
        cut = min(max(heldout.get(document, 2**63) - at, 0), len(text))
        at += len(text)
        if cut > 0:
            yield "train", document, text[:cut]
        if cut < len(text):
            yield "val", document, text[cut:]


# ----------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most vocab_size tokens: bos = 0, eos = 1, 256 bytes, merges."""
    if vocab_size < 258:
        raise DataError(f"vocab_size = {vocab_size} must be at least 258: 256 bytes, bos and eos")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def with_template() -> Iterator[str]:  # fine-tuning will need its words
        yield TEMPLATE
        yield from texts

    tokenizer.train_from_iterator(with_template(), trainer)
    return literal(tokenizer)


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """Make special tokens that occur in a text plain text: only this program places them."""
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None
    return tokenizer


def load_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON. Raises DataError when it is not one, or lacks bos and eos."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception, and this calls nothing else
        raise DataError(f"the tokenizer cannot be read: {error}") from error
    literal(tokenizer)
    if tokenizer.token_to_id(BOS) is None or tokenizer.token_to_id(EOS) is None:
        raise DataError(f"the tokenizer lacks {BOS} or {EOS}")
    return tokenizer


def begin(tokenizer: Tokenizer, text: str) -> list[int]:
    """bos and the ids of a text. Raises DataError for what is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("the text is not valid Unicode: it holds half a character") from error
    return [tokenizer.token_to_id(BOS), *tokenizer.encode(text).ids]


def dialogue(tokenizer: Tokenizer, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    """The ids of (question, answer) pairs in DeepSeek's chat template; the last answer may be
    None: it is the model's turn. Special tokens typed into a question stay text."""
    ids = begin(tokenizer, "")
    for question, answer in turns:
        ids += begin(tokenizer, TEMPLATE.format(question=question))[1:]
        if answer is not None:
            ids += [*begin(tokenizer, f" {answer}")[1:], tokenizer.token_to_id(EOS)]
    return ids


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for; special tokens for none: [ids], int64."""
    size = tokenizer.get_vocab_size()
    names = [tokenizer.id_to_token(i) or "" for i in range(size)]
    return np.array([0 if n in (BOS, EOS) else len(n) for n in names])


# ----------------------------------------------------------------------------------------------
# Token files
# ----------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Documents in a row, each bos + text + eos."""

    ids: np.ndarray  # [n] uint16 or uint32, memory-mapped
    starts: np.ndarray  # [documents + 1]: where each begins, and the end


@dataclass
class Dataset:
    """A corpus, ready to train on."""

    name: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    digest: str  # of the text
    folder: Path


def cache_folder(fallback: Path) -> Path:
    """$DEEPSEEK_CACHE or ~/.cache/deepseek-py; where that cannot be written, below fallback."""
    for folder in (os.environ.get("DEEPSEEK_CACHE"), Path("~/.cache/deepseek-py")):
        if folder:
            try:
                folder = Path(folder).expanduser()
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return folder
            except (OSError, RuntimeError):  # RuntimeError: there is no home
                continue
    return fallback / "cache"


def prepare(source: str, tokens: int | Tokenizer, cache: Path) -> Dataset:
    """Tokenise a corpus, or find it prepared: by a tokenizer trained on it, of so many tokens, or
    by a given one. Raises DataError, one sentence, if it is unusable."""
    files = find_corpus(source, cache)
    name = Path(source.replace(":", "-")).stem or "data"
    size = sum(f.stat().st_size for f in files)
    with tqdm(
        total=size, unit="B", unit_scale=True, desc="reading", leave=False, disable=None
    ) as b:
        found = scan(_counted(read_documents(files), b))
    if not found.documents:
        raise DataError(f"data {source!r} is empty: it holds no text")
    which, vocab_size = tokens, tokens
    if isinstance(tokens, Tokenizer):
        which, vocab_size = tokens.to_str(), tokens.get_vocab_size()
    key = f"{found.digest} {which} {FORMAT} {tokenizers.__version__}"
    folder = cache / f"{name}-{vocab_size}-{hashlib.blake2b(key.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with built_beside(folder, folder=True) as partial:
            _write_tokens(files, found, tokens, partial)
    return Dataset(
        name=name,
        tokenizer=load_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8")),
        train=_open_tokens(folder, "train"),
        val=_open_tokens(folder, "val"),
        digest=found.digest,
        folder=folder,
    )


def _counted(pieces: Iterable[tuple[int, str]], bar: tqdm) -> Iterator[tuple[int, str]]:
    for document, text in pieces:
        bar.update(len(text))
        yield document, text


def _write_tokens(files: list[Path], found: Scan, tokens: int | Tokenizer, folder: Path) -> None:
    def parts() -> Iterator[tuple[str, int, str]]:
        return split(read_documents(files), found.heldout)

    stride = 1 + found.characters // TOKENIZER_TEXT
    sampled = (
        text for i, (part, _, text) in enumerate(parts()) if part == "train" and not i % stride
    )
    tokenizer = train_tokenizer(sampled, tokens) if isinstance(tokens, int) else tokens
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    with tqdm(
        total=found.characters,
        unit="B",
        unit_scale=True,
        desc="tokenising",
        leave=False,
        disable=None,
    ) as bar:
        writers = {part: _Writer(folder, part, dtype, tokenizer) for part in ("train", "val")}
        for group in _groups(parts()):
            encoded = tokenizer.encode_batch_fast([text for _, _, text in group])
            for (part, document, text), encoding in zip(group, encoded, strict=True):
                writers[part].add(document, encoding.ids)
                bar.update(len(text))
        for writer in writers.values():
            writer.close()


def _groups(parts: Iterable[tuple[str, int, str]]) -> Iterator[list[tuple[str, int, str]]]:
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += len(part[2])
        if size >= PIECE:
            yield group
            group, size = [], 0
    yield group


class _Writer:
    """Writes documents that come in pieces as bos + ids + eos."""

    def __init__(self, folder: Path, part: str, dtype, tokenizer: Tokenizer):
        self.file, self.path = open(folder / f"{part}.bin", "wb"), folder / f"{part}.npy"
        self.bos, self.eos = ([tokenizer.token_to_id(t)] for t in (BOS, EOS))
        self.dtype, self.document, self.length, self.starts = dtype, None, 0, array.array("Q")

    def add(self, document: int, ids: list[int]) -> None:
        if document != self.document:
            self._write(self.eos if self.document is not None else [])
            self.document = document
            self.starts.append(self.length)
            self._write(self.bos)
        self._write(ids)

    def close(self) -> None:
        self._write(self.eos if self.document is not None else [])
        self.starts.append(self.length)
        np.save(self.path, np.array(self.starts, dtype=np.int64))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _write(self, ids: list[int]) -> None:
        self.file.write(np.array(ids, dtype=self.dtype).tobytes())
        self.length += len(ids)


def _open_tokens(folder: Path, part: str) -> Tokens:
    starts, path = np.load(folder / f"{part}.npy"), folder / f"{part}.bin"
    if not starts[-1]:
        return Tokens(np.zeros(0, np.uint16), starts)
    dtype = {2: np.uint16, 4: np.uint32}[path.stat().st_size // int(starts[-1])]
    return Tokens(np.memmap(path, dtype, "r"), starts)


# ----------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------


class Batches:
    """Training batches; `at(step)` depends on the seed and the step alone.

    Every row begins where a document begins, or at a multiple of seq_len within a long one, and
    the documents behind it follow without a mask between them. So in an epoch, in which each row
    comes once and in an order of its own, a token of a short document comes several times.
    """

    def __init__(self, tokens: Tokens, batch_size: int, seq_len: int, seed: int):
        self.ids, self.batch_size, self.seq_len, self.seed = tokens.ids, batch_size, seq_len, seed
        rows = -(-(np.diff(tokens.starts) - 1) // seq_len)  # per document; none begins with eos
        within = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        starts = np.repeat(tokens.starts[:-1], rows) + within * seq_len
        self.starts = starts[starts + seq_len < len(tokens.ids)]
        if not len(self.starts):
            raise DataError(
                f"the text has only {len(tokens.ids)} tokens, fewer than one row of seq_len ="
                f" {seq_len}: give more text or a smaller --seq_len"
            )
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step (from 0): 2 x [batch_size, seq_len] int64."""
        picked = []
        for row in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(row, len(self.starts))
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch, self.order = epoch, rng.permutation(len(self.starts))
            start = self.starts[self.order[place]]
            picked.append(self.ids[start : start + self.seq_len + 1])
        rows = torch.from_numpy(np.stack(picked).astype(np.int64))  # B T+1
        return rows[:, :-1], rows[:, 1:]


def pad(rows: Sequence[np.ndarray], filler: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up on the right."""
    tensors = [torch.from_numpy(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler)


@dataclass
class Windows:
    """Held-out documents cut into rows that cover every token once; see `windows`."""

    rows: list[tuple[Tensor, Tensor]]  # inputs and targets [b, t], padded with IGNORE
    tokens: int  # targets that count, eos included
    bytes: int  # bytes of text that these targets stand for
    floor: float | None = None  # of stories: nats per token that no model can go below
    # of stories: [b, t] int64, 0 or, where the target recalls a fact, 1 + its place in FACT_KINDS
    facts: list[Tensor] | None = None


def windows(
    tokens: Tokens,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    limit: int | None = None,
    stories: bool = False,
) -> Windows:
    """Each document from its start, in rows of seq_len, until `limit` tokens are reached.

    Rows of like length share a batch, so that little is padding. stories: the documents are
    whole stories of stories.py, whose exact probability and recalled facts are looked up.
    """
    sizes, rows, count, n_bytes, nats = token_bytes(tokenizer), [], 0, 0, 0.0
    for start, end in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
        if limit is not None and count >= limit:
            break
        document = tokens.ids[start:end].astype(np.int64)
        facts = np.zeros(len(document), np.int64)
        if stories:
            story_nats, facts = read_story(document, tokenizer)
            nats += story_nats
        for at in range(0, len(document) - 1, seq_len):
            if limit is not None and count >= limit and not stories:
                break  # a long document need not be read to its end
            ids = document[at : at + seq_len + 1]
            rows.append((ids, facts[at : at + seq_len + 1]))
            count += len(ids) - 1
            n_bytes += int(sizes[ids[1:]].sum())
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    batches, marks = [], []
    for i in range(0, len(rows), batch_size):
        group = rows[i : i + batch_size]
        inputs = pad([ids[:-1] for ids, _ in group], 0)
        batches.append((inputs, pad([ids[1:] for ids, _ in group], IGNORE)))
        marks.append(pad([facts[1:] for _, facts in group], 0))
    if not stories:
        return Windows(batches, count, n_bytes)
    return Windows(batches, count, n_bytes, nats / max(1, count), marks)


def read_story(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[float, np.ndarray]:
    """Of one document [n], bos + story + eos: -log of its probability in nats, and for each of its
    tokens [n] which kind of fact, fixed earlier in the story, it recalls (see `Windows.facts`)."""
    story = parse(tokenizer.decode(ids.tolist()))
    facts = np.zeros(len(ids), np.int64)
    for i, (start, end) in enumerate(tokenizer.encode(story.text).offsets, start=1):
        for a, b, kind in story.facts:
            if start < b and a < end:
                facts[i] = 1 + FACT_KINDS.index(kind)
    return story.nats, facts


def tokenize_file(path: str, tokenizer: Tokenizer) -> Tokens:
    """The documents of a text file, of whatever name, as tokens in memory, to be scored."""
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file that could be scored")
    tokens = tokenize(read_documents([Path(path)]), tokenizer)
    if not len(tokens.ids):
        raise DataError(f"{path} is empty: there is nothing to score")
    return tokens


def tokenize(pieces: Iterable[tuple[int, str]], tokenizer: Tokenizer) -> Tokens:
    """Pieces of documents as `read_documents` gives them, as tokens in memory."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids, starts, number = [], [], None
    for document, text in pieces:
        if document != number:
            ids += [eos] if number is not None else []
            starts.append(len(ids))
            ids.append(bos)
            number = document
        ids += tokenizer.encode(text).ids
    ids += [eos] if ids else []
    return Tokens(np.array(ids, np.uint32), np.array([*starts, len(ids)]))


# ----------------------------------------------------------------------------------------------
# Instructions: what a model is asked, and what it is to answer
# ----------------------------------------------------------------------------------------------


def read_instructions(source: str) -> list[tuple[str, str]]:
    """(question, answer) pairs of a .json (a list) or .jsonl in Alpaca's form, or of a hub name.

    The question is `instruction` and, where there is one, `input` on the next line; the answer is
    `output`. Raises DataError, naming file and row, for a row without them.
    """
    if source in HUB_INSTRUCTIONS:
        source = str(download(*HUB_INSTRUCTIONS[source]))
    text = "".join(read_text(Path(source)))
    if source.endswith(".jsonl"):
        numbered = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
        rows = [
            (where, _json(f"{source} {where}", line)) for where, line in numbered if line.strip()
        ]
    else:
        rows = _json(source, text)
        if not isinstance(rows, list):
            raise DataError(f"{source} must be a list of rows, not {type(rows).__name__}")
        rows = [(f"row {n}", row) for n, row in enumerate(rows, 1)]
    return [_pair(f"{source} {where}", row) for where, row in rows]


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): mend or remove it") from error


def _pair(where: str, row: Any) -> tuple[str, str]:
    get = row.get if isinstance(row, dict) else lambda name: None
    question, more, answer = get("instruction"), get("input") or "", get("output")
    if not all(isinstance(text, str) for text in (question, more, answer)):
        raise DataError(f'{where} is not an object with the texts "instruction" and "output"')
    try:
        (question + more + answer).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a surrogate pair") from error
    return "\n".join(part for part in (question, more) if part), answer


def hold_out(pairs: list[tuple[str, str]]) -> tuple[list, list]:
    """Pairs to train on and pairs held out: about every 25th question, by its hash, so that equal
    questions stay together. Raises DataError where there are fewer than two."""

    def place(question: str) -> int:
        return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "little")

    questions = sorted({question for question, _ in pairs}, key=place)
    if len(questions) < 2:
        raise DataError(
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
        start = len(dialogue(tokenizer, [(question, None)]))
        if start >= seq_len:
            counts["no room"] += 1
            continue
        ids = np.array(dialogue(tokenizer, [(question, answer.strip())]))
        counts["cut"] += len(ids) > seq_len + 1
        examples.append(Example(question, ids[: seq_len + 1], start))
    return examples, counts


def answers(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [b, t] of examples, padded on the right; only answers and eos count."""
    targets = [np.where(np.arange(1, len(e.ids)) < e.answer, IGNORE, e.ids[1:]) for e in examples]
    return pad([e.ids[:-1] for e in examples], 0), pad(targets, IGNORE)


class AnswerBatches:
    """Batches of examples of like length; `at(step)` depends on the seed and the step alone."""

    def __init__(self, examples: list[Example], batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.per_epoch = -(-len(examples) // batch_size)
        self.epoch, self.order = -1, []  # order: for each batch of an epoch its examples

    def at(self, step: int) -> tuple[Tensor, Tensor]:
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


def answer_windows(
    examples: list[Example], tokenizer: Tokenizer, batch_size: int, limit: int
) -> Windows:
    """Examples to be evaluated, up to `limit` tokens: those of answers, and their eos, count."""
    sizes, taken, said = token_bytes(tokenizer), [], []
    for example in examples:
        if len(said) < limit:
            taken.append(example)
            said += example.ids[example.answer :].tolist()
    taken.sort(key=lambda example: len(example.ids))
    groups = [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]
    return Windows([answers(group) for group in groups], len(said), int(sizes[said].sum()))
