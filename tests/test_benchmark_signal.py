"""The benchmark of the gradient's signal: what it asks `signal` for, and what it adds to its table."""

import json
import typing
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import gradient_signal
from benchmarks.gradient_signal import TABLES, Table
from ebft.assemble import resolve_run, settle
from ebft.assemble.checks import OF_TOKENS
from ebft.assemble.configurations import OF_MATCHING, OF_SAMPLING, parse_configuration, parse_settings
from ebft.cli import app
from ebft.commands.derived import run_defaults
from ebft.commands.run import run
from ebft.files import write_json
from ebft.loops.signal.plan import CROSS_ENTROPY
from ebft.loops.signal.store import GradientStore
from tests.command_line import replaced

RESULTS = Path(gradient_signal.__file__).with_name("results")
UNBIASED = ("rloo", "rloo_tuned", "none")
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def given(arguments, name):
    return [arguments[place + 1] for place, word in enumerate(arguments) if word == f"--{name}"]


def asked_for(table):
    """Name -> options of every configuration, as `signal` reads them from the command line."""
    arguments, hints = gradient_signal.measurement(Path("out"), 3, table), typing.get_type_hints(run)
    (shared,) = given(arguments, "set")
    base = run_defaults() | parse_settings(shared, hints=hints)
    return dict(parse_configuration(text, base=base, hints=hints) for text in given(arguments, "config"))


def in_full(options):
    """With the defaults of the method and of the components."""
    return settle(options) | {n: value for group in resolve_run(options).values() for n, value in group.items()}


def expected_gradient(options):
    """What the expected gradient depends on."""
    full = in_full(options)
    names = (
        *("features", "match", "whitening", "objective", "alignment", "kernel", "diversity", "temperature", "top_p"),
        *("sampler", "stride", "first", "horizon"),
    )
    weights = "last" if full["credit"] is None else full["horizons"] or "uniform"
    return {name: full.get(name) for name in names} | {"weights": weights}


# ---- what is asked for


@each_table
def test_every_configuration_is_accepted(table):
    options = asked_for(table)
    assert list(options) == list(table.configurations)
    for settings in options.values():
        assert resolve_run(settings)["features"]
    arguments = gradient_signal.measurement(Path("out"), 3, table)
    (reference,) = given(arguments, "reference")
    assert reference in options
    assert (given(arguments, "batches"), given(arguments, "dtype")) == (["3"], ["float32"])


@each_table
def test_the_estimator_is_the_papers_unless_said(table):
    for name, settings in asked_for(table).items():
        text = table.configurations[name]
        assert "estimator" in text or "first_token" in text or settings["estimator"] == "rloo", name


@each_table
def test_the_papers_reward_is_that_of_its_preset_but_for_the_temperature(table):
    preset = yaml.safe_load((files("ebft") / "presets" / "paper-code.yaml").read_text())
    compared = {
        *("features", "backbone", "layers", "unit_norm", "pooling", "whitening", "objective", "alignment", "diversity"),
        *("estimator", "sampler", "stride", "first", "horizon", "rollouts", "top_p"),
    }
    assert compared <= preset.keys()
    ours = in_full(asked_for(table)["paper"])
    assert {name: ours[name] for name in compared} == {name: preset[name] for name in compared}
    assert (ours["temperature"], preset["temperature"]) == (1.0, 0.6)


FAMILIES = [(table, family) for table in TABLES.values() for family in table.families]


@pytest.mark.parametrize(("table", "family"), FAMILIES, ids=[family[0] for _, family in FAMILIES])
def test_a_family_has_one_expected_gradient(table, family):
    options = asked_for(table)
    wanted = expected_gradient(options[family[0]])
    for name in family:
        full = in_full(options[name])
        assert expected_gradient(options[name]) == wanted, name
        assert (full["estimator"] in UNBIASED, full["trace"], full["whitening"]) == (True, None, "none"), name


def test_the_defaults_of_run_are_those_of_run():
    ours, theirs = in_full(asked_for(TABLES["features"])["defaults of run"]), in_full(run_defaults())
    assert {name for name in ours if ours[name] != theirs.get(name)} == set()


KEPT = {
    "levers": RESULTS / "signal.json",
    "features": RESULTS / "signal-features" / "signal.json",
    "second": RESULTS / "signal-second" / "signal.json",
}


@pytest.mark.parametrize("table_name", TABLES)
def test_the_kept_results_are_of_these_configurations(table_name):
    """A row that was changed or added without being measured."""
    kept, table = json.loads(KEPT[table_name].read_text()), TABLES[table_name]
    assert list(kept["rows"]) == [*table.configurations, CROSS_ENTROPY]
    assert (kept["reference"], kept["replicates"]) == (table.reference, table.replicates)
    assert kept["identity"]["seed"] == table.seed
    assert kept["families"].keys() == {f"{name} / {base}" for base, *others in table.families for name in others}
    compared = (*OF_SAMPLING, *OF_MATCHING, *OF_TOKENS, "alignment", "kernel", "match", "pooling")
    for name, options in asked_for(table).items():
        theirs, ours = kept["identity"]["configurations"][name], settle(options)
        assert {n: theirs[n] for n in compared} == {n: ours[n] for n in compared}, name


# ---- what is added

NAMES = ("one", "two", CROSS_ENTROPY)
RESULT = {"rows": {name: {} for name in NAMES}, "replicates": 2, "weights": 4}
SMALL = Table({"one": "features=ngram", "two": "features=match"}, (("one", "two"),), reference="one", replicates=2)


def keep_gradients(out):
    """3 batches of 2 replicates: μ ± v and μ ± v/2, so the noise is 2‖v‖² and a quarter of it in every batch."""
    store = GradientStore(out / "gradients", identity={"made": "up"}, shape=(3, 2, 4))
    mean = torch.tensor([1.0, 0, 0, 0])
    for batch in range(3):
        v = torch.zeros(4)
        v[1 + batch % 2] = 2.0 + batch
        one, two = (torch.stack([mean + scale * v, mean - scale * v]) for scale in (1.0, 0.5))
        entropy = torch.tensor([0, 0, 0, 1.0]).expand(2, 4)
        store.add(torch.stack([one, two, entropy]), [100.0, 50.0, 10.0])


def test_noise_over_that_of_the_first_by_hand(tmp_path):
    keep_gradients(tmp_path)
    found, text = gradient_signal.families(tmp_path, RESULT, SMALL)
    assert list(found) == ["two / one"]
    ratio = found["two / one"]
    assert (ratio["noise"]["value"], ratio["noise"]["low"], ratio["noise"]["high"]) == pytest.approx((0.25,) * 3)
    assert ratio["cost"] == 0.5
    assert text.splitlines()[-1] == "| one | two | 0.250 ± 0.000 | 0.50 |"


def test_the_second_table_is_there_once_however_often_it_is_made(tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []

    def stand(*arguments):
        calls.append(list(arguments))
        if not out.exists():
            keep_gradients(out)
            write_json(out / "signal.json", RESULT)
            (out / "signal.md").write_text("| a table |\n\nIts legend.\n")

    monkeypatch.setattr(gradient_signal, "command", stand)
    for _ in range(2):
        gradient_signal.main(out, 3, SMALL)
    assert calls == [gradient_signal.measurement(out, 3, SMALL)] * 2
    text = (out / "signal.md").read_text()
    assert text.startswith("| a table |\n\nIts legend.\n\n## Configurations with the same expected gradient\n")
    assert text.count("\n## ") == 1
    assert text.endswith("| one | two | 0.250 ± 0.000 | 0.50 |\n")
    result = json.loads((out / "signal.json").read_text())
    assert result["rows"] == RESULT["rows"]
    assert result["families"].keys() == {"two / one"}


def test_the_real_command_on_a_tiny_model(tiny_folder, tiny_text, tmp_path, monkeypatch):
    levers = TABLES["levers"].configurations
    chosen = ("paper", "dot", "dot, tuned baseline", "dot, last horizon, ridge", "dot, 8 rollouts")
    table = Table({name: levers[name] for name in chosen}, (chosen[1:],), reference="paper", replicates=2)
    own = {
        **{"policy": str(tiny_folder), "data": str(tiny_text), "device": "cpu", "length": "32", "lora": "2"},
        **{"parameters": "lora_B", "set": "stride=8 first=8 horizon=4 rollouts=4"},
    }

    def call(*arguments):
        app(replaced(list(arguments), own), standalone_mode=False)

    monkeypatch.setattr(gradient_signal, "command", call)
    out = tmp_path / "out"
    gradient_signal.main(out, 3, table)
    result = json.loads((out / "signal.json").read_text())
    assert list(result["rows"]) == [*chosen, CROSS_ENTROPY]
    assert (result["batches"], result["reference"]) == (3, "paper")
    found = result["families"]
    assert len(found) == 3
    assert all(row["noise"]["value"] > 0 for row in found.values())
    assert found["dot, tuned baseline / dot"]["cost"] == 1
    assert 1 < found["dot, 8 rollouts / dot"]["cost"] < 2
    assert (out / "signal.md").read_text().count("\n| dot |") == 4
