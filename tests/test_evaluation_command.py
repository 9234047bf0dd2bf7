"""`evaluate` and `compare` through the command line, on a tiny model."""

import csv
import json

import pytest

from ebft.assemble.rows import read_data
from ebft.commands.derived import run_defaults
from ebft.data.examples import Example
from ebft.data.named import DATA_SETS, DataSet
from tests import command_line
from tests.runs import go, write_problems


@pytest.fixture
def call(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    """Run a tiny command with changed options; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*command, bare=False, **changes):
        options = {"out": tmp_path / "out", **changes} if bare else {
            "data": tiny_text, "features": "hidden,ngram", "device": "cpu", "dtype": "float32", "length": 32,
            "stride": 9, "first": 5, "rollouts": 3, "held_out": 6, "batch": 4, "bootstrap": 100, "seed": 3,
            "out": tmp_path / "out", **changes,
        }  # fmt: skip
        if command[0] == "evaluate":
            options = {"policy": tiny_folder, **options}
        return command_line.call(monkeypatch, capsys, command, options)

    return call


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """Two tiny runs with different learning rates."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("slow", "fast")]
    for folder, rate in zip(folders, (0.001, 0.02), strict=True):
        go({**options, "steps": 2, "lr": rate, "kl": 0.0}, folder)
    return folders


def values(folder, kind="sequences"):
    found = json.loads((folder / "evaluation.json").read_text())["values"][kind]
    return {(e["metric"], e["of"], e["at"]): e for e in found}


def test_evaluate_measures_and_writes_everything(call, tmp_path):
    code, out, err = call("evaluate")
    assert code == 0, err
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 80
    found = values(tmp_path / "out")
    ce = found["cross_entropy", "all", None]
    assert ce["low"] < ce["value"] < ce["high"]
    assert found["perplexity", "all", None]["value"] == pytest.approx(2.718281828 ** ce["value"], rel=1e-6)
    for name in ("hidden", "ngram"):
        assert [g for metric, of, g in found if metric == "feature_matching_loss" and of == name] == [1, 2, 4, 8, 16]
    assert ("entropy_drift", "", None) in found
    with open(tmp_path / "out" / "sequences.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "cross_entropy"]
    assert len(rows) == 6
    total = sum(float(row["sum"]) for row in rows) / sum(float(row["count"]) for row in rows)
    assert total == pytest.approx(ce["value"], abs=1e-12)
    assert (tmp_path / "out" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_again_and_in_other_batches(call, tmp_path):
    for name, batch in (("one", 1), ("four", 4), ("again", 4)):
        assert call("evaluate", out=tmp_path / name, batch=batch, horizons="1,3")[0] == 0
    one, four = values(tmp_path / "one"), values(tmp_path / "four")
    assert values(tmp_path / "again") == four
    assert one.keys() == four.keys()
    for key, entry in four.items():
        if entry["value"] is not None:
            assert one[key]["value"] == pytest.approx(entry["value"], abs=2e-5, rel=1e-5), key


def test_quick_gives_way_to_what_is_given(call, tmp_path):
    code, _, err = call("evaluate", quick=True, horizons="1,2", held_out=None)
    assert code == 0, err
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["horizons"] == [1, 2]
    assert stored["options"]["held_out"] == 8


def test_answers_to_prompts(call, tmp_path):
    data = write_problems(tmp_path / "problems.jsonl")
    code, out, err = call(
        "evaluate", data=data, first=1, stride=3, horizons="1,2", answers=2, max_new_tokens=5, prompts=4, k="1,2",
        length=40,
    )  # fmt: skip
    assert code == 0, err
    found = values(tmp_path / "out", "prompts")
    assert found["pass_at_k", "", 2]["value"] is not None
    assert 0 <= found["compiles", "", None]["value"] <= 1
    ends = {metric: entry["value"] for (metric, _, _), entry in found.items() if metric.startswith("programs_")}
    assert ends["programs_passed"] == found["pass_at_k", "", 1]["value"]
    assert sum(ends.values()) == pytest.approx(1)
    assert found["sentence_chrf", "", 2]["value"] >= found["sentence_chrf", "", 1]["value"]
    assert ("cross_entropy", "answers", None) in values(tmp_path / "out")
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    prompts = int(found["pass_at_k", "", 1]["units"])
    assert len(answers) == prompts
    assert all(len(line["answers"]) == 2 for line in answers)
    assert "pass@2" in out


def test_the_folder_of_a_run_is_its_policy(call, trained, tmp_path):
    """Its data is what is measured and its start gives the hidden states, where nothing else is asked for."""
    shape = {"data": None, "length": None, "horizons": "1,4"}
    assert call("evaluate", policy=trained[1], out=tmp_path / "run", **shape)[0] == 0
    again = call("evaluate", policy=trained[1] / "policy", out=tmp_path / "policy", horizons="1,4")
    assert again[0] == 0
    run, policy = values(tmp_path / "run"), values(tmp_path / "policy")
    for key in (("cross_entropy", "all", None), ("feature_matching_loss", "ngram", 4)):
        assert run[key]["value"] == pytest.approx(policy[key]["value"], abs=1e-9)
    hidden = ("feature_matching_loss", "hidden", 4)
    assert run[hidden]["value"] != pytest.approx(policy[hidden]["value"], abs=1e-6)


def test_compare_runs(call, trained, tmp_path):
    code, out, err = call("compare", *trained, bare=True)
    assert code == 0, err
    assert "Options that differ" in out
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| lr | 0.001 | 0.02 |" in text
    stored = json.loads((trained[0] / "evaluation.json").read_text())["metrics"]["cross_entropy"]
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "cross_entropy" and r["policy"] == str(trained[0])]
    assert float(rows[0]["value"]) == pytest.approx(stored["difference"])
    assert float(rows[0]["after"]) == pytest.approx(stored["after"])
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_policies_in_pairs(call, trained, tiny_folder, tmp_path):
    code, out, err = call("compare", tiny_folder, trained[1], horizons="1,4")
    assert code == 0, err
    assert "Difference from" in out
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ce = {(r["table"], r["policy"]): r for r in rows if r["metric"] == "cross_entropy" and r["table"] != "run"}
    before, after = (ce["value", str(name)] for name in (tiny_folder, trained[1]))
    change = ce["difference", str(trained[1])]
    assert float(change["value"]) == pytest.approx(float(after["value"]) - float(before["value"]), abs=1e-9)
    apart = (float(before["standard_error"]) ** 2 + float(after["standard_error"]) ** 2) ** 0.5
    assert float(change["standard_error"]) < apart


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "hidden,hiden"}, "did you mean 'hidden'"),
        ({"features": "ngram,ngram"}, "each once"),
        ({"features": "ngram", "encoder": "minilm-l6"}, "--encoder minilm-l6 does not apply"),
        ({"horizons": "4,2"}, "increasing"),
        ({"horizons": "32"}, "does not fit --length 32"),
        ({"k": "1,8", "answers": 4}, "at most 4"),
        ({"answers": 3}, "--answers is for data with prompts"),
        ({"rollouts": 1}, "--rollouts 1"),
        ({"level": 1.5}, "--level 1.5"),
        ({"pooling": "none"}, "--pooling none"),
        ({"policy": "no/such"}, "no/such"),
        ({"data": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(call, tmp_path, changes, words):
    code, _, err = call("evaluate", **changes)
    assert code == 2
    assert words in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_compare_refuses_one_or_the_same(call, tiny_folder, trained, tmp_path):
    assert "two or more" in call("compare", trained[0])[2]
    assert "--features is for an evaluation" in call("compare", *trained, bare=True, features="ngram")[2]
    assert "there twice" in call("compare", trained[0], trained[0])[2]
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text(json.dumps({"options": {}}))
    assert "no trained policy" in call("evaluate", policy=tmp_path / "unfinished")[2]
    assert not (tmp_path / "out").exists()


def test_data_for_evaluation_alone_is_measured_whole(call, tmp_path, monkeypatch):
    """`run` refuses it."""
    made = [Example(f"e/{i}", f"def g{i}():\n", f"    return {i}\n", (f"assert g{i}() == {i}",)) for i in range(8)]
    alone = DataSet("eight", "MIT", "here", lambda: made, evaluation=True)
    monkeypatch.setitem(DATA_SETS, "eight", alone)
    small = {"first": 1, "stride": 3, "horizons": "1,2", "length": 40, "max_new_tokens": 3, "answers": 1}
    code, _, err = call("evaluate", data="eight", prompts=20, **small)
    assert code == 0, err
    assert values(tmp_path / "out", "prompts")["pass_at_k", "", 1]["units"] == 8
    assert "for evaluation alone" in call("run", bare=True, data="eight", out=tmp_path / "run")[2]


@pytest.mark.assets
def test_the_embedded_models(call, tmp_path):
    code, _, err = call(
        "evaluate", policy="smollm2-135m", features="sbert,hidden", length=64, horizons="1,2,4", held_out=2, batch=2
    )
    assert code == 0, err
    found = values(tmp_path / "out")
    assert 1.5 < found["cross_entropy", "all", None]["value"] < 6
    assert found["feature_matching_loss", "sbert", 4]["value"] is not None


def test_plain_text_with_the_prompts_of_other_data_and_a_greedy_answer(call, tmp_path, monkeypatch):
    monkeypatch.setattr("ebft.sandbox.weaknesses", lambda isolation=None: ["other processes can be seen"])
    data = write_problems(tmp_path / "problems.jsonl")
    wanted = {"prompts_from": data, "greedy": True, "answers": 2, "k": "1,2", "max_new_tokens": 4, "prompts": 3}
    code, out, err = call("evaluate", horizons="1,2", prompt_length=60, **wanted)
    assert code == 0, err
    assert out.count("not whole on this machine: other processes can be seen") == 1
    found = values(tmp_path / "out", "prompts")
    assert ("pass_at_k", "greedy", 1) in found
    assert ("corpus_bleu", "greedy", None) in found
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert all(len(line["answers"]) == 2 and isinstance(line["greedy"], str) for line in lines)
    # the greedy answers are those of an evaluation at temperature 0
    cold = {"prompts_from": data, "answers": 1, "answer_temperature": 0, "max_new_tokens": 4, "prompts": 3}
    code, _, err = call("evaluate", horizons="1,2", prompt_length=60, out=tmp_path / "cold", **cold)
    assert code == 0, err
    again = [json.loads(line) for line in (tmp_path / "cold" / "answers.jsonl").read_text().splitlines()]
    assert [line["greedy"] for line in lines] == [line["answers"][0] for line in again]
    for name in ("sentence_chrf", "pass_at_k"):
        assert found[name, "greedy", 1]["value"] == values(tmp_path / "cold", "prompts")[name, "", 1]["value"]

    longer = data.read_text().replace("def f", "# twice as long a prompt as the others have\\ndef f", 15)
    data.write_text(longer)
    code, out, err = call("evaluate", horizons="1,2", prompt_length=20, out=tmp_path / "short", **cold)
    assert code == 0, err
    held = read_data({**run_defaults(), "data": str(data)}).held_out
    long = sum(example.prompt.startswith("#") for example in held)
    assert 0 < long < len(held)
    assert f"{long} of {len(held)} prompts are longer than --prompt-length and are left out" in " ".join(out.split())
    code, _, err = call("evaluate", prompts_from=tmp_path / "module.txt", out=tmp_path / "none")
    assert code == 2
    assert "module.txt" in err


def test_halves_of_the_held_out_texts(call, options, tmp_path):
    whole = read_data(options).held_out
    halves = [read_data({**options, "split": name}).held_out for name in ("validation", "test")]
    assert all(halves)
    assert sorted(document.name for part in halves for document in part) == sorted(d.name for d in whole)
    assert read_data({**options, "split": "test"}).train == read_data(options).train
    code, _, err = call("evaluate", split="tests")
    assert code == 2
    assert "--split 'tests': expected one of validation, test" in err
