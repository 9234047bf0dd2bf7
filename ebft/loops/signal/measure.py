"""Gradients of many configurations over independent batches: one sampling, one forward pass, one backward for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.loops.scoring import score
from ebft.loops.signal.plan import Configuration, Plan, restricted, token_forwards
from ebft.loops.stages import at_step
from ebft.objectives.counts import rollout_mask
from ebft.objectives.cross_entropy import prediction_mask
from ebft.policy import CausalPolicy


def measure(
    policy: CausalPolicy,
    plan: Plan,
    data: TensorDictBase,
    parameters: Mapping[str, Tensor],
    *,
    batches: int,
    batch_size: int,
    replicates: int,
    seed: int,
    micro_batch: int | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, list[float]]]:
    """Gradients of every configuration of the plan, batch by batch.

    Every batch draws its sequences anew (without repeats inside a batch), so batches are independent; its replicates
    have the same sequences and draw their rollouts anew. All is keyed by (seed, batch, replicate): batch number i is
    the same wherever one starts.

    Args:
        data: rows of batch size [M'].
        parameters: those in which gradients are taken, see `chosen_parameters`.
        batches: number of the batch before which to stop; start: of the first.
        batch_size: B; replicates: R; micro_batch: sequences scored at once.

    Yields:
        Gradients [C,R,P] float32 on the CPU, of the mean over rollouts of Σ_t -A_t log p_t (of the mean over tokens
        for cross-entropy, which comes last), and what each would cost in token-forwards.

    Raises:
        UsageError: fewer rows than `batch_size`.
    """
    if batch_size > len(data):
        raise UsageError(f"batch_size={batch_size}: the data has only {len(data)} rows")
    leaves = list(parameters.values())
    for batch in range(start, batches):
        rows = data[torch.randperm(len(data), generator=_generator(seed, batch))[:batch_size]].to(policy.device)
        results = []
        for replicate in range(replicates):
            td = at_step(rows.clone(False), seed=hash((seed, batch)) & (2**62 - 1), step=replicate)
            results.append(_gradients(policy, plan, td, leaves, micro_batch or batch_size))
        yield torch.stack([gradients for gradients, _ in results], 1), results[0][1]


def chosen_parameters(policy: CausalPolicy, pattern: str | None) -> Mapping[str, Tensor]:
    """The trained parameters whose names `pattern` (a regular expression) is found in; all of them for None.

    Raises:
        UsageError: no valid expression, or one that no name matches.
    """
    trained = policy.trainable()
    if pattern is None:
        return trained
    try:
        chosen = {name: p for name, p in trained.items() if re.search(pattern, name)}
    except re.error as error:
        raise UsageError(f"--parameters {pattern!r} is no regular expression: {error}") from error
    if not chosen:
        some = ", ".join(list(trained)[:3])
        raise UsageError(f"--parameters {pattern!r} matches none of {len(trained)} trained parameters, such as {some}")
    return chosen


def token_weights(td: TensorDictBase) -> Tensor:
    """[B,K,N,G]: what the gradient multiplies every token's ∇log p by, -A over the number of rollouts."""
    advantage, real = td[schema.ADVANTAGE], rollout_mask(td)
    per_token = advantage if advantage.ndim == 4 else advantage[..., None]
    count = td[schema.ANCHOR_MASK].sum().clamp(min=1) * real.shape[2]
    return torch.where(real, -per_token / count, 0.0)


def _gradients(
    policy: CausalPolicy, plan: Plan, td: TensorDictBase, leaves: list[Tensor], micro_batch: int
) -> tuple[Tensor, list[float]]:
    """[C,P] and the cost of each."""
    found = torch.zeros(len(plan.configurations) + 1, sum(p.numel() for p in leaves))
    cost = [0.0] * len(found)
    for number, (name, sampling) in enumerate(plan.samplings.items()):
        drawn = sampling.stage(td.clone(False))
        embedded: dict[str, TensorDictBase] = {}
        weights = {}
        for row, configuration in enumerate(plan.configurations):
            if configuration.sampling != name:
                continue
            embedding = plan.embeddings[configuration.embedding]
            if configuration.embedding not in embedded:
                embedded[configuration.embedding] = embedding.stage(drawn.clone(False))
            used = restricted(embedded[configuration.embedding], configuration)
            weights[row] = _on_all_rollouts(token_weights(configuration.reward(used)), drawn, configuration)
            cost[row] = token_forwards(used, share=embedding.share)
        if number == 0:
            cost[-1] = 3.0 * int(drawn[schema.MASK].sum())
        begin = 0
        learnt = prediction_mask(td[schema.MASK], None, td.get(schema.DOCUMENT_IDS, None))
        for part in drawn.split(micro_batch):
            rows = slice(begin, begin + len(part))
            begin += len(part)
            score(policy, part, scoring=sampling.scoring)
            for row, weight in weights.items():
                found[row] += _flat_gradient(part[schema.POLICY_LOG_PROB], weight[rows], leaves)
            if number == 0:
                weight = torch.where(learnt[rows], -1.0, 0.0) / learnt.sum()
                found[-1] += _flat_gradient(part[schema.POLICY_TOKEN_LOG_PROB], weight, leaves)
    return found, cost


def _on_all_rollouts(weights: Tensor, td: TensorDictBase, configuration: Configuration) -> Tensor:
    """Weights of the rollouts that were used, 0 for the others."""
    if configuration.rollouts is None:
        return weights
    whole = weights.new_zeros(td[schema.ROLLOUT_TOKENS].shape)
    whole[:, :, : configuration.rollouts] = weights
    return whole


def _flat_gradient(log_prob: Tensor, weight: Tensor, leaves: list[Tensor]) -> Tensor:
    """Gradient [P] of Σ weight · log_prob, float32 on the CPU; the graph is kept."""
    gradients = torch.autograd.grad(log_prob, leaves, weight.to(log_prob.dtype), retain_graph=True, allow_unused=True)
    parts = [
        torch.zeros(leaf.numel()) if g is None else g.detach().flatten().float().cpu()
        for g, leaf in zip(gradients, leaves, strict=True)
    ]
    return torch.cat(parts)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) & (2**62 - 1))
