"""Feature maps, whitenings and rewards per token in whole runs on a tiny model."""

import math
import shutil

import pytest
import torch

from ebft import schema
from ebft.assemble import build_values
from ebft.components import GROUPS, choose, resolve_options
from ebft.errors import UsageError
from ebft.features.whitening import PopulationWhitening, whiten
from ebft.loops.stages import at_step
from ebft.objectives.moments import moment_values
from ebft.objectives.scores import rollout_scores, token_scores
from tests.runs import go, metrics, parts

PER_TOKEN = {"pooling": "none", "credit": "reward_to_go"}


@pytest.mark.parametrize(
    "chosen",
    [
        {"features": "join:hidden+0.5*ngram"},
        {"features": "join:hidden+match"},  # their pooling has different defaults
        {"features": "ngram", "dimension": 64, "whitening": "group"},
        {"whitening": "group", "alignment": "cosine"},
        {"whitening": "sample", "alignment": "cosine"},
        {"whitening": "population", "shrinkage": 0.3},
        {"whitening": "population", "decay": 0.9, "rank": 4, "centred": True, "objective": "kernel_score"},
        {"backbone": "random", "layers": "mean", "unit_norm": "joint", "pooling": "mean"},
        PER_TOKEN,
        PER_TOKEN | {"whitening": "population", "decay": 0.9},
        {"pooling": "mean_with_context"},
        {"pooling": "concat_quantiles"},
        {"pooling": "concat_all"},
        {"whitening": "group", "alignment": "unit_target"},
        {"whitening": "group", "objective": "kernel_score", "kernel": "cosine"},
        PER_TOKEN | {"credit": "total", "pg": "clipped", "updates": 2, "truncate_weights": 2.0},
        PER_TOKEN | {"horizons": "geometric:0.5", "token_baseline": "ridge", "trace": 0.9},
        PER_TOKEN | {"features": "match", "horizons": "last", "token_baseline": "ridge"},
        {"features": "match", "match": "position"},
        PER_TOKEN | {"credit": "own", "normalize_advantage": True, "drop_zero_spread": True, "whitening": "group"},
    ],
    ids=str,
)
def test_every_choice_trains(options, tmp_path, chosen):
    go(options | {"steps": 2, "held_out": 2} | chosen, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(math.isfinite(float(row["loss"])) and float(row["gradient_norm"]) > 0 for row in rows)
    assert all(math.isfinite(float(row["feature_matching_loss"])) for row in rows)


def test_a_running_moment_is_checkpointed(options, tmp_path):
    chosen = options | {"whitening": "population", "decay": 0.5}
    go(chosen, tmp_path / "whole")
    rows = metrics(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000006")
    go(options, tmp_path / "resumed", resume=True)
    assert metrics(tmp_path / "resumed") == rows


def test_a_moment_never_holds_the_rollouts_that_it_whitens(options):
    whitening = PopulationWhitening(lambda r, t, *, mask: moment_values(r, t), decay=1.0)
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 4, 5, generator=random) for _ in range(3)]
    goals = [torch.randn(2, 3, 5, generator=random) for _ in range(3)]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with pytest.raises(UsageError, match="calibrate"):
        whitening(batches[0], goals[0], mask=mask)
    whitening.observe(batches[0], goals[0], mask)
    seen = torch.cat([batches[0], goals[0][:, :, None]], 2)[mask].flatten(0, 1).double()
    moment = seen.T @ seen / len(seen)
    moment = 0.9 * moment + 0.1 * moment.trace() / 5 * torch.eye(5, dtype=torch.float64)
    wanted = torch.einsum("bknd,de,bkme->bknm", batches[1].double(), torch.linalg.inv(moment), batches[1].double())
    found = whitening(batches[1], goals[1], mask=mask)[1]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    state = whitening.state_dict()
    fresh = PopulationWhitening(lambda r, t, *, mask: moment_values(r, t), decay=1.0)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(batches[2], goals[2], mask=mask)[1], whitening(batches[2], goals[2], mask=mask)[1])


def test_the_moment_of_tokens_is_that_of_all_there_are():
    """Features per token: one moment of the tokens under the masks, used at every position."""
    random = torch.Generator().manual_seed(0)
    rollout, goal = (torch.randn(2, 3, *shape, 5, generator=random) for shape in ((4, 6), (6,)))
    rollout_mask = torch.arange(6) < torch.randint(1, 7, (2, 3, 4, 1), generator=random)
    target_mask = torch.arange(6) < torch.randint(1, 7, (2, 3, 1), generator=random)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    whitening = PopulationWhitening(lambda r, t, *, mask: moment_values(r, t), shrinkage=0.0)
    with pytest.raises(UsageError, match=r"expected rollout_mask \[2, 3, 4, 6\] and target_mask \[2, 3, 6\]"):
        whitening.observe(rollout, goal, mask)
    noise = torch.where(rollout_mask[..., None], rollout, torch.nan)
    whitening.observe(noise, torch.where(target_mask[..., None], goal, torch.nan), mask, rollout_mask, target_mask)
    seen = torch.cat([rollout[mask][rollout_mask[mask]], goal[mask][target_mask[mask]]]).double()
    inverse = torch.linalg.inv(seen.T @ seen / len(seen))
    scores = token_scores(whitening, rollout, goal, mask)
    inner = torch.einsum("bkngd,de,bkmge->bkgnm", rollout.double(), inverse, rollout.double())
    aligned = torch.einsum("bkngd,de,bkge->bkng", rollout.double(), inverse, goal.double())
    others = (inner.sum(-1) - inner.diagonal(dim1=-2, dim2=-1)).movedim(-2, -1)
    torch.testing.assert_close(scores.reward.double(), 2 * aligned - 2 / 3 * others, rtol=1e-4, atol=1e-4)


def test_variants_of_the_whitened_reward_by_name():
    """(41), (49), (51) and (52) of the paper, by their formulas, from the components that the command line names."""
    random = torch.Generator().manual_seed(0)
    rollout, goal = torch.randn(1, 1, 4, 9, generator=random), torch.randn(1, 1, 9, generator=random)
    rollout[0, 0, 3] = rollout[0, 0, 1]
    phi, psi = (x.double() for x in whiten(rollout[0, 0], goal[0, 0]))
    length, dots = phi.norm(dim=-1), phi @ phi.T
    cosines = dots / length[:, None] / length
    alike, alike_normalised = ((x.sum(-1) - x.diagonal()) * 2 / 3 for x in (dots, cosines))
    aligned = 2 * phi @ psi
    wanted = {
        ("feature_matching", "alignment", "dot"): aligned - alike,
        ("feature_matching", "alignment", "cosine"): aligned / length / psi.norm() - alike,
        ("kernel_score", "kernel", "cosine"): aligned / length / psi.norm() - alike_normalised,
        ("feature_matching", "alignment", "unit_target"): aligned / psi.norm() - alike,
    }
    torch.testing.assert_close(
        alike_normalised, torch.tensor([0, 2 / 3, 0, 2 / 3], dtype=torch.float64), atol=1e-6, rtol=0
    )
    for (objective, option, value), reward in wanted.items():
        chosen = {"objective": objective, "whitening": "group"}
        values = build_values(chosen, resolve_options(chosen, {option: value}))[objective]
        scores = rollout_scores(values, rollout, goal, torch.ones(1, 1, dtype=torch.bool))
        torch.testing.assert_close(scores.reward[0, 0].double(), reward, rtol=1e-4, atol=1e-5)


def test_joined_features_are_the_parts_side_by_side(options):
    _, pipeline, rows = parts(options, features="join:hidden+0.25*ngram")
    alone = {name: parts(options, features=name)[1]["embed"] for name in ("hidden", "ngram")}
    td = pipeline["sample"](at_step(rows[:2].clone(), seed=0, step=0))
    joined = pipeline["embed"](td.clone())[schema.ROLLOUT_FEATURES]
    hidden, ngram = (
        torch.nn.functional.normalize(alone[name](td.clone())[schema.ROLLOUT_FEATURES], dim=-1)
        for name in ("hidden", "ngram")
    )
    torch.testing.assert_close(joined, torch.cat([hidden, 0.5 * ngram], -1))


def test_random_weights_are_the_same_every_time_and_not_the_policys(options):
    found = []
    for backbone in ("random", "random", "start"):
        state = torch.random.get_rng_state()
        _, pipeline, rows = parts(options, backbone=backbone)
        assert torch.equal(state, torch.random.get_rng_state())
        td = pipeline["sample"](at_step(rows[:2].clone(), seed=0, step=0))
        found.append(pipeline["embed"](td)[schema.ROLLOUT_FEATURES])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (found[0] - found[2]).abs().max() > 0.1


def test_a_backbone_by_folder_is_the_start_when_it_is_the_same_model(options):
    features = []
    for backbone in ("start", options["policy"]):
        _, pipeline, rows = parts(options, backbone=backbone)
        td = pipeline["sample"](at_step(rows[:2].clone(), seed=0, step=0))
        features.append(pipeline["embed"](td)[schema.ROLLOUT_FEATURES])
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"features": "join:hidden+hiden"}, "did you mean 'hidden'"),
        ({"features": "join:hidden+hidden"}, "hidden is there twice"),
        ({"features": "join:much*hidden"}, "expected a number before the *, found 'much'"),
        ({"features": "join:hidden+-1*ngram"}, "every weight must be finite"),
        ({"features": "ngram", "layers": "last"}, "--layers last does not apply"),
        ({"whitening": "pca"}, "unknown whitening 'pca'"),
        ({"shrinkage": 0.5}, "--shrinkage 0.5 does not apply"),
        ({"whitening": "population", "shrinkage": 2.0}, "shrinkage=2.0"),
        ({"whitening": "sample"}, "--alignment cosine"),
        ({"whitening": "group", "rollouts": 1, "estimator": "none", "diversity": 0.0}, "--rollouts 1"),
        ({"pooling": "none"}, "say with --credit"),
        ({"trace": 0.5}, "--trace 0.5"),
        ({"horizons": "last"}, "--horizons last"),
        (PER_TOKEN | {"horizons": "first"}, "horizons='first'"),
        (PER_TOKEN | {"token_baseline": "mlp"}, "token_baseline='mlp'"),
        (PER_TOKEN | {"batch": 1, "token_baseline": "ridge"}, "--batch 1"),
        ({"features": "match", "match": "suffix"}, "match='suffix'"),
        ({"credit": "total"}, "--features hidden or match, and --pooling none"),
        (PER_TOKEN | {"credit": "all"}, "credit='all'"),
        ({"layers": "9"}, "layer"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"unit_norm": "batch"}, "normalization='batch'"),
        ({"backbone": "no/where"}, "no/where"),
        ({"alignment": "cosin"}, "'dot', 'cosine', 'unit_target'"),
        ({"features": "sbert", "encoder": "POLICY"}, "is no sentence-transformers model"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(options, tmp_path, chosen, message):
    if chosen.get("encoder") == "POLICY":
        chosen = chosen | {"encoder": options["policy"]}
    with pytest.raises(UsageError) as caught:
        go(options | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_every_whitening_can_be_built():
    for name in GROUPS["whitening"]:
        resolved = resolve_options({"objective": "feature_matching", "whitening": name}, {"alignment": "cosine"})
        values = build_values({"objective": "feature_matching", "whitening": name}, resolved)
        assert list(values) == ["feature_matching"]
        assert callable(values["feature_matching"])
    assert choose("features", "join:hidden+2*ngram").options.keys() >= {"layers", "ngram"}
