"""The command line: every bad input is one clear message and exit code 2, and nothing is left behind."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from ebft import cli
from tests.command_line import assert_refused, call


@pytest.fixture
def run(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    """Run a tiny, valid command with changed options, as the `ebft` script does; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def of_run(**changes):
        options = {
            "policy": tiny_folder, "data": tiny_text, "features": "ngram", "device": "cpu", "dtype": "float32",
            "lora": 0, "length": 32, "stride": 9, "first": 5, "horizon": 4, "rollouts": 3, "steps": 1, "batch": 2,
            "held_out": 2, "out": tmp_path / "out", **changes,
        }  # fmt: skip
        return call(monkeypatch, capsys, ["run"], options)

    return of_run


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
