"""Log-probs of a batch under the policy and the reference, and what sampling and scoring disagree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.head import Compare
from ebft.objectives.counts import rollout_mask
from ebft.objectives.policy_gradient import truncated_weight
from ebft.policy import CausalPolicy


def has_rollouts(td: TensorDictBase) -> bool:
    """Whether a sampler wrote rollouts into the batch."""
    return td.get(schema.ROLLOUT_TOKENS, None) is not None


def score(
    policy: CausalPolicy,
    td: TensorDictBase,
    *,
    reference: CausalPolicy | None = None,
    scoring: Mapping[str, float] | None = None,
    entropy: bool = False,
    divergence: Compare | None = None,
) -> None:
    """Write the policy's log-probs of rollouts and sequences, and the reference's of the rollouts, into `td`.

    With `entropy` also that of the distributions that the rollout tokens were drawn from; with `divergence` that
    function of these distributions and the reference's, in place of the reference's log-probs. Without rollouts in
    `td` only the log-probs of the sequences.
    """
    if not has_rollouts(td):
        td[schema.POLICY_TOKEN_LOG_PROB] = token_log_prob(policy, td)
        return
    inputs, options = _of_rollouts(td, scoring)
    if reference is not None and divergence is None:
        # first, so that its weights and states are gone when those of the policy are kept for the backward pass
        score_start(reference, td, scoring=scoring)
    start = None if divergence is None else reference
    scored = forward(policy, *inputs, **options, entropy=entropy, reference=start, divergence=divergence)
    td[schema.POLICY_LOG_PROB], td[schema.POLICY_TOKEN_LOG_PROB] = scored[:2]
    if entropy:
        td[schema.POLICY_ENTROPY] = scored[2]
    if divergence is not None:
        td[schema.POLICY_DIVERGENCE] = scored[-1]


def score_start(reference: CausalPolicy, td: TensorDictBase, *, scoring: Mapping[str, float] | None = None) -> None:
    """Write the reference's log-probs of the rollouts into `td`."""
    inputs, options = _of_rollouts(td, scoring)
    with torch.no_grad(), reference.resident():
        td[schema.REFERENCE_LOG_PROB], _ = forward(reference, *inputs, **options)


def _of_rollouts(td: TensorDictBase, scoring: Mapping[str, float] | None) -> tuple[list[Tensor], dict[str, Any]]:
    """What `CausalPolicy.score` wants of a batch with rollouts."""
    inputs = [td[key] for key in (schema.TOKENS, schema.MASK, schema.ANCHORS, schema.ANCHOR_MASK)]
    inputs += [td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK]]
    return inputs, {**(scoring or {}), "document_ids": td.get(schema.DOCUMENT_IDS, None)}


def forward(policy: CausalPolicy, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """`policy.score`, of a sharded policy by all processes alike."""
    if policy.sharded is None:
        return policy.score(*inputs, **options)
    return policy.sharded.forward(policy.score, *inputs, **options)


def token_log_prob(policy: CausalPolicy, td: TensorDictBase) -> Tensor:
    """[B,T-1], with gradient: log-probs of the sequences alone, as `CausalPolicy.score` gives them."""
    tokens, mask = td[schema.TOKENS], td[schema.MASK]
    nowhere = torch.ones(len(tokens), 1, dtype=torch.int64, device=tokens.device)  # one masked anchor
    nothing = torch.zeros(len(tokens), 1, 1, 1, dtype=torch.int64, device=tokens.device)
    documents = td.get(schema.DOCUMENT_IDS, None)
    scored = forward(policy, tokens, mask, nowhere, nowhere < 0, nothing, nothing > 0, document_ids=documents)
    return scored[1]


def mismatch(part: TensorDictBase) -> Tensor:
    """Mean |log p of sampling - log p of scoring| over the batch's tokens: the share of it that these rows hold."""
    difference = (part[schema.POLICY_LOG_PROB].detach() - part[schema.ROLLOUT_LOG_PROB]).abs()
    real = rollout_mask(part)
    return torch.where(real, difference, 0.0).sum() / part[schema.TOTAL_TOKENS][0].clamp(min=1)


def correct_mismatch(part: TensorDictBase, *, cap: float) -> None:
    """Weigh advantages for what scoring and sampling disagree on; later ratios start from the log-probs of scoring."""
    log_prob = part[schema.POLICY_LOG_PROB].detach()
    weight = truncated_weight(log_prob, part[schema.ROLLOUT_LOG_PROB], part[schema.ROLLOUT_MASK], cap=cap)
    advantage = part[schema.ADVANTAGE]
    part[schema.ADVANTAGE] = (advantage if advantage.ndim == 4 else advantage[..., None]) * weight
    part[schema.ROLLOUT_LOG_PROB] = log_prob
