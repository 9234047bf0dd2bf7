"""What a study runs, by budget and task, before anything does."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ebft.assemble import study_cells
from ebft.assemble.ablate import check_cell
from ebft.assemble.evaluation import settle_options
from ebft.assemble.study_arms import (
    TASKS,
    Task,
    answers_prompts,
    arm_options,
    evaluation_options,
    shared_options,
)
from ebft.assemble.study_budget import budget_names, read_budget, settle_settings
from ebft.commands.derived import evaluate_defaults, run_defaults
from ebft.errors import UsageError
from ebft.loops.study.arms import ARMS

ROOT = Path(__file__).resolve().parent.parent


def judging(flags, *, task="qa-code", budget="small", tests=True):
    """What a study says of judging programs: of its runs by RLVR, and of its evaluations."""
    chosen = read_budget(budget, task)
    settings = settle_settings(chosen, {}, where=budget, verifier="unit_tests")
    shared = shared_options(chosen, task=TASKS[task], flags=flags, defaults=run_defaults())
    arms = arm_options(
        chosen, settings, shared, flags=flags, verifier="unit_tests", per_row=1.0, tests=tests
    )  # fmt: skip
    measured = evaluation_options(
        settings, shared, task=TASKS[task], answers=True, defaults=evaluate_defaults(), bootstrap=50, level=0.95
    )
    return [{name: own[name] for name in ("test_timeout", "test_prompt")} for own in (arms["rlvr"], measured)]


def test_an_evaluation_without_flags_is_as_it_was():
    """Folders of studies that earlier versions began go on: an evaluation of other options is refused."""
    assert judging({})[1] == {name: evaluate_defaults()[name] for name in ("test_timeout", "test_prompt")}


def test_training_and_scoring_judge_the_same_programs(tmp_path):
    flags = {"test_timeout": 9.0, "test_prompt": False}
    assert judging(flags) == [flags, flags]
    own = yaml.safe_load((ROOT / "ebft/budgets/small.yaml").read_text())
    own["run"]["test_timeout"], own["methods"]["rlvr"]["test_prompt"] = 8, False
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    assert judging({}, budget=str(tmp_path / "mine.yaml")) == [{"test_timeout": 8.0, "test_prompt": False}] * 2


def test_how_programs_are_judged_applies_where_there_are_some():
    budget = read_budget("small", "qa-code")
    flags = {"test_timeout": 9.0}
    settings = settle_settings(budget, {"arms": "sft"}, where="small")
    shared = shared_options(budget, task=TASKS["qa-code"], flags=flags, defaults=run_defaults())
    resolve = partial(arm_options, budget, settings, shared, flags=flags, verifier=None, per_row=1.0)
    assert resolve(tests=True)["sft"]["test_timeout"] is None
    with pytest.raises(UsageError, match=r"--test-timeout 9.0 applies to no arm"):
        resolve(tests=False)


def test_where_answers_end_applies_where_some_are_drawn():
    budget, flags = read_budget("small", "code"), {"stop": ["\n"]}
    settings = settle_settings(budget, {"arms": "sft"}, where="small")
    shared = shared_options(budget, task=TASKS["code"], flags=flags, defaults=run_defaults())
    resolve = partial(arm_options, budget, settings, shared, flags=flags, verifier=None, per_row=1.0)
    assert resolve(answers=True)
    with pytest.raises(UsageError, match=r"--stop \['\\n'\] applies to no arm"):
        resolve(answers=False)


def test_answers_end_where_the_study_says_and_not_where_those_of_a_run_did(tmp_path, monkeypatch):
    """RLVR may have been trained with other ends, or with none."""
    measured = {}
    monkeypatch.setattr(
        study_cells, "evaluate_from_options", lambda options, *, explicit, **rest: measured.update(options, on=explicit)
    )
    folder = tmp_path / "run"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"options": {"stop": [], "length": 64}}))
    chosen = read_budget("paper", "qa-code")
    settings = settle_settings(chosen, {}, where="paper", verifier="unit_tests")
    shared = shared_options(chosen, task=TASKS["qa-code"], flags={}, defaults=run_defaults())
    options = evaluation_options(
        settings, shared, task=TASKS["qa-code"], answers=True, defaults=evaluate_defaults(), bootstrap=50, level=0.95
    )
    cell = study_cells.Testing("Base, test", options, tmp_path / "test", "test", arm="base")
    study_cells.begin_cell(SimpleNamespace(base=str(folder)), cell, False, None)
    settled = settle_options(measured, measured["on"], policy=str(folder))
    assert settled["stop"] == options["stop"] == list(shared["stop"]) != []
    assert settled["length"] == options["length"] != 64


@pytest.mark.parametrize("name", budget_names())
@pytest.mark.parametrize("task", [*TASKS, "mine.jsonl"])
def test_every_budget_serves_every_task(name, task):
    budget = read_budget(name, task)
    verifier = {"code": None, "translation": "bleu"}.get(task, "unit_tests")
    settings = settle_settings(budget, {}, where=name, verifier=verifier)
    assert ("rlvr-ws" in settings.arms) == (verifier is not None)
    shared = shared_options(budget, task=TASKS.get(task, Task(task)), flags={}, defaults=run_defaults())
    options = arm_options(budget, settings, shared, flags={}, verifier=verifier, per_row=1.6)
    amounts = []
    for arm, own in options.items():
        check_cell({"policy": "any", **own, "lr": settings.lr_grid.get(arm, (1.0,))[0], "seed": 0})
        share = ARMS[arm].share
        rows = own["epochs"] if own["steps"] is None else own["steps"] * own["batch"]
        packed = not answers_prompts(arm) and own["steps"] is not None
        amounts.append(rows / share * (1.6 if packed else 1))
        assert own["split"] == "validation"
        assert own["train_half"] == (None if own["steps"] is None else ARMS[arm].half)
        assert ARMS[arm].after is None or arm == "rlvr-ws" or own["backbone"] == budget.run["policy"]
        assert own["verifier"] == (verifier if arm.startswith("rlvr") else None)
    assert max(amounts) <= 1.1 * min(amounts)  # batches are whole numbers
    assert set(settings.lr_grid) == {arm for arm in settings.arms if ARMS[arm].method and not ARMS[arm].rate_of}


def test_a_budget_of_the_users_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("eval_rows: 3\nrun: {steps: 2, lr: 1e-3}\ntasks: {code: {eval_rows: 4}}\n")
    path = str(tmp_path / "mine.yaml")
    assert [read_budget(path, task).settings["eval_rows"] for task in ("code", "translation")] == [4, 3]
    with pytest.raises(UsageError, match="says nothing of arms: give --arms"):
        settle_settings(read_budget(path, "code"), {}, where="mine")
    (tmp_path / "mine.yaml").write_text("evalrows: 3\n")
    with pytest.raises(UsageError, match="did you mean 'eval_rows'"):
        read_budget(path, "code")
    (tmp_path / "mine.yaml").write_text("run: {stepps: 3}\n")
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        read_budget(path, "code")


def test_only_arms_with_work_for_the_host_overlap_it():
    budget, flags = read_budget("small", "qa-code"), {"overlap": 2}
    settings = settle_settings(budget, {"arms": "sft,ebft,rlvr"}, where="small", verifier="unit_tests")
    shared = shared_options(budget, task=TASKS["qa-code"], flags=flags, defaults=run_defaults())
    given = {"flags": flags, "verifier": "unit_tests", "per_row": 1.0}
    found = arm_options(budget, settings, shared, **given)
    assert {name: own["overlap"] for name, own in found.items()} == {"sft": 1, "ebft": 1, "rlvr": 2}
    alone = settle_settings(budget, {"arms": "sft,ebft"}, where="small")
    with pytest.raises(UsageError, match="--overlap 2 applies to no arm"):
        arm_options(budget, alone, shared, **given)
