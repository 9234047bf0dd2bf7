"""The benchmark of recipes: what it runs, what it keeps, and what it makes of that (no model is loaded)."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import progress, progress_recipes, progress_report
from benchmarks.progress_recipes import MEASURE, METRICS, RECIPES, options_of, parse
from ebft.assemble import resolve_run, settle
from ebft.assemble.evaluation import resolve_maps
from ebft.cli import app
from ebft.commands.derived import evaluate_defaults, parse_option, run_defaults
from ebft.errors import UsageError
from ebft.loops.evaluation.result import csv_bytes

ROWS = 4
TOKENS = 50_000  # of a step
SECONDS = {name: 1.0 + place for place, name in enumerate(RECIPES)}
LOSS = {"paper": -0.01, "paper-adapters": -0.01, "plain": -0.03}  # of a policy less that of the start, by recipe
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
    return made


def sit(out: Path, cells: str, *, minutes: float | None = 2.0, seeds: str = "0,1") -> str:
    """One sitting; the report."""
    progress.main(out, cells=cells, minutes=minutes, seeds=seeds)
    return (out / "progress.md").read_text()


def test_every_recipe_gets_the_same_time_which_stays_what_it_was(stand, tmp_path, monkeypatch):
    sit(tmp_path, "all", seeds="0")
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert {name: row["steps"] for name, row in steps["recipes"].items()} == {
        name: int(120 / seconds) for name, seconds in SECONDS.items()
    }
    assert all(row["machine"] == MACHINE for row in steps["recipes"].values())
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
    assert (cell["options"], cell["machine"]) == (options_of("plain"), MACHINE)
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


def test_the_report_is_of_what_is_there(stand, tmp_path):
    text = sit(tmp_path, "plain,paper-adapters,mean:0")
    (plain,) = [line for line in text.splitlines() if line.startswith("| plain")]
    cells = [cell.strip() for cell in plain.split("|")[1:-1]]
    # t(1 degree of freedom) = 12.706; s/sqrt(2) = 0.001; against the other the seeds' own parts cancel
    assert cells[:7] == ["plain", str(int(120 / SECONDS["plain"])), "0.2", "-0.0300 ± 0.0127", "-0.1500 ± 0.0635",
                         "-0.0200 ± 0.0000", "-0.0600 ± 0.0254"]  # fmt: skip
    assert cells[7].startswith("-0.0290 ± 0.00")
    (mean,) = [line for line in text.splitlines() if line.startswith("| mean |")]
    columns = [cell.strip() for cell in mean.split("|")]
    assert (columns[4], columns[6]) == ("+0.0010 ± –", "+0.0100 ± –")
    assert mean.rstrip(" |").endswith("–")
    missing = json.loads((tmp_path / "progress.json").read_text())["missing"]
    assert "mean:1" in missing
    assert len(missing) == 2 * len(RECIPES) - 5
    assert f"Missing: {', '.join(missing)}." in text
    assert "Steps timed on: a processor, 2 threads, cpu." in text


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
    monkeypatch.setitem(RECIPES, "plain", "features=hidden estimator=rloo")
    with pytest.raises(UsageError, match=r"steps\.json has plain with other estimator"):
        sit(tmp_path, "none")
    steps = json.loads((tmp_path / "steps.json").read_text())
    del steps["recipes"]["plain"]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    with pytest.raises(UsageError, match=r"plain-0\.json has plain with other estimator"):
        sit(tmp_path, "plain:0")


def test_cells_are_chosen_by_name():
    assert progress.chosen_cells("plain, paper:1", [0, 1]) == [("plain", 0), ("plain", 1), ("paper", 1)]
    assert progress.chosen_cells("all", [0]) == [(recipe, 0) for recipe in RECIPES]
    assert progress.chosen_cells("none", [0]) == []
    for wrong in ("plane", "plain:2", "plain:x", ""):
        with pytest.raises(UsageError, match="expected RECIPE or RECIPE:SEED"):
            progress.chosen_cells(wrong, [0, 1])


# ---- recipes


def parsed(recipe: str) -> dict:
    return {name: parse_option(name, text) for name, text in options_of(recipe).items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_accepted_by_run(recipe):
    options = run_defaults() | parsed(recipe)
    assert resolve_run(options)["features"]
    assert options["batch"] % (options["micro_batch"] or 1) == 0


def in_full(options: dict) -> dict:
    """With the defaults of the method and of the components."""
    return settle(options) | {n: value for group in resolve_run(options).values() for n, value in group.items()}


def test_the_papers_recipe_is_that_of_its_preset():
    preset = yaml.safe_load((files("ebft") / "presets" / "paper-code.yaml").read_text())
    # what is trained and for how long, and what changes no number
    elsewhere = {"policy", "data", "length", "epochs", "seed", "ce_tokens", "checkpointing"}
    ours = in_full(run_defaults() | parsed("paper-mixture"))
    theirs = in_full(run_defaults() | preset)
    compared = preset.keys() - elsewhere
    assert len(compared) > 25
    assert {n: ours[n] for n in compared} == {n: theirs[n] for n in compared}
    assert parsed("paper") == parsed("paper-mixture") | {"ce": 0.0}


def test_defaults_are_those_of_run():
    assert in_full(run_defaults() | parsed("defaults")) == in_full(run_defaults()) | {"dtype": "float32"}


def test_the_measurement_is_of_options_of_evaluate():
    defaults = evaluate_defaults()
    assert MEASURE.keys() <= defaults.keys()
    assert resolve_maps({**defaults, "features": MEASURE["features"]}).keys() == {"hidden"}
    (loss, _) = METRICS.values()
    assert (loss.of, str(loss.at)) == (MEASURE["features"], MEASURE["horizons"])


def test_a_cell_by_the_real_commands(tiny_folder, tiny_text, tmp_path, monkeypatch):
    """A tiny model, in this process: the flags are taken and the files hold what is read."""
    shape = f"data={tiny_text} length=32 stride=7 first=5"
    recipes = {"plain": f"{RECIPES['plain']} {shape} batch=2 rollouts=3"}
    monkeypatch.setattr(progress, "POLICY", str(tiny_folder))
    monkeypatch.setattr(progress, "MEASURE", MEASURE | parse(f"{shape} held_out=4 rollouts=3"))
    monkeypatch.setattr(progress, "PROBE", 2)
    for module in (progress, progress_recipes, progress_report):
        monkeypatch.setattr(module, "RECIPES", recipes)
    monkeypatch.setattr(progress, "command", lambda *arguments: app(list(arguments), standalone_mode=False))
    text = sit(tmp_path, "plain", minutes=1e-4, seeds="0")
    cell = json.loads((tmp_path / "cells" / "plain-0.json").read_text())
    assert (cell["steps"], cell["measure"]["held_out"]) == (1, "4")
    loss = cell["changes"]["feature_matching_loss"]
    assert 0 < abs(loss["value"]) < 1
    assert loss["standard_error"] > 0
    (plain,) = [line for line in text.splitlines() if line.startswith("| plain | 1 |")]
    assert plain.split("|")[4].strip() == f"{loss['value']:+.4f} ± –"
    assert 64 < cell["tokens"] <= 208  # 2 sequences of 32, with 3 rollouts of 8 from each of 3 anchors
