"""The command line: every bad input is one clear message and exit code 2, and nothing is left behind."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from ebft import cli
from ebft.components import GROUPS, OPTION_NAMES
from ebft.errors import UsageError
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


@pytest.fixture
def run(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    """Run a tiny, valid command with changed options, as the `ebft` script does; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(**changes):
        options = {
            "policy": tiny_folder, "data": tiny_text, "features": "ngram", "device": "cpu", "dtype": "float32",
            "lora": 0, "length": 32, "stride": 9, "first": 5, "horizon": 4, "rollouts": 3, "steps": 1, "batch": 2,
            "held_out": 2, "out": tmp_path / "out", **changes,
        }  # fmt: skip
        argv = ["ebft", "run"]
        for name, value in options.items():
            argv += [] if value is None else [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        monkeypatch.setattr(sys, "argv", argv)
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def assert_refused(result, *parts):
    """Exit code 2 and one message, with everything in `parts`, on stderr; no traceback."""
    code, _, err = result
    assert code == 2, err
    messages = [line for line in err.splitlines() if "rror" in line]
    assert len(messages) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, f"{part!r} not in {err!r}"


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_the_command_of_these_tests_is_a_good_one(run, tmp_path):
    """Otherwise a test below could be refused for another reason than its own."""
    code, out, err = run(stride=None, temperature=0.9, top_p=1.0)
    assert code == 0, err
    assert "Traceback" not in err
    assert "verdict" in out
    assert (tmp_path / "out" / "report.html").is_file()


BAD_OPTIONS = {
    "unknown features": ({"features": "sbrt"}, ["unknown features 'sbrt'", "did you mean 'sbert'", "hidden"]),
    "unknown attention": ({"attention": "fast"}, ["kernel 'fast'", "dense, chunked, flex, rows"]),
    "attention without gradient": ({"attention": "flex"}, ["--attention flex", "the device is cpu", "chunked"]),
    "unknown sampler": ({"sampler": "strid"}, ["unknown sampler 'strid'", "did you mean 'strided'"]),
    "unknown objective": ({"objective": "zzz"}, ["unknown objective 'zzz'", "feature_matching"]),
    "unknown estimator": ({"estimator": "rlo"}, ["unknown estimator 'rlo'", "did you mean 'rloo'"]),
    "option of another map": ({"context_tokens": 4}, ["--context-tokens 4", "features ngram", "features sbert"]),
    "option of another objective": ({"kernel": "rbf"}, ["--kernel rbf", "objective kernel_score"]),
    "horizon as long as the row": ({"horizon": 32}, ["--horizon 32", "--length 32"]),
    "horizon 0": ({"horizon": 0}, ["--horizon 0"]),
    "stride 0": ({"stride": 0}, ["--stride 0"]),
    "stride 0 of random": ({"stride": 0, "sampler": "random"}, ["--stride 0"]),
    "first 0": ({"first": 0}, ["--first 0"]),
    "ngram 0": ({"ngram": 0}, ["--ngram 0"]),
    "rollouts 0": ({"rollouts": 0}, ["--rollouts 0"]),
    "one rollout, diversity": ({"rollouts": 1, "estimator": "none"}, ["--rollouts 1", "--diversity 1.0"]),
    "one rollout, baseline": ({"rollouts": 1, "diversity": 0}, ["--rollouts 1", "estimator rloo"]),
    "temperature 0": ({"temperature": 0}, ["--temperature 0"]),
    "temperature < 0": ({"temperature": -1.5}, ["--temperature -1.5"]),
    "temperature nan": ({"temperature": "nan"}, ["--temperature nan"]),
    "top-p 0": ({"top_p": 0}, ["--top-p 0"]),
    "top-p > 1": ({"top_p": 1.2}, ["--top-p 1.2"]),
    "learning rate 0": ({"lr": 0}, ["--lr 0"]),
    "learning rate inf": ({"lr": "inf"}, ["--lr inf"]),
    "diversity < 0": ({"diversity": -1}, ["--diversity -1"]),
    "ce nan": ({"ce": "nan"}, ["--ce nan"]),
    "kl < 0": ({"kl": -0.5}, ["--kl -0.5"]),
    "micro-batch 0": ({"micro_batch": 0}, ["--micro-batch 0"]),
    "context tokens < 0": ({"features": "sbert", "context_tokens": -1}, ["--context-tokens -1"]),
    "unknown dtype": ({"dtype": "float17"}, ["'float17'", "bfloat16"]),
    "unknown device": ({"device": "gpuu"}, ["'gpuu'", "cuda:N"]),
    "unknown kernel": ({"objective": "kernel_score", "kernel": "rfb"}, ["'rfb'", "did you mean 'rbf'"]),
    "unknown alignment": ({"alignment": "cos"}, ["'cos'", "cosine"]),
    "layers that are no numbers": ({"features": "hidden", "layers": "a,b"}, ["'a,b'", "0.25,0.5,0.75"]),
    "layer beyond the model": ({"features": "hidden", "layers": "7"}, ["layer 7", "0 to 2"]),
    "unknown pooling": ({"features": "hidden", "pooling": "men"}, ["'men'", "mean"]),
    "lora < 0": ({"lora": -1}, ["--lora -1"]),
    "steps 0": ({"steps": 0}, ["--steps 0"]),
    "held-out 1": ({"held_out": 1}, ["--held-out 1"]),
    "no number": ({"batch": "many"}, ["--batch", "integer"]),
    "resume without a run": ({"resume": True}, ["--resume", "out holds no run"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused(run, tmp_path, case):
    changes, parts = BAD_OPTIONS[case]
    assert_refused(run(**changes), *parts)
    assert left_behind(tmp_path) == []


def test_cuda_where_there_is_none(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run(device="cuda"), "'cuda'", "no CUDA device", "--device cpu")
    assert left_behind(tmp_path) == []


def test_an_option_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ebft", "run", "--lenght", "3"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--lenght" in capsys.readouterr().err


# Models and text


def test_a_folder_that_is_no_model(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(run(policy=tmp_path / "empty"), f"'{tmp_path / 'empty'}'", "config.json")
    assert_refused(run(policy="no/such-model"), "'no/such-model'")
    assert left_behind(tmp_path) == ["empty"]


BAD_FILES = {
    "empty.txt": (b" \n", ["empty.txt is empty"]),
    "binary.txt": (b"\x89PNG\0\1\2", ["binary.txt is not a text file"]),
    "latin.txt": (b"caf\xe9\n" * 9, ["latin.txt is not a text file"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', ["broken.jsonl, line 2", "not JSON"]),
    "fields.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', ["fields.jsonl, line 2", "'text'", "'body'"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_refused(run, tmp_path, name):
    content, parts = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert_refused(run(data=tmp_path / name), *parts)
    assert left_behind(tmp_path) == [name]


def test_a_field_that_is_not_there(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    assert_refused(run(data=tmp_path / "a.jsonl", text_field="body"), "line 1", "'body'", "'text'")


def test_data_that_is_not_there(run, tmp_path):
    assert_refused(run(data=tmp_path / "absent.txt"), tmp_path / "absent.txt")
    assert left_behind(tmp_path) == []


def test_data_that_may_not_be_read(run, tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text\n")
    read_bytes = Path.read_bytes

    def refuse(self):
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # a file mode would not stop the superuser
    assert_refused(run(data=path), f"cannot read {path}: Permission denied")


def test_text_too_short_for_an_anchor(run, tmp_path):
    (tmp_path / "short.txt").write_text("a\nb\n")
    assert_refused(run(data=tmp_path / "short.txt"), "no room for an anchor", "first=5", "horizon=4")
    assert left_behind(tmp_path) == ["short.txt"]


def test_a_batch_larger_than_the_text(run, tmp_path):
    assert_refused(run(batch=5000), "--batch 5000", "--length 32")
    assert left_behind(tmp_path) == []


# Where a run is written


def test_a_folder_that_is_not_empty(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert_refused(run(), f"--out {tmp_path / 'out'} exists and is not empty", "--resume")
    assert left_behind(tmp_path / "out") == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(run(out=tmp_path / "file"), f"--out {tmp_path / 'file'}")
    assert_refused(run(out=tmp_path / "file" / "below"), tmp_path / "file" / "below", "could not be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_disk_space(run, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    assert_refused(run(), f"{tmp_path / 'out'} could not be written: no space is left")
    assert left_behind(tmp_path) == []


def test_no_disk_space_while_the_run_goes_on(run, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if Path(target).name == "metrics.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert_refused(run(), "metrics.csv could not be written: no space is left")
    assert not list((tmp_path / "out").glob(".*"))  # no half-written file


def test_resuming_with_a_changed_option(run, tmp_path):
    assert run()[0] == 0
    stored = (tmp_path / "out" / "metrics.csv").read_bytes()
    assert_refused(run(resume=True, lr=0.5), "--lr 0.5 (was 0.001)", "leave them out")
    assert (tmp_path / "out" / "metrics.csv").read_bytes() == stored


# The command `sample`


@pytest.fixture
def sample(run, tiny_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("def add(left, right):\n    return left + right\n" * 3)

    def call(**changes):
        options = {"text": tmp_path / "text.txt", "policy": tiny_folder, "device": "cpu", "dtype": "float32", **changes}
        argv = [str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
        monkeypatch.setattr(sys, "argv", ["ebft", "sample", *argv])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def test_sample_shows_prefix_text_and_rollouts(sample):
    code, out, err = sample(rollouts=2, horizon=5, first=4, stride=10, length=32)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("   ") and line.split()[0].isdigit()] == [
        "4",
        "14",
        "24",
    ]
    assert len([line for line in lines if line.startswith("    = ")]) == 3
    assert out == sample(rollouts=2, horizon=5, first=4, stride=10, length=32)[1]


@pytest.mark.parametrize("sampler", ["snapshot", "independent", "random"])
def test_sample_by_another_sampler(sample, sampler):
    options = {"rollouts": 2, "horizon": 5, "first": 4, "stride": 10, "length": 32}
    strided, other = sample(**options), sample(sampler=sampler, **options)
    assert other[0] == 0, other[2]
    assert (other == strided) == (sampler != "random")  # the same anchors, the same keys, the same tokens
    assert len([line for line in other[1].splitlines() if line.startswith("    = ")]) == 3


def test_the_seed_of_a_sample_keys_its_anchors_too(sample):
    options = {"sampler": "random", "rollouts": 1, "horizon": 2, "first": 4, "stride": 10, "length": 32}
    out = [sample(seed=seed, **options)[1] for seed in (0, 1, 0)]
    anchors = [[line.split()[0] for line in each.splitlines() if line[:5].strip().isdigit()] for each in out]
    assert len(anchors[0]) == len(anchors[1]) == 3
    assert anchors[0] != anchors[1]
    assert out[0] == out[2]


def test_sample_goes_on_after_the_text(sample):
    code, out, err = sample(sampler="full", rollouts=3, horizon=60, length=24)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[:5].strip().isdigit()] == ["24"]
    assert not any(line.startswith("    = ") for line in lines)
    assert sum(len(line) for line in lines[2:]) > 3 * 60


def test_sample_reads_the_first_text_of_a_json_lines_file(sample, tmp_path):
    text = "def add(left, right):\n    return left + right\n" * 3
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "another"}\n')
    assert sample(text=tmp_path / "text.jsonl") == sample(text=tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "absent.txt"}, "--text absent.txt: no such file"),
        ({"temperature": -1}, "--temperature -1"),
        ({"temperature": "nan"}, "--temperature nan"),
        ({"top_p": 0}, "top_p=0.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"min_p": 2}, "min_p=2.0"),
        ({"rollouts": 0}, "--rollouts 0"),
        ({"stride": 0}, "--stride 0"),
        ({"horizon": 500}, "horizon=500"),
        ({"sampler": "whole"}, "unknown sampler 'whole'"),
        ({"sampler": "full", "stride": 3}, "--stride 3 does not apply to sampler full"),
    ],
)
def test_sample_refuses_bad_input(sample, changes, message):
    assert_refused(sample(**changes), message)


# Help


@pytest.mark.parametrize("name", sorted(get_command(cli.app).commands))
def test_help_ends_with_examples_of_options_that_there_are(name):
    result = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    said = result.output.partition(" Examples")[2].split("•")[1:]
    examples = [" ".join(example.split()) for example in said]
    assert examples
    known = {flag for parameter in get_command(cli.app).commands[name].params for flag in parameter.opts}
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
        assert f"--{name.replace('_', '-')}" in result.stdout


def test_components_lists_each_with_its_options():
    result = CliRunner().invoke(cli.app, ["components"])
    assert result.exit_code == 0
    for group, known in GROUPS.items():
        assert f"--{group}" in result.stdout
        for name, entry in known.items():
            assert name in result.stdout
            for option, default in entry.options.items():
                shown = "(none)" if default is None else default
                assert f"--{option.replace('_', '-')} {shown}" in result.stdout


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
