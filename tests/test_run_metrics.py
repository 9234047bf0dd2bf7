"""What a run logs next to its losses, and scoring at another temperature than sampling."""

import pytest
import torch

from ebft import schema
from ebft.errors import UsageError
from ebft.loops.numbers import part_shares
from ebft.loops.scoring import score
from ebft.loops.stages import at_step
from ebft.loops.summary import squared_norm, summarise
from ebft.loops.train import train
from ebft.objectives import feature_matching_profile, feature_matching_proxy, moment_values
from ebft.objectives.counts import totals
from ebft.objectives.diagnostics import signal_to_noise_of_sums
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.scores import hold_last
from tests.runs import go, metrics, parts


def rewarded(options, **changes):
    policy, pipeline, rows = parts(options, **changes)
    td = at_step(rows[:3].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    return policy, td


def test_the_proxy_is_53_with_the_sign_of_a_loss(options):
    _, td = rewarded(options)
    real = td[schema.ANCHOR_MASK]
    values = moment_values(td[schema.ROLLOUT_FEATURES], td[schema.TARGET_FEATURES])
    wanted = feature_matching_proxy(*values)
    torch.testing.assert_close(td["metrics", "feature_matching_proxy"][real], wanted[real], atol=1e-5, rtol=1e-5)
    found = summarise(td)
    squares = td[schema.TARGET_FEATURES].square().sum(-1)[real].mean().item()
    assert found["feature_matching_proxy"] == pytest.approx(found["feature_matching_loss"] - squares, abs=1e-4)
    assert 1 <= found["effective_rollouts"] <= options["rollouts"]


def test_features_per_token_have_a_profile_over_horizons(options):
    _, td = rewarded(options, pooling="none", credit="reward_to_go")
    found = summarise(td)
    held = (
        hold_last(td["rollout", "features"], td[schema.ROLLOUT_MASK]),
        hold_last(td["target", "features"], td[schema.TARGET_MASK]),
    )
    profile = feature_matching_profile(*held)[td[schema.ANCHOR_MASK]].mean(0)
    assert [name for name in found if name.startswith("feature_matching_loss_")] == [
        f"feature_matching_loss_{g}" for g in (1, 2, 4)
    ]
    assert found["feature_matching_loss_2"] == pytest.approx(profile[1].item())
    assert found["feature_matching_loss_4"] == pytest.approx(found["feature_matching_loss"], abs=1e-5)


def test_signal_to_noise_is_that_of_the_gradients_parts(options):
    """Of a run's first step, against the gradients of the parts one by one."""
    policy, pipeline, rows = parts(options)
    twin, again, _ = parts(options)
    loss = EBFTLoss(cross_entropy_coefficient=0.5)
    settings = {"steps": 1, "batch_size": 5, "seed": 1, "max_grad_norm": 0}
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    (record,) = train(policy, pipeline, loss, rows, optimizer=optimizer, micro_batch=2, **settings)
    from ebft.data import batches

    td = at_step(next(batches(rows, batch_size=5, seed=1)), seed=1, step=0)
    for stage in again.values():
        td = stage(td)
    td.update(totals(td))
    norms = []
    for part in td.split(2):
        score(twin, part)
        sum(value for name, value in loss(part).items() if name.startswith("loss_")).backward()
        norms.append(squared_norm(list(twin.trainable().values())).item())
    assert part_shares(5, 2) == [[0.4, 0.8, 1.0]]
    assert norms[-1] == pytest.approx(record["gradient_norm"] ** 2, rel=1e-4)
    wanted = signal_to_noise_of_sums(norms, [0.4, 0.8, 1.0])
    assert record["gradient_signal_to_noise"] == pytest.approx(wanted, rel=1e-3)


def test_they_stand_in_the_table_of_a_run(options, tmp_path):
    go(options | {"steps": 2}, tmp_path / "run")
    for row in metrics(tmp_path / "run"):
        assert {"effective_rollouts", "feature_matching_proxy", "gradient_signal_to_noise"} <= row.keys()


def test_another_temperature_of_scoring(options, tmp_path):
    """The sampler's is that of scoring unless told otherwise; then the two disagree, and the update is another."""
    found = {}
    for name, chosen in {"same": {}, "told": {"score_temperature": 0.6}, "other": {"score_temperature": 1.0}}.items():
        go(options | {"temperature": 0.6, "steps": 1, "kl": 0.0, **chosen}, tmp_path / name)
        found[name] = metrics(tmp_path / name)[0]
    assert found["same"] == found["told"]
    assert float(found["same"]["sampler_mismatch"]) < 1e-5
    assert float(found["other"]["sampler_mismatch"]) > 0.1
    assert found["other"]["gradient_norm"] != found["same"]["gradient_norm"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"score_temperature": 0.0}, "expected a number > 0"),
        ({"score_temperature": 0.5, "pg": "clipped"}, "--pg clipped takes ratios"),
        ({"score_temperature": 0.5, "truncate_weights": 2.0}, "--truncate-weights"),
    ],
    ids=str,
)
def test_where_it_makes_no_sense_is_said(options, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(options | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
