"""The paper's own data and other hub data sets, from a stand-in for the package `datasets` to what runs are made of."""

import dataclasses
import io
import json
import sys
import types

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ebft import cli
from ebft.assemble import print_card
from ebft.assemble.evaluation import load_data
from ebft.assemble.rows import read_data
from ebft.assemble.study_arms import TASKS
from ebft.assemble.study_budget import read_budget, settle_settings
from ebft.commands.derived import evaluate_defaults, run_defaults
from ebft.data.documents import Document
from ebft.data.examples import Example, load_examples
from ebft.data.named import DATA_SETS, load_parts
from ebft.errors import UsageError
from ebft.loops.study.arms import ARMS
from tests.runs import write_problems

PROGRAM = "def f{0}(x):\n    return x + {0}\n"
ROWS = {
    "sjelassi/opencode-instruct_100k_200tok": lambda i: {
        "question": f"Write f{i}, which adds {i}.\n",
        "answer": PROGRAM.format(i),
        # a string that holds a list, as in OpenCodeInstruct
        "unit_tests": json.dumps([f"\nassert f{i}(1) == {i + 1}", f"\nassert f{i}(0) == {i}"]),
    },
    "sjelassi/swallow_code_20m": lambda i: {"question": f"# {i}\n", "answer": PROGRAM.format(i)},
    "sjelassi/alma": lambda i: {"question": f"To English: Haus {i}\n", "answer": f"House {i}"},
    "someone/questions": lambda i: {"prompt": f"Add {i}.\n", "answer": PROGRAM.format(i), "tests": [f"f{i}(1)"]},
    "someone/texts": lambda i: {"text": PROGRAM.format(i), "answer": "no prompt beside it"},
}
NAMES = {"qa-code": "paper-qa-code", "code": "paper-code", "translation": "paper-translation"}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A hub of 160 rows of every data set, and a HumanEval of six problems."""

    def load_dataset(source, split):
        assert split == "train"
        if source not in ROWS:
            raise FileNotFoundError("not on the hub")
        return [ROWS[source](i) for i in range(160)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    problems = [
        Example(f"{i}", f"def g(x):\n    '''Add {i}.'''\n", f"    return x + {i}\n", ("g(1)",)) for i in range(6)
    ]
    there = dataclasses.replace(DATA_SETS["humaneval"], load=lambda: problems, folder=None)
    monkeypatch.setitem(DATA_SETS, "humaneval", there)


def whole(name):
    train, held_out = load_parts(name).values()
    return [*train, *held_out]


def invoke(*argv):
    return CliRunner().invoke(cli.app, [str(part) for part in argv], env={"COLUMNS": "160", "TERM": "dumb"})


def test_questions_have_answers_and_tests_of_their_own():
    found = {example.prompt: example for example in whole("paper-qa-code")}
    assert len(found) == 160
    one = found["Write f7, which adds 7.\n"]
    assert one.answer == PROGRAM.format(7)
    assert one.tests == ("\nassert f7(1) == 8", "\nassert f7(0) == 7")


def test_programs_are_whole_texts():
    found = whole("paper-code")
    assert len(found) == 160
    assert all(isinstance(document, Document) for document in found)
    assert "# 7\n" + PROGRAM.format(7) in {document.text for document in found}


def test_translations_have_answers():
    found = {example.prompt: example for example in whole("paper-translation")}
    assert found["To English: Haus 7\n"].answer == "House 7"
    assert not any(example.tests for example in found.values())


def test_another_hub_data_set_is_read_as_a_file_of_the_same_rows_would_be():
    found = {example.prompt: example for example in whole("someone/questions")}
    assert found["Add 7.\n"].answer == PROGRAM.format(7)
    assert found["Add 7.\n"].tests == ("f7(1)",)
    assert {document.text for document in whole("someone/texts")} == {PROGRAM.format(i) for i in range(160)}
    texts = load_parts("someone/questions", text_field="answer")
    assert all(isinstance(item, Document) for part in texts.values() for item in part)
    assert read_data(run_defaults() | {"data": "someone/questions"}).answers
    with pytest.raises(UsageError, match=r"no such file or folder: someone/none; .*not on the hub"):
        load_parts("someone/none")


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ('["assert f(1)", "assert f(2)"]', ("assert f(1)", "assert f(2)")),
        (" ['assert f(1)', '''assert f(2)''']\n", ("assert f(1)", "assert f(2)")),
        ("[]", ()),
        ("[f(x) for x in range(3)]", ("[f(x) for x in range(3)]",)),
        ("assert f(1) == [1]", ("assert f(1) == [1]",)),
    ],
)
def test_a_string_that_holds_a_list_of_tests(tmp_path, tests, expected):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a", "tests": tests}))
    assert load_examples(str(path))[0].tests == expected


def test_a_string_that_holds_another_list_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a", "tests": "[1, 2]"}))
    with pytest.raises(UsageError, match=r"the field 'tests' is \[1, 2\], expected Python source or a list of it"):
        load_examples(str(path))


def test_own_field_names_beside_the_prompts_of_a_data_set_with_a_name():
    fields = {"prompt_field": "question", "answer_field": "answer", "tests_field": "unit_tests"}
    source = "sjelassi/opencode-instruct_100k_200tok"
    data = load_data({**evaluate_defaults(), "data": source, **fields, "prompts_from": "humaneval"}, ())
    assert data.held_out[0].tests


def card(name, policy, **fields):
    console = Console(file=io.StringIO(), width=120)
    print_card(name, policy=str(policy), console=console, fields=fields)
    return console.file.getvalue()


def test_cards(tiny_folder):
    for name, kind in (("paper-qa-code", "prompts"), ("paper-code", "texts"), ("someone/questions", "answers")):
        assert f"training {kind}" in card(name, tiny_folder)
    source = "sjelassi/opencode-instruct_100k_200tok"
    text = card(source, tiny_folder, prompt_field="question", tests_field="unit_tests")
    assert "assert f" in text
    with pytest.raises(UsageError, match=r"row 0: no field 'ask'; found 'prompt', .* set --prompt-field"):
        card("someone/questions", tiny_folder, prompt_field="ask")


def test_the_card_command_takes_fields(tiny_folder):
    argv = ["data", "someone/texts", "--prompt-field", "text", "--policy", tiny_folder]
    assert "no prompt beside it" in invoke(*argv).output
    result = invoke("data", "--prompt-field", "text")
    assert "--prompt-field text is of one data set: name it" in str(result.exception)
    result = invoke("data", "qa-code", "--prompt-field", "text")
    assert "--prompt-field text names a field of a file or hub dataset" in str(result.exception)


@pytest.mark.parametrize("task", NAMES)
def test_a_preset_of_the_paper_runs_on_its_data(tiny_folder, tmp_path, task):
    small = ["--lora", "0", "--length", "32", "--batch", "2", "--steps", "1", "--held-out", "2", "--device", "cpu"]
    argv = ["run", "--preset", NAMES[task], "--policy", tiny_folder, *small, "--out", tmp_path / "out"]
    result = invoke(*argv)
    assert result.exit_code == 0, (result.output, result.exception)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["options"]["data"] == NAMES[task]
    assert (config["options"]["ce_tokens"] == "all") == (task == "code")


@pytest.mark.parametrize("task", TASKS)
def test_the_papers_budget_has_the_values_of_its_tables(task):
    budget = read_budget("paper", task)
    settings = settle_settings(budget, {}, where="paper", verifier="bleu")
    sft, rlvr = budget.methods["sft"], budget.methods["rlvr"]
    table_3 = {"batch": 64, "lr_schedule": "cosine", "lr_end": 0.1}
    assert {name: sft[name] for name in table_3} == table_3
    assert settings.lr_grid["sft"] == (1e-5,)  # Table 4: 5e-6 would want a constant rate
    assert ARMS["warm"].rate_of == "sft"
    assert {settings.lr_grid[arm] for arm in ("ebft", "ebft-ws", "rlvr", "rlvr-ws")} == {(1e-6,)}
    table_5 = {"batch": 128 if task == "translation" else 32, "rollouts": 8, "max_new_tokens": 1024, "temperature": 1.0}
    assert {name: rlvr[name] for name in table_5} == table_5
    assert budget.methods["ebft"]["horizon"] == budget.run["horizon"] == (4 if task == "translation" else 8)


class Prepared(Exception):
    """Everything is checked and would run now."""


@pytest.mark.parametrize("task", [*TASKS, "file"])
def test_the_papers_budget_prepares_every_task(tiny_folder, tmp_path, monkeypatch, task):
    def run_study(cells, *args, **kwargs):
        raise Prepared(cells)

    monkeypatch.setattr("ebft.assemble.study.run_study", run_study)
    name = write_problems(tmp_path / "mine.jsonl", count=160) if task == "file" else task
    small = ["--length", "64", "--eval-horizons", "1,4", "--device", "cpu"]
    out = tmp_path / "out"
    result = invoke("study", name, "--budget", "paper", "--policy", tiny_folder, *small, "--out", out)
    assert isinstance(result.exception, Prepared), (result.output, result.exception)
    found = json.loads((out / "study.json").read_text())
    data = NAMES.get(task, str(name))
    verifier = {"code": None, "translation": "bleu"}.get(task, "unit_tests")
    verified = [arm for arm in ARMS if ARMS[arm].verified]
    assert {own["data"] for own in found["options"].values()} == {found["evaluation"]["data"]} == {data}
    assert {own.get("policy", str(tiny_folder)) for own in found["options"].values()} == {str(tiny_folder)}
    assert [arm for arm in verified if arm in found["options"]] == (verified if verifier else [])
    assert ("rlvr, rlvr-ws: left out" in result.output) == (verifier is None)
    assert {found["options"][arm]["verifier"] for arm in verified if verifier} == ({verifier} if verifier else set())
    if task == "qa-code":  # answers to questions are whole programs, those to HumanEval's prompts the rest of one
        assert not found["options"]["rlvr"]["stop"]
        assert "\ndef " in found["evaluation"]["stop"]
    assert found["answers"] == (task != "code")
    assert found["evaluation"]["prompts_from"] == ("humaneval" if task in ("qa-code", "code") else None)
