"""The comparison of estimators: its projected gradients, its measures on a world that is known, and its files."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from torch import nn

from benchmarks import estimators
from benchmarks.estimators_collect import Projections, collect, load
from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from tests.combs import comb
from tests.enumeration import TablePolicy, features
from tests.models import plain_logits, tiny


def changes_at_rollouts(model, row, start):
    """log p(row[start:] | row[:start]) by matrices added to all linear layers at the positions that predict these."""
    deltas = {m: torch.zeros_like(m.weight, requires_grad=True) for m in model.base_model.modules()
              if isinstance(m, nn.Linear)}  # fmt: skip

    def add(module, inputs, output):
        acting = (torch.arange(inputs[0].shape[1]) >= start - 1)[:, None]
        return output + torch.where(acting, inputs[0] @ deltas[module].T, 0.0)

    hooks = [module.register_forward_hook(add) for module in deltas]
    log_prob = plain_logits(model, row).log_softmax(-1)[start - 1 : -1].gather(-1, row[start:, None]).sum()
    gradients = torch.autograd.grad(log_prob, list(deltas.values()))
    for hook in hooks:
        hook.remove()
    return gradients


def test_projections_are_those_of_each_rollouts_own_gradient():
    model = tiny(dtype=torch.float64).requires_grad_(False)
    policy = CausalPolicy(tiny(dtype=torch.float64).requires_grad_(False))
    project = Projections(policy, count=7, seed=3)
    project._ways = {module: tuple(x.double() for x in ways) for module, ways in project._ways.items()}
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    anchors = anchors.clamp(min=2)
    found = project(tokens, mask, anchors, anchor_mask, rollout, rollout_mask, document_ids=None)
    for b, k, n in rollout_mask[..., 0].nonzero().tolist():
        a, alive = int(anchors[b, k]), rollout_mask[b, k, n]
        row = torch.cat([tokens[b, :a], rollout[b, k, n][alive]])
        gradients = changes_at_rollouts(model, row, a)
        wanted = sum(
            torch.einsum("op,oi,ip->p", along, gradient, across)
            for (along, across), gradient in zip(project._ways.values(), gradients, strict=True)
        )
        assert wanted.norm() > 0.1
        torch.testing.assert_close(found[b, k, n].double(), wanted, rtol=1e-5, atol=1e-4)
    assert (found[~anchor_mask] == 0).all()


def world(contexts, rollouts, *, pull=1.0, seed=0):
    """Rollouts of a table policy: features, target and exact scores, as if of several contexts."""
    policy, phi = TablePolicy(seed=seed), features(seed=seed + 1)
    draws = torch.multinomial(policy.prob().detach(), contexts * rollouts, replacement=True,
                              generator=torch.Generator().manual_seed(seed)).view(contexts, rollouts)  # fmt: skip
    jacobian = torch.stack([policy.gradient(value).flatten() for value in policy.log_prob().sum(-1)])
    target = pull * features(seed=seed + 2, outcomes=1)[0].expand(contexts, -1)
    return phi[draws], target, jacobian[draws], policy, phi


def test_halves_share_no_rollouts_however_often_groups_are_drawn():
    """Scores that know nothing of the features: every mean is noise, and the product of two halves is 0 on average."""
    random = torch.Generator().manual_seed(0)
    phi, target, scores = (torch.randn(2000, *shape, generator=random) for shape in ((8, 3), (3,), (8, 4)))
    found = estimators.gradients(phi, target, scores, size=2, kernel="linear", group_whitening=False, repeats=5, seed=0)
    for name, parts in estimators.products(found, 2000).items():
        for value in (parts["true"], parts["own"], parts["both"]):
            assert abs(value.mean()) < 4 * value.std() / 2000**0.5, name


@pytest.mark.parametrize("size", [3, 4])
def test_the_known_bias_is_measured(size):
    """With no target only diversity is left, of which `mean` gives (N-2)/(N-1); within 4.4 standard errors."""
    phi, target, scores, _, _ = world(12, 2048, pull=0.0)
    found = estimators.gradients(
        phi, target, scores, size=size, kernel="linear", group_whitening=False, repeats=1, seed=0
    )
    parts = estimators.products(found, 12)
    scale, width = estimators.with_intervals(parts["mean"], unbiased=False)["scale"]
    assert width < 0.1
    assert scale == pytest.approx((size - 2) / (size - 1), abs=2 * width)
    for name in ("rloo", "rloo_tuned"):
        scale, width = estimators.with_intervals(parts[name], unbiased=True)["scale"]
        assert scale == pytest.approx(1.0, abs=2 * width)


def test_variances_are_those_of_enumeration():
    """All pairs of rollouts of the table with their probabilities, against groups of two drawn from it."""
    phi, target, scores, policy, table = world(8, 4096)
    found = estimators.gradients(phi, target, scores, size=2, kernel="linear", group_whitening=False, repeats=1, seed=1)
    outcomes, probability = len(table), policy.prob().detach()
    pairs = torch.cartesian_prod(torch.arange(outcomes), torch.arange(outcomes))
    weight = probability[pairs].prod(-1)
    jacobian = torch.stack([policy.gradient(value).flatten() for value in policy.log_prob().sum(-1)])
    goal = target[:1].expand(len(pairs), -1)
    for name in ("none", "rloo", "group_norm"):
        k_target, k_rollouts = estimators.values_of("linear")(table[pairs], goal)
        with warnings.catch_warnings(action="ignore"):  # two rollouts leave the diversity part without a baseline
            gain = estimators.advantage(k_target, k_rollouts, estimator=name)
        estimate = torch.einsum("pn,pnw->pw", gain, jacobian[pairs]) / 2
        mean = (weight[:, None] * estimate).sum(0)
        square = (weight * estimate.square().sum(-1)).sum()
        assert found[name]["square"].mean() == pytest.approx(square.item(), rel=0.05)
        torch.testing.assert_close(found[name]["halves"].mean((0, 1)), mean, atol=0.05 * mean.norm().item(), rtol=0.1)


def test_measures_by_hand():
    parts = {"true": 2.0, "both": 3.0, "own": 5.0, "square": 15.0, "none": 42.0, "rloo": 22.0}
    parts = {name: torch.tensor(value) for name, value in parts.items()}
    found = {name: value.item() for name, value in estimators.measures(parts, unbiased=False).items()}
    assert found["variance"] == pytest.approx((15 - 5) / 2)
    assert found["scale"] == pytest.approx(1.5)
    assert found["cosine"] == pytest.approx(3 / 10**0.5)
    assert found["speed_up"] == pytest.approx((42 - 2) / (15 - 5) * 1.5**2)
    assert found["over_rloo"] == pytest.approx((22 - 2) / (15 - 5) * 1.5**2)
    assert found["speed_up_texts"] == pytest.approx(42 / 15 * 1.5**2)
    unbiased = estimators.measures(parts, unbiased=True)
    assert unbiased["speed_up"].item() == pytest.approx((42 - 2) / (15 - 2))


def test_intervals_are_the_jackknife_of_a_mean():
    """Of a ratio with a constant below it, which is a mean: t times the standard error."""
    values = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.ones(9, dtype=torch.float64)
    parts = {"true": one, "both": values, "own": one, "square": 3 * one, "none": 3 * one, "rloo": 3 * one}
    mean, width = estimators.with_intervals(parts, unbiased=True)["scale"]
    assert mean == pytest.approx(values.mean().item())
    assert width == pytest.approx(2.306004 * values.std().item() / 3, rel=1e-5)


@pytest.fixture(scope="module")
def collection(tmp_path_factory, tiny_folder, tiny_text):
    folder = tmp_path_factory.mktemp("rollouts")
    collect(folder, policy=str(tiny_folder), data=str(tiny_text), features=("hidden",), **SETTINGS)
    return folder


SETTINGS = {"sequences": 7, "length": 40, "horizon": 3, "rollouts": 8, "projections": 5, "seed": 0, "say": print}


def test_from_rollouts_to_table_and_plot_without_a_model(collection, tiny_folder, tiny_text, tmp_path, monkeypatch):
    td, _ = load(collection)
    assert td["scores"].shape == (7, 2, 8, 5)
    assert td["features", "hidden"].shape[:3] == (7, 2, 8)
    for number in (2, 5):  # what an interrupted collection lacks is made again, the same
        shutil.rmtree(collection / f"sequence-00{number}")
    with pytest.raises(UsageError, match="lacks sequence-002, sequence-005"):
        load(collection)
    collect(collection, policy=str(tiny_folder), data=str(tiny_text), features=("hidden",), **SETTINGS)
    again, _ = load(collection)
    assert torch.equal(again["rollout_tokens"], td["rollout_tokens"])
    torch.testing.assert_close(again["scores"], td["scores"])
    with pytest.raises(UsageError, match="other settings"):
        collect(collection, policy=str(tiny_folder), data=str(tiny_text), features=("hidden",),
                **{**SETTINGS, "seed": 1})  # fmt: skip

    monkeypatch.setattr(CausalPolicy, "from_pretrained", None)  # nothing below loads a model
    options = {"sizes": (2, 4), "kernels": ("linear", estimators.COSINE), "repeats": 1, "seed": 0}
    said: list[str] = []
    first = estimators.evaluate(collection, **options, say=said.append)
    assert len(said) == 3 * 2
    assert len(first["rows"]) == 3 * 2 * 2 * 5
    assert estimators.evaluate(collection, **options, say=said.append) == first
    assert len(said) == 3 * 2
    (collection / "cells" / "hidden-none-4.json").unlink()
    assert estimators.evaluate(collection, **options, say=said.append) == first
    assert len(said) == 3 * 2 + 1
    estimators.estimators_report.write(tmp_path, first, plot=tmp_path / "plot.png")
    stored = json.loads((tmp_path / "estimators.json").read_text())
    assert stored["collection"] == first["collection"]
    assert any(own["scale"][0] is not None for own in first["rows"])
    for row, own in zip(stored["rows"], first["rows"], strict=True):
        assert row["estimator"] == own["estimator"]
        assert [x is None for x in row["scale"]] == [x is None for x in own["scale"]]
        if own["scale"][0] is not None:
            assert row["scale"][0] == pytest.approx(own["scale"][0], rel=1e-4)
    assert "| linear | none |" in (tmp_path / "estimators.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_bad_folders_are_refused(collection, tmp_path):
    with pytest.raises(UsageError, match="holds no rollouts"):
        load(tmp_path)
    with pytest.raises(UsageError, match="groups of 16 do not fit into half of 8"):
        estimators.evaluate(collection, sizes=(16,), kernels=("linear",), repeats=1, seed=0, say=print)
