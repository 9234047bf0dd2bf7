"""FlexAttention compiled once: how many graphs there are, and what happens when there would be too many.

The compiler's front end decides what is compiled anew, and it is the same on every device; what it hands on is here run
by torch's own reference, since inductor has no FlexAttention with log-sum-exp on a CPU.
"""

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from ebft.attention import flex
from ebft.attention.flex import bucketed, flex_masks
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout
from ebft.policy import CausalPolicy
from tests.models import tiny


@pytest.fixture
def graphs(monkeypatch):
    """A function that gives the number of graphs compiled so far, with the compiler in front of every call."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "flex_attention", compiled)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def comb(*, count, length=40, rollouts=2, horizon=4, documents=False):
    tokens = torch.arange(2 * length).view(2, -1) % 23 + 2
    anchors = torch.linspace(2, length - horizon, count).long().expand(2, -1)
    drawn = torch.arange(2 * count * rollouts * horizon).view(2, count, rollouts, horizon) % 19 + 3
    ids = (torch.arange(length) // 15).expand(2, -1) if documents else None
    return (tokens, tokens >= 0, anchors, anchors > 0, drawn, drawn > 0), {"document_ids": ids}


def test_the_number_of_graphs_does_not_grow_with_steps_and_anchors(graphs):
    policy = CausalPolicy(tiny("llama"), kernel="flex")
    dense = CausalPolicy(tiny("llama"), kernel="dense")
    seen = []
    for count, documents in ((3, False), (5, True), (4, False), (7, True), (6, True), (3, False)):
        inputs, options = comb(count=count, documents=documents)
        with torch.no_grad():
            found, wanted = policy.score(*inputs, **options), dense.score(*inputs, **options)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
        seen.append(graphs())
    assert seen == [1] * 6


def test_windows_and_sizes_have_graphs_of_their_own(graphs):
    policy = CausalPolicy(tiny("gemma3_text"), kernel="flex")
    for count in (3, 5, 4):
        with torch.no_grad():
            policy.score(*comb(count=count)[0])
    assert graphs() == 2  # sliding and full layers
    with torch.no_grad():
        policy.score(*comb(count=14)[0])  # 40 + 14 * 2 * 3 slots: the next size
        policy.score(*comb(count=13, rollouts=3)[0])
    assert bucketed(124) == 128
    assert graphs() == 4


def test_too_many_graphs_are_an_error_and_no_silent_detour(graphs, monkeypatch):
    monkeypatch.setattr(flex, "_GRAPHS", 3)
    policy, done = CausalPolicy(tiny("llama"), kernel="flex"), []

    @torch.no_grad()
    def grow():
        for length in (40, 140, 300, 400, 600):
            policy.score(*comb(count=3, length=length)[0])
            done.append(graphs())

    with pytest.raises(UsageError, match=r"'flex'.* compiled for more than 3 shapes\. Use 'chunked'") as raised:
        grow()
    assert isinstance(raised.value.__cause__, FailOnRecompileLimitHit)
    assert done == [1, 2, 3]


def test_the_kernel_of_gpus_wants_a_whole_graph(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options, function=function))
    flex._compiled.__wrapped__()
    assert asked == {"function": flex_attention, "fullgraph": True, "dynamic": False, "backend": "inductor"}


@pytest.mark.parametrize(("size", "wanted"), [(1, 128), (128, 128), (129, 256), (1025, 1152), (4580, 4608)])
def test_sizes_are_few_and_near(size, wanted):
    assert bucketed(size) == wanted
    assert len({bucketed(n) for n in range(3000, 5000)}) <= 8
    assert max(bucketed(n) / n for n in range(1024, 9000, 7)) < 1.126


@pytest.mark.parametrize("window", [None, 3])
def test_slots_behind_the_row_see_themselves_and_are_seen_by_nobody_else(window):
    (_, _, anchors, real, drawn, _), _ = comb(count=3)
    layout = NestedPrefixLayout(anchors, real, length=40, rollouts=2, horizon=4)
    size = layout.size + 5
    seen = layout.padded(size).dense_mask(window=window)
    assert torch.equal(seen[:, : layout.size, : layout.size], layout.dense_mask(window=window))
    assert not seen[:, : layout.size, layout.size :].any()
    assert torch.equal(seen[:, layout.size :], torch.eye(size, dtype=torch.bool)[layout.size :].expand(2, -1, -1))
    mask = flex_masks(layout, window)
    assert mask.seq_lengths == (128, 128)
    assert drawn.shape == (2, 3, 2, 4)


def test_masks_of_a_row_at_a_time_are_those_of_all_at_once(monkeypatch):
    anchors = torch.tensor([[3, 9], [30, 60]])
    layout = NestedPrefixLayout(anchors, anchors > 0, length=64, rollouts=1, horizon=3)
    asked, create = [], flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *x, **more: asked.append(x[1]) or create(*x, **more))
    ours = flex_masks(layout, None, block=4, size=72)
    padded = layout.padded(72)
    theirs = create(
        lambda row, head, query, key: padded.visible(query, key, row=row), 2, None, 72, 72, device="cpu", BLOCK_SIZE=4
    )
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert not torch.equal(*ours.kv_num_blocks)
    assert asked == [1, 1]


def test_the_order_of_the_row_leaves_most_tiles_out():
    """Tooth after tooth the row touches 212 tiles of 128; step after step of all teeth, as in public code, 548."""
    anchors = torch.arange(8, 1017, 8)[None]
    layout = NestedPrefixLayout(anchors, anchors > 0, length=1024, rollouts=4, horizon=8)
    mask = flex_masks(layout, None)
    assert mask.full_kv_num_blocks is not None
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 212

    teeth = torch.arange(1024, layout.size).view(127, 4, 8)
    by_step = torch.cat([torch.arange(1024), teeth.permute(2, 1, 0).flatten(), torch.arange(layout.size, 5120)])
    seen = layout.padded(5120).dense_mask()[0][by_step][:, by_step]
    assert int(seen.view(40, 128, 40, 128).any(3).any(1).sum()) == 548
