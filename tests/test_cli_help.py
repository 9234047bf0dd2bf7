"""The command line as a whole: its help, its exit codes, and what it is as a process."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from ebft import cli
from ebft.components import GROUPS, OPTION_NAMES
from ebft.errors import UsageError, flag
from ebft.loops.interrupt import Interrupted

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [
    "--policy",
    "--features",
    "--sampler",
    "--data",
    "--length",
    "--stride",
    "--first",
    "--horizon",
    "--rollouts",
    "--temperature",
    "--top-p",
    "--steps",
    "--batch",
    "--micro-batch",
    "--lr",
    "--ce",
    "--kl",
    "--diversity",
    "--estimator",
    "--seed",
    "--device",
    "--dtype",
    "--lora",
    "--out",
    "--resume",
]


# Help


@pytest.mark.parametrize("name", sorted(get_command(cli.app).commands))
def test_help_ends_with_examples_of_options_that_there_are(name):
    result = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    said = result.output.partition(" Examples")[2].split("•")[1:]
    examples = [" ".join(example.split()) for example in said]
    assert examples
    known = {opt for parameter in get_command(cli.app).commands[name].params for opt in parameter.opts}
    for example in examples:
        assert example.split()[:2] == ["ebft", name]
        assert {word for word in example.split() if word.startswith("--")} <= known
    assert "(default runs/" not in result.output or "(default runs/TIME" in result.output or name in ("ablate", "study")


def test_run_help_mentions_every_option():
    result = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in OPTIONS:
        assert option in result.stdout, option


def test_every_option_of_a_component_is_one_of_the_command_line():
    result = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    for name in OPTION_NAMES:
        assert flag(name) in result.stdout


def test_components_lists_each_with_its_options():
    result = CliRunner().invoke(cli.app, ["components"])
    assert result.exit_code == 0
    for group, known in GROUPS.items():
        assert f"--{group}" in result.stdout
        for name, entry in known.items():
            assert name in result.stdout
            for option, default in entry.options.items():
                shown = "(none)" if default is None else default
                assert f"{flag(option)} {shown}" in result.stdout


# Options given twice


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["evaluate", "--features", "hidden", "--features", "sbert"], "--features hidden --features sbert: given 2"),
        (["run", "--lr=0.1", "--steps", "2", "--lr", "0.2"], "--lr=0.1 --lr 0.2: given 2 times, expected once"),
        (["run", "--resume", "--out", "x", "--resume"], "--resume --resume: given 2 times"),
        (["run", "--test-prompt", "--no-test-prompt"], "--test-prompt --no-test-prompt: given 2 times"),
    ],
)
def test_an_option_given_twice_is_refused(argv, told):
    result = CliRunner().invoke(cli.app, argv)
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith(told)


def test_options_of_several_values_are_given_again():
    result = CliRunner().invoke(cli.app, ["run", "--stop", "a", "--stop", "b"])
    assert str(result.exception).startswith("--stop ['a', 'b'] does not apply to method ebft")


# Exit codes


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("--odd [value]: expected [even]"), 2, "error: --odd [value]: expected [even]"),
        (Interrupted("stopped after step 3"), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("ebft.assemble.run_from_options", fail)
    monkeypatch.setattr(sys, "argv", ["ebft", "run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    assert message in capsys.readouterr().err


# As processes


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_checkout_runs_by_its_script():
    result = python("cli.py", "run", "--features", "sbrt")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: unknown features 'sbrt' (did you mean 'sbert'?)")


def test_the_package_runs_as_a_module():
    result = python("-m", "ebft", "--help")
    assert result.returncode == 0
    assert "components" in result.stdout


def test_importing_is_light():
    code = (
        "import sys, time; import ebft; assert time.process_time() < 2; assert 'torch' not in sys.modules;"
        "import ebft.samplers, ebft.features;"
        "print([name for name in ('torchrl', 'sentence_transformers') if name in sys.modules])"
    )
    result = python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
