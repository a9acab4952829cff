"""Text to tokens to batches: nothing lost, nothing leaked, nothing stale."""

import json
import shutil

import numpy as np
import pytest
from data import BOS, EOS, SEPARATOR, Batches, Tokens, UsageError
from hypothesis import given, settings
from hypothesis import strategies as st
from stories import tell

from common import data, stories


def stories(n=300):
    return [
        f"Story {i}: the {i % 7} cats saw {i * 31} birds. They said: naïve 猫 {i}!"
        for i in range(n)
    ]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(SEPARATOR.join(stories()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(stories(), 400)


def texts(tokens: Tokens, tokenizer):
    spans = zip(tokens.doc_offsets[:-1], tokens.doc_offsets[1:], strict=True)
    return [tokenizer.decode(tokens.ids[a:b].tolist()) for a, b in spans]


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_unicode_string_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert int(data.token_bytes(tokenizer)[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("text", ["\0", "\r\n \t", "x" * 100_000, f"a{BOS}b{EOS}", SEPARATOR])
def test_unusual_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_a_text_stay_text(tokenizer):
    special = {tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)}
    assert special == {0, 1}
    assert not special & set(tokenizer.encode(f"{BOS}User: {EOS}").ids)
    again = data.load_tokenizer(tokenizer.to_str())  # also after a round through its JSON
    assert not special & set(again.encode(f"{BOS}User: {EOS}").ids)


def test_too_few_merges_leave_a_smaller_vocabulary():
    assert data.train_tokenizer(["ab"], 5000).get_vocab_size() < 400
    with pytest.raises(UsageError, match="vocab_size = 257 must be at least 258"):
        data.train_tokenizer(["ab"], 257)


def test_a_document_is_bos_text_eos_and_every_document_is_there(corpus, tmp_path):
    ready = data.prepare(str(corpus), 400, tmp_path / "cache")
    train, val = (texts(part, ready.tokenizer) for part in (ready.train, ready.val))
    assert sorted(train + val) == sorted(stories())
    assert len(val) > 2
    for part in (ready.train, ready.val):
        assert (part.ids[part.doc_offsets[:-1]] == 0).all() and (
            part.ids[part.doc_offsets[1:] - 1] == 1
        ).all()
        assert (part.ids == 0).sum() == len(part.starts) - 1


def test_held_out_documents_depend_on_their_text_alone(corpus, tmp_path):
    cache = tmp_path / "cache"
    ready = data.prepare(str(corpus), 400, cache)
    held_out = set(texts(ready.val, ready.tokenizer))
    corpus.write_text(SEPARATOR.join([*reversed(stories()), *stories()]), encoding="utf-8")
    again = data.prepare(str(corpus), 400, cache)
    assert set(texts(again.val, again.tokenizer)) == held_out  # doubles stay on one side
    assert not held_out & set(texts(again.train, again.tokenizer))


def test_the_tokenizer_has_not_seen_the_held_out_part(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abcdefgh " * 1900 + "zyxwvu " * 120)
    ready = data.prepare(str(path), 300, tmp_path / "cache")
    assert "zyxwvu" in texts(ready.val, ready.tokenizer)[0]
    assert "zyxwvu" not in texts(ready.train, ready.tokenizer)[0]
    words = [word for word in ready.tokenizer.get_vocab() if len(word) > 1]
    assert "abcdefgh" in words and not [word for word in words if set(word) & set("zyxwv")]


def test_the_tokenizer_knows_the_chat_template_and_spells_numbers():
    tokenizer = data.train_tokenizer(["2024 2024 2024 2024"], 400)
    assert len(tokenizer.encode("Assistant: ").ids) < 6
    assert len(tokenizer.encode("2024").ids) == 4
    assert data.token_bytes(tokenizer)[:2].tolist() == [0, 0]


@pytest.mark.parametrize("piece", [2**20, 500])
def test_one_long_document_holds_out_its_last_part(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(data, "PIECE", piece)
    path, text = tmp_path / "one.txt", "".join(f"{i} bottles on the wall\n" for i in range(900))
    path.write_text(text)
    ready = data.prepare(str(path), 300, tmp_path / "cache")
    head, tail = texts(ready.train, ready.tokenizer)[0], texts(ready.val, ready.tokenizer)[0]
    assert head + tail == text.rstrip()
    assert len(tail) == len(text.rstrip()) // 20


def test_separators_are_found_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 40)
    for n in range(1, 120):
        path, parts = tmp_path / "a.txt", ["a b" * n + "x", "y" * n + "\n y", "z"]
        path.write_text(SEPARATOR.join(parts))
        found = {}
        for document, piece in data.read_documents([path]):
            found[document] = found.get(document, "") + piece
        assert list(found.values()) == parts


def test_a_byte_order_mark_and_outer_blanks_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"\ufeff one \n{SEPARATOR}\n two\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": " three\\n"}')
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert [t for _, t in data.read_documents(files)] == ["one", "two", "three"]


def test_about_a_twenty_fifth_is_held_out_and_never_nothing():
    pieces = list(enumerate(f"text {i}" for i in range(2000)))
    assert 50 < len(data.scan(pieces).heldout) < 115
    for shift in range(40):
        heldout = data.scan((i, f"{shift} {i}") for i in range(20)).heldout
        assert heldout and set(heldout.values()) == {0}  # whole documents


def test_what_is_held_out_stands_nowhere_in_the_training_text():
    rng = np.random.default_rng(0)
    for _ in range(200):
        different, copies = rng.integers(1, 40), rng.integers(1, 4)
        words = ["".join(chr(c) for c in rng.integers(97, 123, 400)) for _ in range(different)]
        documents = [str(text) for text in rng.permutation(words * copies)]
        heldout = data.scan(enumerate(documents)).heldout
        parts = {"train": [], "val": []}
        for part, _, text in data.split(enumerate(documents), heldout):
            parts[part].append(text)
        assert parts["train"] and parts["val"]
        assert not any(text in trained for text in parts["val"] for trained in parts["train"])


def test_a_few_different_documents_are_cut_and_many_are_chosen_from():
    for different, whole in ((19, False), (20, True)):
        pieces = [*enumerate(f"{i} " * 60 for i in [*range(different), *range(different)])]
        cuts = set(data.scan(pieces).heldout.values())
        assert (cuts == {0}) == whole


def test_documents_are_found_across_chunk_boundaries(corpus, monkeypatch):
    whole = [t for _, t in data.read_documents([corpus])]
    monkeypatch.setattr(data, "PIECE", 23)  # shorter than a document, longer than a separator
    joined = {}
    for document, piece in data.read_documents([corpus]):
        assert len(piece) <= 3 * 23 + len(SEPARATOR)
        joined[document] = joined.get(document, "") + piece
    assert list(joined.values()) == whole == stories()


def test_tokens_are_the_same_however_the_text_is_cut(corpus, tmp_path, monkeypatch):
    a = data.prepare(str(corpus), 300, tmp_path / "a")
    monkeypatch.setattr(data, "PIECE", 200)
    b = data.prepare(str(corpus), 300, tmp_path / "b")
    assert np.array_equal(a.train.ids, b.train.ids) and np.array_equal(a.val.ids, b.val.ids)


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(data, "PIECE", 2**14)
    peaks = []
    for n in (1, 8):
        path = tmp_path / f"{n}.txt"
        path.write_text("once there was a very small whale. " * 20_000 * n)
        tracemalloc.start()
        data.prepare(str(path), 300, tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_prepared_tokens_are_reused_only_when_they_are_the_same(corpus, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = data.prepare(str(corpus), 400, cache)

    def refuse(*_):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "train_tokenizer", refuse)
        assert data.prepare(str(corpus), 400, cache).folder == first.folder
        corpus.touch()
        data.prepare(str(corpus), 400, cache)
    assert data.prepare(str(corpus), 401, cache).folder != first.folder
    corpus.write_text(corpus.read_text(encoding="utf-8") + "!", encoding="utf-8")
    assert data.prepare(str(corpus), 400, cache).folder != first.folder
    corpus.write_text(corpus.read_text(encoding="utf-8")[:-1] + "?", encoding="utf-8")
    again = data.prepare(str(corpus), 400, cache).folder
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    assert data.prepare(str(corpus), 400, cache).folder != again


def test_two_processes_may_prepare_at_once(corpus, tmp_path, monkeypatch):
    real = data.os.rename

    def late(source, target):  # somebody else was faster
        shutil.copytree(source, target)
        raise OSError("Directory not empty")

    monkeypatch.setattr(data.os, "rename", late)
    first = data.prepare(str(corpus), 400, tmp_path / "a")
    monkeypatch.setattr(data.os, "rename", real)
    second = data.prepare(str(corpus), 400, tmp_path / "b")
    assert np.array_equal(first.train.ids, second.train.ids)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_a_preparation_that_breaks_off_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(data._Writer, "close", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.prepare(str(corpus), 400, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_jsonl_and_folders_are_read(tmp_path):
    lines = [json.dumps({"text": t, "other": 1}) for t in stories(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    assert [
        t for _, t in data.read_documents(data.find_corpus(str(tmp_path / "a.jsonl"), tmp_path))
    ] == stories(5)
    for i, text in enumerate(stories(3)):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert [
        t for _, t in data.read_documents(data.find_corpus(str(tmp_path), tmp_path))
    ] == stories(3)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"caf\xe9 and more", "byte 3 is wrong"),
        ("a.txt", b"x" * (2**20 - 1) + "é".encode() + b"\xff", "byte 1048577 is wrong"),
        ("a.txt", b"abc\xe2\x82", "byte 3 is wrong"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'line 2 is not a JSON object with a "text"'),
        ("a.jsonl", b'{"text": "a"}\nnonsense', "line 2 is not"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 holds half a surrogate pair"),
        ("a.csv", b"a", "must end in .txt or .jsonl"),
        ("a.txt", None, "is neither a file"),
    ],
)
def test_unusable_data_is_answered_with_a_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        data.prepare(str(tmp_path / name), 300, tmp_path / "cache")


def test_an_absent_network_is_answered_with_the_way_out(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UsageError, match="TinyStoriesV2-GPT4-train.txt elsewhere .* --data"):
        data.prepare("tinystories", 300, tmp_path)


def test_a_downloaded_corpus_is_prepared_like_a_file(corpus, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((*a, k)) or str(corpus)
    )
    ready = data.prepare("tinystories", 400, tmp_path / "cache")
    assert asked == [(*data.HUB["tinystories"], {"repo_type": "dataset"})]
    assert len(ready.train.starts) + len(ready.val.starts) == 302


def some_tokens(lengths):
    ids = np.concatenate([np.arange(100 * i, 100 * i + n) for i, n in enumerate(lengths)])
    return Tokens(ids.astype(np.uint16), np.cumsum([0, *lengths]))


def test_batches_depend_on_seed_and_step_alone():
    tokens = some_tokens([7] * 50)
    one, other = Batches(tokens, 4, 10, seed=1), Batches(tokens, 4, 10, seed=1)
    for step in range(30):
        one.at(step)
    for a, b in zip(one.at(13), other.at(13), strict=True):
        assert (a == b).all()
    assert not (Batches(tokens, 4, 10, seed=2).at(13)[0] == one.at(13)[0]).all()


def test_rows_begin_with_documents_and_an_epoch_visits_each_once():
    tokens = some_tokens([7, 25, 3, 9, 11, 2, 31])
    batches = Batches(tokens, 1, 10, seed=0)
    allowed = {0, 100, 110, 120, 200, 300, 400, 500, 600, 610, 620}  # not 410, an eos
    assert len(batches.starts) == len(allowed)
    orders = []
    for epoch in range(3):
        seen = []
        for step in range(11 * epoch, 11 * epoch + 11):
            inputs, targets = batches.get_batch(step)
            assert (inputs[:, 1:] == targets[:, :-1]).all()
            seen += inputs[:, 0].tolist()
        orders.append(seen)
        assert sorted(seen) == sorted(allowed)
    assert orders[0] != orders[1]


def test_windows_cover_every_token_once():
    tokenizer = data.train_tokenizer(stories(), 300)
    tokenizer.add_tokens([f"w{i}" for i in range(300)])  # the ids below must be known to it
    lengths = [7, 25, 3, 11, 10]
    tokens = some_tokens(lengths)
    got = data.build_eval_set(tokens, tokenizer, seq_len=10, batch_size=3)
    targets = sorted(t for _, y in got.rows for t in y.flatten().tolist() if t != data.IGNORE)
    expected = [100 * i + j for i, n in enumerate(lengths) for j in range(1, n)]
    assert targets == expected
    assert got.tokens == len(expected) and got.entropy_floor is None
    assert got.bytes == data.token_bytes(tokenizer)[expected].sum()
    for x, y in got.rows:
        counted = y != data.IGNORE
        assert (x[counted] + 1 == y[counted]).all()  # the target follows its input
        assert ((x[:, 0] % 100) % 10 == 0).all()  # from the start, or a multiple of seq_len
    limited = data.build_eval_set(tokens, tokenizer, 10, 3, limit=12)
    assert limited.tokens == 16  # whole rows, then no more


def test_stories_come_with_their_exact_floor_and_their_facts(tmp_path):
    ready = data.prepare("stories:150", 1024, tmp_path)
    told = [tell(seed) for seed in range(150)]
    by_text = {story.text: story for story in told}
    train, val = (texts(part, ready.tokenizer) for part in (ready.train, ready.val))
    assert sorted(train + val) == sorted(by_text)
    got = data.build_eval_set(ready.val, ready.tokenizer, 256, 4, stories=True)
    stories = [by_text[text] for text in val]
    assert got.entropy_floor == pytest.approx(sum(s.nats for s in stories) / got.tokens)
    assert got.tokens == len(ready.val.ids) - len(val)
    for number, kind in enumerate(stories.FACT_KINDS, 1):
        found = []
        for (_, targets), marks in zip(got.rows, got.facts, strict=True):
            assert not ((marks > 0) & (targets == data.IGNORE)).any()
            found += targets[marks == number].tolist()
        spans = [story.text[a:b] for story in stories for a, b, k in story.facts if k == kind]
        letters = sorted("".join(ready.tokenizer.decode(found).split()))
        assert letters == sorted("".join("".join(spans).split())), kind


def test_a_given_tokenizer_cuts_the_text_and_is_part_of_the_cache(corpus, tmp_path):
    texts = ("The cat sat on mat small big " * 9, "zq xj vw kk zq xj " * 9)
    given = [data.train_tokenizer([text], 275) for text in texts]
    assert given[0].get_vocab_size() == given[1].get_vocab_size()
    for tokenizer in given:
        ready = data.prepare(str(corpus), tokenizer, tmp_path)
        first = ready.train.ids[: ready.train.doc_offsets[1]].tolist()
        assert ready.tokenizer.to_str() == tokenizer.to_str()
        assert first[1:-1] == tokenizer.encode(tokenizer.decode(first)).ids


def test_a_scored_file_is_cut_into_bos_text_eos(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(SEPARATOR.join(["one", "two"]))
    tokens = data.tokenize_file(str(tmp_path / "a.txt"), tokenizer)
    one, two = ([0, *tokenizer.encode(x).ids, 1] for x in ("one", "two"))
    assert tokens.ids.tolist() == one + two
    assert tokens.starts.tolist() == [0, len(one), len(one + two)]


def test_a_large_vocabulary_is_kept_in_uint32(tmp_path, monkeypatch):
    real = data.train_tokenizer

    def large(*arguments):
        tokenizer = real(*arguments)
        tokenizer.add_tokens([f"w{i}" for i in range(70_000)])
        return tokenizer

    monkeypatch.setattr(data, "train_tokenizer", large)
    (tmp_path / "a.txt").write_text("w69999 w5 " * 100)
    ready = data.prepare(str(tmp_path / "a.txt"), 300, tmp_path / "cache")
    assert ready.train.ids.dtype == np.uint32
    assert "w69999" in texts(ready.train, ready.tokenizer)[0]


def test_too_little_text_for_one_row_is_said():
    with pytest.raises(UsageError, match="only 7 tokens, fewer than one row of seq_len = 10"):
        Batches(some_tokens([7]), 1, 10, 0)


def test_an_unwritable_cache_falls_back(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert data.cache_folder(tmp_path / "out") == tmp_path / "out" / "cache"
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "mine"))
    assert data.cache_folder(tmp_path / "out") == tmp_path / "mine"
