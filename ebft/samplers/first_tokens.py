"""How the first tokens of an anchor's N rollouts are chosen together: S strata of N/S rollouts each.

Independent draws repeat the likeliest tokens. A chooser covers the distribution instead, and gives each stratum a
weight that its own estimator knows (``ebft.objectives.strata``); later tokens are drawn as ever. Choosers have the
signature that ``CausalPolicy.sample`` takes as `first`: (log_probs [R,V], uniform [R,N]) -> tokens [R,N].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ebft.draw import inverse_cdf
from ebft.errors import UsageError

FirstTokens = Callable[[Tensor, Tensor], Tensor]


def branches(log_probs: Tensor, uniform: Tensor, *, strata: int) -> Tensor:
    """The S-1 likeliest tokens, each for N/S rollouts, and for the last N/S draws from the rest of the vocabulary.

    Args:
        log_probs: [R,V]; uniform: [R,N] in [0, 1).
        strata: S, of which N is a multiple; rollouts of one stratum stand side by side.

    Returns:
        tokens [R,N].
    """
    each = _each(uniform, strata)
    top = log_probs.topk(strata - 1, -1).indices
    rest = log_probs.exp().scatter(-1, top, 0.0)
    drawn = inverse_cdf(rest, uniform[:, -each:])
    return torch.cat([top.repeat_interleave(each, -1), drawn], -1)


def distinct(log_probs: Tensor, uniform: Tensor, *, strata: int) -> Tensor:
    """S tokens drawn without replacement, one after the other from what is left, each for N/S rollouts.

    Args, Returns: as :func:`branches`.
    """
    each = _each(uniform, strata)
    left, tokens = log_probs.exp(), []
    for number in range(strata):
        token = inverse_cdf(left, uniform[:, number * each, None])
        left = left.scatter(-1, token, 0.0)
        tokens.append(token)
    return torch.cat(tokens, -1).repeat_interleave(each, -1)


FIRST_TOKENS = {"branches": branches, "distinct": distinct}


def first_tokens(name: str, *, strata: int) -> FirstTokens:
    """The chooser called `name` with its number of strata.

    Raises:
        UsageError: there is no such chooser, or fewer than 2 strata.
    """
    if name not in FIRST_TOKENS:
        raise UsageError(f"first tokens {name!r}: expected one of {', '.join(FIRST_TOKENS)}")
    if strata < 2:
        raise UsageError(f"strata={strata}: expected 2 or more groups of first tokens")
    return partial(FIRST_TOKENS[name], strata=strata)


def _each(uniform: Tensor, strata: int) -> int:
    """Rollouts in a stratum."""
    rollouts = uniform.shape[-1]
    if rollouts % strata:
        raise UsageError(f"{rollouts} rollouts do not fill {strata} strata evenly: give a multiple of {strata}")
    return rollouts // strata
