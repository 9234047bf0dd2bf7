"""`signal` as a command: what it leaves, that it goes on, and what it refuses."""

import json

import pytest

from tests.command_line import call


@pytest.fixture
def signal(tiny_folder, tiny_text, tmp_path, monkeypatch, capsys):
    """Run a tiny `signal`; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")

    def of_signal(*configs, **changes):
        options = {
            "policy": tiny_folder, "data": tiny_text, "device": "cpu", "dtype": "float32", "lora": 2, "length": 32,
            "batches": 4, "batch": 2, "out": tmp_path / "out",
            "set": "stride=9 first=5 horizon=4 rollouts=3 features=ngram", **changes,
        }  # fmt: skip
        given = [part for config in configs for part in ("--config", config)]
        return call(monkeypatch, capsys, ["signal", *given], options)

    return of_signal


def test_every_lever_is_measured(signal, tmp_path):
    per_token = "pooling=none credit=reward_to_go"
    configs = [
        "a: features=match",
        f"b: features=match match=position {per_token} horizons=geometric:0.5 token_baseline=ridge trace=0.9",
        "c: first_token=branches strata=3 diversity=0",
        f"d: features=hidden {per_token} first_token=distinct strata=2 rollouts=4",
        "e: estimator=rloo_tuned objective=kernel_score kernel=energy temperature=0.8",
    ]
    code, _, err = signal(*configs, batches=3)
    assert code == 0, err
    rows = json.loads((tmp_path / "out/signal.json").read_text())["rows"]
    assert all(rows[name]["square"]["value"] > 0 for name in "abcde")


def test_allocation(signal, tmp_path):
    code, out, err = signal("one: diversity=0 rollouts=6", batches=4, allocate=True)
    assert code == 0, err
    assert "| rollouts | stride | gain |" in out
    result = json.loads((tmp_path / "out/signal.json").read_text())["allocation"]
    assert result["measured"] == {"rollouts": 6, "stride": 9}
    assert result["cost"]["sequences"] > 0
    assert (tmp_path / "out/allocation.md").read_text().startswith("| source |")


CONFIGS = ("one: diversity=0", "features=hidden whitening=population calibration=1", "four: rollouts=4 stride=12")


def test_leaves_table_numbers_and_plot_and_goes_on(signal, tmp_path):
    code, out, err = signal(*CONFIGS, batches=3)
    assert code == 0, err
    assert "calibrating" in out
    again, _, err = signal(*CONFIGS, batches=5, reference="four")
    assert again == 0, err
    result = json.loads((tmp_path / "out/signal.json").read_text())
    assert list(result["rows"]) == ["one", CONFIGS[1], "four", "cross-entropy"]
    assert (result["batches"], result["replicates"], result["reference"]) == (5, 2, "four")
    row = result["rows"]["four"]
    assert row["gain"]["value"] == row["noise_ratio"]["value"] == 1
    assert row["signal_to_noise"]["low"] < row["signal_to_noise"]["value"] < row["signal_to_noise"]["high"]
    assert result["rows"]["one"]["token_forwards"] < result["rows"][CONFIGS[1]]["token_forwards"]
    table = (tmp_path / "out/signal.md").read_text()
    assert table.count("\n| ") == 4
    assert (tmp_path / "out/signal.png").stat().st_size > 10_000
    fresh, _, _ = signal(*CONFIGS, batches=5, reference="four", out=tmp_path / "fresh")
    assert fresh == 0
    assert json.loads((tmp_path / "fresh/signal.json").read_text())["rows"] == result["rows"]


def test_refuses_another_measurement_in_its_folder(signal):
    assert signal("one: diversity=0", batches=3)[0] == 0
    code, _, err = signal("one: diversity=0.5", batches=3)
    assert code == 2
    assert "other configurations" in err
    assert "--out" in err


@pytest.mark.parametrize(
    ("configs", "changes", "message"),
    [
        (["rolouts=3"], {}, "did you mean 'rollouts'?"),
        (["first_token=branches"], {}, "strata=None: give both"),
        (["first_token=branches strata=2"], {}, "expected a multiple of 2"),
        (["first_token=branches strata=2 rollouts=2"], {}, "the diversity term wants 2 rollouts in a stratum"),
        (["first_token=top strata=3 diversity=0"], {}, "expected one of branches, distinct"),
        (
            ["first_token=branches strata=3 diversity=0 estimator=none"],
            {},
            "leave out estimator",
        ),
        (["first_token=branches strata=3 diversity=0 normalize_advantage=true"], {}, "normalize_advantage=True"),
        (["x: diversity=0", "y: diversity=1"], {"allocate": True}, "--allocate with 2 configurations"),
        (["x: rollouts=4"], {"allocate": True}, "even number of 6 or more"),
        (["x: rollouts=8"], {"allocate": True, "replicates": 1}, "--replicates 1"),
        (["x: rollouts=8 sampler=random"], {"allocate": True}, "sampler=random draws anchors anew"),
        (["x: rollouts=8 sampler=snapshot"], {"allocate": True}, "--allocate is for rollouts drawn independently"),
        (["x: sampler=random"], {}, "give --replicates 1 (not 2), or another sampler"),
        (["lr=0.1"], {}, "'lr=0.1'"),
        (["rollouts=many"], {}, "rollouts=many: expected a value of type int"),
        (["drop_zero_spread=yes"], {}, "expected true or false"),
        (["a: diversity=0", "a: diversity=1"], {}, "configuration 'a' is there twice"),
        (["cross-entropy: diversity=0"], {}, "'cross-entropy'"),
        (["x: kernel=rbf"], {}, "configuration 'x': --kernel rbf does not apply"),
        (["x: diversity=0"], {"reference": "y"}, "--reference 'y'"),
        (["x: diversity=0"], {"batches": 2}, "--batches 2"),
        (["x: diversity=0"], {"parameters": "nothing"}, "matches none"),
        (["x: diversity=0"], {"batch": 1000}, "--batch 1000"),
    ],
)
def test_refuses_bad_input(signal, tmp_path, configs, changes, message):
    code, _, err = signal(*configs, **changes)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
