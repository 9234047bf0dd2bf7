"""Studies of runs: the grid, what is skipped, what is recorded, and the statistics against closed forms."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ebft import cli
from ebft.assemble import ablate
from ebft.assemble.ablate import check_cell
from ebft.assemble.grid import check_cells, default_name, folder_name, make_cells, parse_axes
from ebft.commands.derived import parse_option, run_defaults
from ebft.errors import UsageError
from ebft.loops.ablation.intervals import jackknife, paired_interval, standard_error, t_interval
from ebft.loops.ablation.results import Cell, Results
from ebft.loops.ablation.tables import compare, study_markdown
from tests.runs import go

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "ablation.md"


def axes(*texts):
    return parse_axes(texts, known=run_defaults(), parse=parse_option)


# The grid


def test_axes_have_the_options_own_types():
    found = axes("features=hidden,sbert", "lr=1e-3,0.01", "--micro-batch=2,default", "centred=true,false", "rank=3")
    assert found == {
        "features": ["hidden", "sbert"],
        "lr": [1e-3, 0.01],
        "micro_batch": [2, None],
        "centred": [True, False],
        "rank": [3],
    }
    assert isinstance(found["micro_batch"][0], int)
    assert axes("layers=0.25,0.5;last")["layers"] == ["0.25,0.5", "last"]
    assert axes("layers=0.25,0.5;")["layers"] == ["0.25,0.5"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["featurs=hidden"], "did you mean 'features'"),
        (["features"], "expected option=value"),
        (["features="], "expected one value or more"),
        (["features=hidden,,sbert"], "none of them empty"),
        (["features=hidden", "features=sbert"], "varied twice"),
        (["features=hidden,hidden"], "hidden is there twice"),
        (["steps=3,x"], "--over steps: 'x'"),
        (["centred=yes"], "neither true nor false"),
        (["seed=1,2"], "--seeds"),
        (["out=a,b"], "no such option to vary"),
        ([], "nothing to vary"),
    ],
)
def test_mistakes_in_axes(texts, message):
    with pytest.raises(UsageError) as caught:
        axes(*texts)
    assert message in str(caught.value)


def test_a_grid_is_every_combination():
    cells = make_cells(axes("features=hidden,ngram", "estimator=rloo,mean,none"), run_defaults())
    assert [cell.name for cell in cells] == [
        f"features={f}, estimator={e}" for f in ("hidden", "ngram") for e in ("rloo", "mean", "none")
    ]
    assert cells[4].options == run_defaults() | {"features": "ngram", "estimator": "mean"}


def test_one_at_a_time_leaves_the_rest_as_in_the_base():
    base = run_defaults() | {"estimator": "mean"}
    cells = make_cells(
        axes("features=sbert,ngram", "estimator=rloo,mean"), base, given=["estimator"], one_at_a_time=True
    )
    assert [cell.name for cell in cells] == ["base", "features=ngram", "estimator=rloo"]
    assert [cell.options["estimator"] for cell in cells] == ["mean", "mean", "rloo"]
    assert [cell.options["features"] for cell in cells] == [None, "ngram", None]  # None: the default, sbert


def test_options_of_components_go_to_the_cells_that_take_them():
    base = run_defaults() | {"layers": "last"}
    hidden, ngram = make_cells(axes("features=hidden,ngram"), base, given=["layers"])
    assert (hidden.options["layers"], ngram.options["layers"]) == ("last", None)
    with pytest.raises(UsageError, match="--layers last applies to no cell"):
        make_cells(axes("features=sbert,ngram"), base, given=["layers"])
    with pytest.raises(UsageError, match="drop the former"):
        make_cells(axes("features=hidden,ngram"), base, given=["features"])


def test_every_cell_is_checked():
    cells = make_cells(axes("features=hidden,ngram", "layers=last,mean"), run_defaults())
    with pytest.raises(UsageError, match="cell features=ngram, layers=last: --layers last does not apply"):
        check_cells(cells, check_cell)
    cells = make_cells(axes("whitening=group,sample"), run_defaults())
    with pytest.raises(UsageError, match=r"cell whitening=sample: .*--alignment cosine"):
        check_cells(cells, check_cell)
    check_cells(make_cells(axes("whitening=none,group,population", "pg=reinforce,clipped"), run_defaults()), check_cell)


def test_folders_are_apart_and_safe():
    settings = [
        {"features": f} for f in ("join:hidden+0.5*sbert", "join_hidden+0.5_sbert", "a/../b", "hidden", "x" * 300)
    ]
    names = [folder_name(Cell(s, s)) for s in settings]
    assert len(set(names)) == len(names)
    assert names[3] == "features=hidden"
    assert all(len(name) < 140 and "/" not in name and "*" not in name for name in names)


# The statistics


def test_the_interval_of_three_values_in_closed_form():
    """t with 2 degrees of freedom has the quantile function (2p - 1) √2 / √(1 - (2p - 1)²)."""
    values, p = [1.0, 2.0, 6.0], 0.95
    t = p * math.sqrt(2) / math.sqrt(1 - p**2)
    found = t_interval(values)
    assert found.mean == pytest.approx(3.0, rel=1e-12)
    assert found.half_width == pytest.approx(t * math.sqrt(7) / math.sqrt(3), rel=1e-9)
    assert found.number == 3


def test_the_interval_of_two_values_in_closed_form():
    """t with 1 degree of freedom is Cauchy's: tan(π (p - 1/2))."""
    assert t_interval([1.0, 3.0], confidence=0.9).half_width == pytest.approx(math.tan(math.pi * 0.45), rel=1e-9)


def test_few_values_have_no_interval():
    assert t_interval([4.0])[::2] == (4.0, 1)
    assert math.isnan(t_interval([4.0]).half_width)
    assert math.isnan(t_interval([]).mean)
    with pytest.raises(UsageError, match="confidence=1"):
        t_interval([1.0, 2.0], confidence=1)


def test_pairing_takes_away_what_seeds_share():
    base = {0: 10.0, 1: -5.0, 2: 70.0, 9: 1e9}
    found = paired_interval({2: 71.0, 0: 11.0, 1: -4.0, 7: -1e9}, base)
    assert found == (1.0, 0.0, 3)
    assert paired_interval({3: 1.0}, base).number == 0


def test_intervals_cover_as_often_as_they_say():
    random = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 4, generator=random, dtype=torch.float64).tolist()
    covered = sum(abs(f.mean) <= f.half_width for f in (t_interval(row, confidence=0.8) for row in draws)) / 2000
    assert abs(covered - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 2000)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.tensor([1.0, 4.0, 2.0, 9.0])
    found = jackknife(lambda rows: rows.mean(), x)
    assert found.value == 4.0
    torch.testing.assert_close(found.without, torch.tensor([5.0, 4.0, 14 / 3, 7 / 3], dtype=torch.float64))
    assert standard_error(found.without) == pytest.approx(x.double().std().item() / 2, rel=1e-12)
    assert math.isnan(standard_error(jackknife(lambda rows: rows.mean(), x[:1]).without))


def results(changes):
    """Of cells a, b, ...: seed -> change."""
    cells = [Cell({"pg": name}, {"pg": name, "features": "f" if name != "c" else "g"}) for name in changes]
    rows = [
        {"cell": cell.name, "pg": name, "seed": seed, "metric": "loss", "before": 1.0, "after": 1 + d, "difference": d}
        for cell, (name, by_seed) in zip(cells, changes.items(), strict=True)
        for seed, d in by_seed.items()
    ]
    return Results(("pg",), cells, rows, yardsticks={"loss": ("features",)})


def test_tables_pair_by_seed_and_refuse_other_yardsticks():
    found = results({"a": {0: 1.0, 1: 2.0}, "b": {1: 2.5, 0: 1.5, 5: 9.0}, "c": {0: 1.0}})
    a, b, c = compare(found, "loss")
    assert (a.against, a.change.mean) == (None, 1.5)
    assert b.against == (0.5, 0.0, 2)
    assert b.change.number == 3
    assert (c.against, c.unlike) == (None, ["features"])
    text = study_markdown(found)
    assert "| pg=c | 1 | 1 | 2 | +1 | – |" in text
    assert "| +0.5 ± 0 (2 seeds) |" in text
    assert "there is no interval over seeds" in text
    assert "under another features" in text


# Whole studies


@pytest.fixture
def command(tiny_folder, tiny_text, tmp_path):
    """Arguments of a tiny study, but for its axes."""
    options = {
        "policy": tiny_folder, "data": tiny_text, "device": "cpu", "dtype": "float32", "lora": 0, "length": 32,
        "stride": 9, "first": 5, "horizon": 4, "rollouts": 3, "batch": 2, "held_out": 4, "out": tmp_path / "study",
    }  # fmt: skip
    return ["ablate", *(str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value))]


def invoke(command, *more):
    return CliRunner().invoke(cli.app, [*command, *more], env={"COLUMNS": "160", "TERM": "dumb"})


def rows(out):
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_around_a_file_of_options(command, tmp_path):
    """Options of the file hold for every cell, flags go before them, and what is varied comes from --over."""
    file = tmp_path / "base.yaml"
    file.write_text("features: ngram\nngram: 1\nce: 0.5\nsteps: 9\nsave-every: 1\n")
    chosen = ["--config", str(file), "--steps", "1", "--over"]
    result = invoke(command, *chosen, "estimator=rloo,none")
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(rows(tmp_path / "study")) == 2 * 5
    for cell in ("estimator=rloo", "estimator=none"):
        stored = json.loads((tmp_path / "study" / cell / "seed-0" / "config.json").read_text())["options"]
        assert {name: stored[name] for name in ("features", "ngram", "ce", "steps", "save_every")} == {
            "features": "ngram", "ngram": 1, "ce": 0.5, "steps": 1, "save_every": 1,
        }  # fmt: skip
    result = invoke(command, *chosen, "features=ngram,hidden")
    assert isinstance(result.exception, UsageError)
    assert "--features ngram and --over features" in str(result.exception)
    file.write_text("estimatr: none\n")
    result = invoke(command, *chosen, "estimator=rloo,none")
    assert isinstance(result.exception, UsageError)
    assert f"--config {file}: unknown key 'estimatr' (did you mean 'estimator'?)" in str(result.exception)


def test_a_study_by_the_command_line(command, tmp_path, options):
    over = ["--over", "features=ngram,hidden", "--over", "entropy=0.01,0.02", "--steps", "1"]
    out = tmp_path / "study"
    result = invoke(command, *over, "--seed", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    found = rows(out)
    assert len(found) == 2 * 2 * 5
    assert {row["features"] for row in found} == {"ngram", "hidden"}
    for name in ("results.md", "axis-features.png", "axis-entropy.png"):
        assert (out / name).stat().st_size > 100
    assert "features=hidden, entropy=0.02" in result.output
    assert json.loads((out / "failures.json").read_text()) == {}

    # a cell is the run that `run` makes, held-out measurement of the start included
    cell = out / "features=hidden,entropy=0.02" / "seed-1"
    stored = json.loads((cell / "config.json").read_text())["options"]
    go(stored, tmp_path / "alone")
    for name in ("before.json", "samples.json"):
        assert (cell / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    alone, there = (json.loads((p / "evaluation.json").read_text()) for p in (tmp_path / "alone", cell))
    assert alone["metrics"] == there["metrics"]
    log = (out / "features=hidden,entropy=0.02" / "seed-1.log").read_text()
    assert "held-out before" not in log  # measured once, by the cell with the other weight of the entropy
    assert "held-out before" in (out / "features=hidden,entropy=0.01" / "seed-1.log").read_text()

    # again: nothing runs, the results are the same
    result = invoke(command, *over, "--seed", "1")
    assert "4 of 4 runs are done already" in result.output
    assert rows(out) == found
    # other options for the same folders are refused
    result = invoke(command, *over, "--seed", "1", "--lr", "0.5")
    assert isinstance(result.exception, UsageError)
    assert "--lr 0.5 (there default)" in str(result.exception)


def test_a_failure_is_recorded_and_the_others_go_on(command, tmp_path):
    out = tmp_path / "study"
    result = invoke(command, "--over", "layers=last,99;mean", "--features", "hidden", "--steps", "1")
    assert result.exit_code == 1, result.output
    (failure,) = json.loads((out / "failures.json").read_text()).items()
    assert failure[0] == "layers=last,99, seed 0"
    assert "layers 'last,99'" in failure[1]
    assert {row["layers"] for row in rows(out)} == {"mean"}
    assert "1 runs failed" in result.output
    assert "layers=last,99" in (out / "results.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--over", "estimatr=rloo"], "did you mean 'estimator'"),
        (["--over", "estimator=rloo,nome"], "cell estimator=nome: unknown estimator 'nome'"),
        (["--over", "steps=1,0"], "cell steps=0: --steps 0"),
        (["--over", "steps=1,2", "--seeds", "0"], "--seeds 0"),
        (["--over", "steps=1,2", "--data", "no/where"], "no/where"),
        (["--over", "steps=1,2", "--steps", "3"], "drop the former"),
    ],
)
def test_mistakes_leave_nothing(command, tmp_path, more, message):
    result = invoke(command, *more)
    assert isinstance(result.exception, UsageError), result.output
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_study(command, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("mine")
    result = invoke(command, "--over", "estimator=rloo,none")
    assert isinstance(result.exception, UsageError)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.txt"]


def test_a_study_that_was_killed_goes_on(command, tmp_path):
    out = tmp_path / "study"
    over = ["--over", "features=ngram", "--over", "estimator=rloo,none", "--steps", "6", "--save-every", "2"]
    process = subprocess.Popen([sys.executable, "cli.py", *command, *over], cwd=ROOT, stdout=subprocess.DEVNULL)
    second = out / "features=ngram,estimator=none" / "seed-0"
    deadline = time.monotonic() + 120
    while not (second / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = out / "features=ngram,estimator=rloo" / "seed-0" / "evaluation.json"
    stamp = first.stat().st_mtime_ns
    assert not (second / "evaluation.json").exists()
    result = invoke(command, *over)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "1 of 2 runs are done already" in result.output
    assert first.stat().st_mtime_ns == stamp
    assert len(rows(out)) == 2 * 5


def test_five_lines_of_python(options, tmp_path, monkeypatch, capsys):
    """Those of the example, but for the model and the size."""
    (code,) = re.findall(r"```python\n(from ebft.assemble import ablate\n.*?)```", EXAMPLE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 5
    tiny = {name: value for name, value in options.items() if name != "estimator"} | {"steps": 1, "held_out": 2}

    def small(over, *, out, seeds, **given):
        assert seeds == 2
        return ablate(over, out=tmp_path / out, **{**given, **tiny})

    monkeypatch.setattr("ebft.assemble.ablate", small)
    exec(code, {})
    shown = capsys.readouterr().out
    assert "estimator=rloo" in shown
    assert "estimator=none" in shown


def test_misspelt_options_in_python(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'horizon'"):
        ablate({"estimator": ["rloo"]}, out=tmp_path / "other", horizn=3)
    with pytest.raises(UsageError, match=r"--over estimatr: .*did you mean 'estimator'"):
        ablate({"estimatr": ["rloo"]}, out=tmp_path / "other")


def test_the_same_command_finds_its_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [word for word in command if word not in ("--out", str(tmp_path / "study"))]
    over = ["--features", "ngram", "--steps", "1", "--over"]
    result = invoke(command, *over, "estimator=rloo")
    assert result.exit_code == 0, (result.output, result.exception)
    result = invoke(command, *over, "estimator=rloo,none")  # another value adds to it
    assert "1 of 2 runs are done already" in result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ablate-estimator-")
    assert default_name(["lr"], {"steps": 1}) != default_name(["lr"], {"steps": 2})


def test_help_has_the_options_of_run():
    text = invoke(["ablate"], "--help").output
    for name in run_defaults():
        assert f"--{name.replace('_', '-')}" in text
    assert "--one-at-a-time" in text
    assert "--resume" not in text
