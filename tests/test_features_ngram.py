"""Hashed n-grams against plain counting, and joining maps."""

import itertools
from collections import Counter

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ebft.errors import UsageError
from ebft.features import from_token_function
from ebft.features.join import join
from ebft.features.ngram import ngram
from tests.test_features_contract import LetterEncoder, Letters, make_batch, sbert


def embed_rows(feature_map, rows):
    """Features of the token lists `rows`, as the rollouts of one anchor: [N,D]."""
    horizon = max(map(len, rows))
    tokens = torch.tensor([row + [9] * (horizon - len(row)) for row in rows])[None, None]
    mask = torch.tensor([[g < len(row) for g in range(horizon)] for row in rows])[None, None]
    sequence, yes = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    target = tokens[:, :, 0], mask[:, :, 0]
    return feature_map(sequence, sequence == 0, yes.long(), yes, tokens, mask, *target)[0][0, 0]


def grams(row, n):
    size = min(n, len(row))
    return Counter(tuple(row[i : i + size]) for i in range(len(row) - size + 1) if row)


ROWS = [[3, 4, 3, 4, 3, 5], [3, 4, 5], [5, 4, 3], [3], [4, 3, 4, 3], [], [6, 6, 6, 6], [3, 4, 3, 4, 3, 5]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 9])
def test_inner_products_are_those_of_plain_counts(n):
    features = embed_rows(ngram(n, dimension=2**16, normalize=False), ROWS)
    counts = [grams(row, n) for row in ROWS]
    expected = torch.tensor([[float(sum(a[g] * b[g] for g in a)) for b in counts] for a in counts])
    assert torch.equal(features @ features.mT, expected)


def test_holes_in_the_mask_are_skipped():
    batch = make_batch()
    batch.rollout_tokens[0, 0, 0] = torch.tensor([9, 3, 9, 4, 5])
    batch.rollout_mask[0, 0, 0] = torch.tensor([False, True, False, True, True])
    batch.rollout_tokens[0, 0, 2], batch.rollout_mask[0, 0, 2] = torch.tensor([3, 4, 5, 8, 8]), torch.arange(5) < 3
    rollout, _ = batch.embed(ngram(2))
    assert torch.equal(rollout[0, 0, 0], rollout[0, 0, 2])


def test_unit_norm_by_default():
    norms = embed_rows(ngram(2), ROWS).norm(dim=-1)
    torch.testing.assert_close(norms, torch.tensor([float(len(row) > 0) for row in ROWS]))


def test_whole_rollouts_are_one_hot():
    rows = [list(row) for row in itertools.product((2, 3, 4), repeat=3)] + [[2], [2, 2], [2, 3]]
    features = embed_rows(ngram(3, dimension=2**18), rows)
    assert torch.equal(features @ features.mT, torch.eye(30))


def test_buckets_are_used_evenly():
    """Chi-square of 5,000 single tokens over 50 buckets: mean 49, deviation 10."""
    buckets = embed_rows(ngram(1, dimension=50), [[i] for i in range(5_000)]).sum(0)
    assert 20 < ((buckets - 100) ** 2 / 100).sum() < 100


def test_the_seed_is_a_key():
    one, other = (embed_rows(ngram(2, seed=seed), ROWS) for seed in (0, 1))
    assert not torch.equal(one, other)


def splitmix(x):
    """The finaliser in Python's integers: no sign bit, no overflow."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_buckets_are_those_of_exact_integer_arithmetic(seed):
    """Hence the same in every process, on every device and in every version: saved results stay comparable."""
    rows = [[7, 0, 49_151], [151_935, 3, 3], [1, 2, 3], [1, 3, 2]]
    expected = []
    for row in rows:
        state = splitmix((seed + splitmix(3)) % 2**64)
        for token in row:
            state = splitmix(state ^ splitmix(token + 1))
        expected.append((state >> 1) % 2**62 % 1000)
    assert embed_rows(ngram(3, dimension=1000, seed=seed), rows).argmax(-1).tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with a CPU, and there is no GPU")
def test_buckets_are_the_same_on_a_gpu():
    batch = make_batch()
    on_gpu = batch.map(lambda x: x.cuda()).embed(ngram(2))
    assert all(torch.equal(g.cpu(), c) for g, c in zip(on_gpu, batch.embed(ngram(2)), strict=True))


@pytest.mark.parametrize(
    ("options", "name"), [({"n": 0}, "n=0"), ({"n": 1.5}, "n=1.5"), ({"dimension": 0}, "dimension=0")]
)
def test_options_out_of_range(options, name):
    with pytest.raises(UsageError, match=name):
        ngram(**options)


# ---- join


def test_joined_inner_products_are_weighted_cosines():
    batch = make_batch()
    maps = [ngram(1, normalize=False), sbert(LetterEncoder(), Letters()), ngram(2)]
    weights = [0.5, 2.0, 0.0]
    rollout, target = batch.embed(join(maps, weights))
    parts = [batch.embed(m) for m in maps]
    expected = sum(w * cosine_similarity(r, t[:, :, None], dim=-1) for w, (r, t) in zip(weights, parts, strict=True))
    torch.testing.assert_close((rollout * target[:, :, None]).sum(-1), expected, rtol=1e-5, atol=1e-6)
    assert rollout.shape[-1] == 512 + 16 + 512


def test_documents_reach_every_map():
    batch = make_batch()
    documents = (torch.arange(20) >= 6).long().repeat(3, 1)
    maps = [from_token_function(lambda tokens, mask: tokens.float(), context_tokens=4), ngram(1)]
    apart = batch.embed(maps[0], document_ids=documents)
    joined = batch.embed(join(maps), document_ids=documents)
    for one, both in zip(apart, joined, strict=True):
        torch.testing.assert_close(torch.nn.functional.normalize(one, dim=-1), both[..., :9])
    assert not torch.equal(joined[1], batch.embed(join(maps))[1])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights(weights):
    with pytest.raises(UsageError, match="weights="):
        join([ngram(1), ngram(2)], weights)


def test_nothing_to_join_and_dimensions_that_differ():
    with pytest.raises(UsageError, match="no feature maps"):
        join([])

    def lopsided(*batch, document_ids=None):
        return torch.zeros(3, 3, 4, 5), torch.zeros(3, 3, 6)

    with pytest.raises(UsageError, match=r"map 1 .*\[3, 3, 4, 5\].*\[3, 3, 6\]"):
        make_batch().embed(join([ngram(1), lopsided]))
