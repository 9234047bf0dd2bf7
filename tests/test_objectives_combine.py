"""Sums of rewards: that they are sums, and that the expected update is the gradient of the sum of the objectives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives.baselines import advantage
from ebft.objectives.combine import combine, weighted_sum
from ebft.objectives.component import objective
from ebft.objectives.kernels import kernel_values
from ebft.objectives.verifiers import reward_advantage, verifier
from tests.enumeration import VOCABULARY, TablePolicy, expected_update, features, score_parts

WEIGHTS = {"matching": 0.7, "table": -1.3}


def decode(tokens: Tensor, mask: Tensor) -> list[str]:
    return ["".join(map(str, row[keep].tolist())) for row, keep in zip(tokens, mask, strict=True)]


class Setting:
    """Groups of rollouts of a table policy as batches, one group a row, with features and an arbitrary reward table."""

    def __init__(self, seed: int = 0) -> None:
        self.policy, self.phi = TablePolicy(seed=seed), features(seed=seed + 1)
        self.target = features(seed=seed + 2, outcomes=1)[0]
        generator = torch.Generator().manual_seed(seed + 3)
        self.table = torch.randn(len(self.phi), generator=generator, dtype=torch.float64)

    def score(self, texts: list[str], references: list[str]) -> Tensor:
        return self.table[torch.tensor([int(text, VOCABULARY) for text in texts])]

    def batch(self, index: Tensor) -> TensorDict:
        """Outcomes [M,N] as M sequences of one anchor."""
        tokens = self.policy.outcomes[index][:, None]
        rollout = {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
        rollout["features"] = self.phi[index][:, None]
        target = {"tokens": tokens[:, :, 0], "mask": torch.ones_like(tokens[:, :, 0], dtype=torch.bool)}
        target["features"] = self.target.expand(len(index), 1, -1)
        size = [len(index)]
        entries = {"rollout": TensorDict(rollout, size), "target": TensorDict(target, size)}
        return TensorDict({**entries, "anchor_mask": torch.ones(len(index), 1, dtype=torch.bool)}, size)

    def stages(self, estimator: str = "rloo", diversity: float = 1.0):
        return {
            "matching": objective(kernel_values, estimator=estimator, diversity=diversity),
            "table": verifier(self.score, decode=decode, estimator=estimator),
        }

    def stage(self, weights=WEIGHTS, **options):
        return combine(self.stages(**options), weights, decode=decode)


def some(count: int = 5, rollouts: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY**2, (count, rollouts), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("estimator", ["rloo", "none"])
@pytest.mark.parametrize("diversity", [0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 10])
def test_expected_update_is_the_gradient_of_the_sum(estimator, diversity, seed):
    """w₁ (score of the kernel) - w₂ E[reward], by enumeration of all groups of three rollouts."""
    setting = Setting(seed)
    stage = setting.stage(estimator=estimator, diversity=diversity)
    found = expected_update(setting.policy, 3, lambda index: stage(setting.batch(index))[schema.ADVANTAGE][:, 0])
    alignment, spread = score_parts(setting.policy, *kernel_values(setting.phi, setting.target))
    expected_reward = setting.policy.prob() @ setting.table
    loss = WEIGHTS["matching"] * (alignment + diversity * spread) - WEIGHTS["table"] * expected_reward
    exact = setting.policy.gradient(loss)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    assert exact.norm() > 0.1


@pytest.mark.parametrize("estimator", ["rloo", "mean", "group_norm", "none"])
def test_reward_and_advantage_are_the_sums_of_the_parts(estimator):
    setting, index = Setting(), some()
    found = setting.stage(estimator=estimator)(setting.batch(index))
    alone = {name: stage(setting.batch(index)) for name, stage in setting.stages(estimator=estimator).items()}
    for key in (schema.REWARD, schema.ADVANTAGE):
        expected = 0.7 * alone["matching"][key] - 1.3 * alone["table"][key]
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-12)


def test_under_rloo_the_advantage_of_the_sum_is_the_sum_of_the_advantages():
    """The plain reward r of a rollout is the kernel value r/2 with the target, and none among rollouts."""
    setting, index = Setting(), some()
    k_target, k_rollouts = kernel_values(setting.phi[index], setting.target.expand(len(index), -1))
    reward = setting.table[index]
    whole = advantage(0.7 * k_target - 1.3 * reward / 2, 0.7 * k_rollouts)
    parts = 0.7 * advantage(k_target, k_rollouts) - 1.3 * reward_advantage(reward)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    found = setting.stage()(setting.batch(index))[schema.ADVANTAGE][:, 0]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_every_part_is_on_record():
    setting, index = Setting(), some()
    td = setting.stage(weights={"matching": 2.0, "table": 0.0})(setting.batch(index))
    torch.testing.assert_close(td["metrics", "table_reward"], setting.table[index].mean(-1, keepdim=True))
    matching = objective(kernel_values)(setting.batch(index))
    torch.testing.assert_close(td["metrics", "matching_reward"], matching[schema.REWARD].mean(-1))
    assert torch.equal(td["metrics", "matching_alignment"], matching["metrics", "alignment"])
    torch.testing.assert_close(td[schema.REWARD], 2 * matching[schema.REWARD])
    own = {"reward_spread", "zero_spread_groups"}
    assert own < set(td["metrics"].keys())
    assert {name.split("_")[0] for name in set(td["metrics"].keys()) - own} == {"matching", "table"}
    torch.testing.assert_close(td["metrics", "reward_spread"], td[schema.REWARD].std(-1))
    assert all(value.shape == (5, 1) for value in td["metrics"].values())


def test_parts_do_not_see_each_other():
    """Not even the reward and the metrics of an earlier stage; what else they write is kept."""
    setting, seen = Setting(), []

    def part(td, *, number):
        seen.append([key for key in td.keys(include_nested=True, leaves_only=True) if td.get(key) is not None])
        td[schema.REWARD] = td[schema.ADVANTAGE] = torch.full(td["rollout", "tokens"].shape[:3], number)
        td[schema.metric("size")] = torch.full((len(td), 1), number)
        td["rollout", f"extra_{number:.0f}"] = torch.full((len(td), 1), number)
        return td

    td = setting.batch(some())
    td[schema.REWARD] = torch.full((5, 1, 4), 9.0)
    td[schema.metric("earlier")] = torch.full((5, 1), 9.0)
    parts = {name: partial(part, number=number) for name, number in (("a", 1.0), ("b", 2.0))}
    out = combine(parts, {"a": 10.0, "b": 1.0}, decode=decode)(td)
    assert seen[0] == seen[1]
    assert schema.REWARD not in seen[0]
    assert out[schema.REWARD].eq(12).all()
    assert (out["metrics", "a_size"].eq(1) & out["metrics", "b_size"].eq(2) & out["metrics", "earlier"].eq(9)).all()
    assert out["rollout", "extra_1"].eq(1).all()
    assert out["rollout", "extra_2"].eq(2).all()


@pytest.mark.parametrize("garbage", [3.0, float("nan"), float("inf")])
def test_masked_anchors_get_zeros_whatever_a_part_writes(garbage):
    setting = Setting()
    td = setting.batch(some())
    td["anchor_mask"][2] = False

    def careless(td):
        td[schema.REWARD] = torch.ones(5, 1, 4)
        td[schema.REWARD][2] = garbage
        td[schema.ADVANTAGE] = td[schema.REWARD].clone()
        return td

    stages = {**setting.stages(), "careless": careless}
    out = combine(stages, {**WEIGHTS, "careless": 1.0}, decode=decode)(td)
    for key in (schema.REWARD, schema.ADVANTAGE, schema.metric("careless_reward")):
        assert out[key][2].eq(0).all()
        assert out[key].isfinite().all()
        assert out[key][3].ne(0).any()


@pytest.mark.parametrize("key", [schema.REWARD, schema.ADVANTAGE])
def test_what_is_not_finite_is_named_with_part_and_text(key):
    setting, index = Setting(), some()
    index[3, 2] = 5  # "12" to base 3

    def broken(td):
        td[schema.REWARD], td[schema.ADVANTAGE] = torch.zeros(5, 1, 4), torch.zeros(5, 1, 4)
        td[key][3, 0, 2] = float("nan")
        return td

    stage = combine({**setting.stages(), "broken": broken}, {**WEIGHTS, "broken": 0.0}, decode=decode)
    message = f"{key[1]} of part broken, nan of rollout 2 of anchor 0 of sequence 3.*text: '12'"
    with pytest.raises(UsageError, match=message):
        stage(setting.batch(index))


def test_a_part_that_writes_nothing_or_another_shape_is_refused():
    setting = Setting()

    def per_token(td):
        td[schema.REWARD] = td[schema.ADVANTAGE] = torch.zeros(5, 1, 4, 2)
        return td

    td = setting.batch(some())
    td[schema.REWARD] = td[schema.ADVANTAGE] = torch.zeros(5, 1, 4)  # of an earlier stage
    with pytest.raises(UsageError, match=r"part idle wrote nothing to .*'reward'"):
        combine({"idle": lambda td: td}, {"idle": 1.0}, decode=decode)(td)
    with pytest.raises(UsageError, match=r"part tokens wrote shape \[5, 1, 4, 2\].*\[5, 1, 4\]"):
        combine({"tokens": per_token}, {"tokens": 1.0}, decode=decode)(td)


def test_weighted_sum():
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 20.0], dtype=torch.float64)}
    assert weighted_sum(parts, {"b": 0.5, "a": -1.0}).tolist() == [4.0, 8.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "no weight for b; there are weights for a"),
        ({}, "no weight for a, b; there are weights for nothing"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "weights for c, which are no parts; the parts are a, b"),
        ({"a": 1.0, "b": float("nan")}, "weight nan of b"),
        ({"a": 1.0, "b": float("inf")}, "weight inf of b"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(UsageError, match=message):
        weighted_sum({"a": torch.zeros(2), "b": torch.zeros(2)}, weights)
    with pytest.raises(UsageError, match=message):
        combine({"a": lambda td: td, "b": lambda td: td}, weights, decode=decode)


def test_nothing_to_sum_and_shapes_that_disagree():
    with pytest.raises(UsageError, match="no parts"):
        weighted_sum({}, {})
    with pytest.raises(UsageError, match=r"'a': \[2\], 'b': \[1, 2\]"):
        weighted_sum({"a": torch.zeros(2), "b": torch.zeros(1, 2)}, {"a": 1.0, "b": 1.0})
