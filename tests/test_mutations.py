"""The proofs can fail: each mistake that the public codebases made turns a comparison with plain forwards red."""

import copy

import pytest
import torch

from ebft.layout import NestedPrefixLayout
from ebft.policy import CausalPolicy
from tests.combs import comb
from tests.models import independent_score, tiny


def worst_error(name="mistral-window", kernel="chunked"):
    """Largest error of scored and of sampled log-probs against one plain forward per rollout."""
    model = tiny(name)
    with pytest.MonkeyPatch.context() as patch:  # the probe would refuse a policy that is wrong
        patch.setattr("ebft.policy.comb_differs", lambda policy: None)
        policy = CausalPolicy(copy.deepcopy(model), kernel=kernel)
    tokens, mask, anchors, anchor_mask, rollout, rollout_mask = comb()
    with torch.no_grad():
        scored, _ = policy.score(tokens, mask, anchors, anchor_mask, rollout, rollout_mask)
        drawn, recorded, alive = policy.sample(tokens, mask, anchors, anchor_mask, rollouts=3, horizon=4, seed=5)
        expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask)
        of_drawn = independent_score(model, tokens, anchors, anchor_mask, drawn, alive)
    return float((scored - expected).abs().max()), float((recorded - of_drawn).abs().max())


@pytest.mark.parametrize("kernel", ["dense", "chunked", "flex"])
def test_without_a_mistake(kernel):
    assert max(worst_error(kernel=kernel)) < 2e-5


def shifted_anchor(layout):
    """A tooth sees one token more of the trunk than its prefix."""
    layout._limit[:, layout.length :] += 1


def shifted_position(layout):
    """A tooth goes on one position too late."""
    layout._position[:, layout.length :] += 1


def row_positions(layout):
    """Positions count the slots of the row."""
    layout._position = torch.arange(layout.size).expand(layout.batch, -1)


def teeth_see_each_other(layout):
    """All rollouts of an anchor are one tooth."""
    layout._tooth = torch.where(layout._tooth < 0, -1, layout._tooth // layout.rollouts)


@pytest.mark.parametrize("kernel", ["dense", "chunked", "flex"])
@pytest.mark.parametrize("mistake", [shifted_anchor, shifted_position, row_positions, teeth_see_each_other])
def test_a_mistake_in_the_layout_shows(monkeypatch, mistake, kernel):
    describe = NestedPrefixLayout._describe_slots

    def wrong(layout, document_ids):
        describe(layout, document_ids)
        mistake(layout)

    monkeypatch.setattr(NestedPrefixLayout, "_describe_slots", wrong)
    scored, sampled = worst_error(kernel=kernel)
    # a sampler, and the chunked kernel, keep the teeth apart in memory, whatever the layout says
    apart = mistake is teeth_see_each_other
    assert scored > 0.01 or (apart and kernel == "chunked")
    assert sampled > 0.01 or apart


@pytest.mark.parametrize("kernel", ["dense", "chunked", "flex"])
@pytest.mark.parametrize("lost", ["no window", "window in slots", "window too long"])
def test_a_mistake_in_the_window_shows(monkeypatch, kernel, lost):
    seen = NestedPrefixLayout.visible

    def wrong(layout, query, key, *, row, window=None):
        if lost == "no window":
            return seen(layout, query, key, row=row)
        if lost == "window too long":
            return seen(layout, query, key, row=row, window=window + 1)
        return seen(layout, query, key, row=row) & (query - key < window)

    monkeypatch.setattr(NestedPrefixLayout, "visible", wrong)
    torch.compiler.reset()  # FlexAttention traces the rule once and would go on with the right one
    assert min(worst_error(kernel=kernel)) > 0.01


def test_a_mistake_in_the_order_of_the_teeth_shows(monkeypatch):
    """The public codebases' own: time-major rows read back as if they were anchor-major."""

    def unpack(layout, row):
        teeth = row[:, layout.length :].unflatten(1, (layout.horizon, layout.rollouts, layout.count))
        return row[:, : layout.length], teeth.permute(0, 3, 2, 1, *range(4, teeth.ndim))

    monkeypatch.setattr(NestedPrefixLayout, "unpack", unpack)
    assert worst_error()[0] > 0.01


def test_a_mistake_in_the_predecessor_of_the_first_token_shows(monkeypatch):
    """The first token of a rollout is predicted by the trunk's token before the anchor, not by the anchor's own."""
    build = NestedPrefixLayout.__init__

    def wrong(layout, anchors, anchor_mask, **shape):
        build(layout, anchors, anchor_mask, **shape)
        layout.anchors = (layout.anchors + 1).clamp(max=layout.length)

    monkeypatch.setattr(NestedPrefixLayout, "__init__", wrong)
    assert worst_error()[0] > 0.01
