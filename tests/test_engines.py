"""Every sampling engine gives the same tokens for the same keys, at the cost it claims, with the right distribution."""

import itertools
from collections import defaultdict
from functools import partial

import pytest
import torch

from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from ebft.samplers import full, independent, snapshot
from ebft.samplers.anchors import strided
from tests.models import NAMES, UNSHARED, VOCABULARY, WITHOUT_A_USABLE_CACHE, independent_score, tiny

EOS = 2

# Log-probs of a few nats in float32, summed in other orders: of all families 4.5e-6 apart were seen at most.
# A delta rule's state is summed by chunks of a prefix and token by token after it.
ROUNDING = defaultdict(lambda: 1e-5, qwen3_5_text=3e-5)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8, [3] * 9 + [4] * 4])


def prefixes(seed=0):
    """Two rows of 13 tokens (the second padded), anchors in no order, one masked."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (2, 13), generator=random)
    mask = torch.arange(13) < torch.tensor([[13], [11]])
    anchors = torch.tensor([[4, 9, 1, 12], [7, 2, 11, 5]])
    return tokens, mask, anchors, torch.tensor([[True] * 4, [True, True, True, False]])


def engines(policy):
    """Every engine that the policy can use."""
    found = {"independent": partial(independent.sample, policy)}
    if not policy.not_shared:
        found["strided"] = policy.sample
    found["snapshot"] = partial(snapshot.sample, snapshot.cache_reader(policy))
    return found


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("name", [*NAMES, *UNSHARED])
def test_same_keys_same_tokens(name, documents):
    policy = CausalPolicy(tiny(name))
    batch, options = prefixes(), {"rollouts": 3, "horizon": 4, "seed": 5, "eos": EOS, "document_ids": documents}
    drawn = {name: engine(*batch, **options) for name, engine in engines(policy).items()}
    tokens, log_prob, mask = drawn.pop("independent")
    assert mask[batch[3]].float().mean() > 0.5  # something to compare
    assert not mask[1, 3].any()
    assert drawn
    for theirs in drawn.values():
        assert torch.equal(theirs[2], mask)
        assert torch.equal(theirs[0], tokens)
        torch.testing.assert_close(theirs[1], log_prob, atol=ROUNDING[name], rtol=0)
    starts = None
    if documents is not None:
        starts = torch.tensor([[int((row == row[a - 1]).nonzero()[0]) for a in places] for row, places in
                               zip(documents, batch[2].tolist(), strict=True)])  # fmt: skip
    expected = independent_score(policy_model(policy), batch[0], batch[2], batch[3], tokens, mask, starts)
    torch.testing.assert_close(log_prob, expected.detach(), atol=ROUNDING[name], rtol=0)


def policy_model(policy):
    """The model under its own attention, for good."""
    policy.causal_lm.set_attn_implementation("eager")
    return policy.causal_lm


@pytest.mark.parametrize(
    "options", [{"temperature": 0.6, "top_k": 7, "min_p": 0.02}, {"top_p": 0.8}, {"temperature": 0}]
)
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_5_text"])
def test_same_keys_same_tokens_under_truncation(name, options):
    policy = CausalPolicy(tiny(name))
    shared = {"rollouts": 2, "horizon": 3, "seed": 9, "eos": EOS, "sequence_ids": torch.tensor([77, 5]), **options}
    results = [engine(*prefixes(), **shared) for engine in engines(policy).values()]
    for theirs in results[1:]:
        for left, right in zip(results[0], theirs, strict=True):
            torch.testing.assert_close(left, right, atol=ROUNDING[name], rtol=0)


@pytest.mark.parametrize("name", WITHOUT_A_USABLE_CACHE)
def test_a_cache_that_forgets_is_refused(name):
    policy = CausalPolicy(tiny(name))
    with pytest.raises(UsageError, match=r"ForCausalLM cannot go on from a copy of its cache.*'independent'"):
        snapshot.cache_reader(policy)


# ---- what it costs


def count_tokens(policy, engine, *args, **options):
    """Tokens that enter the first decoder layer while an engine draws, and what it draws."""
    counted = []
    handle = policy._layers()[0].register_forward_pre_hook(
        lambda module, args, kwargs: counted.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    result = engine(*args, **options)
    handle.remove()
    return sum(counted), result


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "mamba"])
def test_every_token_is_computed_once(name):
    policy = CausalPolicy(tiny(name))
    tokens, mask, anchors, _ = prefixes()
    anchors[:, -1] = 13  # the last anchor needs the whole row
    every = torch.ones_like(anchors, dtype=torch.bool)
    cheap = engines(policy)
    slow = cheap.pop("independent")
    for engine in cheap.values():
        spent, _ = count_tokens(policy, engine, tokens, mask, anchors, every, rollouts=3, horizon=4, seed=0)
        assert spent == 2 * (13 + 4 * 3 * (4 - 1))  # T + K·N·(G-1)
    spent, _ = count_tokens(policy, slow, tokens, mask, anchors, every, rollouts=3, horizon=4, seed=0)
    assert spent == sum(3 * (a + g) for a in anchors.flatten().tolist() for g in range(4))


def test_scoring_computes_every_token_once():
    """T + K·N·(G-1): the last token of a rollout predicts nothing."""
    policy = CausalPolicy(tiny("llama"))
    tokens, mask, anchors, anchor_mask = prefixes()
    rollout = torch.ones(2, 4, 3, 5, dtype=torch.int64)
    spent, _ = count_tokens(policy, policy.score, tokens, mask, anchors, anchor_mask, rollout, rollout.bool())
    assert spent == 2 * (13 + 4 * 3 * (5 - 1))


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_finished_rollouts_and_masked_anchors_cost_nothing(name):
    policy = CausalPolicy(tiny(name))
    tokens, mask, anchors, anchor_mask = prefixes()
    cheap = engines(policy)
    cheap.pop("independent")
    for label, engine in cheap.items():
        options = {"rollouts": 5, "horizon": 9, "seed": 1, "eos": EOS}
        spent, (drawn, _, alive) = count_tokens(policy, engine, tokens, mask, anchors, anchor_mask, **options)
        entered = alive[..., :-1] & (drawn[..., :-1] != EOS)  # tokens that another one was drawn after
        reach = torch.where(anchor_mask, anchors, 0).amax(1)
        trunk = 2 * int(reach.max()) if label == "strided" else int(reach.sum())
        assert spent == trunk + int(entered.sum())
        assert entered.sum() < 7 * 5 * 8


# ---- whole answers


# Over answers of 40 tokens 7e-6 apart were seen. The delta rule's state is summed in float32, by chunks of a prefix and
# token by token after it: 7e-5.
@pytest.mark.parametrize(("name", "rounding"), [("llama", 2e-5), ("mistral-window", 2e-5), ("qwen3_5_text", 2e-4)])
def test_whole_answers_end_at_eos(name, rounding):
    policy = CausalPolicy(tiny(name))
    tokens, mask, *_ = prefixes()
    answer = torch.zeros_like(mask)
    answer[0, 6:] = True
    lengths = full.prompt_lengths(mask, answer)
    assert lengths.tolist() == [6, 11]
    options = {"rollouts": 6, "max_new_tokens": 40, "seed": 3, "eos": EOS}
    results = []
    for engine in engines(policy).values():
        drawn, log_prob, alive = full.sample(engine, tokens, mask, lengths, **options)
        results.append((drawn, log_prob, alive))
        assert drawn.shape == (2, 1, 6, 40)
        ends = alive.sum(-1)
        assert (ends < 40).any()
        for sizes, row in zip(ends.flatten().tolist(), drawn.flatten(0, 2), strict=True):
            assert sizes == 40 or row[sizes - 1] == EOS
            assert EOS not in row[: sizes - 1]
    for theirs in results[1:]:
        for left, right in zip(results[0], theirs, strict=True):
            torch.testing.assert_close(left, right, atol=rounding, rtol=0)


def test_whole_answers_refuse_what_has_no_end():
    policy = CausalPolicy(tiny("llama"))
    tokens, mask, *_ = prefixes()
    with pytest.raises(UsageError, match="eos=None"):
        full.sample(policy.sample, tokens, mask, mask.sum(1), rollouts=1, max_new_tokens=2, eos=None, seed=0)
    with pytest.raises(UsageError, match=r"prompt of row 1 has 12 tokens, its row 11"):
        full.sample(policy.sample, tokens, mask, torch.tensor([3, 12]), rollouts=1, max_new_tokens=2, eos=EOS, seed=0)
    with pytest.raises(UsageError, match=r"prompt lengths \[0, 0\]"):
        full.sample(policy.sample, tokens, mask, torch.zeros(2).long(), rollouts=1, max_new_tokens=2, eos=EOS, seed=0)


# ---- what it draws


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}])
def test_rollouts_have_the_models_distribution(options):
    """χ² over all rollouts of two tokens from a vocabulary of 5, against their enumerated probabilities."""
    size, rollouts, horizon = 5, 4000, 2
    model = tiny("llama", vocab_size=size, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    policy = CausalPolicy(model)
    tokens = torch.tensor([[1, 3, 0, 4, 2, 2, 1]])
    anchors, anchor_mask = strided(torch.ones_like(tokens).bool(), stride=2, first=2, horizon=horizon)
    drawn, _, _ = policy.sample(
        tokens,
        torch.ones_like(tokens).bool(),
        anchors,
        anchor_mask,
        rollouts=rollouts,
        horizon=horizon,
        seed=0,
        **options,
    )
    outcomes = torch.tensor(list(itertools.product(range(size), repeat=horizon)))
    with torch.no_grad():
        score, _ = policy.score(
            tokens,
            torch.ones_like(tokens).bool(),
            anchors,
            anchor_mask,
            outcomes.expand(1, anchors.shape[1], -1, -1),
            torch.ones(1, anchors.shape[1], *outcomes.shape).bool(),
            **options,
        )
    probability = score.nan_to_num(neginf=-1e9).sum(-1)[0].exp().double()
    torch.testing.assert_close(probability.sum(-1), torch.ones(anchors.shape[1]).double(), atol=1e-5, rtol=0)
    for k in range(anchors.shape[1]):
        observed = (drawn[0, k] @ torch.tensor([size, 1])).bincount(minlength=size**2).double()
        assert (observed[probability[k] < 1e-12] == 0).all()
        usual = probability[k] * rollouts >= 5
        expected = torch.cat([probability[k][usual], probability[k][~usual].sum()[None]]) * rollouts
        found = torch.cat([observed[usual], observed[~usual].sum()[None]])
        statistic = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum()
        degrees = int(usual.sum())
        # the 1 - 1e-5 quantile by Wilson and Hilferty: a wrong distribution is off by hundreds
        assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.265 * (2 / (9 * degrees)) ** 0.5) ** 3
