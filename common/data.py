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
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
ROWS = (".json", ".jsonl")  # files of rows; others are plain text
FORMAT = 4  # of the prepared files; another number means: prepare again
LONGEST = 2**21  # characters read at a time, as to tokenise one takes 200 bytes
TOKENIZER_TEXT = 100 * 2**20  # bytes that the tokenizer learns from, spread over the corpus
IGNORE = -100  # a target that counts nothing
PASSED_OVER = "hidden or other files passed over"  # of a folder

HUB = {  # names of files on the Hugging Face hub
    "tinystories": ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt"),
    "alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
}


def is_stories(source: str) -> bool:
    """Whether a --data value means the built-in stories."""
    return source.partition(":")[0] == "stories"


def count_of(source: str, default: int, least: int) -> int:
    """The N of `stories:N`, or the default of `stories`. Raises UsageError."""
    number = source.partition(":")[2] or str(default)
    if not number.isdecimal() or not least <= int(number) <= 10**8:
        raise UsageError(f"data {source!r} must be stories:N with N from {least} to 100000000")
    return int(number)


def find_corpus(source: str) -> tuple[list[Path], int]:
    """The files behind a --data value other than stories: a text, .json or .jsonl, the .txt and
    .jsonl of a folder, or one that is kept (and resumed) in the hub's cache; and how many files of
    a folder are passed over. Raises UsageError."""
    path = Path(source)
    if source in HUB:
        from huggingface_hub import hf_hub_download  # comes with tokenizers

        repo, name = HUB[source]
        try:
            path = Path(hf_hub_download(repo, name, repo_type="dataset"))
        except OSError as error:  # the hub's errors are such
            message = f"{repo} cannot be reached: fetch {name} elsewhere and give it as --data"
            raise UsageError(message) from error
    if path.is_file() and path.suffix.lower() in ("", ".txt", ".md", *ROWS):
        return [path], 0
    inside = [f for f in path.rglob("*") if f.is_file()]
    texts = [f for f in inside if f.suffix.lower() in (".txt", ".jsonl")]  # a .json may be settings
    # systems and editors leave hidden files beside texts
    if files := sorted(f for f in texts if "/." not in f"/{f.relative_to(path).as_posix()}"):
        return files, len(inside) - len(files)
    what = "does not exist"
    if path.exists():
        what = "is no text file of a kind that is read, nor a folder of such"
    raise UsageError(f"data {source!r} {what}: see --data in --help")


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of files, none empty: the "text" of rows, or what SEPARATOR stands between.
    Raises UsageError."""
    for path in files:
        texts = txt_documents(path)
        if path.suffix.lower() in ROWS:
            texts = (text for (text,) in read_rows(path, 'a "text"', lambda row: [row["text"]]))
        try:
            yield from filter(None, map(str.strip, texts))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error.reason}): convert it") from error
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def txt_documents(path: Path) -> Iterator[str]:
    """One that does not end for LONGEST characters is cut, at a blank line where there is one."""
    rest = ""
    with open(path, encoding="utf-8-sig", newline="") as file:  # line ends stay as they are
        while piece := file.read(LONGEST):
            *complete, rest = (rest + piece).split(SEPARATOR)
            yield from complete
            while len(rest) > LONGEST + len(SEPARATOR):  # one may have begun at the end
                end = rest.rfind("\n\n", 0, LONGEST) + 1 or LONGEST
                yield rest[:end]
                rest = rest[end:]
    yield rest


def read_rows(path: Path, wanted: str, pick: Callable) -> Iterator[Sequence[str]]:
    """The texts that `pick` takes out of each row: an element of a JSON list, or a line of JSON
    each, whatever the file is called. Raises UsageError for a row without them."""
    done = 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            first = next(filter(str.strip, file), "")
            file.seek(0)
            is_list = first.lstrip().startswith("[")
            for row in json.load(file) if is_list else map(json.loads, filter(str.strip, file)):
                texts = pick(row)
                "".join(texts).encode()  # they are texts, and without half a surrogate pair
                yield texts
                done += 1
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error.reason}): convert it") from error
        except json.JSONDecodeError as error:
            where = path if is_list else f"{path}: row {done + 1}"
            raise UsageError(f"{where} is not JSON ({error}): mend it") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: row {done + 1} lacks {wanted} ({error})") from error


def mark(text: str) -> int:
    """A number below 2^64 that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "little")


def scan(texts: Iterable[str], few: int = 1) -> tuple[str, int]:
    """A hash of all texts, and the mark below which one is held out: about every 25th, at least
    one, and equal ones together. It is 0 where there are fewer than `few` different ones."""
    whole, marks = hashlib.blake2b(), array.array("Q")
    for text in texts:
        whole.update(hashlib.blake2b(text.encode()).digest())
        marks.append(mark(text))
    below = max(2**64 // 25, min(marks, default=0) + 1)
    return whole.hexdigest(), below if len(np.unique(marks)) >= few else 0


def split(text: str, below: int) -> tuple[str, str]:
    """The part of a document to train on, and the part held out, as `scan` tells: all of it or
    nothing, but where `below` is 0 the last twentieth."""
    if below:
        return ("", text) if mark(text) < below else (text, "")
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


# ----------------------------------------------------------------------------------------------
# Documents to tokens
# ----------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most vocab_size tokens: bos = 0, eos = 1, 256 bytes, merges."""
    if vocab_size < 258:
        raise UsageError(f"vocab_size = {vocab_size} must be at least 258: 256 bytes, bos and eos")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS, EOS])
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer.show_progress = False
    # It compares all words, which takes forever where there are no spaces: genes, or Chinese.
    texts = (re.sub(r"\S{64}", "\\g<0>\n", text) for text in texts)
    tokenizer.train_from_iterator(texts, trainer)
    return load_tokenizer(tokenizer.to_str())


def load_tokenizer(text: str) -> Tokenizer:
    """A tokenizer from its JSON, to which control tokens in a text are text, whether it calls them
    special or not (<｜User｜> of DeepSeek is not): only this program places them. Raises UsageError
    when it is not one, or lacks bos and eos."""
    try:
        record = json.loads(text)
        for token in record["added_tokens"]:  # others are letters, such as DeepSeek's ö
            token["special"] |= bool(re.fullmatch(r"<.+>|\[[A-Z_/]+\]", token["content"]))
        tokenizer = Tokenizer.from_str(json.dumps(record))
    except Exception as error:  # the library raises bare Exception, and this calls nothing else
        raise UsageError(f"the tokenizer cannot be read: {error}") from error
    if tokenizer.token_to_id(BOS) is None or tokenizer.token_to_id(EOS) is None:
        raise UsageError(f"the tokenizer lacks {BOS} or {EOS}")
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None
    return tokenizer


def encode_with_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    """bos and the ids of a text; a '?' stands for what is not Unicode."""
    text = text.encode(errors="replace").decode()
    return [tokenizer.token_to_id(BOS), *tokenizer.encode(text).ids]


@dataclass
class Tokens:
    """Documents in a row, each bos + text + eos."""

    ids: np.ndarray  # [n] uint16 or uint32, perhaps memory-mapped
    doc_offsets: np.ndarray  # [documents + 1]: where each begins, and the end

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.ids[a:b] for a, b in itertools.pairwise(self.doc_offsets))


@dataclass
class Dataset:
    """A corpus, ready to train on."""

    name: str
    folder: Path
    digest: str  # of the text
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    remark: str = ""  # what was not read, for the screen


def cache_folder(fallback: Path) -> Path:
    """$DEEPSEEK_CACHE or ~/.cache/deepseek-py; where that cannot be written, below fallback."""
    try:
        folder = Path(os.environ.get("DEEPSEEK_CACHE") or "~/.cache/deepseek-py").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return fallback / "cache"


def prepare(source: str, tokens: int | Tokenizer, cache: Path, also: Sequence[str] = ()) -> Dataset:
    """Tokenise a corpus by a tokenizer trained on it (and on `also`), of so many tokens, or by a
    given one; or find it prepared, as far as files of the same place, size and time are the same.
    Raises UsageError if it is unusable."""
    if is_stories(source):  # another grammar tells other ones
        files, text = [], [stories.tell(seed).text for seed in range(100)]
        remark = f"./{source} is not read" if Path(source).exists() else ""
    else:
        files, passed = find_corpus(source)
        remark = f"{passed:,} {PASSED_OVER}" if passed else ""
        text = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    which = tokens if isinstance(tokens, int) else tokens.to_str()
    key = f"{text} {which} {FORMAT} {[*also]} {tokenizers.__version__}"
    name = Path(source.replace(":", "-")).stem or "data"
    # file systems allow 255 bytes
    short = name.encode(errors="replace")[:80].decode(errors="ignore")
    folder = cache / f"{short}-{hashlib.blake2b(key.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with atomic_folder(folder) as partial:
            write_tokens(source, files, tokens, also, partial)
    parts = []
    for part in ("train", "val"):
        offsets, path = np.load(folder / f"{part}.npy"), folder / f"{part}.bin"
        dtype = f"u{path.stat().st_size // offsets[-1]}"
        parts.append(Tokens(np.memmap(path, dtype, "r"), offsets))
    tokenizer = load_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    digest = (folder / "digest").read_text(encoding="ascii")
    return Dataset(name, folder, digest, tokenizer, *parts, remark)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which then becomes `target`. So a half-written one is never found, whatever
    ends the process. Raises UsageError on a full disk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".partial", dir=target.parent) as beside:
            partial = Path(beside, target.name)  # with the usual rights
            partial.mkdir()
            yield partial
            for path in partial.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())  # so that not even a power cut leaves it half written
            if not target.exists():  # another process may have been faster
                partial.rename(target)
    except OSError as error:
        what = f"the cache {target.parent} cannot be written ({error.strerror})"
        raise UsageError(f"{what}: make room, or set DEEPSEEK_CACHE to another folder") from error


def write_tokens(
    source: str, files: list[Path], tokens: int | Tokenizer, also: Sequence[str], folder: Path
) -> None:
    """Fill a folder of prepared tokens: digest, tokenizer.json, ids and offsets of both parts."""
    if is_stories(source):
        files = [folder / "stories.txt"]
        with open(files[0], "w", encoding="ascii", newline="\n") as file:
            seeds = range(count_of(source, 50_000, least=100))
            for seed in tqdm(seeds, "writing", leave=False, disable=None):
                file.write(stories.tell(seed).text + SEPARATOR)
    size = sum(f.stat().st_size for f in files)

    def documents(what: str) -> Iterator[str]:
        return tqdm(read_documents(files), what, leave=False, unit=" texts", disable=None)

    digest, below = scan(documents("reading"), few=20)
    tokenizer = tokens
    if isinstance(tokens, int):
        some = itertools.islice(documents("counting"), 0, None, 1 + size // TOKENIZER_TEXT)
        texts = itertools.chain(also, (split(text, below)[0] for text in some))
        tokenizer = train_tokenizer(texts, tokens)
    (folder / "digest").write_text(digest, encoding="ascii")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for i, part in enumerate(("train", "val")):
        texts = (split(text, below)[i] for text in documents(f"tokenising, {part}"))
        offsets = array.array("Q", [0])
        with open(folder / f"{part}.bin", "wb") as file:
            for ids in encode_documents(filter(None, texts), tokenizer):
                file.write(ids.tobytes())
                offsets.append(offsets[-1] + len(ids))
        if not offsets[-1]:
            raise UsageError(f"data {source!r} is too short to hold anything out: give more text")
        np.save(folder / f"{part}.npy", np.array(offsets, np.int64))


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Each text as bos + text + eos. About a million characters are cut at a time, in parallel."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    done = 0

    def million(text: str) -> int:
        nonlocal done
        done += len(text)
        return done // 2**20

    for _, group in itertools.groupby(texts, million):
        for encoding in tokenizer.encode_batch_fast(list(group)):
            yield np.array([bos, *encoding.ids, eos], dtype)


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
            few = f"the text has only {len(tokens.ids)} tokens, fewer than one row of {seq_len}"
            raise UsageError(f"{few}: give more text or a smaller --seq_len")
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


def pad(rows: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, ...]:
    """Rows of inputs, targets and perhaps tags, each [n], as a tensor [b, t] of each kind."""
    return tuple(
        pad_sequence([*map(torch.from_numpy, column)], True, value)
        for column, value in zip(zip(*rows, strict=True), (0, IGNORE, 0), strict=False)
    )


@dataclass
class EvalSet:
    """What is evaluated, in batches."""

    rows: list[tuple[Tensor, Tensor]]  # inputs and targets [b, t], padded with IGNORE
    tokens: int  # targets that count, eos included
    bytes: int  # bytes of text that these targets stand for
    entropy_floor: float | None = None  # nats per token that no model can go below, where known
    tags: list[Tensor] | None = None  # [b, t] int64 for each row: 0, or 1 + an index of tag_names
    tag_names: Sequence[str] = ()  # kinds of token scored by themselves


def make_eval_set(rows: Iterable, tokenizer: Tokenizer, batch_size: int) -> EvalSet:
    """Rows as `pad` takes them. Those of like length share a batch, so that little is padding."""
    rows = sorted(rows, key=lambda row: -len(row[0]))
    batches = [pad(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    said = np.concatenate([targets[targets != IGNORE] for _, targets, *_ in rows])
    # A token's name has a character for each byte, unless it was added, as DeepSeek's "ö" is.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    names = [name for name in map(tokenizer.id_to_token, said.tolist()) if name not in (BOS, EOS)]
    n_bytes = sum(len(name.encode() if name in added else name) for name in names)
    tags = [batch[2] for batch in batches if len(batch) > 2]
    return EvalSet([batch[:2] for batch in batches], len(said), n_bytes, tags=tags or None)


def build_eval_set(
    documents: Iterable[np.ndarray], tokenizer: Tokenizer, seq_len: int, batch_size: int,
    limit: float = math.inf, tagger: Callable | None = None, tag_names: Sequence[str] = (),
    overlap: int = 0,
) -> EvalSet:  # fmt: skip
    """Each document from its start, in rows of seq_len, until `limit` tokens are reached. A row
    begins with the last `overlap` tokens of the row before, which do not count again. Where
    somebody knows, tagger(document, tokenizer) tells -log of its exact probability in nats, and for
    each token 0, or 1 + the place in tag_names of what it is scored as. Raises UsageError."""
    rows, count, nats = [], 0, 0.0
    for document in documents:
        ids = document.astype(np.int64)
        columns = [ids[:-1], ids[1:]]
        if tagger:
            more, tags = tagger(ids, tokenizer)
            nats, columns = nats + more, [*columns, tags[1:]]
        starts = range(0, max(1, len(ids) - 1 - overlap), seq_len - overlap)
        for at in starts:
            row = [column[at : at + seq_len].copy() for column in columns]
            if at:
                row[1][:overlap] = IGNORE
            rows.append(row)
            count += len(row[0]) - (overlap if at else 0)
            if count >= limit and not tagger:
                break  # a long document need not be read to its end
        if count >= limit:
            break
    if not rows:
        raise UsageError("the text is empty: there is nothing to evaluate")
    found = make_eval_set(rows, tokenizer, batch_size)
    if tagger:
        found.entropy_floor, found.tag_names = nats / count, tag_names
    return found
