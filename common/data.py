"""
Text to tokens to batches.

    corpus      documents, read one by one: a 2 GB text never lies in memory
    tokenizer   byte-level BPE, trained on the training part; every Unicode string survives it
    tokens      memory-mapped files of uint16 or uint32, a document being bos + text + eos
    batches     a pure function of (seed, step), so that a resumed run sees what it would have seen

Prepared tokens lie in ~/.cache/deepseek-py (or $DEEPSEEK_CACHE); a text is prepared once.
"""

from __future__ import annotations

import array
import codecs
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import stories
from common.runtime import UsageError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # spelt as in DeepSeek-V2
SEPARATOR = "<|endoftext|>"  # between the documents of a .txt, as TinyStories has it
FORMAT = 3  # of the prepared files; another number means: prepare again
LONGEST = 2**21  # characters of a document; a longer one is cut: to tokenise one takes 200 bytes
TOKENIZER_TEXT = 100 * 2**20  # characters that the tokenizer learns from, spread over the corpus
IGNORE = -100  # a target that counts nothing

HUB = {"tinystories": ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt")}


# ----------------------------------------------------------------------------------------------
# Corpora: where documents come from
# ----------------------------------------------------------------------------------------------


def find_corpus(source: str, cache: Path) -> list[Path]:
    """The files behind a --data value: a .txt, a .jsonl, a folder of .txt, a hub corpus, or the
    built-in stories, which are written down in the cache first. Raises UsageError."""
    if is_stories(source):
        return [write_stories(source, cache)]
    if source in HUB:
        return [download(*HUB[source])]
    path = Path(source)
    if path.is_dir():
        if not (files := sorted(f for f in path.rglob("*.txt") if f.is_file())):
            raise UsageError(f"folder {source} holds no .txt file: put the texts there")
        return files
    if not path.is_file():
        raise UsageError(
            f"data {source!r} is neither a file, nor a folder, nor one of stories, {', '.join(HUB)}"
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"data {source!r} must end in .txt or .jsonl, or be a folder of .txt")
    return [path]


def is_stories(source: str) -> bool:
    """Whether a --data value means the built-in stories."""
    return source.partition(":")[0] == "stories"


def write_stories(source: str, cache: Path) -> Path:
    """A .txt of `stories` (50,000 of them) or `stories:N`: those of the seeds 0, 1, 2, ..."""
    number = source.partition(":")[2] or "50000"
    if not number.isdecimal() or not 100 <= int(number) <= 100_000_000:
        raise UsageError(
            f"data {source!r} must be stories, or stories:N with N from 100 to 100000000"
        )
    # The hash is that of the first hundred: another grammar writes another file.
    sample = SEPARATOR.join(stories.tell(seed).text for seed in range(100))
    mark = hashlib.blake2b(sample.encode()).hexdigest()[:12]
    path = cache / f"stories-{number}-{mark}.txt"
    if not path.is_file():
        with (
            atomic_output(path) as partial,
            open(partial, "w", encoding="ascii", newline="\n") as f,
        ):
            seeds = range(int(number))
            for seed in tqdm(seeds, desc="writing", unit="story", leave=False, disable=None):
                f.write((SEPARATOR if seed else "") + stories.tell(seed).text)
    return path


@contextmanager
def atomic_output(target: Path, folder: bool = False) -> Iterator[Path]:
    """A name to write a file (or a folder) of the cache under; complete, it becomes `target`. So a
    half-written one is never found, whatever ends the process. Raises UsageError on a full disk."""
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
        raise UsageError(
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
        raise UsageError(
            f"{repo} cannot be downloaded ({type(error).__name__}: no network?): "
            f"fetch {name} elsewhere and give its path with --data"
        ) from error


def read_lines(path: Path, longest: int = -1) -> Iterator[str]:
    """The lines of a UTF-8 file, those of more than `longest` bytes in pieces. Raises UsageError
    for a wrong byte, with its position."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(longest):
                text = decoder.decode(line)
                # a byte order mark is no text
                yield text if position else text.removeprefix("\ufeff")
                position = file.tell() - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = position + error.start
        raise UsageError(f"{path} is not UTF-8 text: byte {at} is wrong; convert it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of .txt files (SEPARATOR between them) and .jsonl files, none empty."""
    for path in files:
        read = jsonl_documents if path.suffix == ".jsonl" else txt_documents
        yield from filter(None, map(str.strip, read(path)))


def txt_documents(path: Path) -> Iterator[str]:
    """One that is longer than LONGEST is cut: at a blank line, or else at about twice its length,
    at the end of a line where there is one."""
    lines: list[str] = []
    size = 0
    for line in read_lines(path, LONGEST):
        if lines and not lines[-1].endswith("\n"):  # so this is more of a very long line
            size -= len(lines[-1])
            line = lines.pop() + line
        *complete, rest = line.split(SEPARATOR)
        for text in complete:
            yield "".join([*lines, text])
            lines, size = [], 0
        lines.append(rest)
        size += len(rest)
        if size > 2 * LONGEST or (size > LONGEST and not rest.strip()):
            text = "".join(lines)
            # at the end of a piece of a line a separator may have begun
            end = len(text) if rest.endswith("\n") else len(text) - len(SEPARATOR)
            yield text[:end]
            lines, size = [text[end:]], len(text) - end
    yield "".join(lines)


def jsonl_documents(path: Path) -> Iterator[str]:
    """The "text" of each line. Raises UsageError."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{path} line {number} holds half a surrogate pair") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f'{path} line {number} is not a JSON object with a "text"'
            raise UsageError(message) from error
        yield text


@dataclass
class Scan:
    """What one pass over a corpus finds out."""

    digest: str  # hash of all text
    characters: int
    held_out: dict[int, int]  # document -> the character from which on it is held out


def scan(documents: Iterable[str]) -> Scan:
    """Hash a corpus and choose what is held out of training: about every 25th document, by the
    hash of its text, so that equal documents stay on one side; of fewer than 20 different documents
    the last twentieth of each."""
    whole, lengths, marks = hashlib.blake2b(), array.array("Q"), array.array("Q")
    different: set[int] = set()
    for text in documents:
        own = hashlib.blake2b(text.encode()).digest()
        whole.update(own)
        marks.append(int.from_bytes(own[:8], "little"))
        lengths.append(len(text))
        if len(different) < 20:
            different.add(marks[-1])
    if len(different) == 20:
        below = max(2**64 // 25, min(marks) + 1)  # one document at least, and all that equal it
        held_out = {n: 0 for n, mark in enumerate(marks) if mark < below}
    else:
        held_out = {n: length - length // 20 for n, length in enumerate(lengths)}
    return Scan(whole.hexdigest(), sum(lengths), held_out)


def split(documents: Iterable[str], held_out: dict[int, int]) -> Iterator[tuple[str, str]]:
    """("train" or "val", text) of each document, or of its two parts."""
    for number, text in enumerate(documents):
        cut = held_out.get(number, len(text))
        if cut > 0:
            yield "train", text[:cut]
        if cut < len(text):
            yield "val", text[cut:]


# ----------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int, also: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE with at most vocab_size tokens: bos = 0, eos = 1, 256 bytes, merges. It learns
    from the texts and from what will be said `also`, such as a chat template."""
    if vocab_size < 258:
        raise UsageError(f"vocab_size = {vocab_size} must be at least 258: 256 bytes, bos and eos")
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
    tokenizer.train_from_iterator(itertools.chain(also, texts), trainer)
    return disable_special_tokens(tokenizer)


def disable_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Make special tokens that occur in a text plain text: only this program places them."""
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None
    return tokenizer


def load_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON. Raises UsageError when it is not one, or lacks bos and eos."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception, and this calls nothing else
        raise UsageError(f"the tokenizer cannot be read: {error}") from error
    if tokenizer.token_to_id(BOS) is None or tokenizer.token_to_id(EOS) is None:
        raise UsageError(f"the tokenizer lacks {BOS} or {EOS}")
    return disable_special_tokens(tokenizer)


def encode_with_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    """bos and the ids of a text. Raises UsageError for what is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the text is not valid Unicode: it holds half a character") from error
    return [tokenizer.token_to_id(BOS), *tokenizer.encode(text).ids]


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
    doc_offsets: np.ndarray  # [documents + 1]: where each begins, and the end


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


def prepare(source: str, tokens: int | Tokenizer, cache: Path, also: Sequence[str] = ()) -> Dataset:
    """Tokenise a corpus, or find it prepared: by a tokenizer trained on it (and on `also`), of so
    many tokens, or by a given one. Raises UsageError if it is unusable.

    A file of the same place, size and time is taken for the same, so it is read once.
    """
    files = find_corpus(source, cache)
    name = Path(source.replace(":", "-")).stem or "data"
    which, vocab_size = tokens, tokens
    if isinstance(tokens, Tokenizer):
        which, vocab_size = tokens.to_str(), tokens.get_vocab_size()
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = f"{stats} {which} {FORMAT} {[*also]} {tokenizers.__version__}"
    folder = cache / f"{name}-{vocab_size}-{hashlib.blake2b(key.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with atomic_output(folder, folder=True) as partial:
            write_tokens(source, files, tokens, also, partial)
    return Dataset(
        name=name,
        tokenizer=load_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8")),
        train=open_tokens(folder, "train"),
        val=open_tokens(folder, "val"),
        digest=(folder / "digest").read_text(encoding="ascii"),
        folder=folder,
    )


def write_tokens(
    source: str, files: list[Path], tokens: int | Tokenizer, also: Sequence[str], folder: Path
) -> None:
    """Fill a folder of prepared tokens: digest, tokenizer.json, ids and offsets of both parts."""

    def documents(what: str) -> Iterator[str]:
        size = sum(f.stat().st_size for f in files)
        with tqdm(total=size, unit="B", unit_scale=True, desc=what, leave=False, disable=None) as b:
            for text in read_documents(files):
                yield text
                b.update(len(text))

    found = scan(documents("reading"))
    if not found.characters:
        raise UsageError(f"data {source!r} is empty: it holds no text")
    stride = 1 + found.characters // TOKENIZER_TEXT
    if isinstance(tokens, int):
        parts = split(documents("counting"), found.held_out)
        texts = (text for i, (part, text) in enumerate(parts) if part == "train" and not i % stride)
        tokenizer = train_tokenizer(texts, tokens, also)
    else:
        tokenizer = tokens
    (folder / "digest").write_text(found.digest, encoding="ascii")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    offsets = {"train": array.array("Q", [0]), "val": array.array("Q", [0])}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for group in grouped(split(documents("tokenising"), found.held_out), 2**20):
            encoded = tokenizer.encode_batch_fast([text for _, text in group])
            for (part, _), encoding in zip(group, encoded, strict=True):
                ids = [bos, *encoding.ids, eos]
                (train if part == "train" else val).write(np.array(ids, dtype).tobytes())
                offsets[part].append(offsets[part][-1] + len(ids))
    for part, places in offsets.items():
        np.save(folder / f"{part}.npy", np.array(places, dtype=np.int64))


def grouped(parts: Iterable[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    """Texts in lists of about `size` characters, to be encoded together."""
    group, count = [], 0
    for part in parts:
        group.append(part)
        count += len(part[1])
        if count >= size:
            yield group
            group, count = [], 0
    yield group


def open_tokens(folder: Path, part: str) -> Tokens:
    """A part of a prepared corpus, memory-mapped."""
    offsets, path = np.load(folder / f"{part}.npy"), folder / f"{part}.bin"
    if not offsets[-1]:
        return Tokens(np.zeros(0, np.uint16), offsets)
    dtype = {2: np.uint16, 4: np.uint32}[path.stat().st_size // int(offsets[-1])]
    return Tokens(np.memmap(path, dtype, "r"), offsets)


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> Tokens:
    """Documents as tokens in memory."""
    eos, rows = tokenizer.token_to_id(EOS), []
    for text in documents:
        rows.append([*encode_with_bos(tokenizer, text), eos])
    ids = np.array([i for row in rows for i in row], np.uint32)
    return Tokens(ids, np.cumsum([0, *map(len, rows)]))


def tokenize_file(path: str, tokenizer: Tokenizer) -> Tokens:
    """The documents of a text file, of whatever name, as tokens in memory, to be scored."""
    if not Path(path).is_file():
        raise UsageError(f"{path} is not a file that could be scored")
    tokens = tokenize(read_documents([Path(path)]), tokenizer)
    if not len(tokens.ids):
        raise UsageError(f"{path} is empty: there is nothing to score")
    return tokens


# ----------------------------------------------------------------------------------------------
# Batches and evaluation sets
# ----------------------------------------------------------------------------------------------


class Batches:
    """Training batches; `get_batch(step)` depends on the seed and the step alone.

    Every row begins where a document begins, or at a multiple of seq_len within a long one, and
    the documents behind it follow without a mask between them. So in an epoch, in which each row
    comes once and in an order of its own, a token of a short document comes several times.
    """

    def __init__(self, tokens: Tokens, batch_size: int, seq_len: int, seed: int):
        self.ids, self.batch_size, self.seq_len, self.seed = tokens.ids, batch_size, seq_len, seed
        rows = -(-(np.diff(tokens.doc_offsets) - 1) // seq_len)  # per document, not from its eos
        within = np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows)
        starts = np.repeat(tokens.doc_offsets[:-1], rows) + within * seq_len
        self.starts = starts[starts + seq_len < len(tokens.ids)]
        if not len(self.starts):
            raise UsageError(
                f"the text has only {len(tokens.ids)} tokens, fewer than one row of seq_len ="
                f" {seq_len}: give more text or a smaller --seq_len"
            )
        self.per_epoch = -(-len(self.starts) // batch_size)
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def get_batch(self, step: int) -> tuple[Tensor, Tensor]:
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


def pad(rows: Sequence[np.ndarray], padding_value: int) -> Tensor:
    """Rows of different lengths as one tensor, padded on the right."""
    tensors = [torch.from_numpy(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=padding_value)


@dataclass
class EvalSet:
    """Documents cut into rows that cover every token once; see `build_eval_set`."""

    rows: list[tuple[Tensor, Tensor]]  # inputs and targets [b, t], padded with IGNORE
    tokens: int  # targets that count, eos included
    bytes: int  # bytes of text that these targets stand for
    entropy_floor: float | None = None  # nats per token that no model can go below, where known
    tags: list[Tensor] | None = None  # [b, t] int64 for each row: 0, or 1 + an index of tag_names
    tag_names: Sequence[str] = field(default_factory=tuple)  # kinds of token scored by themselves


# Of a document [n]: -log of its probability in nats, and for each token 0 or 1 + its tag.
Tagger = Callable[[np.ndarray, Tokenizer], tuple[float, np.ndarray]]


def build_eval_set(
    tokens: Tokens,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    limit: int | None = None,
    tagger: Tagger | None = None,
    tag_names: Sequence[str] = (),
) -> EvalSet:
    """Each document from its start, in rows of seq_len, until `limit` tokens are reached.

    Rows of like length share a batch, so that little is padding. tagger tells the exact probability
    of whole documents, and which tokens are scored by themselves, where somebody knows.
    """
    sizes, rows, count, n_bytes, nats = token_bytes(tokenizer), [], 0, 0, 0.0
    for start, end in itertools.pairwise(tokens.doc_offsets.tolist()):
        if limit is not None and count >= limit:
            break
        document = tokens.ids[start:end].astype(np.int64)
        tags = np.zeros(len(document), np.int64)
        if tagger:
            document_nats, tags = tagger(document, tokenizer)
            nats += document_nats
        for at in range(0, len(document) - 1, seq_len):
            if limit is not None and count >= limit and not tagger:
                break  # a long document need not be read to its end
            ids = document[at : at + seq_len + 1]
            rows.append((ids, tags[at : at + seq_len + 1]))
            count += len(ids) - 1
            n_bytes += int(sizes[ids[1:]].sum())
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [
        (pad([ids[:-1] for ids, _ in group], 0), pad([ids[1:] for ids, _ in group], IGNORE))
        for group in groups
    ]
    if not tagger:
        return EvalSet(batches, count, n_bytes)
    marks = [pad([tags[1:] for _, tags in group], 0) for group in groups]
    return EvalSet(batches, count, n_bytes, nats / max(1, count), marks, tag_names)
