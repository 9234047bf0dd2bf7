"""Options from files: YAML, the config.json of a run, and the presets of the paper, through the command line."""

import inspect
import json
import re
import shutil

import pytest
from typer.main import get_command

from ebft import cli
from ebft.assemble.option_files import _PRESETS, preset_names, read_option_file, read_preset
from ebft.commands.declared import of_features
from ebft.components import GROUPS
from ebft.components.features import FEATURES
from tests import command_line


@pytest.fixture
def run(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    """Run `ebft run` with these arguments on the tiny model; exit code, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv):
        tiny = ["--policy", tiny_folder, "--data", tiny_text, "--device", "cpu", "--dtype", "float32"]
        code, _, err = command_line.call(monkeypatch, capsys, ["run", *tiny, *argv], {})
        return code, err

    return call


TINY = """
lora: 0
features: ngram
length: 32
stride: 9
first: 5
horizon: 4
steps: 2
batch: 2
held_out: 2
micro-batch: 1
lr: 1e-3            # YAML 1.1 reads this as text
betas: [0.8, 0.9]
pg: clipped
clip: 0.3
normalize_advantage: true
"""


def options_of(out):
    return json.loads((out / "config.json").read_text())["options"]


def test_a_file_sets_options_and_flags_go_before_it(run, tmp_path):
    (tmp_path / "run.yaml").write_text(TINY)
    code, err = run("--config", "run.yaml", "--lr", "0.5", "--out", "first")
    assert code == 0, err
    options = options_of(tmp_path / "first")
    assert (options["lr"], options["betas"], options["clip"]) == (0.5, "0.8,0.9", "0.3")
    assert (options["micro_batch"], options["normalize_advantage"], options["length"]) == (1, True, 32)
    assert "config" not in options

    code, err = run("--config", "first/config.json", "--steps", "1", "--out", "second")
    assert code == 0, err
    assert options_of(tmp_path / "second") == options | {"steps": 1}

    code, err = run("--config", "first/config.json", "--method", "sft", "--out", "third")
    assert code == 2
    assert "--pg clipped does not apply to method sft" in err

    code, err = run("--config", "run.yaml", "--lr", "0.5", "--out", "first", "--resume")
    assert code == 0, err
    code, err = run("--config", "run.yaml", "--out", "first", "--resume")
    assert code == 2
    assert "--lr 0.001 (was 0.5)" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1", "--config run.yaml: unknown key 'learning_rate'"),
        ("featurs: hidden", "unknown key 'featurs' (did you mean 'features'?)"),
        ("out: here", "unknown key 'out'"),
        ("steps: many", "steps: 'many' is no int"),
        ("steps: 2.5", "steps: 2.5 is no int"),
        ("steps: true", "steps: True is no int"),
        ("data: no", "data: False is no text"),
        ("lr: {a: 1}", "lr: {'a': 1} is no float"),
        ("micro-batch: 1\nmicro_batch: 2", "micro_batch is there twice"),
        ("- lr", "holds list"),
        ("lr: [", "is neither YAML nor JSON"),
        ("!!python/object/apply:os.system ['touch owned']", "is neither YAML nor JSON"),
        ("", "holds NoneType"),
    ],
)
def test_mistakes_in_a_file_are_told(run, tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    code, err = run("--config", "run.yaml")
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_file_that_is_not_there(run):
    code, err = run("--config", "nowhere.yaml")
    assert code == 2
    assert "--config nowhere.yaml: cannot be read" in err


# Presets

# The paper, version 1. Table 2: (question-and-answer coding, unstructured coding, translation).
TABLE_2 = {
    "batch": (16, 16, 16),
    "length": (1024, 1024, 1024),
    "horizon": (8, 8, 4),
    "stride": (8, 8, 2),
    "lr": (1e-6, 1e-6, 1e-6),
    "temperature": (0.6, 0.6, 0.6),
    "kl": (0.0, 0.0, 0.0),
    "rollouts": (4, 4, 4),
    "warm_up": (0.03, 0.03, 0.03),
    "betas": ("0.9,0.95", "0.9,0.95", "0.9,0.95"),
    "epochs": (1, 1, 1),
    "policy": ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.2-1B"),
}
SWEPT = {"diversity": (0, 0.5, 1), "gamma": (0, 0.03, 0.1)}
METHOD = {  # sections 2 and 4
    "method": "ebft",
    "features": "hidden",
    "layers": "0.25,0.5,0.75",
    "unit_norm": "layer",
    "pooling": "last",
    "whitening": "group",
    "alignment": "cosine",
    "estimator": "rloo",
    "pg": "reinforce",
    "normalization": "sequence",
}
OF_ITS_CODE = {"top_p": 1.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 43, "lr_schedule": "constant"}
PAPER = ("paper-qa-code", "paper-code", "paper-translation")


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_has_the_values_of_the_papers_tables(name):
    preset = read_preset(name)
    column = PAPER.index(name)
    for option, values in TABLE_2.items():
        assert preset[option] == values[column], option
    for option, value in {**METHOD, **OF_ITS_CODE}.items():
        assert preset[option] == value, option
    assert preset["diversity"] in SWEPT["diversity"]
    assert preset["ce"] / preset["horizon"] == pytest.approx(0.1)
    assert 0.1 in SWEPT["gamma"]
    assert preset["batch"] * preset["rollouts"] == 64  # Table 2: train batch
    code_first = {"paper-translation": 4}.get(name, 8)
    anchors = (preset["length"] - preset["horizon"] - preset["first"]) // preset["stride"] + 1
    assert (preset["first"], anchors) == (code_first, {"paper-translation": 509}.get(name, 127))


@pytest.mark.parametrize("name", preset_names())
def test_every_field_of_a_preset_says_where_it_comes_from(name):
    lines = [line for line in (_PRESETS / f"{name}.yaml").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(read_preset(name)) > 20
    for line in lines:
        assert re.fullmatch(r"\w+: \S+ +# \S.*", line), line


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_runs_on_a_tiny_model(run, tmp_path, name):
    small = ["--lora", "0", "--length", "24", "--batch", "2", "--steps", "1", "--held-out", "2"]
    code, err = run("--preset", name, *small, "--out", "out")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    preset = read_preset(name)
    for option in ("horizon", "temperature", "ce", "whitening", "alignment", "warm_up"):
        assert config["options"][option] == preset[option]
    assert config["options"]["epochs"] is None  # --steps on the command line is instead of it
    assert config["components"]["lr_schedule"]["name"] in GROUPS["lr_schedule"]


def test_passes_are_counted_in_batches(run, tmp_path):
    (tmp_path / "run.yaml").write_text(TINY.replace("steps: 2", "epochs: 0.1"))
    code, err = run("--config", "run.yaml", "--out", "out")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["steps"] == round(0.1 * (config["sequences"]["training"] // 2))
    assert len((tmp_path / "out" / "metrics.csv").read_text().splitlines()) == config["steps"] + 1
    shutil.rmtree(tmp_path / "out")
    code, err = run("--config", "run.yaml", "--epochs", "1", "--steps", "3", "--out", "out")
    assert code == 2
    assert "give one of the two" in err


def test_an_unknown_preset(run):
    code, err = run("--preset", "paper-qa-cod")
    assert code == 2
    assert "unknown preset 'paper-qa-cod' (did you mean 'paper-qa-code'?)" in err


def test_a_config_goes_before_a_preset_in_either_order(run, tmp_path):
    (tmp_path / "run.yaml").write_text(TINY)
    assert read_option_file(tmp_path / "run.yaml")["clip"] == 0.3
    small = ["--preset", "paper", "--pg", "clipped"]
    for order in (["--config", "run.yaml", *small], [*small, "--config", "run.yaml"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, err = run(*order, "--features", "hidden", "--out", "out")
        assert code == 0, err
        assert (options_of(tmp_path / "out")["horizon"], options_of(tmp_path / "out")["whitening"]) == (4, "group")


def test_options_of_feature_maps_are_declared_once():
    """Every option of a map is one of run, and evaluate and tilt have the same, with the same help."""
    commands = get_command(cli.app).commands
    known = {option for entry in FEATURES.values() for option in entry.options}
    declared = set(inspect.signature(of_features).parameters) - {"features"}
    assert declared == known
    helps = [
        {parameter.name: (parameter.help, parameter.default) for parameter in commands[name].params} for name in
        ("run", "evaluate", "compare", "tilt")
    ]  # fmt: skip
    for name in declared:
        assert len({found[name] for found in helps}) == 1, name
    panels = {parameter.name: parameter.rich_help_panel for parameter in commands["evaluate"].params}
    assert panels["layers"] == panels["features"] == "Features"
    assert {parameter.name: parameter.rich_help_panel for parameter in commands["run"].params}["layers"] != "Features"
