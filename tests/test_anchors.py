"""Anchor placement against a slow double loop that says what an anchor is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft.errors import UsageError
from ebft.samplers import anchors


@st.composite
def batches(draw):
    """Right-padded rows with, or without, documents and answer masks."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    lengths = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    given = {}
    if draw(st.booleans()):
        # few ids, so that one comes back after another document
        opens = torch.rand(batch, length, generator=generator) < 0.25
        ids = torch.randint(0, 3, (batch, length), generator=generator)
        given["document_ids"] = torch.stack(
            [
                torch.tensor([int(i[o.nonzero()[:, 0][: int(o[: t + 1].sum())][-1]]) if o[: t + 1].any() else 9
                              for t in range(length)])
                for i, o in zip(ids, opens, strict=True)
            ]
        )  # fmt: skip
    if draw(st.booleans()):
        given["answer_mask"] = torch.rand(batch, length, generator=generator) < 0.8
    return mask, given


def valid_places(mask, *, first, horizon, document_ids=None, answer_mask=None):
    """For every row, {anchor: context tokens in its document}, by looking at each token of context and target."""
    found = []
    for row in range(mask.shape[0]):
        places = {}
        for a in range(1, mask.shape[1]):
            document = None if document_ids is None else document_ids[row]
            start = a
            while start > 0 and (document is None or document[start - 1] == document[a]):
                start -= 1
            target = range(a, a + horizon)
            fits = all(
                t < mask.shape[1]
                and mask[row, t]
                and (answer_mask is None or answer_mask[row, t])
                and (document is None or all(document[u] == document[a] for u in range(a, t + 1)))
                for t in target
            )
            if fits and a - start >= first:
                places[a] = a - start
        found.append(places)
    return found


def unpadded(result):
    """The anchors of every row, after checking the form of the padding."""
    places, real = result
    assert places.shape == real.shape
    assert places.dtype == torch.int64
    assert real.any(0).all()  # no column without an anchor
    assert (real.long().diff(dim=1) <= 0).all()  # real ones first
    assert (places[~real] == 1).all()
    return [row[m].tolist() for row, m in zip(places, real, strict=True)]


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_strided_against_a_double_loop(batch, stride, first, horizon):
    mask, given = batch
    wanted = [
        [a for a, context in places.items() if (context - first) % stride == 0]
        for places in valid_places(mask, first=first, horizon=horizon, **given)
    ]
    options = {"stride": stride, "first": first, "horizon": horizon}
    if not any(wanted):
        with pytest.raises(UsageError, match="no room for an anchor"):
            anchors.strided(mask, **options, **given)
        return
    assert unpadded(anchors.strided(mask, **options, **given)) == wanted


@settings(max_examples=80, deadline=None)
@given(batches(), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_random_takes_valid_places_without_replacement(batch, count, first, horizon, seed):
    mask, given = batch
    valid = valid_places(mask, first=first, horizon=horizon, **given)
    options = {"count": count, "first": first, "horizon": horizon, "generator": torch.Generator().manual_seed(seed)}
    if not any(valid):
        with pytest.raises(UsageError, match="no room for an anchor"):
            anchors.random(mask, **options, **given)
        return
    for drawn, places in zip(unpadded(anchors.random(mask, **options, **given)), valid, strict=True):
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= set(places)
        assert len(drawn) == min(count, len(places))


def test_random_is_uniform_over_all_subsets():
    mask = torch.ones(9000, 8, dtype=torch.bool)  # first 2, horizon 2: the valid places are 2..6
    generator = torch.Generator().manual_seed(0)
    drawn, real = anchors.random(mask, count=2, first=2, horizon=2, generator=generator)
    assert real.all()
    pairs, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert len(pairs) == 10
    statistic = float(((counts - 900.0) ** 2 / 900).sum())
    assert statistic < 27.9  # chi-square of 9 degrees of freedom, exceeded once in 1,000


def test_a_row_without_an_anchor_is_masked():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    places, real = anchors.strided(mask, stride=2, first=2, horizon=2)
    assert places[0].tolist() == [2, 4]
    assert real.tolist() == [[True, True], [False, False]]


def test_stride_and_first_need_divide_nothing():
    mask = torch.ones(1, 20, dtype=torch.bool)
    places, _ = anchors.strided(mask, stride=7, first=3, horizon=4)
    assert places.tolist() == [[3, 10]]


@pytest.mark.parametrize("name", ["stride", "first", "horizon"])
def test_numbers_below_one_are_refused(name):
    options = {"stride": 1, "first": 1, "horizon": 1, name: 0}
    with pytest.raises(UsageError, match=f"^{name}=0: expected a whole number >= 1"):
        anchors.strided(torch.ones(1, 9, dtype=torch.bool), **options)


def test_random_refuses_no_anchors():
    with pytest.raises(UsageError, match=r"^count=0: expected"):
        anchors.random(torch.ones(1, 9).bool(), count=0, first=1, horizon=1, generator=torch.Generator())


def test_too_short_text_says_what_is_needed_and_what_is_there():
    mask = torch.arange(9).expand(2, -1) < torch.tensor([[5], [7]])
    message = "first=4 context tokens and horizon=6 target tokens need 10 tokens in one document, the longest row has 7"
    with pytest.raises(UsageError, match=message):
        anchors.strided(mask, stride=1, first=4, horizon=6)


def test_single_anchors_at_the_end_of_each_prompt():
    places, real = anchors.single(torch.tensor([3, 0, 7]))
    assert places.tolist() == [[3], [1], [7]]
    assert real.tolist() == [[True], [False], [True]]
    with pytest.raises(UsageError, match=r"prompt lengths \[0, 0\]"):
        anchors.single(torch.tensor([0, 0]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_targets_are_the_tokens_that_follow(batch, length, horizon, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1000, (batch, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)
    answers = (torch.rand(batch, length, generator=generator) < 0.8) if seed % 2 else None
    documents = torch.randint(0, 2, (batch, length), generator=generator) if seed % 3 else None
    places = torch.randint(1, length + 1, (batch, 3), generator=generator)
    real = torch.rand(batch, 3, generator=generator) < 0.7
    found, inside = anchors.targets(
        tokens, mask, places, real, horizon=horizon, answer_mask=answers, document_ids=documents
    )
    assert found.shape == inside.shape == (batch, 3, horizon)
    for b in range(batch):
        for k in range(3):
            wanted = []
            for place in range(a := int(places[b, k]), min(a + horizon, length)):
                other = documents is not None and documents[b, place] != documents[b, a - 1]
                if not real[b, k] or not mask[b, place] or other or (answers is not None and not answers[b, place]):
                    break
                wanted.append(int(tokens[b, place]))
            assert found[b, k][inside[b, k]].tolist() == wanted
