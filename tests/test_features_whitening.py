"""Whitening: the identities of arXiv 2603.12248 appendix B, the authors' form, the population form."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from ebft.errors import UsageError
from ebft.features.second_moment import SecondMoment
from ebft.features.whitening import whiten


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(x):
    return (x.double() @ x.double().mT).float()


def diversity(rollout):
    """DT_j = (2 / (n-1)) Σ_{j'≠j} φ̃_jᵀ φ̃_j'."""
    inner = rollout @ rollout.mT
    return 2 / (len(rollout) - 1) * (inner.sum(-1) - inner.diagonal())


def alignment(rollout, target):
    """AT_j with both vectors normalised, (49)."""
    return 2 * cosine_similarity(rollout, target.expand_as(rollout), dim=-1)


def by_definition(rollout, target):
    """(8) with the D x D matrix, its pseudo-inverse and its root, as printed."""
    phi = rollout.double()
    second_moment = phi.mT @ phi / phi.shape[-2]
    values, vectors = torch.linalg.eigh(second_moment)
    root = torch.where(values > 1e-10 * values[-1], values, torch.inf).rsqrt()
    matrix = (vectors * root) @ vectors.mT
    return phi @ matrix, target.double() @ matrix


@pytest.mark.parametrize(("n", "d"), [(4, 10), (6, 3), (3, 3), (1, 5)])
def test_group_whitening_is_the_papers_formula(n, d):
    rollout, target = draw(n, d), draw(d, seed=1)
    expected = by_definition(rollout, target)
    for got, want in zip(whiten(rollout, target), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_gram_matrix_of_whitened_rollouts_with_duplicates():
    """Lemma B.2 with the 1/n of (8): n/n_k within a class of n_k duplicates, 0 between classes."""
    phi = draw(3, 20)
    rollout = phi[[0, 0, 0, 1, 1, 2]]
    sizes = torch.tensor([3.0, 3, 3, 2, 2, 1])
    same = torch.tensor([[i == j for j in "aaabbc"] for i in "aaabbc"])
    expected = torch.where(same, 6 / sizes[:, None], 0.0)
    torch.testing.assert_close(gram(whiten(rollout, draw(20, seed=1))[0]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", ["abcd", "aabc", "aabb", "aaab", "aaaa"])
def test_whitened_diversity_is_a_duplicate_penalty(classes):
    """(48): DT_j = 2 (1 - 1/n_k) / (1 - 1/n)."""
    rollout = draw(4, 9)[["abcd".index(c) for c in classes]]
    sizes = torch.tensor([float(classes.count(c)) for c in classes])
    expected = 2 * (1 - 1 / sizes) / (1 - 1 / 4)
    torch.testing.assert_close(diversity(whiten(rollout, draw(9, seed=1))[0]), expected, rtol=0, atol=1e-5)


def test_normalised_alignment_has_norm_two():
    """(50): Σ_j AT_j² = 4 for distinct rollouts."""
    rollout, target = whiten(draw(5, 12), draw(12, seed=1))
    torch.testing.assert_close(alignment(rollout, target).square().sum(), torch.tensor(4.0))


def test_raw_alignment_is_the_closed_form():
    """(46)-(47) with x = Φ†ψ; the 1/n of (8) multiplies inner products by n."""
    rollout, target = draw(4, 9), draw(9, seed=1)
    x = torch.linalg.lstsq(rollout.mT, target[:, None]).solution[:, 0]
    r, t = whiten(rollout, target)
    torch.testing.assert_close(r @ t, (4 * x).float(), rtol=1e-5, atol=1e-5)


def test_a_rollout_that_equals_the_target_is_found():
    rollout = normalize(draw(8, 30) + 3, dim=-1)
    r, t = whiten(rollout, rollout[2])
    torch.testing.assert_close(alignment(r, t), 2 * torch.eye(8)[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(r[2], t)


def test_the_authors_form_scales_by_one_over_root_n_and_keeps_the_target_collinear():
    rollout, target = draw(4, 9), draw(9, seed=1)
    u, _, vt = torch.linalg.svd(rollout, full_matrices=False)
    r, t = whiten(rollout, target, mode="sample")
    torch.testing.assert_close(r, (u @ vt).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r, whiten(rollout, target)[0] / 2, rtol=1e-6, atol=1e-6)
    assert t.shape == (4, 9)
    rows = cosine_similarity(t.double(), target.expand(4, 9), dim=-1).abs()
    torch.testing.assert_close(rows, torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    copies = (rollout @ rollout.mT).inverse()
    values, vectors = torch.linalg.eigh(copies)
    weights = ((vectors * values.sqrt()) @ vectors.mT) @ target.expand(4, 9)
    torch.testing.assert_close(t, weights.float(), rtol=1e-5, atol=1e-5)


def test_the_authors_form_divides_the_duplicate_penalty_by_n():
    rollout = draw(3, 9)[[0, 0, 1, 2]]
    sample = whiten(rollout, draw(9, seed=1), mode="sample")[0]
    torch.testing.assert_close(diversity(sample), torch.tensor([1 / 3, 1 / 3, 0, 0]), rtol=0, atol=1e-6)


def test_the_authors_form_can_turn_the_alignment_against_the_target_itself():
    """Rollout 0 is the target and has cosine 0.76 to each of the others, which have 0.4 among themselves."""
    cosines = torch.full((4, 4), 0.4, dtype=torch.float64)
    cosines[0] = cosines[:, 0] = 0.76
    rollout = torch.linalg.cholesky(cosines.fill_diagonal_(1.0))
    sample = cosine_similarity(*whiten(rollout, rollout[0], mode="sample"), dim=-1)
    group, group_target = whiten(rollout, rollout[0])
    assert sample[0] < -0.5
    assert (sample[1:] > 0.3).all()
    torch.testing.assert_close(alignment(group, group_target), 2 * torch.eye(4)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["group", "sample", "population"])
@pytest.mark.parametrize(
    "rollout",
    [
        torch.zeros(4, 6),
        torch.ones(4, 6),
        torch.ones(1, 6),
        torch.zeros(1, 6),
        torch.outer(torch.tensor([1.0, -2, 3, 0]), torch.arange(6.0)),
        1e-20 * torch.eye(4, 6),
        1e20 * torch.eye(4, 6),
        torch.eye(4, 6) * torch.tensor([1.0, 1e-4, 1e-8, 0])[:, None],
    ],
)
def test_degenerate_groups_stay_finite(mode, rollout):
    moment = None
    if mode == "population":
        moment = SecondMoment(6, shrinkage=0.0)
        moment.update(rollout)
    for dtype in (torch.float32, torch.bfloat16):
        for target in (torch.zeros(6), torch.arange(6.0)):
            for x in whiten(rollout.to(dtype), target.to(dtype), mode=mode, moment=moment):
                assert x.isfinite().all()
                assert x.dtype == torch.float32


@pytest.mark.parametrize("mode", ["group", "sample"])
def test_groups_do_not_influence_each_other_and_order_does_not_matter(mode):
    rollout, target = draw(2, 3, 4, 7), draw(2, 3, 7, seed=1)
    r, t = whiten(rollout, target, mode=mode)
    alone = whiten(rollout[1, 2], target[1, 2], mode=mode)
    torch.testing.assert_close((r[1, 2], t[1, 2]), alone)
    order = torch.tensor([2, 0, 3, 1])
    permuted = whiten(rollout[..., order, :], target, mode=mode)
    torch.testing.assert_close(permuted[0], r[..., order, :], rtol=1e-5, atol=1e-6)


def test_no_gradient_passes():
    rollout = draw(4, 6).float().requires_grad_()
    assert not any(x.requires_grad for x in whiten(rollout, rollout[0]))


# ---- population


def rewards(rollout, target, moment):
    r, t = whiten(rollout, target, mode="population", moment=moment)
    return 2 * r @ t - diversity(r)


@pytest.mark.parametrize("centred", [False, True])
def test_population_rewards_do_not_change_under_invertible_linear_maps(centred):
    matrix = draw(6, 6, seed=3) + 4 * torch.eye(6)
    population, rollout, target = draw(200, 6, seed=4) + 1, draw(4, 6), draw(6, seed=1)
    moments = [SecondMoment(6, shrinkage=0.0, centred=centred) for _ in range(2)]
    moments[0].update(population)
    moments[1].update(population @ matrix)
    plain = rewards(rollout, target, moments[0])
    mapped = rewards(rollout @ matrix, target @ matrix, moments[1])
    torch.testing.assert_close(plain, mapped, rtol=1e-4, atol=1e-4)
    assert plain.std() > 0.1


@pytest.mark.parametrize("centred", [False, True])
def test_population_whitening_makes_the_population_white(centred):
    population = draw(300, 5) @ draw(5, 5, seed=1) + 2
    moment = SecondMoment(5, shrinkage=0.0, centred=centred)
    moment.update(population)
    white = moment.whiten(population)
    torch.testing.assert_close(white.mT @ white / 300, torch.eye(5), rtol=0, atol=1e-5)
    if centred:
        torch.testing.assert_close(white.mean(0), torch.zeros(5), rtol=0, atol=1e-5)


def test_group_whitening_is_population_whitening_with_the_groups_own_moment():
    rollout, target = draw(4, 9), draw(9, seed=1)
    moment = SecondMoment(9, shrinkage=0.0)
    moment.update(rollout)
    own = whiten(rollout, target, mode="population", moment=moment)
    torch.testing.assert_close(own, whiten(rollout, target), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 6])
@pytest.mark.parametrize("centred", [False, True])
def test_updates_in_pieces_are_one_update(centred, rank):
    data = draw(60, 8) + 1
    if rank:  # exact when the data lies in that many directions
        data = data[:, :rank] @ draw(rank, 8, seed=2)
    whole, pieces = (SecondMoment(8, centred=centred, rank=rank) for _ in range(2))
    whole.update(data)
    for piece in data.split([1, 20, 9, 30]):
        pieces.update(piece)
        pieces.whiten(data)
    torch.testing.assert_close(pieces.whiten(data), whole.whiten(data), rtol=1e-4, atol=1e-4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = SecondMoment(8, centred=centred, rank=rank)
    shuffled.update(data[order])
    torch.testing.assert_close(shuffled.whiten(data), whole.whiten(data), rtol=1e-4, atol=1e-4)


def test_decay_weights_the_past():
    moment = SecondMoment(2, decay=0.5, shrinkage=0.0)
    moment.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    moment.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    # Σ = (0.5 · I + diag(9, 1)) / (0.5 · 2 + 2)
    expected = torch.diag(torch.tensor([9.5, 1.5]) / 3).rsqrt().diag()
    torch.testing.assert_close(moment.whiten(torch.eye(2)).diagonal(), expected)


@pytest.mark.parametrize("centred", [False, True])
def test_decay_is_the_same_with_a_rank_that_loses_nothing(centred):
    data = draw(40, 3) @ draw(3, 8, seed=2)
    whole, low = (SecondMoment(8, decay=0.7, centred=centred, rank=rank) for rank in (None, 3))
    for moment in (whole, low):
        for piece in (data[:10], 3 * data[10:20] + data[0], data[20:]):
            moment.update(piece)
    torch.testing.assert_close(low.whiten(data), whole.whiten(data), rtol=1e-4, atol=1e-4)


def test_what_a_rank_leaves_out_decays_too():
    """Once the left-out directions have been forgotten, all that remains is the recent data."""
    moment = SecondMoment(4, decay=1e-9, rank=1, shrinkage=0.0)
    moment.update(torch.eye(4))
    moment.update(torch.tensor([[2.0, 0, 0, 0]]))
    torch.testing.assert_close(moment.whiten(torch.tensor([2.0, 0, 0, 0])), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(moment.state_dict()["rest"], 3e-9)


@pytest.mark.parametrize("data", [torch.outer(draw(30), draw(10, seed=1)), 2.0 * torch.eye(6, 10)[[0, 0, 3, 3]].tril()])
def test_a_rank_above_that_of_the_data_has_no_made_up_directions(data):
    moments = [SecondMoment(10, rank=rank, shrinkage=0.2) for rank in (None, 5)]
    for moment in moments:
        moment.update(data)
    probe = draw(6, 10, seed=2)
    torch.testing.assert_close(moments[1].whiten(probe), moments[0].whiten(probe), rtol=1e-4, atol=1e-4)


def test_shrinkage_mixes_with_the_isotropic_matrix_and_one_is_a_scalar():
    data = draw(50, 4)
    shrunk = SecondMoment(4, shrinkage=0.3)
    shrunk.update(data)
    second_moment = data.mT @ data / 50
    mixed = 0.7 * second_moment + 0.3 * second_moment.trace() / 4 * torch.eye(4)
    white = shrunk.whiten(data).double()
    torch.testing.assert_close(white @ white.mT, data @ mixed.inverse() @ data.mT, rtol=1e-4, atol=1e-4)
    isotropic = SecondMoment(4, shrinkage=1.0)
    isotropic.update(data)
    torch.testing.assert_close(isotropic.whiten(data).double(), data / (second_moment.trace() / 4).sqrt())


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
@pytest.mark.parametrize("seen", [2, 40])
def test_a_rank_keeps_the_leading_directions_and_the_trace(shrinkage, seen):
    data = draw(seen, 10) * torch.tensor([9.0, 8, 7, 1, 1, 1, 1, 1, 1, 1])
    moment = SecondMoment(10, rank=3, shrinkage=shrinkage)
    moment.update(data)
    values, vectors = torch.linalg.eigh(data.mT @ data / seen)
    values = values.flip(0).clamp(min=0)
    vectors = vectors.flip(1)
    kept = torch.cat([values[:3], values[3:].mean().expand(7)])
    shrunk = (1 - shrinkage) * kept + shrinkage * values.mean()
    root = torch.where(shrunk > 1e-9, shrunk, torch.inf).rsqrt()
    expected = draw(4, 10, seed=5) @ ((vectors * root) @ vectors.mT)
    torch.testing.assert_close(moment.whiten(draw(4, 10, seed=5)), expected.float(), rtol=1e-4, atol=1e-4)


def test_masked_features_are_not_taken_in():
    data = draw(3, 4, 5)
    mask = torch.tensor([True, False, True])[:, None].expand(3, 4)
    moments = [SecondMoment(5) for _ in range(2)]
    moments[0].update(torch.where(mask[..., None], data, torch.nan), mask)
    moments[0].update(data, torch.zeros_like(mask))
    moments[1].update(data[[0, 2]])
    torch.testing.assert_close(moments[0].whiten(data), moments[1].whiten(data))


def test_whitening_does_not_update():
    moment = SecondMoment(5)
    moment.update(draw(20, 5))
    first = whiten(draw(4, 5, seed=1), draw(5, seed=2), mode="population", moment=moment)
    second = whiten(draw(4, 5, seed=1), draw(5, seed=2), mode="population", moment=moment)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("rank", [None, 3])
def test_state_round_trip(rank):
    moment, other = (SecondMoment(5, decay=0.9, rank=rank, centred=True) for _ in range(2))
    moment.update(draw(20, 5))
    other.load_state_dict(moment.state_dict())
    for m in (moment, other):
        m.update(draw(7, 5, seed=1) + 1)
    assert torch.equal(moment.whiten(draw(4, 5, seed=2)), other.whiten(draw(4, 5, seed=2)))


def test_errors():
    rollout, target, moment = torch.ones(4, 5), torch.ones(5), SecondMoment(5)
    with pytest.raises(UsageError, match=r"'zca'.*group, sample, population"):
        whiten(rollout, target, mode="zca")
    with pytest.raises(UsageError, match="belongs to mode='population'"):
        whiten(rollout, target, mode="population")
    with pytest.raises(UsageError, match="belongs to mode='population'"):
        whiten(rollout, target, moment=moment)
    with pytest.raises(UsageError, match=r"\[4, 5\].*\[4\]"):
        whiten(rollout, torch.ones(4))
    with pytest.raises(UsageError, match="calibration pass"):
        whiten(rollout, target, mode="population", moment=moment)
    with pytest.raises(UsageError, match=r"\[4, 6\]: expected \[..., 5\]"):
        moment.update(torch.ones(4, 6))
    with pytest.raises(UsageError, match="does not fit a SecondMoment"):
        moment.load_state_dict(SecondMoment(6).state_dict())
    for options in ({"decay": 0.0}, {"decay": 1.5}, {"shrinkage": -0.1}, {"rank": 5}, {"rank": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            SecondMoment(5, **options)
