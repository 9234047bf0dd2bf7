"""The command `sample`: rollouts at their anchors, in the terminal."""

import json

import pytest

from tests.command_line import assert_refused, call


@pytest.fixture
def sample(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text("def add(left, right):\n    return left + right\n" * 3)

    def of_sample(**changes):
        options = {"text": tmp_path / "text.txt", "policy": tiny_folder, "device": "cpu", "dtype": "float32", **changes}
        return call(monkeypatch, capsys, ["sample"], options)

    return of_sample


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
