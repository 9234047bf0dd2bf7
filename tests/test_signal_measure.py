"""Measured signal and noise against exact ones of a model that can be enumerated; gradients against the loss's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict

from ebft import schema
from ebft.errors import UsageError
from ebft.features import as_module, from_token_function
from ebft.loops.scoring import score
from ebft.loops.signal.measure import chosen_parameters, measure, token_weights
from ebft.loops.signal.plan import CROSS_ENTROPY, Configuration, Embedding, Plan, Sampling, token_forwards
from ebft.loops.signal.statistics import jackknife, signal_to_noise, signal_to_noise_within
from ebft.loops.signal.store import GradientStore
from ebft.loops.stages import at_step
from ebft.objectives.baselines import advantage
from ebft.objectives.component import objective
from ebft.objectives.counts import totals
from ebft.objectives.kernels import kernel_values
from ebft.objectives.losses import EBFTLoss
from ebft.policy import CausalPolicy
from ebft.samplers import sampler
from ebft.samplers.anchors import strided
from tests.models import tiny

VOCABULARY, HORIZON, ROLLOUTS, LENGTH = 4, 2, 3, 5
NAME = "rloo"


@pytest.fixture(scope="module")
def policy():
    model = tiny("llama", vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return CausalPolicy(model, kernel="dense")


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    return TensorDict(
        {
            schema.TOKENS: tokens,
            schema.MASK: torch.ones_like(tokens, dtype=torch.bool),
            schema.DOCUMENT_IDS: torch.zeros_like(tokens),
            schema.SEQUENCE_IDS: torch.tensor([11, 12]),
        },
        batch_size=[2],
    )


def table(outcomes: int = VOCABULARY**HORIZON) -> torch.Tensor:
    return torch.randn(outcomes, 3, generator=torch.Generator().manual_seed(3))


def embed(tokens, mask):
    """A random feature for every rollout."""
    places = VOCABULARY ** torch.arange(HORIZON)
    return table()[(tokens * places).sum(-1)]


def plan_of(policy, *, stride: int = LENGTH, first: int = 3, **options) -> Plan:
    def place(mask, *, document_ids):
        return strided(mask, stride=stride, first=first, horizon=HORIZON, document_ids=document_ids)

    stage = sampler(place, policy.sample, horizon=HORIZON, rollouts=ROLLOUTS)
    map_ = Embedding(as_module(from_token_function(embed), documents=True))
    reward = objective(kernel_values, **options)
    return Plan({"s": Sampling(stage, {})}, {"e": map_}, [Configuration(NAME, "s", "e", reward)])


def exact(policy, rows, leaves) -> tuple[float, float, float]:
    """‖μ‖², E‖E[g|sequence]‖² and E‖g‖² over all groups of rollouts of the one anchor, batches of one sequence."""
    outcomes = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=HORIZON)))
    means, squares = [], []
    for row in rows.split(1):
        anchor, valid = torch.tensor([[3]]), torch.ones(1, 1, dtype=torch.bool)
        tokens = outcomes[None, None]
        log_prob, _ = policy.score(
            row[schema.TOKENS], row[schema.MASK], anchor, valid, tokens, torch.ones_like(tokens).bool()
        )
        log_prob = log_prob[0, 0].sum(-1)  # [Y]
        jacobian = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(lp, leaves, retain_graph=True)]) for lp in log_prob]
        ).double()
        phi = embed(outcomes, None).double()
        target = embed(row[schema.TOKENS][:, 3:], None)[0].double()
        groups = torch.tensor(list(itertools.product(range(len(outcomes)), repeat=ROLLOUTS)))
        prob = log_prob.detach().double().exp()[groups].prod(-1)
        k_target, k_rollouts = kernel_values(phi[groups], target.expand(len(groups), -1))
        weights = -advantage(k_target, k_rollouts) / ROLLOUTS
        per_outcome = torch.zeros(len(groups), len(outcomes), dtype=torch.float64).scatter_add_(1, groups, weights)
        assert prob.sum().item() == pytest.approx(1, abs=1e-5)
        means.append((prob @ per_outcome) @ jacobian)
        products = jacobian @ jacobian.T
        squares.append(prob @ (per_outcome @ products * per_outcome).sum(-1))
    mean = torch.stack(means)
    return (
        mean.mean(0).square().sum().item(),
        mean.square().sum(-1).mean().item(),
        torch.stack(squares).mean().item(),
    )


def collect(policy, plan, rows, leaves, tmp_path, **options):
    """The store after measuring."""
    count, replicates = len(plan.names()), options["replicates"]
    size = sum(p.numel() for p in leaves.values())
    store = GradientStore(tmp_path, identity={}, shape=(count, replicates, size))
    for gradients, cost in measure(policy, plan, rows, leaves, **options):
        store.add(gradients, cost)
    return store


def test_the_estimate_holds_the_exact_value(policy, rows, tmp_path):
    leaves = chosen_parameters(policy, r"layers\.2\.")
    store = collect(policy, plan_of(policy), rows, leaves, tmp_path, batches=60, batch_size=1, replicates=3, seed=5)
    total, within = jackknife(
        store.gram()[:1, :, :, :1], lambda m: torch.cat([signal_to_noise(m), signal_to_noise_within(m)])
    )
    signal, conditional, square = exact(policy, rows, list(leaves.values()))
    assert total.low < signal / (square - signal) < total.high
    assert within.low < conditional / (square - conditional) < within.high
    assert total.value > 2 * total.error  # and the intervals say something
    assert within.value > 3 * within.error


def test_a_gradient_is_that_of_the_loss(policy, rows):
    """As training takes it, of the whole batch and in parts, for several anchors."""
    plan = plan_of(policy, stride=1, first=1)
    leaves = chosen_parameters(policy, None)
    options = {"batches": 1, "batch_size": 2, "replicates": 2, "seed": 0}
    ((whole, cost),) = measure(policy, plan, rows, leaves, **options)
    ((parts, _),) = measure(policy, plan, rows, leaves, **options, micro_batch=1)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    order = torch.randperm(2, generator=torch.Generator().manual_seed(hash((0, 0)) & (2**62 - 1)))
    for replicate in range(2):
        td = at_step(rows[order].clone(), seed=hash((0, 0)) & (2**62 - 1), step=replicate)
        for stage in (plan.samplings["s"].stage, plan.embeddings["e"].stage, plan.configurations[0].reward):
            td = stage(td)
        td.update(totals(td))
        for number, options in enumerate(({}, {"policy_gradient_coefficient": 0, "cross_entropy_coefficient": 1})):
            score(policy, td)
            out = EBFTLoss(**options)(td)
            loss = sum(value for name, value in out.items() if name.startswith("loss_"))
            expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])
            torch.testing.assert_close(whole[number, replicate], expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(whole[0, 0], whole[0, 1])
    assert plan.names() == [NAME, CROSS_ENTROPY]
    # 2 rows of 5 tokens, 3 anchors each with 3 rollouts of 2 tokens: 10 + 18 fed to sampling and thrice to scoring
    assert cost == [4 * (10 + 18), 3 * 10]
    assert token_forwards(td, share=0.5) == 4 * 28 + 0.5 * (10 + 36)


def test_halves_of_anchors_and_rollouts(policy, rows):
    """The gradient of all anchors is the mean of those of its halves; the first rollouts are those of fewer."""
    plan = plan_of(policy, stride=1, first=1)
    base = plan.configurations[0]
    fewer = objective(kernel_values, diversity=0.0)
    both = [
        Configuration("even", "s", "e", base.reward, parity=0),
        Configuration("odd", "s", "e", base.reward, parity=1),
        Configuration("two", "s", "e", fewer, rollouts=2),
    ]
    plan = Plan(plan.samplings, plan.embeddings, [base, *both])
    leaves = chosen_parameters(policy, "norm")
    ((found, cost),) = measure(policy, plan, rows, leaves, batches=1, batch_size=2, replicates=1, seed=0)
    torch.testing.assert_close(found[0], (2 * found[1] + found[2]) / 3, rtol=1e-4, atol=1e-6)  # 2 of 3 anchors are even
    assert cost[:4] == [4 * 28, 4 * (10 + 12), 4 * (10 + 6), 4 * (10 + 12)]
    small = sampler(
        lambda mask, *, document_ids: strided(mask, stride=1, first=1, horizon=HORIZON, document_ids=document_ids),
        policy.sample, horizon=HORIZON, rollouts=2,
    )  # fmt: skip
    alone = Plan({"s": Sampling(small, {})}, plan.embeddings, [Configuration("two", "s", "e", fewer)])
    ((two, _),) = measure(policy, alone, rows, leaves, batches=1, batch_size=2, replicates=1, seed=0)
    torch.testing.assert_close(found[3], two[0], rtol=1e-4, atol=1e-6)


def test_batches_are_keyed_and_go_on(policy, rows, tmp_path):
    plan, leaves = plan_of(policy), chosen_parameters(policy, "norm")
    options = {"batch_size": 1, "replicates": 2, "seed": 3}
    whole = collect(policy, plan, rows, leaves, tmp_path / "whole", batches=5, **options)
    collect(policy, plan, rows, leaves, tmp_path / "parts", batches=2, **options)
    resumed = collect(policy, plan, rows, leaves, tmp_path / "parts", batches=5, start=2, **options)
    assert torch.equal(whole.gram(), resumed.gram())
    assert whole.cost == resumed.cost
    assert whole.gram().shape == (2, 5, 2, 2, 5, 2)
    direct = [g.double() for g, _ in measure(policy, plan, rows, leaves, batches=5, **options)]
    torch.testing.assert_close(whole.gram()[1, 4, 0, 0, 2, 1], direct[4][1, 0] @ direct[2][0, 1])
    with pytest.raises(UsageError, match=r"other seed:"):
        GradientStore(tmp_path / "whole", identity={"seed": 4}, shape=whole.shape)


def test_token_weights_by_hand():
    td = TensorDict(
        {
            schema.ADVANTAGE: torch.tensor([[[1.0, 2.0], [4.0, 5.0]]]),
            schema.ANCHOR_MASK: torch.tensor([[True, False]]),
            schema.ROLLOUT_MASK: torch.tensor([[[[True, True], [True, False]], [[True, True], [True, True]]]]),
        },
        batch_size=[1],
    )
    assert token_weights(td).tolist() == [[[[-0.5, -0.5], [-1.0, 0.0]], [[0, 0], [0, 0]]]]


def test_bad_input_is_refused(policy, rows):
    with pytest.raises(UsageError, match=r"'nothing' matches none of .* such as model"):
        chosen_parameters(policy, "nothing")
    with pytest.raises(UsageError, match=r"'\('.*no regular expression"):
        chosen_parameters(policy, "(")
    leaves = chosen_parameters(policy, "norm")
    with pytest.raises(UsageError, match=r"batch_size=3: the data has only 2"):
        next(measure(policy, plan_of(policy), rows, leaves, batches=1, batch_size=3, replicates=1, seed=0))
    assert math.prod(next(iter(leaves.values())).shape) == 32
