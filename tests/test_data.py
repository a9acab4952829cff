"""Text to tokens to batches: nothing lost, nothing leaked, nothing stale."""

import json
import tracemalloc
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from common import data, stories
from common.data import BOS, EOS, SEPARATOR, Batches, Tokens
from common.runtime import UsageError

TEXTS = [
    f"Story {i}: the {i % 7} cats saw {i * 31} birds. They said: naïve 猫 {i}!" for i in range(300)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 400)


def parts_of(ready):
    """The texts of both parts of a prepared corpus."""
    return [[ready.tokenizer.decode(ids) for ids in part] for part in (ready.train, ready.val)]


def documents_of(path, content):
    path.write_bytes(content.encode())
    return list(data.read_documents([path]))


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.sampled_from(["\0", "\r\n \t", "x" * 100_000, f"a{BOS}b{SEPARATOR}"]))
def test_any_unicode_string_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_tokenizer_spells_numbers_and_special_tokens():
    tokenizer = data.train_tokenizer(["2024 2024 2024 2024"], 5000)
    assert tokenizer.get_vocab_size() < 400  # there is no more to learn
    assert len(tokenizer.encode("2024").ids) == 4
    first, *others = data.encode_with_bos(tokenizer, f"{BOS}half a character: \udcff{EOS}")
    assert first == 0 and not {0, 1} & set(others)  # in a text they are text
    assert tokenizer.decode(others) == f"{BOS}half a character: ?{EOS}"


def test_every_text_of_a_folder_is_read_but_for_marks_and_outer_blanks(tmp_path):
    blank = f"{SEPARATOR} \r\n{SEPARATOR}{SEPARATOR}"
    found = documents_of(tmp_path / "a.txt", f"\ufeff one \r\n\r\n1\n{blank}\n two\r\n{blank}")
    assert found == ["one \r\n\r\n1", "two"]  # line ends within a text stay as they are
    rows = [{"text": " three\n"}, {"text": ""}, {"text": "4\u2028", "other": 1}]
    lines = "\r\n \r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert documents_of(tmp_path / "b.jsonl", f"\ufeff{lines}\n") == ["three", "4"]
    assert documents_of(tmp_path / "b.json", json.dumps(rows)) == ["three", "4"]
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.txt" / "b.txt").write_text("below")
    assert list(data.read_documents(data.find_corpus(str(tmp_path)))) == [*found, "below"]


def test_long_documents_are_cut_and_separators_found_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST", 100)
    verse = "one of the lines\n" * 4
    assert documents_of(tmp_path / "a.txt", (verse + "\n") * 6) == [verse.strip()] * 6
    monkeypatch.setattr(data, "LONGEST", 40)
    for n in range(120):  # within a line
        texts = [("aébé猫c😀d" * 15)[:n], "y" * n, "z"]
        found = documents_of(tmp_path / "a.txt", SEPARATOR.join(texts))
        assert "".join(found) == "".join(texts)
        assert found[-1] == "z" and max(map(len, found)) <= 2 * 40 + len(SEPARATOR)
        assert not any("y" in text and text.strip("y") for text in found)


def test_a_text_without_lines_is_read_piece_by_piece(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(data, "LONGEST", 2**14)
    (tmp_path / "a.txt").write_text("whale" * 900_000)
    tracemalloc.start()
    ready = data.prepare(str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * 5 * 900_000
    assert "".join(map("".join, zip(*parts_of(ready), strict=True))) == "whale" * 900_000


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", f" \n{SEPARATOR}\n".encode(), "too short to hold anything out"),
        ("a.txt", b"one word", "too short to hold anything out"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'row 2 lacks a "text"'),
        ("a.jsonl", b'{"text": "a"}\n\nnonsense', "row 2 lacks .*Expecting value"),
        ("a.jsonl", b'{"text": 5}', "row 1 lacks"),
        ("a.jsonl", b'{"text": "\\ud800"}', "row 1 lacks .* surrogates"),
        ("a.json", b'[{"text": "a"}, 5]', "row 2 lacks"),
        ("a.json", b'{"text": "a"}', "row 1 lacks"),
        ("vocab_size.txt", b"a", "vocab_size = 257 must be at least 258"),
        ("a.csv", b"a", "a.csv' is no text that can be read"),
        ("a.txt", None, "a.txt' is no text that can be read"),
    ],
)
def test_unusable_data_is_answered_with_a_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        tokens = 257 if name == "vocab_size.txt" else 258
        data.prepare(str(tmp_path / name), tokens, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_what_the_hub_has_is_fetched_and_without_a_network_the_way_out_is_said(corpus, monkeypatch):
    fetch = Mock(side_effect=[str(corpus), LocalEntryNotFoundError("no connection")])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert data.find_corpus("alpaca") == [corpus]
    fetch.assert_called_with(*data.HUB["alpaca"], repo_type="dataset")
    with pytest.raises(UsageError, match="TinyStoriesV2-GPT4-train.txt elsewhere .* --data"):
        data.find_corpus("tinystories")


def test_a_twenty_fifth_is_held_out_and_stands_nowhere_in_the_training_text():
    rng = np.random.default_rng(0)
    for _ in range(200):
        different, copies = rng.integers(1, 40), rng.integers(1, 4)
        words = ["".join(chr(c) for c in rng.integers(97, 123, 400)) for _ in range(different)]
        documents = [str(text) for text in rng.permutation(words * copies)]
        _, below = data.scan(documents, few=20)
        trained, held_out = zip(*(data.split(text, below) for text in documents), strict=True)
        assert [a + b for a, b in zip(trained, held_out, strict=True)] == documents
        assert all(trained) == all(held_out) == (different < 20)  # of few the ends, or whole ones
        assert any(trained) and any(held_out)
        assert not any(text in other for text in held_out if text for other in trained)
    texts = [f"text {i}" for i in range(2000)]
    assert 50 < sum(bool(data.split(text, data.scan(texts)[1])[1]) for text in texts) < 115


def test_one_document_holds_out_its_end_which_the_tokenizer_has_not_seen(tmp_path):
    path, text = tmp_path / "one.txt", "abcdefgh " * 1900 + "zyxwvu " * 120
    path.write_text(text)
    ready = data.prepare(str(path), 300, tmp_path / "cache")
    (head,), (tail,) = parts_of(ready)
    assert head + tail == text.rstrip() and len(tail) == len(text.rstrip()) // 20
    words = [word for word in ready.tokenizer.get_vocab() if len(word) > 1]
    assert "abcdefgh" in words and not [word for word in words if set(word) & set("zyxwv")]


def test_a_document_is_bos_text_eos_and_every_document_is_there(corpus, tmp_path):
    ready = data.prepare(str(corpus), 400, tmp_path / "cache")
    train, val = parts_of(ready)
    assert sorted(train + val) == sorted(TEXTS) and len(val) > 2
    for part in (ready.train, ready.val):
        assert part.ids.dtype == np.uint16
        assert (part.ids[part.doc_offsets[:-1]] == 0).all()
        assert (part.ids[part.doc_offsets[1:] - 1] == 1).all()
        assert (part.ids == 0).sum() == len(part.doc_offsets) - 1
    rows = data.build_eval_set(ready.val, ready.tokenizer, 16, 4)
    assert rows.bytes == sum(len(text.encode()) for text in val)
    # What is held out depends on its text alone, and doubles stay on one side.
    corpus.write_text(SEPARATOR.join([*reversed(TEXTS), *TEXTS]), encoding="utf-8")
    train, again = parts_of(data.prepare(str(corpus), 400, tmp_path / "cache"))
    assert set(again) == set(val) and not set(again) & set(train)


def test_prepared_tokens_are_reused_only_when_they_are_the_same(corpus, tmp_path, monkeypatch):
    def prepare(tokens=400, also=()):
        return data.prepare(str(corpus), tokens, tmp_path / "cache", also)

    first = prepare()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_documents", lambda files: 1 / 0)
        assert prepare().folder == first.folder
    given = [data.train_tokenizer([text], 266) for text in ("zq xj vw " * 9, "kw fg pl " * 9)]
    for tokenizer in given:
        tokenizer.add_tokens([*(f"w{i}" for i in range(66_000)), "birds"])
    other = [prepare(401), prepare(also=["Assistant:"] * 99), *map(prepare, given)]
    alone, learned = (len(ready.tokenizer.encode("Assistant:").ids) for ready in other[:2])
    assert learned < 3 < alone
    for ready, tokenizer in zip(other[2:], given, strict=True):
        assert ready.tokenizer.to_str() == tokenizer.to_str()
        assert ready.train.ids.dtype == np.uint32 and ready.train.ids.max() > 2**16
        document = next(iter(ready.train)).tolist()
        assert document[1:-1] == tokenizer.encode(tokenizer.decode(document)).ids
    corpus.touch()
    other.append(prepare())
    assert {ready.digest for ready in other} == {first.digest}  # the text is still the same
    corpus.write_text(corpus.read_text(encoding="utf-8")[:-1] + "?", encoding="utf-8")
    other.append(prepare())
    assert other[-1].digest != first.digest
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    other.append(prepare())
    assert len({ready.folder for ready in [first, *other]}) == 1 + len(other)


def test_the_cache_holds_whole_folders_only(tmp_path):
    cache = tmp_path / "cache"
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises((KeyboardInterrupt, UsageError), match="No space .* make room|^$"):
            with data.atomic_folder(cache / "a") as partial:
                (partial / "file").write_text("half")
                raise error
        assert not list(cache.iterdir())
    with data.atomic_folder(cache / "a") as slow:
        (slow / "file").write_text("slow")
        with data.atomic_folder(cache / "a") as fast:
            (fast / "file").write_text("fast")
    assert [path.read_text() for path in cache.rglob("*") if path.is_file()] == ["fast"]


def test_an_unwritable_cache_falls_back(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "file" / "below"))
    assert data.cache_folder(tmp_path / "out") == tmp_path / "out" / "cache"
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "mine"))
    assert data.cache_folder(tmp_path / "out") == tmp_path / "mine"


def some_tokens(lengths):
    ids = np.concatenate([np.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths)])
    return Tokens(ids.astype(np.uint16), np.cumsum([0, *lengths]))


def test_batches_depend_on_seed_and_step_and_an_epoch_visits_each_document_once():
    def batches(seed):
        return Batches(some_tokens([7, 25, 3, 9, 11, 2, 31]), 1, 10, seed)

    allowed = [0, 100, 110, 120, 200, 300, 400, 500, 600, 610, 620]  # not 410, an eos
    one, orders = batches(0), []
    assert one.per_epoch == len(allowed)
    for epoch in range(3):
        rows = [one.get_batch(step) for step in range(11 * epoch, 11 * epoch + 11)]
        assert all((inputs[:, 1:] == targets[:, :-1]).all() for inputs, targets in rows)
        orders.append([inputs[0, 0].item() for inputs, _ in rows])
        assert sorted(orders[-1]) == allowed
    assert orders[0] != orders[1]
    for step in (13, 4):  # whatever was asked for before
        assert (batches(0).get_batch(step)[1] == one.get_batch(step)[1]).all()
    assert [batches(1).get_batch(step)[0][0, 0].item() for step in range(11)] != orders[0]
    with pytest.raises(UsageError, match="only 7 tokens, fewer than one row of 10"):
        Batches(some_tokens([7]), 1, 10, 0)


def test_an_evaluation_covers_every_token_once():
    tokenizer = data.train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens([f"w{i}" for i in range(300)])  # so that it knows the ids below
    lengths = [7, 25, 3, 11, 10]
    got = data.build_eval_set(some_tokens(lengths), tokenizer, seq_len=10, batch_size=3)
    expected = [100 * i + j for i, n in enumerate(lengths) for j in range(1, n)]
    assert sorted(t for _, y in got.rows for t in y[y != data.IGNORE].tolist()) == expected
    assert got.tokens == len(expected) and got.entropy_floor is None
    for x, y in got.rows:
        counted = y != data.IGNORE
        assert (x[counted] + 1 == y[counted]).all()  # the target follows its input
        assert ((x[:, 0] % 100) % 10 == 0).all()  # from the start, or a multiple of seq_len
    limited = data.build_eval_set(some_tokens(lengths), tokenizer, 10, 3, limit=12)
    assert limited.tokens == 16  # whole rows, then no more
    with pytest.raises(UsageError, match="nothing to evaluate"):
        data.build_eval_set([], tokenizer, 10, 3)


def test_stories_come_with_their_exact_floor_and_their_facts(tmp_path):
    ready = data.prepare("stories:150", 1024, tmp_path)
    by_text = {story.text: story for story in map(stories.tell, range(150))}
    assert sorted(sum(parts_of(ready), [])) == sorted(by_text)
    got, one = (
        data.build_eval_set(
            ready.val, ready.tokenizer, 64, 4, limit, stories.tag_facts, stories.FACT_KINDS
        )
        for limit in (10**9, 1)
    )
    told = [by_text[text] for text in parts_of(ready)[1]]
    assert got.entropy_floor == pytest.approx(sum(s.nats for s in told) / got.tokens)
    assert got.tokens == len(ready.val.ids) - len(told)
    assert one.tokens == ready.val.doc_offsets[1] - 1 > 64  # a floor is of whole stories
    for number, kind in enumerate(got.tag_names, 1):
        found = []
        for (_, targets), tags in zip(got.rows, got.tags, strict=True):
            assert not ((tags > 0) & (targets == data.IGNORE)).any()
            found += targets[tags == number].tolist()
        spans = [story.text[a:b] for story in told for a, b, k in story.facts if k == kind]
        letters = sorted("".join(ready.tokenizer.decode(found).split()))
        assert letters == sorted("".join("".join(spans).split())), kind
