"""The benchmark of recipes: what it runs, what it keeps, and what it makes of that (no model is loaded)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import progress
from benchmarks.progress_recipes import HALF_HOUR, PLANS, parse
from ebft.assemble import resolve_run, settle
from ebft.assemble.evaluation import resolve_maps
from ebft.cli import app
from ebft.commands.derived import evaluate_defaults, parse_option, run_defaults
from ebft.errors import UsageError
from ebft.loops.evaluation.result import csv_bytes

ROWS = 4
TOKENS = 50_000  # of a step
REWARD = "features=hidden estimator=rloo_tuned"
PLAN = dataclasses.replace(
    HALF_HOUR, recipes={"paper": "lr=1e-6", "plain": REWARD, "mean": f"{REWARD} pooling=mean", "short": "steps=3"}
)
METRICS = PLAN.metrics
SECONDS = {name: 1.0 + place for place, name in enumerate(PLAN.recipes)}
LOSS = {"paper": -0.01, "plain": -0.03}  # of a policy less that of the start, by recipe
MACHINE = {"processor": "a processor", "threads": 2, "device": "cpu", "python": "3.11.7"}


class Stand:
    """What the commands would leave, as far as it is read; `python` and `documents` are those of the sitting."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.python, self.documents = "3.11.7", 0

    def __call__(self, *arguments: str) -> None:
        self.calls.append(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (self.run if arguments[0] == "run" else self.evaluate)(out, arguments[arguments.index("--policy") + 1])

    def run(self, out: Path, policy: str) -> None:
        recipe = out.name.rpartition("-")[0]
        times = [100.0, SECONDS[recipe], SECONDS[recipe] + 0.5, SECONDS[recipe] - 0.5]  # the first step is slow
        lines = [f"{time},{TOKENS / time}" for time in times]
        (out / "metrics.csv").write_text("time_step,tokens_per_second\n" + "\n".join(lines) + "\n")
        (out / "config.json").write_text(json.dumps({"machine": MACHINE, "versions": {"torch": "2"}}))
        (out / "evaluation.json").write_text("{}")

    def evaluate(self, out: Path, policy: str) -> None:
        recipe, _, seed = Path(policy).name.rpartition("-")
        change = 0.0 if policy == progress.POLICY else LOSS.get(recipe, 0.0) + {"0": 0.001, "1": -0.001}[seed]
        anchors = torch.tensor([7.0, 7.0, 6.0, 7.0 - self.documents], dtype=torch.float64)
        noise = torch.tensor([0.01, -0.01, 0.0, 0.0], dtype=torch.float64) * (policy != progress.POLICY)
        values = dict(zip(METRICS, (0.6 + change + noise, 2.0 + 2 * change + noise), strict=True))
        totals = {METRICS[name]: (value * anchors, anchors) for name, value in values.items()}
        (out / "sequences.csv").write_bytes(csv_bytes(totals))
        (out / "evaluation.json").write_text(json.dumps({"machine": {**MACHINE, "python": self.python}}))

    def of(self, kind: str) -> list[str]:
        """Names of the folders that a command was run for."""
        return [Path(call[call.index("--out") + 1]).name for call in self.calls if call[0] == kind]


@pytest.fixture
def stand(monkeypatch) -> Stand:
    made = Stand()
    monkeypatch.setattr(progress, "command", made)
    monkeypatch.setitem(progress.PLANS, "plan", PLAN)
    return made


def sit(out: Path, cells: str, *, minutes: float | None = 2.0, seeds: str = "0,1", against: str | None = None) -> str:
    """One sitting; the report."""
    progress.main(out, "plan", cells=cells, minutes=minutes, seeds=seeds, against=against)
    return (out / "progress.md").read_text()


def test_every_recipe_gets_the_same_time_which_stays_what_it_was(stand, tmp_path, monkeypatch):
    sit(tmp_path, "all", seeds="0")
    steps = json.loads((tmp_path / "steps.json").read_text())
    timed = ("paper", "plain", "mean")
    assert {name: row["steps"] for name, row in steps["recipes"].items()} == {
        **{name: int(120 / SECONDS[name]) for name in timed},
        "short": 3,
    }
    assert "short-probe" not in stand.of("run")
    assert all(steps["recipes"][name]["machine"] == MACHINE for name in timed)
    monkeypatch.setitem(SECONDS, "plain", 50.0)  # a slower machine
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "cells")
    stand.calls.clear()
    sit(tmp_path, "plain:0", minutes=None)
    assert stand.of("run") == ["plain-0"]
    (call,) = [call for call in stand.calls if call[0] == "run"]
    assert call[call.index("--steps") + 1] == str(steps["recipes"]["plain"]["steps"])
    with pytest.raises(UsageError, match=r"minutes 3.*is for 2"):
        sit(tmp_path, "none", minutes=3.0)


def test_only_what_is_asked_for_is_timed(stand, tmp_path):
    sit(tmp_path, "none")
    assert stand.calls == []
    sit(tmp_path, "plain:0")
    assert stand.of("run") == ["plain-probe", "plain-0"]
    sit(tmp_path, "mean:1")
    assert stand.of("run") == ["plain-probe", "plain-0", "mean-probe", "mean-1"]


def test_a_cell_is_kept_with_its_paired_change(stand, tmp_path):
    sit(tmp_path, "plain:1")
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["plain-1.json"]
    cell = json.loads((tmp_path / "cells" / "plain-1.json").read_text())
    assert (cell["recipe"], cell["seed"], cell["steps"]) == ("plain", 1, int(120 / SECONDS["plain"]))
    assert (cell["options"], cell["machine"]) == (PLAN.options_of("plain"), MACHINE)
    assert cell["train_s"] == 100.0 + 3 * SECONDS["plain"]
    assert cell["tokens"] == 4 * TOKENS
    loss, entropy = (cell["changes"][name] for name in METRICS)
    assert (loss["value"], entropy["value"]) == pytest.approx((-0.031, -0.062))
    assert loss["low"] < loss["value"] < loss["high"]
    assert 0 < loss["standard_error"] < 0.01  # of the differences; the noise, not the values
    assert len(cell["sums"]["feature_matching_loss"][0]) == ROWS


def test_what_is_kept_is_not_done_again_though_the_runs_are_gone(stand, tmp_path):
    first = sit(tmp_path, "plain:0")
    shutil.rmtree(tmp_path / "runs")
    stand.calls.clear()
    assert sit(tmp_path, "plain:0") == first
    assert stand.calls == []
    sit(tmp_path, "plain")
    assert (stand.of("run"), stand.of("evaluate")) == (["plain-1"], ["plain-1-evaluation"])  # not the start


def test_a_run_that_was_stopped_goes_on(stand, tmp_path):
    sit(tmp_path, "plain:0")
    (tmp_path / "cells" / "plain-0.json").unlink()
    (tmp_path / "runs" / "plain-0" / "evaluation.json").unlink()
    stand.calls.clear()
    sit(tmp_path, "plain:0")
    ((name, *rest),) = stand.calls
    assert (name, rest[-1]) == ("run", "--resume")


def columns(text: str, start: str) -> list[str]:
    """The cells of the row of a table that starts with this."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_report_is_of_what_is_there(stand, tmp_path):
    text = sit(tmp_path, "plain,paper,mean:0")
    table, against = text.split("| against paper | seeds |")
    plain, mean = columns(table, "plain"), columns(table, "mean")
    # t(1 degree of freedom) = 12.706; s/sqrt(2) = 0.001
    minutes = f"{SECONDS['plain'] * int(120 / SECONDS['plain']) / 60:.3g}"
    assert plain[:4] == ["plain", str(int(120 / SECONDS["plain"])), "0.2", minutes]
    assert plain[4].startswith("-0.0300 ± 0.0127 (-0.03")
    assert plain[5].startswith("-0.0600 ± 0.0254 (-0.06")
    assert plain[6].startswith("-0.0290 ± 0.00")
    assert mean[4].startswith("+0.0010 ± – (")
    assert mean[7] == "–"
    # what a seed does to both cancels, and so does what a text does
    assert columns(against, "plain") == ["plain", "2", "-0.0200 ± 0.0000 (-0.0200 to -0.0200)",
                                         "-0.0400 ± 0.0000 (-0.0400 to -0.0400)"]  # fmt: skip
    assert columns(against, "mean")[:3] == ["mean", "1", "+0.0100 ± – (+0.0100 to +0.0100)"]
    assert "| paper |" not in against
    missing = json.loads((tmp_path / "progress.json").read_text())["missing"]
    assert missing == ["mean:1", "short:0", "short:1"]
    assert f"Missing: {', '.join(missing)}." in text
    assert "Steps timed on: a processor, 2 threads, cpu." in text


def test_the_recipe_that_others_are_compared_with_can_be_another(stand, tmp_path):
    sit(tmp_path, "plain,paper,mean:0")
    _, against = sit(tmp_path, "none", against="plain").split("| against plain | seeds |")
    assert columns(against, "paper")[:3] == ["paper", "2", "+0.0200 ± 0.0000 (+0.0200 to +0.0200)"]
    assert columns(against, "mean")[:3] == ["mean", "1", "+0.0300 ± – (+0.0300 to +0.0300)"]
    assert "| plain |" not in against
    with pytest.raises(UsageError, match="--against plane: expected a recipe, paper, plain"):
        sit(tmp_path, "none", against="plane")


def test_the_interval_over_texts_is_of_the_difference(stand, tmp_path):
    sit(tmp_path, "plain,paper", seeds="0")
    path = tmp_path / "cells" / "plain-0.json"
    cell = json.loads(path.read_text())
    name = next(iter(METRICS))
    sums, counts = cell["sums"][name]
    cell["sums"][name] = [[sums[0] + 0.7, *sums[1:]], counts]  # one text more, by 0.7 over its 7 anchors
    path.write_text(json.dumps(cell))
    sit(tmp_path, "none", seeds="0")
    row = json.loads((tmp_path / "progress.json").read_text())["recipes"]["plain"]["against"][name]
    assert row["value"] == pytest.approx(-0.02 + 0.7 / 27)
    assert row["low"] < row["value"] < row["high"]
    assert row["standard_error"] > 0.005


def test_other_sequences_are_refused(stand, tmp_path):
    sit(tmp_path, "plain:0")
    for change, told in (({"python": "3.13.0"}, r"Python 3\.11\.7, here 3\.13\.0"), ({"documents": 1}, "tokens")):
        vars(stand).update({"python": "3.11.7", "documents": 0, **change})
        shutil.rmtree(tmp_path / "runs" / "plain-1-evaluation", ignore_errors=True)
        with pytest.raises(UsageError, match=rf"other held-out sequences.*{told}"):
            sit(tmp_path, "plain:1")
        assert not (tmp_path / "cells" / "plain-1.json").exists()


def test_a_recipe_that_changed_is_refused(stand, tmp_path, monkeypatch):
    sit(tmp_path, "plain:0")
    changed = {**PLAN.recipes, "plain": "features=hidden estimator=rloo"}
    monkeypatch.setitem(progress.PLANS, "plan", dataclasses.replace(PLAN, recipes=changed))
    with pytest.raises(UsageError, match=r"steps\.json has plain with other estimator"):
        sit(tmp_path, "none")
    steps = json.loads((tmp_path / "steps.json").read_text())
    del steps["recipes"]["plain"]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    with pytest.raises(UsageError, match=r"plain-0\.json has plain with other estimator"):
        sit(tmp_path, "plain:0")


def test_cells_are_chosen_by_name():
    names = ("paper", "plain", "mean")
    assert progress.chosen_cells("plain, paper:1", names, [0, 1]) == [("plain", 0), ("plain", 1), ("paper", 1)]
    assert progress.chosen_cells("all", names, [0]) == [(recipe, 0) for recipe in names]
    assert progress.chosen_cells("none", names, [0]) == []
    for wrong in ("plane", "plain:2", "plain:x", ""):
        with pytest.raises(UsageError, match="expected RECIPE or RECIPE:SEED"):
            progress.chosen_cells(wrong, names, [0, 1])


def test_what_does_not_apply_is_refused(tmp_path):
    with pytest.raises(UsageError, match="other: expected a plan, half-hour or levers"):
        progress.main(tmp_path, "other")
    with pytest.raises(UsageError, match="--minutes 3: every recipe of this plan has its steps"):
        progress.main(tmp_path, "levers", cells="none", minutes=3.0)


# ---- recipes


def parsed(plan: str, recipe: str) -> dict:
    return {name: parse_option(name, text) for name, text in PLANS[plan].options_of(recipe).items()}


@pytest.mark.parametrize(("plan", "recipe"), [(plan, recipe) for plan in PLANS for recipe in PLANS[plan].recipes])
def test_every_recipe_is_accepted_by_run(plan, recipe):
    options = run_defaults() | parsed(plan, recipe)
    assert resolve_run(options)["features"]
    assert options["batch"] % (options["micro_batch"] or 1) == 0


def test_levers_see_as_many_sequences():
    seen = {
        options["batch"] * options["steps"] for options in (parsed("levers", name) for name in PLANS["levers"].recipes)
    }
    assert seen == {128}


def in_full(options: dict) -> dict:
    """With the defaults of the method and of the components."""
    return settle(options) | {n: value for group in resolve_run(options).values() for n, value in group.items()}


def test_the_papers_recipe_is_that_of_its_preset():
    preset = yaml.safe_load((files("ebft") / "presets" / "paper-code.yaml").read_text())
    # what is trained and for how long, what changes no number, and the policy gradient alone
    elsewhere = {"policy", "data", "length", "epochs", "seed", "ce_tokens", "checkpointing", "ce"}
    ours = in_full(run_defaults() | parsed("half-hour", "paper"))
    theirs = in_full(run_defaults() | preset)
    compared = preset.keys() - elsewhere
    assert len(compared) > 25
    assert {n: ours[n] for n in compared} == {n: theirs[n] for n in compared}
    assert ours["ce"] == 0


@pytest.mark.parametrize(("plan", "dtype"), [("half-hour", "float32"), ("levers", "auto")])
def test_defaults_are_those_of_run(plan, dtype):
    assert in_full(run_defaults() | parsed(plan, "defaults")) == in_full(run_defaults()) | {"dtype": dtype}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_measurement_is_of_options_of_evaluate(plan):
    defaults = evaluate_defaults()
    assert plan.measure.keys() <= defaults.keys()
    maps = resolve_maps({**defaults, "features": plan.measure["features"]})
    *losses, _ = plan.metrics.values()
    assert {loss.of for loss in losses} == maps.keys()
    assert {str(loss.at) for loss in losses} == {plan.measure["horizons"]}


def test_a_cell_by_the_real_commands(tiny_folder, tiny_text, tmp_path, monkeypatch):
    """A tiny model, in this process: the flags are taken and the files hold what is read."""
    shape = f"data={tiny_text} length=32 stride=7 first=5"
    recipes = {"plain": f"{REWARD} {shape} batch=2 rollouts=3"}
    measure = {**PLAN.measure, **parse(f"{shape} held_out=4 rollouts=3")}
    plan = dataclasses.replace(PLAN, recipes=recipes, against="plain", measure=measure)
    monkeypatch.setitem(progress.PLANS, "plan", plan)
    monkeypatch.setattr(progress, "POLICY", str(tiny_folder))
    monkeypatch.setattr(progress, "PROBE", 2)
    monkeypatch.setattr(progress, "command", lambda *arguments: app(list(arguments), standalone_mode=False))
    text = sit(tmp_path, "plain", minutes=1e-4, seeds="0")
    cell = json.loads((tmp_path / "cells" / "plain-0.json").read_text())
    assert (cell["steps"], cell["measure"]["held_out"]) == (1, "4")
    loss = cell["changes"]["feature_matching_loss"]
    assert 0 < abs(loss["value"]) < 1
    assert loss["standard_error"] > 0
    (plain,) = [line for line in text.splitlines() if line.startswith("| plain | 1 |")]
    low, high = (f"{loss[end]:+.4f}" for end in ("low", "high"))
    assert plain.split("|")[5].strip() == f"{loss['value']:+.4f} ± – ({low} to {high})"
    assert 64 < cell["tokens"] <= 208  # 2 sequences of 32, with 3 rollouts of 8 from each of 3 anchors
