"""Documents and packing: every bad input, the stability of the split, and the round trip of the rows."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ebft import schema
from ebft.data import Document, batches, load_documents, pack, packing, split_documents
from ebft.errors import UsageError


def byte_tokenizer():
    """One token a byte, with an EOS, and a context far shorter than the texts."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", model_max_length=4)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def documents(*texts):
    return [Document(str(i), text) for i, text in enumerate(texts)]


# Loading


def test_stdlib_is_source_without_tests():
    loaded = load_documents("stdlib")
    names = [document.name for document in loaded]
    assert {"json/decoder.py", "bisect.py"} <= set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert loaded == load_documents("stdlib")


def test_folder_is_sorted_recursive_and_skips_what_is_no_text(tmp_path):
    for name, raw in {
        "b.txt": b"second\r\n",
        "a/z.txt": "\ufefff\u00fcrst".encode(),
        "image.bin": b"\x89PNG\0\1",
        "latin.txt": b"\xe9t\xe9",
        "blank.txt": b" \n",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    assert load_documents(str(tmp_path)) == [Document("a/z.txt", "f\u00fcrst"), Document("b.txt", "second\r\n")]


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert load_documents(str(tmp_path / "a.txt")) == [Document("a.txt", "one\ntwo\n")]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    # U+2028 may stand unescaped in a JSON string and is no end of a line.
    path.write_text('{"text": "one\u2028more", "body": "eins"}\n\n{"text": " ", "body": "zwei"}\n', encoding="utf-8")
    assert load_documents(str(path)) == [Document("a.jsonl:1", "one\u2028more")]
    assert [d.text for d in load_documents(str(path), text_field="body")] == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ('{"text": "a"}\n{"text": \n', None, r"line 2: not JSON"),
        ('{"text": "a"}\n["b"]\n', None, r"line 2: expected a JSON object.*\[\"b\"\]"),
        ('{"code": "a", "id": 1}\n', None, r"line 1: no field 'text'; found 'code', 'id'"),
        ('{"text": "a"}\n', "", r"line 1: no field ''; found 'text'"),
        ("{}\n", None, r"line 1: no field 'text'; found no fields"),
        ('{"text": "a"}\n{"text": 7}\n', None, r"line 2: the field 'text' is 7, expected a string"),
        ('{"text": ""}\n', None, r"the field 'text' of .* is empty"),
        ("", None, r"a\.jsonl is empty"),
    ],
)
def test_bad_json_lines(tmp_path, content, field, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_documents(str(path), text_field=field)


@pytest.mark.parametrize(
    ("raw", "message"), [(b"", "is empty"), (b" \n", "is empty"), (b"a\0b", "NUL"), (b"\xff\xfea", "not UTF-8")]
)
def test_bad_text_file(tmp_path, raw, message):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(UsageError, match=message):
        load_documents(str(tmp_path / "a.txt"))


def test_folder_without_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UsageError, match="holds no text: 2 files that are not hidden, 1 of them binary"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("source", ["{tmp}/nowhere", "data/train.jsonl", "notes.txt", "a b", "../x/y"])
def test_missing_path(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    source = source.format(tmp=tmp_path)
    with pytest.raises(UsageError, match="no such file or folder: ") as caught:
        load_documents(source)
    assert source in str(caught.value)


def test_blank_source():
    with pytest.raises(UsageError, match="blank"):
        load_documents(" ")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # chmod does not stop a superuser
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UsageError, match=r"cannot read .*a\.txt: Permission denied"):
            load_documents(str(source))


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot read .*: Permission denied"):
        load_documents(str(tmp_path))


@pytest.mark.parametrize("kind", ["stdlib", "folder", "file"])
def test_text_field_must_mean_something(tmp_path, kind):
    (tmp_path / "a.txt").write_text("a")
    source = {"stdlib": "stdlib", "folder": str(tmp_path), "file": str(tmp_path / "a.txt")}[kind]
    with pytest.raises(UsageError, match="text_field='body' means nothing for"):
        load_documents(source, text_field="body")


def test_hub_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'no such file or folder: owner/name.*pip install "ebft\[hub\]"'):
        load_documents("owner/name")


def test_hub_data_set(monkeypatch):
    def load_dataset(source, split):
        if source == "owner/none":
            raise FileNotFoundError("not on the hub")
        assert split == "train"
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_documents("owner/name") == [Document("owner/name:0", "one"), Document("owner/name:2", "two")]
    with pytest.raises(UsageError, match="row 0: no field 'body'; found 'text'"):
        load_documents("owner/name", text_field="body")
    with pytest.raises(UsageError, match=r"no such file or folder: owner/none; .*not on the hub"):
        load_documents("owner/none")


# Splitting


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(max_size=3), min_size=2, max_size=12),
    more=st.lists(st.text(max_size=3), max_size=12),
    held_out=st.floats(0.05, 0.95),
)
def test_split_is_a_partition_with_both_sides_and_without_leaks(texts, more, held_out):
    if len(set(texts)) < 2:
        return
    some = documents(*texts)
    train, held = split_documents(some, held_out=held_out)
    assert train
    assert held
    assert sorted(train + held, key=lambda d: int(d.name)) == some
    assert not {d.text for d in train} & {d.text for d in held}
    # Order and names do not matter.
    again, _ = split_documents([Document("x" + d.name, d.text) for d in reversed(some)], held_out=held_out)
    assert {d.text for d in again} == {d.text for d in train}


def test_split_is_stable_when_documents_are_added():
    some = documents(*(f"text {i}" for i in range(200)))
    train, held = split_documents(some[:100], held_out=0.2)
    more_train, more_held = split_documents(some, held_out=0.2)
    assert set(train) <= set(more_train)
    assert set(held) <= set(more_held)
    assert 20 <= len(more_held) <= 60  # binomial(200, 0.2): mean 40, standard deviation 5.7


def test_split_of_two_documents_never_leaves_a_side_empty():
    for i in range(50):
        for held_out in (0.01, 0.99):
            train, held = split_documents(documents(f"a{i}", f"b{i}"), held_out=held_out)
            assert (len(train), len(held)) == (1, 1)


@pytest.mark.parametrize("copies", [1, 3])
def test_one_text_is_cut_at_a_line(copies):
    text = "".join(f"line {i}\n" for i in range(10))
    (head,), (tail,) = split_documents(documents(*[text] * copies), held_out=0.2)
    assert head.text == "".join(f"line {i}\n" for i in range(8))
    assert head.text + tail.text == text


def test_a_cut_leaves_no_blank_side():
    (head,), (tail,) = split_documents(documents("\n\na\nb\n\n\n\n"), held_out=0.1)
    assert (head.text, tail.text) == ("\n\na\n", "b\n\n\n\n")


@pytest.mark.parametrize("text", ["one line", "one line\n", "\n\none line\n\n"])
def test_one_line_cannot_be_split(text):
    with pytest.raises(UsageError, match="one line only"):
        split_documents(documents(text))


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_bad_split(held_out):
    with pytest.raises(UsageError, match="held_out="):
        split_documents(documents("a", "b"), held_out=held_out)
    with pytest.raises(UsageError, match="no documents"):
        split_documents([])


# Packing


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6),
    length=st.integers(2, 9),
    eos=st.booleans(),
)
def test_packing_round_trip(tokenizer, texts, length, eos):
    packed = pack(documents(*texts), tokenizer, length=length, eos=eos)
    schema.check(packed, schema.TOKENS, schema.MASK, schema.DOCUMENT_IDS, schema.SEQUENCE_IDS)
    tokens, mask, ids = packed["tokens"], packed["mask"], packed["document_ids"]
    assert (tokens.dtype, mask.dtype, ids.dtype) == (torch.int64, torch.bool, torch.int64)
    assert packed["sequence_ids"].dtype == torch.int64
    assert (packed["sequence_ids"] >= 0).all()
    assert mask[:-1].all()  # only the last row is padded,
    assert not (mask[-1, 1:] & ~mask[-1, :-1]).any()  # on the right,
    assert mask[-1].any()  # and not wholly
    assert ((ids == -1) == ~mask).all()
    end = [tokenizer.eos_token_id] if eos else []
    for i, text in enumerate(texts):
        piece = tokens[ids == i].tolist()
        assert piece == [*tokenizer.encode(text, add_special_tokens=False), *end]
        assert tokenizer.decode(piece[: len(piece) - len(end)]) == text
    assert (ids[mask].diff() >= 0).all()  # runs: a document is in one piece


def test_sequence_ids_follow_the_content(tokenizer):
    alone = pack(documents("abcd" * 4), tokenizer, length=4, eos=False)
    assert len(set(alone["sequence_ids"].tolist())) == 1  # equal rows, equal ids
    before = pack(documents("first text", "second"), tokenizer, length=5)
    after = pack(documents("first text", "second", "a third one"), tokenizer, length=5)
    full = int(before["mask"].all(dim=1).sum())
    assert full >= 3
    assert torch.equal(before["sequence_ids"][:full], after["sequence_ids"][:full])
    assert len(set(after["sequence_ids"].tolist())) == len(after)
    # Padding is no content: a last row of "ab" is not the full row "ab" + padding token.
    padded = pack(documents("ab"), tokenizer, length=3, eos=False)
    same = pack(documents("ab"), tokenizer, length=2, eos=False)
    assert torch.equal(padded["sequence_ids"], same["sequence_ids"])


def test_long_texts_draw_no_warning(caplog, recwarn):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        pack(documents("much longer than the context of four tokens"), byte_tokenizer(), length=8)  # it warns but once
    finally:
        logging.disable_propagation()
    assert not caplog.records
    assert not recwarn.list


def test_few_documents_are_tokenised_at_once(tokenizer, monkeypatch):
    seen = []

    class Counting:
        def __call__(self, texts, **options):
            seen.append(len(texts))
            return tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    texts = [f"text {'x' * number}" for number in range(7)]
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 3)
    few = pack(documents(*texts), Counting(), length=5)
    assert seen == [3, 3, 1]
    monkeypatch.undo()
    assert (few == pack(documents(*texts), tokenizer, length=5)).all()


def test_bad_packing(tokenizer):
    with pytest.raises(UsageError, match="length=1"):
        pack(documents("a"), tokenizer, length=1)
    for nothing in ([], documents("", "")):
        with pytest.raises(UsageError, match=f"{len(nothing)} documents hold no tokens"):
            pack(nothing, tokenizer, length=4, eos=False)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(UsageError, match="no EOS token"):
        pack(documents("a"), bare, length=4)
    assert pack(documents("aaa"), bare, length=2, eos=False)["tokens"].tolist() == [[0, 0], [0, 0]]


# Batches


@pytest.fixture
def rows(tokenizer):
    return pack(documents("".join(map(chr, range(60, 60 + 22)))), tokenizer, length=2, eos=False)  # 11 rows


def take(iterator, count):
    return [next(iterator)["sequence_ids"].tolist() for _ in range(count)]


def test_batches_resume_and_repeat(rows):
    seen = take(batches(rows, batch_size=3, seed=5), 12)
    assert seen == take(batches(rows, batch_size=3, seed=5), 12)
    for start in range(9):
        assert take(batches(rows, batch_size=3, seed=5, start=start), 3) == seen[start : start + 3]


def test_an_epoch_is_a_permutation(rows):
    seen = take(batches(rows, batch_size=3, seed=0), 6)
    epochs = [[i for batch in part for i in batch] for part in (seen[:3], seen[3:])]
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(rows["sequence_ids"].tolist())
    assert epochs[0] != epochs[1]
    # Another seed is another order, not the same one an epoch later.
    assert take(batches(rows, batch_size=3, seed=1), 3) not in (seen[:3], seen[3:])


def test_batches_keep_rows_whole_and_the_global_generator_alone(rows):
    state = torch.get_rng_state()
    batch = next(batches(rows, batch_size=11, seed=0))
    assert torch.equal(state, torch.get_rng_state())
    assert batch.batch_size == torch.Size([11])
    where = [rows["sequence_ids"].tolist().index(i) for i in batch["sequence_ids"].tolist()]
    assert sorted(where) == list(range(11))
    assert torch.equal(batch["tokens"], rows["tokens"][where])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 12}, "batch_size=12: expected 1 to 11"),
        ({"batch_size": 0}, "batch_size=0: expected 1 to 11"),
        ({"batch_size": 2, "start": -1}, "start=-1"),
    ],
)
def test_bad_batches(rows, arguments, message):
    with pytest.raises(UsageError, match=message):
        batches(rows, seed=0, **arguments)
