"""Scoring and embedding over combs: all rollouts of a sequence and the sequence itself in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ebft.draw import check_sampling, is_truncated
from ebft.errors import UsageError
from ebft.head import Compare, chosen_log_probs, compared
from ebft.layout import NestedPrefixLayout

if TYPE_CHECKING:
    from ebft.policy import CausalPolicy


def score(
    policy: CausalPolicy,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    rollout_tokens: torch.Tensor,
    rollout_mask: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    document_ids: torch.Tensor | None = None,
    entropy: bool = False,
    reference: CausalPolicy | None = None,
    divergence: Compare | None = None,
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of all rollouts and of the sequence itself in one pass, with gradient.

    The last token of a rollout predicts nothing, so a row holds T + K·N·(G-1) tokens.

    Args:
        tokens, mask, anchors, anchor_mask: as in `sample`.
        rollout_tokens, rollout_mask: [B,K,N,G] int64, bool.
        temperature, top_p, top_k, min_p: as in `sample`, for the rollouts: with the sampler's settings the
            log-probs are those that it recorded; a token that truncation drops has -inf.
        document_ids: [B,T] int64; contexts stay inside their document.
        entropy: also return the entropy of the distribution that each rollout token was drawn from.
        divergence: also return this function of the distribution that each rollout token was drawn from and that
            of `reference`, over the whole vocabulary: logits [R,V] of both, over the temperature, to [R]
            (`ebft.objectives.exact_kl`). No more than `head_rows` rows of logits exist at a time, in backward too.

    Returns:
        log_prob [B,K,N,G] float32, 0 where `rollout_mask` is False;
        token_log_prob [B,T-1] float32: of tokens[:, 1:] at temperature 1, 0 where the predicted token is padding;
        with `entropy`, entropy [B,K,N,G] float32 in nats, with gradient, 0 where `rollout_mask` is False;
        with `divergence`, it as [B,K,N,G] float32, with gradient for this policy, 0 where `rollout_mask` is False.

    Raises:
        UsageError: a setting out of range, or a `divergence` without a `reference` or of truncated distributions.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(**settings)
    if divergence is not None:
        _check_divergence(policy, reference, settings)
    _, _, rollouts, horizon = rollout_tokens.shape
    real = rollout_mask & anchor_mask[:, :, None, None]
    later_real, known = real[..., 1:], mask[:, 1:]
    # a GPU waits wherever the host asks it something, as how many are real: it is asked once for everything
    *read, are_later, are_known = read_together(anchors, anchor_mask, later_real, known)
    rows, columns, at_later, at_known = (
        torch.from_numpy(places).to(tokens.device, non_blocking=True)
        for places in (*read[1].nonzero(), np.flatnonzero(are_later), np.flatnonzero(are_known))
    )
    layout = NestedPrefixLayout(
        anchors,
        anchor_mask,
        length=tokens.shape[1],
        rollouts=rollouts,
        horizon=horizon - 1,
        document_ids=document_ids,
        read=(read[0], read[1]),
    )
    trunk, teeth = policy.states(layout, tokens, rollout_tokens[..., :-1], None)[-1]
    with policy.computing():
        at_anchors = trunk[rows, layout.anchors[rows, columns] - 1]
        first, first_entropy = _select(policy, at_anchors, rollout_tokens[rows, columns, :, 0], settings, entropy)
        in_teeth = teeth.flatten(0, 3)[at_later]
        later_tokens = rollout_tokens[..., 1:].flatten()[at_later, None]
        later, later_entropy = _select(policy, in_teeth, later_tokens, settings, entropy)
        own, _ = _select(
            policy, trunk[:, :-1].flatten(0, 1)[at_known], tokens[:, 1:].flatten()[at_known, None], {}, False
        )

    def whole(of_first: torch.Tensor, of_later: torch.Tensor) -> torch.Tensor:
        start = of_first.new_zeros(rollout_tokens.shape[:3]).index_put((rows, columns), of_first)
        rest = of_later.new_zeros(later_real.numel()).index_put((at_later,), of_later).view(later_real.shape)
        return torch.where(real, torch.cat([start[..., None], rest], -1), 0.0)

    of_trunk = own.new_zeros(known.numel()).index_put((at_known,), own[:, 0]).view(known.shape)
    results = (whole(first, later[:, 0]), of_trunk)
    if entropy:
        spread = first_entropy[:, None].expand(-1, rollouts)  # type: ignore[index]
        results = (*results, whole(spread, later_entropy))  # type: ignore[arg-type, assignment]
    if divergence is not None and reference is not None:
        with torch.no_grad():
            their_trunk, their_teeth = reference.states(layout, tokens, rollout_tokens[..., :-1], None)[-1]
        theirs = their_trunk[rows, layout.anchors[rows, columns] - 1], their_teeth.flatten(0, 3)[at_later]
        of_first, of_later = (
            _compare(policy, divergence, states, reference, other, temperature)
            for states, other in zip((at_anchors, in_teeth), theirs, strict=True)
        )
        results = (*results, whole(of_first[:, None].expand(-1, rollouts), of_later))  # type: ignore[assignment]
    return results


def read_together(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Integers or booleans in the host's memory, in one transfer; those of a CPU share it."""
    if tensors[0].device.type == "cpu":
        return [x.numpy() for x in tensors]
    parts = torch.cat([x.flatten().long() for x in tensors]).cpu().split([x.numel() for x in tensors])
    return [part.view(x.shape).to(x.dtype).numpy() for part, x in zip(parts, tensors, strict=True)]


def _check_divergence(policy: CausalPolicy, reference: CausalPolicy | None, settings: dict) -> None:
    if reference is None:
        raise UsageError("divergence compares with a reference policy: give one")
    if reference.offload is not None:
        raise UsageError("divergence wants the reference's head in the backward pass: its weights cannot be offloaded")
    if is_truncated(settings):
        raise UsageError(
            f"divergence of distributions truncated by {settings}: a token that one of the two drops makes it"
            " infinite; score with top_p=1 and without top_k and min_p"
        )
    if reference.adapters_off and hasattr(policy.causal_lm.get_output_embeddings(), "base_layer"):
        raise UsageError("divergence from the start of a policy with adapters on its head is not supported")


def _compare(
    policy: CausalPolicy,
    function: Compare,
    hidden: torch.Tensor,
    reference: CausalPolicy,
    reference_hidden: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`function` of the next-token distributions at hidden states [R,H] of both policies: [R]."""
    if not hidden.numel():
        return hidden.sum(-1, dtype=torch.float32)
    with policy.computing():
        return compared(
            function,
            policy.logits,
            hidden,
            reference.logits,
            reference_hidden,
            rows=policy.head_rows,
            temperature=temperature,
        )


def _select(
    policy: CausalPolicy, hidden: torch.Tensor, tokens: torch.Tensor, settings: dict, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states [R,H] and Q tokens for each [R,Q] -> log-probs [R,Q] and entropies [R], the head in chunks."""
    if not hidden.numel():
        nothing = hidden.sum(-1, dtype=torch.float32)  # of the graph, so that a backward pass finds it
        return nothing[:, None].expand(tokens.shape), nothing
    return chosen_log_probs(
        policy.logits,
        hidden,
        tokens,
        rows=policy.head_rows,
        settings=settings,
        weight=policy.head_weight,
        entropy=entropy,
    )


@torch.no_grad()
def hidden_states(
    policy: CausalPolicy,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    rollout_tokens: torch.Tensor,
    rollout_mask: torch.Tensor,
    *,
    layers: Sequence[int],
    document_ids: torch.Tensor | None = None,
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Outputs of decoder layers for the sequence and all its rollouts, in one pass of T + K·N·G tokens.

    Layer i is the output of the i-th decoder layer (1-based), 0 the embeddings; the final norm is not applied and
    the pass stops after the deepest layer asked for.

    Args: as in `score`, and `layers`: layer indices.

    Returns:
        layer -> [B,K,N,G,H] of the rollouts, layer -> [B,T,H] of the sequence, in the compute dtype.

    Raises:
        UsageError: a layer outside [0, number of layers].
    """
    wrong = [layer for layer in layers if not 0 <= layer <= policy.num_layers]
    if wrong or not layers:
        raise UsageError(f"layers {list(layers)}: expected one or more of 0 (embeddings) to {policy.num_layers}")
    _, _, rollouts, horizon = rollout_tokens.shape
    values, real = read_together(anchors, anchor_mask)
    shape = {"length": tokens.shape[1], "rollouts": rollouts, "horizon": horizon}
    layout = NestedPrefixLayout(anchors, anchor_mask, **shape, document_ids=document_ids, read=(values, real))
    states = policy.states(layout, tokens, rollout_tokens, layers)
    return {i: teeth for i, (_, teeth) in states.items()}, {i: trunk for i, (trunk, _) in states.items()}
