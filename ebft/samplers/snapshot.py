"""Sampling with the model's own cache, copied at every anchor: for layers that keep a recurrent state.

A recurrent state cannot be shared along a comb: it has to be that of the prefix, no more and no less. So a sequence is
read up to its first anchor, the cache copied and the copy continued by the anchor's N rollouts, then read on to the
next anchor. Every token of the sequence is still computed once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ebft.architectures import deviation, probe_tokens, rounding
from ebft.draw import check_sampling, draw, keyed_uniform
from ebft.errors import UsageError
from ebft.layout import document_starts, layout_to_the_last_anchor
from ebft.policy import CausalPolicy

# Names by which models take their cache.
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")


@torch.no_grad()
def sample(
    reader: CacheReader,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    *,
    rollouts: int,
    horizon: int,
    seed: int | torch.Tensor,
    sequence_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw rollouts as `CausalPolicy.sample` does, for any model with a cache that can be copied.

    Costs up to T token-forwards and K·N·(G-1) more, one anchor after the other; finished rollouts cost nothing.

    Args: as in `CausalPolicy.sample`, with the same random numbers; `reader` is `cache_reader(policy)`.

    Returns:
        tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32, mask [B,K,N,G] bool; 0 where masked.

    Raises:
        UsageError: a setting is out of range, or the text is too long for the model.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(**settings)
    layout = layout_to_the_last_anchor(
        anchors, anchor_mask, rollouts=rollouts, horizon=horizon, document_ids=document_ids
    )
    reader.policy.check_positions(layout)
    if sequence_ids is None:
        sequence_ids = torch.arange(tokens.shape[0], device=tokens.device)
    drawn = torch.zeros(*anchors.shape, rollouts, horizon, dtype=torch.int64, device=tokens.device)
    log_prob = torch.zeros(drawn.shape, device=tokens.device)
    alive = torch.zeros(drawn.shape, dtype=torch.bool, device=tokens.device)
    uniform = torch.stack(
        [keyed_uniform(seed, sequence_ids, anchors, rollouts=rollouts, step=step) for step in range(horizon)], -1
    )
    with reader.policy.plain():
        for b, k, cache, logits in _at_anchors(reader, tokens, anchors, anchor_mask, document_ids):
            live = torch.arange(rollouts, device=tokens.device)
            cache, logits = reader.fork(cache, rollouts), logits.expand(rollouts, -1)
            for step in range(horizon):
                token, chosen = draw(logits.clone(), uniform[b, k, live, step, None], **settings)
                drawn[b, k, live, step], log_prob[b, k, live, step] = token[:, 0], chosen[:, 0].float()
                alive[b, k, live, step] = True
                if eos is not None and (token == eos).any():
                    keep = token[:, 0] != eos
                    live, token = live[keep], token[keep]
                    cache.reorder_cache(keep.nonzero()[:, 0])
                if step == horizon - 1 or not len(live):
                    break
                logits = reader.read(token, cache)
    return drawn, log_prob, alive


@dataclass(frozen=True)
class CacheReader:
    """How a model reads on from its cache; `cache_reader` finds and proves it.

    Attributes:
        policy: whose model it is.
        argument: the forward argument that takes the cache.
        one_by_one: whether the model must be given a token at a time once the cache holds something.
    """

    policy: CausalPolicy
    argument: str
    one_by_one: bool

    def start(self) -> Any:
        return DynamicCache(config=self.policy.causal_lm.config)

    def fork(self, cache: Any, copies: int) -> Any:
        """`copies` continuations of a cache of one row, the cache itself untouched."""
        forked = copy.deepcopy(cache)
        forked.reorder_cache(torch.zeros(copies, dtype=torch.int64, device=self.policy.device))
        return forked

    def read(self, tokens: torch.Tensor, cache: Any, *, fresh: bool = False) -> torch.Tensor:
        """[R,S] tokens -> [R,V] logits after the last of them; the cache (empty if `fresh`) holds them then.

        Call it inside `policy.plain()`.
        """
        for piece in tokens.split(1, 1) if self.one_by_one and not fresh else (tokens,):
            out = self.policy.model(input_ids=piece, use_cache=True, **{self.argument: cache})
        return out.logits[:, -1]


@torch.no_grad()
def cache_reader(policy: CausalPolicy) -> CacheReader:
    """The way of reading on that gives the model's plain logits, tried on 7 tokens.

    Some architectures forget their state when they are given several tokens on top of it, and some always.

    Raises:
        UsageError: there is none; names the model and the sampler that can serve it.
    """
    parameters = inspect.signature(policy.causal_lm.forward).parameters
    arguments = [name for name in _CACHE_ARGUMENTS if name in parameters]
    reason = "it takes none"
    for reader in (CacheReader(policy, name, slow) for name in arguments for slow in (False, True)):
        try:
            off = _reading_error(reader)
        except (TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
            reason = str(error)
            continue
        if off < rounding(policy):
            return reader
        reason = f"its logits differ by {off:.2g} deviations"
    raise UsageError(
        f"{type(policy.causal_lm).__name__} cannot go on from a copy of its cache: {reason}."
        " Use the 'independent' sampler for it, or another model"
    )


def _reading_error(reader: CacheReader) -> float:
    """Deviation from plain logits after reading 3 and 2 tokens, forking, and reading on by 1 and 1."""
    ids = probe_tokens(reader.policy)[None]
    with reader.policy.plain() as model:
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        cache = reader.start()
        found = [(reader.read(ids[:, :3], cache, fresh=True), 2), (reader.read(ids[:, 3:5], cache), 4)]
        fork = reader.fork(cache, 2)
        found.append((reader.read(ids[:, 5:6].expand(2, 1), fork), 5))
        fork.reorder_cache(torch.tensor([1], device=ids.device))
        found += [(reader.read(ids[:, 6:], fork), 6), (reader.read(ids[:, 5:6], cache), 5)]
    return max(deviation(logits, expected[:, place].expand_as(logits)) for logits, place in found)


def _at_anchors(
    reader: CacheReader,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> Iterator[tuple[int, int, Any, torch.Tensor]]:
    """(b, k, cache of the anchor's context, logits [1,V] after it), every token of a document read once."""
    starts = document_starts(tokens, document_ids)
    for b in range(len(tokens)):
        read_from, read_to = -1, -1
        for k in anchors[b].argsort(stable=True).tolist():
            if not anchor_mask[b, k]:
                continue
            anchor = int(anchors[b, k])
            start = int(starts[b, anchor - 1])
            if start != read_from:
                cache, read_from, read_to = reader.start(), start, start
            if anchor > read_to:
                logits = reader.read(tokens[b : b + 1, read_to:anchor], cache, fresh=read_to == start)
                read_to = anchor
            yield b, k, cache, logits
