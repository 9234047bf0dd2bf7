"""Examples: every bad input, the split, whole examples in rows, prompts alone, and runs on them."""

import json
from functools import partial

import pytest
import torch
from tensordict import TensorDict

from ebft import schema
from ebft.assemble.rows import read_data, usable_rows
from ebft.data import Example, Fields, load_examples, pack_examples, prompt_rows, split_examples
from ebft.data.example_rows import count_unfit
from ebft.data.examples import has_examples
from ebft.errors import UsageError
from ebft.objectives.cross_entropy import prediction_mask
from ebft.objectives.verifiers import exact_match, verifier
from ebft.policy import CausalPolicy
from ebft.samplers import full
from ebft.samplers.anchors import strided, targets
from tests.runs import go
from tests.test_data import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def examples(*pairs):
    return [Example(str(i), *pair) for i, pair in enumerate(pairs)]


def json_file(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return str(path)


# Loading


def test_json_lines(tmp_path):
    source = json_file(
        tmp_path / "data.jsonl",
        {"prompt": "1 + 1 =", "answer": " 2", "more": 3},
        "",
        {"prompt": "def f():\n", "answer": "    return 1", "tests": ["assert f() == 1", "assert f"], "group": "a.py"},
        {"prompt": "p\u2028", "answer": "a", "tests": "assert p", "group": None},
    )
    assert has_examples(source)
    assert load_examples(source) == [
        Example(f"{source}, line 1", "1 + 1 =", " 2"),
        Example(f"{source}, line 3", "def f():\n", "    return 1", ("assert f() == 1", "assert f"), "a.py"),
        Example(f"{source}, line 4", "p\u2028", "a", ("assert p",)),
    ]


def test_own_field_names(tmp_path):
    source = json_file(tmp_path / "data.jsonl", {"question": "q", "response": "r", "checks": ["c"], "prompt": "no"})
    fields = Fields(prompt="question", answer="response", tests="checks")
    assert load_examples(source, fields=fields) == [Example(f"{source}, line 1", "q", "r", ("c",))]
    assert has_examples(source, fields=fields)
    assert not has_examples(source)


def test_tab_separated(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_bytes('\ufeffanswer\tprompt\r\n"oui"\tyes\r\n\r\nnon, "non\tno\r\n'.encode())
    found = load_examples(str(path))
    assert [(e.prompt, e.answer) for e in found] == [("yes", '"oui"'), ("no", 'non, "non')]
    assert [e.name.rpartition(" ")[2] for e in found] == ["2", "4"]


def test_hub_rows(monkeypatch):
    rows = [{"prompt": "p", "answer": "a", "tests": None}]
    fake = type("datasets", (), {"load_dataset": staticmethod(lambda source, split: rows)})
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    assert load_examples("someone/data") == [Example("data set someone/data, row 0", "p", "a")]
    assert has_examples("someone/data")
    rows[0] = {"text": "t", "answer": "a"}
    assert not has_examples("someone/data")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "p", "answer": "a"}', '{"prompt": "p"}'], "line 2: no field 'answer'; found 'prompt'; set --ans"),
        (['{"answer": "a"}'], "line 1: no field 'prompt'; found 'answer'; set --prompt-field"),
        (['{"prompt": "p", "answer": " \\n"}'], r"line 1: the answer \(field 'answer'\) is blank"),
        (['{"prompt": "", "answer": "a"}'], r"line 1: the prompt \(field 'prompt'\) is blank"),
        (['{"prompt": 3, "answer": "a"}'], "line 1: the field 'prompt' is 3, expected a string"),
        (['{"prompt": "p", "answer": "a"', ""], "line 1: not JSON: .* at column 30"),
        (["", "[1]"], r"line 2: expected a JSON object with the fields 'prompt' and 'answer', found \[1\]"),
        (
            ['{"prompt": "p", "answer": "a", "tests": [1]}'],
            r"the field 'tests' is \[1\], expected Python source",
        ),
        (['{"prompt": "p", "answer": "a", "group": 1}'], "line 1: the field 'group' is 1, expected a string"),
        ([" "], "is empty"),
    ],
)
def test_bad_json_lines(tmp_path, lines, message):
    with pytest.raises(UsageError, match=message):
        load_examples(json_file(tmp_path / "data.jsonl", *lines))


def test_other_bad_sources(tmp_path):
    (tmp_path / "bad.tsv").write_text("prompt\tanswer\none\ttwo\tthree\n")
    with pytest.raises(UsageError, match=r"bad.tsv, line 2: 3 fields, but the first line names 2 \(prompt, answer\)"):
        load_examples(str(tmp_path / "bad.tsv"))
    (tmp_path / "header.tsv").write_text("prompt\tanswer\n")
    with pytest.raises(UsageError, match="holds no examples"):
        load_examples(str(tmp_path / "header.tsv"))
    with pytest.raises(UsageError, match=r"no such file: .*none\.jsonl"):
        load_examples(str(tmp_path / "none.jsonl"))
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UsageError, match=r"text.txt: examples are read from a .jsonl or a .tsv file"):
        load_examples(str(tmp_path / "text.txt"))


def test_split_keeps_groups_and_equal_prompts_together():
    data = [Example(f"{i}", f"p{i % 20}", f"a{i}", group=f"g{i % 20 % 7}" if i % 20 < 14 else "") for i in range(60)]
    train, held = split_examples(data, held_out=0.3)
    assert sorted(train + held, key=data.index) == data
    assert {e.group or e.prompt for e in train}.isdisjoint(e.group or e.prompt for e in held)
    assert split_examples(data[::2], held_out=0.3)[1] == [e for e in data[::2] if e in held]
    with pytest.raises(UsageError, match="all 2 examples belong together"):
        split_examples(examples(("p", "a"), ("p", "b")))


# Rows


def test_rows_hold_whole_examples(tokenizer):
    data = examples(("ab", "cde"), ("pqrstu", "vw"), ("x", "y"), ("12", "3"))
    rows = pack_examples(data, tokenizer, length=10)
    # 6 tokens + 3 of the third; 9; then the fourth begins a row of its own
    assert [row.tolist() for row in rows[schema.DOCUMENT_IDS]] == [
        [0] * 6 + [2] * 3 + [-1],
        [1] * 9 + [-1],
        [3] * 4 + [-1] * 6,
    ]
    for row in rows:
        assert torch.equal(row[schema.MASK], row[schema.DOCUMENT_IDS] >= 0)
        for number in set(row[schema.DOCUMENT_IDS].tolist()) - {-1}:
            own = row[schema.DOCUMENT_IDS] == number
            answer = row[schema.ANSWER_MASK]
            assert tokenizer.decode(row[schema.TOKENS][own & ~answer]) == data[number].prompt
            assert tokenizer.decode(row[schema.TOKENS][own & answer]) == data[number].answer + "<eos>"
    assert not (rows[schema.ANSWER_MASK] & ~rows[schema.MASK]).any()
    schema.check(rows, schema.TOKENS, schema.MASK, schema.ANSWER_MASK, schema.DOCUMENT_IDS, schema.SEQUENCE_IDS)
    assert len(set(rows[schema.SEQUENCE_IDS].tolist())) == 3


def test_long_answers_are_cut_and_long_prompts_left_out(tokenizer):
    data = examples(("abc", "defgh"), ("abcdef", "x"), ("abcde", "fgh"), ("a", "b"))
    rows = pack_examples(data, tokenizer, length=6)
    assert count_unfit(data, tokenizer, length=6) == (1, 2)
    texts = {tokenizer.decode(row[row >= 0]) for row in torch.where(rows[schema.MASK], rows[schema.TOKENS], -1)}
    assert texts == {"abcdef", "ab<eos>"}
    assert rows[schema.ANSWER_MASK].sum(1).tolist() == [3, 1, 2]
    assert rows[schema.DOCUMENT_IDS][:, 0].tolist() == [0, 2, 3]
    with pytest.raises(UsageError, match="length=3: none of the 4 prompts"):
        pack_examples(data[:3] + data[:1], tokenizer, length=3)
    with pytest.raises(UsageError, match="no examples"):
        pack_examples([], tokenizer, length=3)


def test_many_examples_lose_nothing(tokenizer):
    data = examples(*[("p" * (1 + i % 13), "a" * (1 + i % 7)) for i in range(500)])
    rows = pack_examples(data, tokenizer, length=40)
    sizes = torch.bincount(rows[schema.DOCUMENT_IDS][rows[schema.MASK]], minlength=500)
    assert sizes.tolist() == [len(e.prompt) + len(e.answer) + 1 for e in data]
    for row in rows[schema.DOCUMENT_IDS]:  # each example in one piece
        assert len(row[row >= 0].unique_consecutive()) == len(row[row >= 0].unique())
    assert len(rows) <= sizes.sum() / 40 * 1.1


def test_only_answers_are_learnt_and_matched(tokenizer):
    rows = pack_examples(examples(("ab", "cde"), ("pqrs", "t")), tokenizer, length=16)
    masks = {"answer_mask": rows[schema.ANSWER_MASK], "document_ids": rows[schema.DOCUMENT_IDS]}
    learnt = prediction_mask(rows[schema.MASK], **masks)[0].nonzero()[:, 0] + 1
    assert tokenizer.decode(rows[schema.TOKENS][0, learnt]) == "cde<eos>t<eos>"
    anchors, anchor_mask = strided(rows[schema.MASK], stride=1, first=1, horizon=2, **masks)
    assert anchors[anchor_mask].tolist() == [2, 3, 4, 10]
    found, inside = targets(rows[schema.TOKENS], rows[schema.MASK], anchors, anchor_mask, horizon=2, **masks)
    assert inside.all()
    assert tokenizer.batch_decode(found[0]) == ["cd", "de", "e<eos>", "t<eos>"]
    with pytest.raises(UsageError, match=r"no answer has a target of horizon=5 .* answers of a row are 6 tokens"):
        strided(rows[schema.MASK], stride=1, first=1, horizon=5, **masks)


def test_chat_template(tokenizer):
    with pytest.raises(UsageError, match="no chat template"):
        pack_examples(examples(("p", "a")), tokenizer, length=9, chat=True)
    chatty = byte_tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
    )
    row = pack_examples(examples(("p", "  a")), chatty, length=20, chat=True)[0]
    answer = row[schema.ANSWER_MASK]
    assert chatty.decode(row[schema.TOKENS][row[schema.MASK] & ~answer]) == "user:p;bot:"
    assert chatty.decode(row[schema.TOKENS][answer]) == "  a<eos>"
    alone = prompt_rows(examples(("p", "  a")), chatty, length=20, chat=True)
    assert chatty.decode(alone[schema.TOKENS][0]) == "user:p;bot:"


def test_prompts_alone(tokenizer):
    data = examples(("abc", "x"), ("too long", "y"), ("d", "z"), ("abc", "w"))
    rows = prompt_rows(data, tokenizer, length=5)
    assert rows[schema.EXAMPLE].tolist() == [0, 2, 3]
    assert rows[schema.MASK].sum(1).tolist() == [3, 1, 3]
    assert [tokenizer.decode(row[schema.TOKENS][row[schema.MASK]]) for row in rows] == ["abc", "d", "abc"]
    schema.check(rows, schema.TOKENS, schema.MASK, schema.EXAMPLE, schema.SEQUENCE_IDS)
    packed = pack_examples(data, tokenizer, length=5)
    assert packed[schema.TOKENS][0, :3].tolist() == rows[schema.TOKENS][0].tolist()
    with pytest.raises(UsageError, match="length=0: all 4 prompts are longer"):
        prompt_rows(data, tokenizer, length=0)


# In a pipeline, and in runs


def test_verified_answers_of_prompts(tiny_folder):
    """Prompts with equal text and other answers are told apart; what the policy said is what is rewarded."""
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")
    data = examples(("def f", "no"), ("1 + ", "no"), ("def f", "no"))
    rows = prompt_rows(data, policy.tokenizer, length=20)

    def rollouts(rows):
        found = full.sample(
            policy.sample, rows[schema.TOKENS], rows[schema.MASK], full.prompt_lengths(rows[schema.MASK]), rollouts=3,
            max_new_tokens=4, eos=policy.tokenizer.eos_token_id, seed=0, sequence_ids=rows[schema.SEQUENCE_IDS],
        )  # fmt: skip
        return found[0], found[2]

    tokens, mask = rollouts(rows)
    decode = lambda tokens, mask: [policy.tokenizer.decode(t[m]) for t, m in zip(tokens, mask, strict=True)]  # noqa: E731
    said = [decode(t[0], m[0]) for t, m in zip(tokens, mask, strict=True)]
    assert said[0] == said[2]  # equal prompts draw equal rollouts
    assert len(set(said[0])) == 3
    answers = {0: said[0][1], 1: said[1][2], 2: said[2][0]}
    batch = TensorDict({**rows, schema.ANCHOR_MASK: torch.ones(3, 1, dtype=torch.bool)}, batch_size=[3])
    batch[schema.ROLLOUT_TOKENS], batch[schema.ROLLOUT_MASK] = tokens, mask
    score = partial(exact_match, normalize=str)
    done = verifier(score, decode=decode, references=answers.__getitem__, by=schema.EXAMPLE)(batch)
    assert done[schema.REWARD][:, 0].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert done[schema.ADVANTAGE][0, 0].tolist() == pytest.approx([-0.5, 1, -0.5])


@pytest.fixture(scope="module")
def example_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "data.jsonl"
    sums = [{"prompt": f"def f{i}(x):\n", "answer": f"    return x + {i}\n"} for i in range(60)]
    return json_file(path, *sums)


def test_a_run_on_examples(options, example_file, tmp_path):
    printed = go(options | {"data": example_file, "length": 48, "first": 1, "stride": 3, "steps": 2}, tmp_path / "run")
    assert "do not fit" not in printed
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert samples
    for sample in samples:
        seen = sample["prefix"] + sample["target"]
        (own,) = {e for e in load_examples(example_file) if f"{e.prompt}{e.answer}<eos>".startswith(seen)}
        assert sample["prefix"].startswith(own.prompt)  # the target lies in the answer


def test_rows_whose_answers_are_too_short_for_a_target_are_left_out(tokenizer):
    rows = pack_examples(examples(("p" * 8, "a"), ("q" * 8, "bcd"), ("r" * 7, "ef")), tokenizer, length=12)
    kept = usable_rows(rows, {"horizon": 3}, {"sampler": {"first": 2}})
    assert kept[schema.DOCUMENT_IDS][:, 0].tolist() == [1, 2]


def test_what_does_not_fit_is_said(options, example_file, tmp_path, tiny_folder):
    printed = go(options | {"data": example_file, "length": 16, "first": 1, "steps": 1}, tmp_path / "run")
    tokenizer = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32").tokenizer
    left_out, cut = count_unfit(load_examples(example_file), tokenizer, length=16)
    assert cut > 0
    said = f"{left_out} examples do not fit and are left out, {cut} lose the end of their answers"
    assert said in " ".join(printed.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "stdlib", "chat": True}, "--chat is for examples, and --data stdlib is plain text"),
        ({"answer_field": "a", "text_field": "t"}, "--text-field t is for plain text"),
        ({"answer_field": "reply"}, "line 1: no field 'reply'; found 'prompt', 'answer'; set --answer-field"),
        ({"text_field": "prompt", "chat": True}, "--chat is for examples"),
    ],
)
def test_bad_options(options, example_file, changes, message):
    with pytest.raises(UsageError, match=message):
        read_data(options | {"data": example_file} | changes)


def test_examples_can_be_read_as_text(options, example_file):
    data = read_data(options | {"data": example_file, "text_field": "answer"})
    assert not data.answers
    assert data.train[0].text.startswith("    return")
