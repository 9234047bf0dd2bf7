"""`tilt`: what it measures is what it says, on worlds that are known, and the command on a tiny model."""

import inspect
import io
import json
import math

import pytest
import torch
from rich.console import Console

from ebft import cli
from ebft.assemble import tilt_from_options
from ebft.errors import UsageError
from ebft.loops.tilt import Rollouts, fit, measure, token_agreement
from ebft.objectives.energy import LinearEnergy, tilt_log_weights
from ebft.objectives.energy_reward import load_energy
from tests.enumeration import TablePolicy, features
from tests.runs import go, metrics


def world(contexts, rollouts, *, seed=0, noise=0.0):
    """Rollouts of a table policy; the targets are drawn from another one."""
    policy, text, phi = TablePolicy(seed=seed), TablePolicy(seed=seed + 7), features(seed=seed + 1)
    random = torch.Generator().manual_seed(seed)
    drawn, right = (
        torch.multinomial(p.prob().detach(), contexts * n, replacement=True, generator=random).view(contexts, n)
        for p, n in ((policy, rollouts), (text, 1))
    )
    agreement = token_agreement(
        policy.outcomes[drawn], torch.ones(contexts, rollouts, 2, dtype=torch.bool),
        policy.outcomes[right[:, 0]], torch.ones(contexts, 2, dtype=torch.bool),
    )  # fmt: skip
    made = Rollouts(phi[drawn], phi[right[:, 0]], agreement, torch.arange(contexts) // 2)
    return made, policy, text, phi


def expected_loss(shares, phi, text):
    """E over the text's outcomes of ‖mean features - φ(y)‖², for outcome shares [Y]."""
    off = shares @ phi - phi
    return (text.prob().detach() * off.square().sum(-1)).sum().item()


def test_a_tilt_fitted_on_rollouts_does_what_the_enumerated_one_does():
    seen, policy, text, phi = world(4000, 8)
    tilt = fit(seen, beta=2.0)
    held, *_ = world(4000, 64, seed=0)
    found = measure(held, tilt.energy, fitting={})
    losses = {name: row["feature_matching_loss"]["mean"] for name, row in found["methods"].items()}
    probability = policy.prob().detach()
    tilted = tilt_log_weights(phi, tilt.energy, log_base=probability.log()).exp()
    assert losses["plain"] == pytest.approx(expected_loss(probability, phi, text), rel=0.03)
    assert losses["resampled"] == pytest.approx(expected_loss(tilted, phi, text), rel=0.03)
    assert losses["resampled"] < losses["plain"] - 0.1
    # best of 32: the outcome of least energy that comes up in 32 draws
    order = tilt.energy(phi).argsort()
    miss = 1 - probability[order].cumsum(0)
    best = torch.zeros_like(probability)
    best[order] = torch.cat([torch.ones(1), miss.clamp(min=0)[:-1]]) ** 32 - miss.clamp(min=0) ** 32
    assert losses["best"] == pytest.approx(expected_loss(best, phi, text), rel=0.05)
    assert found["moment_gap"]["after"] < 0.5 * found["moment_gap"]["before"]


def test_rollouts_without_weights_are_plain():
    held, *_ = world(50, 8)
    found = measure(held, LinearEnergy(torch.zeros(4, dtype=torch.float64)), fitting={})
    plain, resampled = found["methods"]["plain"], found["methods"]["resampled"]
    for name in ("feature_matching_loss", "token_agreement"):
        assert resampled[name]["mean"] == pytest.approx(plain[name]["mean"], abs=1e-12)
        assert resampled[name]["difference"] == pytest.approx(0, abs=1e-12)
    assert found["effective_rollouts"] == pytest.approx(8)
    assert found["moment_gap"]["after"] == pytest.approx(found["moment_gap"]["before"])
    off = held.features.mean(1) - held.target
    assert found["moment_gap"]["before"] == pytest.approx(off.mean(0).norm().item())
    assert plain["token_agreement"]["mean"] == pytest.approx(held.agreement.mean().item())
    sums = torch.stack([held.features[:, :4].mean(1), held.features[:, 4:].mean(1)]) - held.target
    assert plain["feature_matching_loss"]["mean"] == pytest.approx((sums[0] * sums[1]).sum(-1).mean().item())


def test_an_energy_for_each_context_knows_its_target():
    held, *_ = world(200, 32)
    found = measure(held, None, fitting={"beta": 5.0})
    change = found["methods"]["resampled"]["feature_matching_loss"]
    assert change["difference"] < -5 * change["standard_error"]
    assert found["methods"]["best"]["token_agreement"]["difference"] > 0
    assert 1 <= found["effective_rollouts"] <= 16


def test_agreement_is_at_the_same_place():
    rollout = torch.tensor([[[1, 2, 3], [2, 1, 3], [1, 2, 9]]])
    alive = torch.tensor([[[True, True, True], [True, True, True], [True, False, False]]])
    target, real = torch.tensor([[1, 2, 3]]), torch.tensor([[True, True, False]])
    assert token_agreement(rollout, alive, target, real).tolist() == [[1.0, 0.0, 0.5]]


@pytest.fixture
def tilt_options(tiny_folder, tiny_text):
    parameters = inspect.signature(cli.tilt.tilt).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("context", "out")} | {
        "policy": str(tiny_folder), "data": str(tiny_text), "device": "cpu", "dtype": "float32", "length": 32,
        "stride": 9, "first": 5, "horizon": 4, "rollouts": 4, "features": "ngram", "dimension": 16, "sequences": 12,
        "held_out": 6, "batch": 4, "beta": 2.0,
    }  # fmt: skip


def test_from_the_command_to_a_reward(tilt_options, options, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    report = tilt_from_options(tilt_options, out=tmp_path / "tilt", console=console)
    said = console.file.getvalue()
    assert "effective rollouts" in said
    assert "the rollout of least energy" in said
    assert json.loads((tmp_path / "tilt" / "energy.json").read_text()) == json.loads(json.dumps(report))
    energy, about = load_energy(tmp_path / "tilt" / "energy.safetensors")
    assert energy.chi.shape == (16,)
    assert energy.chi.norm().item() == pytest.approx(report["fitted"]["norm"], rel=1e-6)
    assert about["features"] == {"features": "ngram", "ngram": 2, "dimension": 16}
    again = tilt_from_options(tilt_options, out=tmp_path / "again", console=console)
    assert again == report
    other = tilt_from_options(tilt_options | {"batch": 3}, out=tmp_path / "other", console=console)
    assert other["fitted"]["norm"] == pytest.approx(report["fitted"]["norm"], rel=1e-6)
    chosen = {"objective": "energy", "energy": str(tmp_path / "tilt" / "energy.safetensors"), "features": "ngram",
              "dimension": 16, "kl": 1.0, "kl_scope": "rollout", "steps": 2}  # fmt: skip
    go(options | chosen, tmp_path / "run")
    assert all(math.isfinite(float(row["reward"])) for row in metrics(tmp_path / "run"))


def test_bounded_and_per_context(tilt_options, tmp_path):
    console = Console(file=io.StringIO())
    bounded = tilt_from_options(
        tilt_options | {"beta": None, "max_norm": 0.5, "diversity": 0.5}, out=tmp_path / "bounded", console=console
    )
    assert bounded["fitted"]["norm"] == pytest.approx(0.5, rel=1e-4)
    tilt_from_options(tilt_options | {"per_context": True}, out=tmp_path / "each", console=console)
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["energy.json"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"beta": None}, "give --beta"),
        ({"max_norm": 1.0}, "--beta 2.0 and --max-norm 1.0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"diversity": 2.0}, "diversity=2.0"),
        ({"rollouts": 5}, "--rollouts 5"),
        ({"rollouts": 2}, "--rollouts 2"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"horizon": 32}, "--horizon 32"),
        ({"encoder": "minilm-l6"}, "--encoder minilm-l6 does not apply"),
        ({"features": "hidden", "dimension": None, "pooling": "none"}, "--pooling none"),
        ({"features": "ngrams"}, "did you mean 'ngram'"),
        ({"data": "no/where"}, "no/where"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(tilt_options, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        tilt_from_options(tilt_options | chosen, out=tmp_path / "tilt", console=Console(file=io.StringIO()))
    assert message in str(caught.value)
    assert not (tmp_path / "tilt").exists()
