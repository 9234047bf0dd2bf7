"""The comb against its definition: what a token sees is the list of tokens before it in its own text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft.attention import chunks
from ebft.attention.flex import flex_masks
from ebft.errors import UsageError
from ebft.layout import NestedPrefixLayout
from ebft.policy import CausalPolicy
from ebft.tuning import PerDevice
from tests.models import VOCABULARY, independent_score, plain_logits, tiny


def texts(layout, anchors, document_ids):
    """For every row and slot, the slots of its text in reading order, the slot itself last: by enumeration."""

    def start_of(row, place):
        while place > 0 and (document_ids is None or document_ids[row, place - 1] == document_ids[row, place]):
            place -= 1
        return place

    found = []
    for row in range(layout.batch):
        slots = [list(range(start_of(row, t), t + 1)) for t in range(layout.length)]
        for k in range(layout.count):
            a = int(anchors[row, k])
            prefix = list(range(start_of(row, a - 1), a))
            for n in range(layout.rollouts):
                first = layout.length + (k * layout.rollouts + n) * layout.horizon
                slots += [prefix + list(range(first, first + g + 1)) for g in range(layout.horizon)]
        found.append(slots)
    return found


@st.composite
def combs(draw):
    """A random comb of at most about 60 slots: anchors in no order, some masked, with or without documents."""
    batch, length, count = draw(st.integers(1, 2)), draw(st.integers(1, 10)), draw(st.integers(1, 3))
    rollouts, horizon = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    anchors = torch.randint(1, length + 1, (batch, count), generator=generator)
    real = torch.rand(batch, count, generator=generator) < 0.8
    anchors = torch.where(real, anchors, draw(st.sampled_from([0, 1, -5, 10**6])))
    documents = None
    if draw(st.booleans()):
        documents = torch.randint(0, 2, (batch, length), generator=generator)
    shape = {"length": length, "rollouts": rollouts, "horizon": horizon}
    return NestedPrefixLayout(anchors, real, **shape, document_ids=documents), anchors, real, documents


@settings(max_examples=60, deadline=None)
@given(combs(), st.sampled_from([None, 1, 2, 3, 5]))
def test_visibility_and_positions_by_enumeration(comb, window):
    layout, anchors, real, documents = comb
    placed = torch.where(real, anchors, 1)
    wanted = torch.zeros(layout.batch, layout.size, layout.size, dtype=torch.bool)
    positions = torch.zeros(layout.batch, layout.size, dtype=torch.int64)
    for row, slots in enumerate(texts(layout, placed, documents)):
        for query, text in enumerate(slots):
            wanted[row, query, text if window is None else text[-window:]] = True
            positions[row, query] = len(text) - 1
    assert torch.equal(layout.dense_mask(window=window), wanted)
    assert torch.equal(layout.positions(), positions)


@settings(max_examples=30, deadline=None)
@given(combs(), st.sampled_from([None, 1, 2, 3, 5]), st.sampled_from([2, 4, 16]))
def test_the_block_mask_shows_what_the_layout_shows(comb, window, block):
    """Every cell of every block: whole blocks are all visible, partial ones by the mask's rule, absent ones hidden."""
    layout, *_ = comb
    mask = flex_masks(layout, window, block=block, size=layout.size)
    size, wanted = layout.size, layout.dense_mask(window=window)
    shown = torch.zeros_like(wanted)
    slots = torch.arange(size)
    for row in range(layout.batch):
        for counts, indices, whole in (
            (mask.kv_num_blocks, mask.kv_indices, False),
            (mask.full_kv_num_blocks, mask.full_kv_indices, True),
        ):
            for q in range(counts.shape[-1]):
                for k in indices[row, 0, q, : counts[row, 0, q]].tolist():
                    queries, keys = (slots[i * block : (i + 1) * block] for i in (q, k))
                    inside = mask.mask_mod(row, 0, queries[:, None], keys[None]) | whole
                    shown[row, queries[:, None], keys[None]] = inside
    assert torch.equal(shown, wanted)


@settings(max_examples=60, deadline=None)
@given(
    combs(),
    st.sampled_from([None, 1, 2, 3, 5]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 3),
)
def test_the_chunks_show_what_the_layout_shows(comb, window, tokens, anchors, rows):
    """Every slot is in one chunk, and sees of the trunk and of its own tooth what it is to see, of the rest nothing."""
    layout, *_ = comb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "TOKENS_PER_CALL", PerDevice(tokens, tokens))
        patch.setattr(chunks, "ANCHORS_PER_CALL", PerDevice(anchors, anchors))
        patch.setattr(chunks, "ROWS_PER_CALL", PerDevice(rows, rows))
        parts = chunks.chunks_of(layout, window)
    shown = torch.zeros_like(layout.dense_mask(window=window))
    times = torch.zeros(layout.batch, layout.size, dtype=torch.int64)
    for part in parts:
        times[part.rows, part.start : part.stop] += 1
        shown[part.rows, part.start : part.stop, part.begin : part.seen] = True
        for slot in range(part.start, part.stop):
            first = slot - (slot - layout.length) % part.own if part.own else 0
            keys = [*range(part.reach), *range(first, first + part.own)]
            shown[part.rows, slot, keys[part.seen :]] = ~part.hidden[:, 0, 0, slot - part.start]
    assert (times == 1).all()
    assert torch.equal(shown, layout.dense_mask(window=window))


@settings(max_examples=40, deadline=None)
@given(combs())
def test_the_predecessor_is_the_token_before_in_the_text(comb):
    layout, anchors, real, documents = comb
    slots = texts(layout, torch.where(real, anchors, 1), documents)
    before = torch.tensor([[text[-2] if len(text) > 1 else -1 for text in row] for row in slots])
    assert torch.equal(layout.predecessors(), layout.unpack(before)[1])


@settings(max_examples=40, deadline=None)
@given(combs())
def test_unpack_inverts_pack(comb):
    layout, *_ = comb
    shape = (layout.batch, layout.count, layout.rollouts, layout.horizon)
    trunk = torch.arange(layout.batch * layout.length * 2).view(layout.batch, layout.length, 2)
    teeth = -torch.arange(2 * torch.Size(shape).numel()).view(*shape, 2)
    row = layout.pack(trunk, teeth)
    assert row.shape == (layout.batch, layout.size, 2)
    assert all(torch.equal(got, put) for got, put in zip(layout.unpack(row), (trunk, teeth), strict=True))


def test_an_id_that_comes_back_is_another_document():
    layout = NestedPrefixLayout(
        torch.tensor([[6]]), torch.tensor([[True]]), length=6, rollouts=1, horizon=1,
        document_ids=torch.tensor([[4, 4, 7, 7, 4, 4]]),
    )  # fmt: skip
    assert layout.positions().tolist() == [[0, 1, 0, 1, 0, 1, 2]]
    assert layout.dense_mask()[0, 6].tolist() == [False, False, False, False, True, True, True]


@pytest.mark.parametrize("anchor", [0, 8, -1])
def test_an_anchor_outside_the_sequence_is_refused(anchor):
    with pytest.raises(UsageError, match=rf"anchor {anchor} lies outside \[1, 7\]"):
        NestedPrefixLayout(torch.tensor([[anchor]]), torch.tensor([[True]]), length=7, rollouts=1, horizon=1)


# Through a model: documents

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [3] * 12 + [4] * 8 + [-1] * 4])


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def batch():
    """Rows of several documents, 10 anchors each (more than one chunk of the chunked kernel), one masked."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCABULARY, DOCUMENTS.shape, generator=random)
    mask = DOCUMENTS >= 0
    # 5 and 14 of the first row are the ends of its first two documents
    anchors = torch.tensor([[1, 3, 5, 6, 8, 11, 14, 15, 19, 22], [2, 4, 9, 12, 13, 14, 16, 18, 20, 1]])
    anchor_mask = torch.ones_like(anchors, dtype=torch.bool)
    anchor_mask[1, -1] = False
    return tokens, mask, anchors, anchor_mask


def document_starts(anchors):
    def start(row, place):
        while place > 0 and DOCUMENTS[row, place - 1] == DOCUMENTS[row, place]:
            place -= 1
        return place

    return torch.tensor([[start(b, int(a) - 1) for a in row] for b, row in enumerate(anchors)])


@pytest.mark.parametrize("kernel", ["dense", "chunked", "rows"])
def test_score_with_documents_equals_forwards_of_the_single_documents(model, batch, kernel):
    tokens, mask, anchors, anchor_mask = batch
    random = torch.Generator().manual_seed(1)
    rollout = torch.randint(2, VOCABULARY, (*anchors.shape, 2, 3), generator=random)
    rollout_mask = anchor_mask[:, :, None, None].expand(rollout.shape)
    policy = CausalPolicy(tiny("llama"), kernel=kernel)
    log_prob, token_log_prob = policy.score(*batch, rollout, rollout_mask, document_ids=DOCUMENTS)
    expected = independent_score(
        model, tokens, anchors, anchor_mask, rollout, rollout_mask, starts=document_starts(anchors)
    )
    torch.testing.assert_close(log_prob, expected, atol=2e-5, rtol=0)
    for row, ids in enumerate(DOCUMENTS):
        for document in ids[mask[row]].unique().tolist():
            own = (ids == document).nonzero()[:, 0]
            wanted = plain_logits(model, tokens[row, own]).log_softmax(-1)[:-1]
            wanted = wanted.gather(-1, tokens[row, own[1:], None])[:, 0]
            torch.testing.assert_close(token_log_prob[row, own[1:] - 1], wanted, atol=2e-5, rtol=0)


def test_documents_change_the_scores(batch):
    """Else the test above would also pass with documents ignored."""
    rollout = torch.full((2, 10, 1, 2), 5)
    rollout_mask = batch[3][:, :, None, None].expand(rollout.shape)
    policy = CausalPolicy(tiny("llama", dtype=torch.float64))  # documents change the order of adding
    with_documents, _ = policy.score(*batch, rollout, rollout_mask, document_ids=DOCUMENTS)
    without, _ = policy.score(*batch, rollout, rollout_mask)
    same = (with_documents - without).abs().amax((-2, -1)) < 1e-6
    assert torch.equal(same, (document_starts(batch[2]) == 0) | ~batch[3])


def test_sampling_with_documents_records_the_log_probs_of_the_single_documents(model, batch):
    tokens, _, anchors, anchor_mask = batch
    policy = CausalPolicy(tiny("llama"))
    settings = {"rollouts": 3, "horizon": 4, "seed": 5, "eos": 2, "document_ids": DOCUMENTS}
    rollout, log_prob, rollout_mask = policy.sample(*batch, **settings)
    starts = document_starts(anchors)
    expected = independent_score(model, tokens, anchors, anchor_mask, rollout, rollout_mask, starts=starts)
    torch.testing.assert_close(log_prob, expected, atol=2e-5, rtol=0)
    assert not rollout_mask[1, -1].any()
    ended = (rollout == 2) & rollout_mask
    assert ended.any()
    assert not (ended[..., :-1] & rollout_mask[..., 1:]).any()


def test_a_rollout_does_not_depend_on_its_company(batch):
    policy = CausalPolicy(tiny("llama"))
    tokens, mask, anchors, anchor_mask = batch
    ids = torch.tensor([31, 8])
    shared = {"horizon": 4, "seed": 3}

    def draw(rows=slice(None), kept=slice(None), rollouts=3):
        part = tokens[rows], mask[rows], anchors[rows][:, kept], anchor_mask[rows][:, kept]
        given = {**shared, "sequence_ids": ids[rows], "document_ids": DOCUMENTS[rows]}
        drawn, _, real = policy.sample(*part, rollouts=rollouts, **given)
        return drawn * real

    whole = draw()
    assert torch.equal(draw(rows=slice(1, 2)), whole[1:2])
    assert torch.equal(draw(rows=[1, 0]), whole[[1, 0]])
    assert torch.equal(draw(rollouts=5)[:, :, :3], whole)
    assert torch.equal(draw(rollouts=1), whole[:, :, :1])
    assert torch.equal(draw(kept=[7, 2, 4]), whole[:, [7, 2, 4]])
