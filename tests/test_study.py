"""The comparison of methods: what it runs, what it chooses by, its arithmetic, and how it goes on."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebft import cli
from ebft.assemble.rows import read_data
from ebft.assemble.study_arms import (
    TASKS,
    Task,
    find_verifier,
)
from ebft.assemble.study_budget import read_budget, settle_settings, unverified
from ebft.commands.derived import run_defaults
from ebft.components.methods import with_defaults
from ebft.data.split import unit_hash
from ebft.errors import UsageError
from ebft.loops.ablation.tables import with_error
from ebft.loops.interrupt import stop_after
from ebft.loops.study.arms import ARMS
from ebft.loops.study.choice import choose
from tests.command_line import replaced
from tests.runs import write_problems

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _no_evaluation_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebft.assemble.evaluate.evaluation_png", lambda *args, **kwargs: b"no picture")
        yield


def command(data, model, out, **changes):
    """Arguments of a tiny study."""
    options = {
        "policy": model, "device": "cpu", "dtype": "float32", "lora": 0, "length": 32, "stride": 9, "first": 5,
        "horizon": 4, "rollouts": 3, "steps": 2, "batch": 2, "held_out": 4, "eval_every": 1, "bootstrap": 50,
        "eval_rows": 5, "eval_features": "hidden,ngram", "eval_horizons": "1,4", "out": out, **changes,
    }  # fmt: skip
    flags = [str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    return ["study", str(data), *flags]


def invoke(argv):
    return CliRunner().invoke(cli.app, argv, env={"COLUMNS": "160", "TERM": "dumb"})


def rows(out, name="results.csv"):
    with open(out / name, newline="") as file:
        return list(csv.DictReader(file))


def value(out, arm, seed, metric, of="", at=""):
    (found,) = [
        float(row["value"])
        for row in rows(out)
        if (row["arm"], row["seed"], row["metric"], row["of"], row["at"]) == (arm, seed, metric, of, at)
    ]
    return found


# One whole study of the user's own file


@pytest.fixture(scope="module")
def study(tiny_folder, tmp_path_factory):
    """All arms on a file of problems with tests, two seeds; its arguments, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    small = {"prompts": 2, "answers": 2, "answer_tokens": 4, "prompt_length": 40, "length": 64, "first": 1, "stride": 3}
    small |= {"max_new_tokens": 3, "test_timeout": 20, "held_out": 2, "eval_every": 2}
    argv = command(
        write_problems(folder / "mine.jsonl", count=160), tiny_folder, folder / "out", seeds="0,1",
        lr_grid="sft=0.001,0.02", **small,
    )  # fmt: skip
    argv += [part for arm in ("ebft", "ebft-ws", "rlvr", "rlvr-ws") for part in ("--lr-grid", f"{arm}=0.01")]
    result = invoke(argv)
    assert result.exit_code == 0, (result.output, result.exception)
    return argv, folder / "out", result.output


def test_every_arm_is_measured_alike(study):
    _, out, shown = study
    found = rows(out)
    assert {row["arm"] for row in found} == set(ARMS)
    for arm in ARMS:
        kinds = {(row["metric"], row["of"], row["at"]) for row in found if row["arm"] == arm}
        for quantity in (
            ("cross_entropy", "all", ""),
            ("cross_entropy", "answers", ""),
            ("feature_matching_loss", "hidden", "4"),
            ("feature_matching_loss", "ngram", "1"),
            ("pass_at_k", "greedy", "1"),
            ("pass_at_k", "", "1"),
            ("compiles", "", ""),
        ):
            assert quantity in kinds, (arm, quantity)
    text = (out / "table.md").read_text()
    for title in [*(f"| {arm.title} |" for arm in ARMS.values()), "pass greedy", "pass@1", "compiles"]:
        assert title in text
    for name in ("training.png", "horizon.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert "about" in shown
    assert "left" in shown


def trained_on(options):
    """The prompts that a run of examples trains on."""
    return [example.prompt for example in read_data(with_defaults(options)).train]


def test_every_arm_sees_as_many_examples_and_warm_starts_are_of_sft(study):
    _, out, _ = study
    examples = {row["arm"]: float(row["value"]) for row in rows(out) if row["metric"] == "examples"}
    stored = json.loads((out / "study.json").read_text())
    in_a_row = stored["examples_in_a_row"]
    assert in_a_row["sft"] > 1.5
    assert in_a_row["rlvr"] == 1
    assert examples == {arm: pytest.approx(4 * in_a_row["sft"], abs=1) for arm in examples} | {
        "warm": pytest.approx(2 * in_a_row["sft"], abs=1)
    }
    assert set(examples) == set(ARMS) - {"base"}
    rate = stored["choices"]["sft"]["lr"]
    for seed in ("0", "1"):
        warm = json.loads((out / "runs/warm" / f"seed-{seed}/config.json").read_text())
        assert (warm["options"]["method"], warm["options"]["lr"], warm["steps"]) == ("sft", rate, 1)
        (path,) = (out / "runs/ebft-ws").rglob(f"seed-{seed}/config.json")
        after = json.loads(path.read_text())
        assert after["options"]["policy"] == str(out / "runs/warm" / f"seed-{seed}")
        assert after["options"]["backbone"] == stored["policy"]
        seen = [set(trained_on(config["options"])) for config in (warm, after)]
        assert all(seen)
        assert not seen[0] & seen[1]
        # its start is measured as the end of the warm start was
        begun = json.loads((path.parent / "evaluation.json").read_text())["metrics"]["cross_entropy"]["before"]
        end = json.loads((out / "runs/warm" / f"seed-{seed}/evaluation.json").read_text())["metrics"]["cross_entropy"]
        assert begun == pytest.approx(end["after"], abs=1e-5)
    assert stored["versions"]["torch"]
    assert stored["machine"]["device"] == "cpu"
    assert stored["seeds"] == [0, 1]


def test_the_table_against_a_hand_computation(study):
    """t with 1 degree of freedom is Cauchy's: its 97.5 % quantile is tan(0.475 π), its tails are arctangents."""
    _, out, _ = study
    ce = {arm: [value(out, arm, seed, "cross_entropy", "all") for seed in "01"] for arm in ("sft", "ebft")}
    base = value(out, "base", "", "cross_entropy", "all")

    def interval(values):
        spread = abs(values[0] - values[1]) / 2  # s / √2 of two values
        return sum(values) / 2, math.tan(0.475 * math.pi) * spread, spread

    text = (out / "table.md").read_text()
    mean, half, _ = interval(ce["sft"])
    (line,) = [line for line in text.splitlines() if line.startswith("| SFT | ") and " | 2 | " in line]
    assert line.split("|")[4].strip() == with_error(mean, half)
    for arm, other, values in (
        ("ebft", "sft", [a - b for a, b in zip(ce["ebft"], ce["sft"], strict=True)]),
        ("sft", "base", [a - base for a in ce["sft"]]),
    ):
        mean, half, error = interval(values)
        (row,) = [r for r in rows(out, "differences.csv") if (r["arm"], r["other"], r["column"]) == (arm, other, "CE")]
        assert float(row["difference"]) == pytest.approx(mean, rel=1e-9)
        assert float(row["half_width"]) == pytest.approx(half, rel=1e-6)
        assert float(row["p"]) == pytest.approx(1 - 2 / math.pi * math.atan(abs(mean) / error), rel=1e-6)
        assert float(row["low"]) <= mean <= float(row["high"])
        decided = abs(mean) > half and (float(row["low"]) > 0 or float(row["high"]) < 0)
        assert row["decided"] == str(int(decided))
        assert row["better"] == str(int(mean < 0))


def test_the_learning_rate_is_that_of_the_best_candidate(study):
    _, out, _ = study
    choice = json.loads((out / "study.json").read_text())["choices"]["sft"]
    values = {
        rate: json.loads((out / f"runs/sft/lr-{rate}/seed-0/evaluation.json").read_text())["metrics"]["cross_entropy"]
        for rate in ("0.001", "0.02")
    }
    assert choice["values"] == {rate: metrics["after"] for rate, metrics in values.items()}
    assert f"{choice['lr']:g}" == min(values, key=lambda rate: values[rate]["after"])
    assert (choice["metric"], choice["split"]) == ("cross_entropy", "validation")
    rejected = {"0.001", "0.02"} - {f"{choice['lr']:g}"}
    assert not (out / f"runs/sft/lr-{rejected.pop()}/seed-0/policy").exists()
    assert not list(out.rglob("checkpoints"))


def test_again_nothing_runs_and_another_configuration_is_refused(study):
    argv, out, _ = study
    before = (out / "results.csv").read_bytes()
    result = invoke(argv)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "26 of 26 runs are done already" in result.output
    assert (out / "results.csv").read_bytes() == before
    for change in ({"ce": 0.1}, {"prompts": 3}, {"lr_grid": "sft=0.001,0.03"}, {"seeds": "1,0"}):
        result = invoke(replaced(argv, change))
        assert isinstance(result.exception, UsageError), result.output
        assert "holds a study of another configuration" in str(result.exception)
    assert (out / "results.csv").read_bytes() == before


# What choices are made on


def held_out_texts(half, start):
    """Texts that land on one half of the held-out side."""
    for number in range(start, start + 100_000):
        text = f"def g{number}(x, y={number}):\n    return x * {number} + y\n\nfor index in range({number}):\n    g()\n"
        side = "test" if unit_hash("halves: " + text) < 0.5 else "validation"
        if unit_hash(text) < 0.1 and side == half:
            yield text


def test_choices_never_see_the_test_half(tiny_folder, tiny_text, tmp_path):
    """With other texts on the test half everything up to the choice is the same, bit for bit, and its results are not.

    Were candidates measured on the whole held-out side, or the table on the validation half, this would fail.
    """
    found = []
    for name, start in (("one", 0), ("other", 500_000)):
        folder = tmp_path / name
        folder.mkdir()
        texts = {f"v{i}": text for i, text in zip(range(4), held_out_texts("validation", 0), strict=False)}
        texts |= {f"z{i}": text for i, text in zip(range(4), held_out_texts("test", start), strict=False)}
        texts |= {
            f"t{path.name}": path.read_text() for path in tiny_text.iterdir() if unit_hash(path.read_text()) > 0.1
        }
        for file, text in texts.items():
            (folder / f"{file}.py").write_text(text)
        out = tmp_path / f"out-{name}"
        options = {"arms": "sft", "seeds": "0", "lr_grid": "0.001,0.02", "eval_every": 0}
        # the same data by name, so that paths do not differ
        result = invoke(command(folder, tiny_folder, out, **options))
        assert result.exit_code == 0, (result.output, result.exception)
        kept = {"choices": json.loads((out / "study.json").read_text())["choices"]}
        for path in sorted((out / "runs").rglob("*.json")):
            if path.name == "evaluation.json":
                kept[str(path.relative_to(out))] = json.loads(path.read_text())["metrics"]
            elif path.name in ("before.json", "samples.json"):
                kept[str(path.relative_to(out))] = path.read_text()
        found.append((kept, value(out, "sft", "0", "cross_entropy", "all")))
    (one, ce), (other, other_ce) = found
    assert len(one) == 7
    assert one == other
    assert ce != other_ce


def test_the_best_candidate(tmp_path):
    for rate, after in {0.1: 3.0, 0.2: 2.0, 0.3: 4.0}.items():
        folder = tmp_path / f"{rate}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"metrics": {"reward": {"after": after}}}))
    folders = {rate: tmp_path / f"{rate}" for rate in (0.1, 0.2, 0.3, 0.4)}  # one did not finish
    low, high = (choose(folders, metric="reward", better=better) for better in ("lower", "higher"))
    assert (low["lr"], low["edge"], high["lr"]) == (0.2, False, 0.3)
    assert low["values"] == {"0.1": 3.0, "0.2": 2.0, "0.3": 4.0}
    (tmp_path / "0.2" / "evaluation.json").write_text('{"metrics": {"reward": {"after": NaN}}}')
    assert choose(folders, metric="reward", better="lower") == low | {
        "lr": 0.1, "edge": True, "values": {"0.1": 3.0, "0.3": 4.0},
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"none of the learning rates 0\.4"):
        choose({0.4: tmp_path / "0.4"}, metric="reward", better="lower")


# Going on


def test_a_study_that_was_killed_ends_as_one_that_was_not(tiny_folder, tiny_text, tmp_path):
    options = {
        "arms": "ebft", "seeds": "0", "lr_grid": "0.01", "steps": 6, "eval_rows": 3, "save_every": 1,
        "eval_every": 4,
    }  # fmt: skip
    whole = invoke(command(tiny_text, tiny_folder, tmp_path / "whole", **options))
    assert whole.exit_code == 0, (whole.output, whole.exception)
    argv = command(tiny_text, tiny_folder, tmp_path / "killed", **options)
    process = subprocess.Popen([sys.executable, "cli.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    cell = tmp_path / "killed/runs/ebft/lr-0.01/seed-0"
    deadline = time.monotonic() + 300
    while not (cell / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cell / "evaluation.json").exists()
    result = invoke(argv)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "runs are done already" in result.output
    ends = [[row for row in rows(tmp_path / name) if row["metric"] != "seconds"] for name in ("whole", "killed")]
    assert ends[0] == ends[1]
    for name in ("differences.csv", "training.png", "horizon.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0


def test_a_candidate_that_diverges_is_no_candidate_and_the_rest_goes_on(tiny_folder, tiny_text, tmp_path):
    out = tmp_path / "out"
    options = {"arms": "sft", "seeds": "0", "lr_grid": "0.01,1e20", "eval_every": 0, "steps": 4, "eval_rows": 2}
    result = invoke(command(tiny_text, tiny_folder, out, **options))
    assert result.exit_code == 1, (result.output, result.exception)
    (failure,) = json.loads((out / "failures.json").read_text()).items()
    assert failure[0] == "SFT, seed 0, lr 1e+20"
    assert json.loads((out / "study.json").read_text())["choices"]["sft"]["lr"] == 0.01
    assert value(out, "sft", "0", "cross_entropy", "all") < value(out, "base", "", "cross_entropy", "all")
    assert "* SFT, seed 0, lr 1e+20:" in (out / "table.md").read_text()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_timer_stops_as_ctrl_c_does(handler):
    before = signal.signal(signal.SIGINT, handler)
    with pytest.raises(KeyboardInterrupt), stop_after(0.001):
        time.sleep(20)
    with stop_after(0.001 / 60 * 1e6):
        pass  # over before it is due
    assert signal.signal(signal.SIGINT, before) is handler


def test_training_and_scoring_judge_alike(study):
    config = json.loads((study[1] / "study.json").read_text())
    assert config["options"]["rlvr"]["test_timeout"] == config["evaluation"]["test_timeout"] == 20


def test_rlvr_takes_part_where_answers_can_be_verified(tiny_folder, tmp_path):
    path = write_problems(tmp_path / "tests.jsonl")
    lines = [{**json.loads(line), "tests": []} for line in path.read_text().splitlines()]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    budget = read_budget("small", "mine.jsonl")

    def found(source, task=None, **flags):
        return find_verifier(
            budget, read_data(run_defaults() | {"data": str(source)}), task=task or Task(str(source)), flags=flags
        )

    assert found(path) == "unit_tests"
    assert found(plain) is None
    assert found(plain, verifier="chrf") == found(path, verifier="chrf") == "chrf"
    assert found(plain, TASKS["translation"]) == "bleu"
    assert "rlvr" not in settle_settings(budget, {}, where="small").arms
    for given, verifier, left_out in (
        ({}, None, ["rlvr", "rlvr-ws"]),
        ({"arms": "sft"}, None, []),
        ({}, "chrf", []),
        ({"arms": "rlvr-ws"}, "chrf", []),
    ):
        assert unverified(budget, given, settle_settings(budget, given, where="small", verifier=verifier)) == left_out
    changes = {"arms": "rlvr", "length": 40, "first": 1, "stride": 3}
    result = invoke(command(plain, tiny_folder, tmp_path / "out", **changes))
    assert isinstance(result.exception, UsageError), result.output
    assert "--arms rlvr: there is nothing to verify answers with" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_parts_of_the_data_do_not_overlap(tiny_text):
    options = run_defaults() | {"data": str(tiny_text)}
    validation, test = (read_data({**options, "split": name}) for name in ("validation", "test"))
    first, second = (read_data({**options, "train_half": name}) for name in ("first", "second"))
    assert sorted(d.name for d in (*first.train, *second.train)) == sorted(d.name for d in validation.train)
    sides = (first.train, second.train, validation.held_out, test.held_out)
    names = [{d.name for d in side} for side in sides]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names))
