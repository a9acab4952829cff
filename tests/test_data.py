"""Text to tokens to batches: nothing lost, nothing leaked, nothing stale."""

import json
import tracemalloc
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from huggingface_hub.errors import LocalEntryNotFoundError

from common import data, stories
from common.data import SEPARATOR, Batches, Tokens
from common.runtime import UsageError

TEXTS = [
    f"Story {i}: the {i % 7} cats saw {i * 31} birds. They said: naïve 猫 {i}!" for i in range(300)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    return path


def parts_of(ready):
    """The texts of both parts of a prepared corpus."""
    return [[ready.tokenizer.decode(ids) for ids in part] for part in (ready.train, ready.val)]


def documents_of(path, content):
    path.write_bytes(content.encode())
    return list(data.read_documents([path]))


def test_a_tokenizer_learns_no_more_than_there_is_and_no_numbers():
    tokenizer = data.train_tokenizer(["2024 2024 2024 2024"], 5000)
    assert tokenizer.get_vocab_size() < 400 and len(tokenizer.encode("2024").ids) == 4
    typed = data.encode_with_bos(tokenizer, data.BOS + data.EOS)  # is text, not what it spells
    assert typed[0] == 0 and min(typed[1:]) > 1
    assert tokenizer.decode(data.encode_with_bos(tokenizer, "half a letter \udcff")[-1:]) == "?"


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
    for name in ("b.TXT", "._b.txt", "c.md", "d.json"):
        (tmp_path / "folder.txt" / name).write_text("below")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.jsonl").write_text("hidden")
    files, passed = data.find_corpus(str(tmp_path))
    assert list(data.read_documents(files)) == [*found, "three", "4", "below"]
    assert passed == 5
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "three 4 " * 99}))
    assert data.prepare(str(tmp_path), 258, tmp_path / "c").remark.startswith("5 hidden or other")


def test_rows_are_read_in_a_list_or_in_lines_whatever_the_file_is_called(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    for name in ("a.json", "a.jsonl", "a.JSON"):
        for content in (json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
            assert documents_of(tmp_path / name, f"\ufeff\n {content}\n") == ["one", "two"]
    for name in ("LICENSE", "a.md"):  # these are text
        assert documents_of(tmp_path / name, '["one"]') == ['["one"]']


def test_the_words_of_a_text_without_spaces_are_cut_before_they_are_counted(tmp_path):
    word = "".join(np.random.default_rng(0).choice([*"ACGT"], 200))
    path = tmp_path / ("长" * 83 + ".txt")  # 253 bytes, which the cache's folder cannot have
    path.write_text(word * 50)
    ready = data.prepare(str(path), 3000, tmp_path / "cache")
    assert max(map(len, ready.tokenizer.get_vocab())) == 64
    assert "".join(map("".join, zip(*parts_of(ready), strict=True))) == word * 50


def test_whatever_a_tokenizer_calls_its_added_tokens_in_a_text_they_are_text(tmp_path):
    tokenizer = data.train_tokenizer(["a"], 300)
    record = json.loads(tokenizer.to_str())
    extra = record["added_tokens"][0] | {"id": 258, "content": "<｜User｜>", "special": False}
    record["added_tokens"] += [extra, extra | {"id": 259, "content": "猫"}]
    as_stored = tokenizers.Tokenizer.from_str(json.dumps(record))
    as_stored.encode_special_tokens = True
    assert as_stored.encode("a<｜User｜>").ids[-1] == 258
    ids = data.encode_with_bos(data.load_tokenizer(json.dumps(record)), "a<｜User｜>猫")
    assert 258 not in ids and 259 in ids and as_stored.decode(ids) == "a<｜User｜>猫"


def test_a_folder_called_like_the_stories_is_not_read_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    assert data.prepare("stories:100", 300, tmp_path / "c").remark == ""
    assert data.prepare("stories", 300, tmp_path / "c").remark == "./stories is not read"


def test_long_documents_are_cut_and_separators_found_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST", 100)
    verse = "one of the lines\n" * 4
    assert documents_of(tmp_path / "a.txt", (verse + "\n") * 6) == [verse.strip()] * 6
    monkeypatch.setattr(data, "LONGEST", 40)
    for n in range(120):  # within a line
        texts = [("aébé猫c😀d" * 15)[:n], "y" * 37, "y" * n, "z"]
        found = documents_of(tmp_path / "a.txt", SEPARATOR.join(texts))
        assert "".join(found) == "".join(texts)
        assert found[-1] == "z" and max(map(len, found)) <= 2 * 40 + len(SEPARATOR)
        assert not any("y" in text and text.strip("y") for text in found)


def test_a_text_without_lines_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST", 2**14)
    (tmp_path / "a.txt").write_text("whale" * 900_000)
    tracemalloc.start()
    ready = data.prepare(str(tmp_path / "a.txt"), 280, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * 5 * 900_000
    assert "".join(map("".join, zip(*parts_of(ready), strict=True))) == "whale" * 900_000


@pytest.mark.parametrize("name", ["NOTES", "a.md", "a.TXT"])
def test_a_text_may_have_these_names(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert data.find_corpus(str(tmp_path / name)) == ([tmp_path / name], 0)


def test_bytes_are_those_of_the_text_also_where_tokens_were_added():
    tokenizer = data.train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens(["ö", "ä"])  # as DeepSeek's
    ids = np.array(tokenizer.encode("schöne Bäume, 猫").ids)
    row = (np.array([0, *ids[:-1]]), ids)
    assert data.make_eval_set([row], tokenizer, 8).bytes == len("schöne Bäume, 猫".encode())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", f" \n{SEPARATOR}\n".encode(), "too short to hold anything out"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'row 2 lacks a "text"'),
        ("a.jsonl", b'{"text": "a"}\n\nnonsense', "row 2 is not JSON .*Expecting value"),
        ("a.jsonl", b'{"text": 5}', "row 1 lacks"),
        ("a.jsonl", b'{"text": "\\ud800"}', "row 1 lacks .* surrogates"),
        ("a.json", b'[{"text": "a"},\n{"text"', "a.json is not JSON .*line 2"),
        ("a.csv", b"a", "a.csv' is no text file of a kind that is read"),
    ],
)
def test_unusable_data_is_answered_with_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        data.prepare(str(tmp_path / name), 258, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_what_the_hub_has_is_fetched_and_without_a_network_the_way_out_is_said(corpus, monkeypatch):
    fetch = Mock(side_effect=[str(corpus), LocalEntryNotFoundError("no connection")])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert data.find_corpus("alpaca") == ([corpus], 0)
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
    assert sorted(train + val) == sorted(TEXTS) and 2 < len(val) < 25
    for part in (ready.train, ready.val):
        assert part.ids.dtype == np.uint16
        assert (part.ids[part.doc_offsets[:-1]] == 0).all()
        assert (part.ids[part.doc_offsets[1:] - 1] == 1).all()
        assert (part.ids == 0).sum() == len(part.doc_offsets) - 1
    held_out = data.build_eval_set(ready.val, ready.tokenizer, 16, 4)
    assert held_out.bytes == sum(len(text.encode()) for text in val)


def test_prepared_tokens_are_reused_only_when_they_are_the_same(corpus, tmp_path, monkeypatch):
    def prepare(tokens=400, also=()):
        return data.prepare(str(corpus), tokens, tmp_path / "cache", also)

    first, given = prepare(), data.train_tokenizer(["zq xj vw " * 9], 266)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_documents", lambda files: 1 / 0)
        assert prepare().folder == first.folder
    given.add_tokens([*(f"w{i}" for i in range(66_000)), "birds"])
    other = [prepare(401), prepare(also=["Assistant:"] * 99), prepare(given)]
    alone, learned = (len(ready.tokenizer.encode("Assistant:").ids) for ready in other[:2])
    assert learned < 3 < alone
    ids = other[-1].train.ids
    assert other[-1].tokenizer.to_str() == given.to_str()
    assert ids.dtype == np.uint32 and given.token_to_id("birds") in ids
    corpus.touch()
    other.append(prepare())
    assert {ready.digest for ready in other} == {first.digest}  # the text is still the same
    corpus.write_text(corpus.read_text(encoding="utf-8")[:-1] + "?", encoding="utf-8")
    other.append(prepare())
    assert other[-1].digest != first.digest
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    other.append(prepare())
    assert len({ready.folder for ready in [first, *other]}) == 1 + len(other)


def test_of_two_processes_the_faster_one_fills_the_cache(tmp_path):
    with data.atomic_folder(tmp_path / "a") as slow:
        (slow / "file").write_text("slow")
        with data.atomic_folder(tmp_path / "a") as fast:
            (fast / "file").write_text("fast")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["fast"]


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
    assert [x.shape[1] for x, _ in got.rows] == [10, 9, 2]  # like lengths share a batch
    limited = data.build_eval_set(some_tokens(lengths), tokenizer, 10, 3, limit=12)
    assert limited.tokens == 16  # whole rows, then no more
    with pytest.raises(UsageError, match="nothing to evaluate"):
        data.build_eval_set([], tokenizer, 10, 3)


def test_stories_come_with_their_exact_floor_and_their_facts(tmp_path):
    assert data.count_of("stories", 50_000, least=100) == 50_000
    ready = data.prepare("stories:150", 1024, tmp_path)
    by_text = {story.text: story for story in map(stories.tell, range(150))}
    assert sorted(sum(parts_of(ready), [])) == sorted(by_text)
    got = data.build_eval_set(  # a floor is of whole stories, so of two
        ready.val, ready.tokenizer, 64, 4, 400, stories.tag_facts, stories.FACT_KINDS
    )
    told = [by_text[text] for text in parts_of(ready)[1][:2]]
    assert got.tokens == ready.val.doc_offsets[2] - 2 > 400 > ready.val.doc_offsets[1]
    assert got.entropy_floor == pytest.approx(sum(s.nats for s in told) / got.tokens)
    for number, kind in enumerate(got.tag_names, 1):
        found = []
        for (_, targets), tags in zip(got.rows, got.tags, strict=True):
            assert not ((tags > 0) & (targets == data.IGNORE)).any()
            found += targets[tags == number].tolist()
        spans = [story.text[a:b] for story in told for a, b, k in story.facts if k == kind]
        letters = sorted("".join(ready.tokenizer.decode(found).split()))
        assert letters == sorted("".join("".join(spans).split())), kind
