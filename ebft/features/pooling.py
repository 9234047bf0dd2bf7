"""From features per token to features per rollout.

Every function takes ``hidden`` [...,G,D] and ``mask`` [...,G] (True on a rollout's own tokens, in order) and returns
one vector per rollout. Masked entries are never read, so they may hold anything, NaN included; a rollout without
tokens of its own gives zeros. The token that ends a rollout (EOS) is one of its own; the mask of a target ends with its
row, its document or its answer, so that ``last`` is the last token of an answer that is shorter than the horizon.

``mean_with_context`` reads the tokens of the context too, whose sum and number it gets in two arguments more; it is the
only pooling under which most of what is compared is the same for all rollouts of an anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebft.errors import UsageError


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last own token: [...,D]. The paper's default (arXiv 2603.12248, section 4)."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return _take(hidden, mask, (positions * mask).amax(-1))


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the own tokens: [...,D]."""
    return none(hidden, mask).sum(-2) / mask.sum(-1).clamp(min=1)[..., None]


def mean_with_context(hidden: Tensor, mask: Tensor, context_sum: Tensor, context_count: Tensor) -> Tensor:
    """The mean over the context and the own tokens: [...,D], from the context's sum [...,D] and token number [...]."""
    count = mask.sum(-1) + context_count
    pooled = (none(hidden, mask).sum(-2) + context_sum) / count.clamp(min=1)[..., None]
    return pooled.masked_fill(~mask.any(-1)[..., None], 0.0)


def concat_quantiles(hidden: Tensor, mask: Tensor) -> Tensor:
    """The tokens 25, 50 and 75 % of the way through the own tokens, side by side: [...,3·D].

    With m own tokens the quantile q is token number ceil(q·m), counted from 1.
    """
    order = mask.cumsum(-1)
    count = order[..., -1:]
    taken = []
    for quarter in (1, 2, 3):
        wanted = (quarter * count + 3) // 4
        taken.append(_take(hidden, mask, ((order == wanted) & mask).int().argmax(-1)))
    return torch.cat(taken, -1)


def concat_all(hidden: Tensor, mask: Tensor) -> Tensor:
    """All tokens side by side, zeros at masked places: [...,G·D]."""
    return none(hidden, mask).flatten(-2)


def none(hidden: Tensor, mask: Tensor) -> Tensor:
    """Features per token, zeros at masked places: [...,G,D]."""
    return hidden.masked_fill(~mask[..., None], 0.0)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last": last,
    "mean": mean,
    "concat_quantiles": concat_quantiles,
    "concat_all": concat_all,
    "none": none,
}


WITH_CONTEXT = "mean_with_context"
NAMES = (*POOLINGS, WITH_CONTEXT)
# Those that give vectors of one length, whatever the number of tokens.
OF_ANY_LENGTH = ("last", "mean", "concat_quantiles", WITH_CONTEXT)


def check_pooling(name: str, allowed: Sequence[str] = NAMES, why: str = "") -> None:
    """Refuse a pooling that is not among those `allowed`; `why` says more about what is allowed."""
    if name not in NAMES:
        raise UsageError(f"pooling={name!r} is unknown: choose one of {', '.join(allowed)}")
    if name not in allowed:
        raise UsageError(f"pooling={name!r} does not fit{why}: choose one of {', '.join(allowed)}")


def pooling(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The pooling function called `name`.

    Raises:
        UsageError: there is no such pooling; the message lists those there are.
    """
    check_pooling(name, tuple(POOLINGS), " features without their context")
    return POOLINGS[name]


def pool(hidden: Tensor, mask: Tensor, *, how: str = "last") -> Tensor:
    """Pool ``hidden`` [...,G,D] over the own tokens given by ``mask`` [...,G] with the pooling called `how`.

    Raises:
        UsageError: unknown pooling, or shapes that do not fit together.
    """
    if hidden.shape[:-1] != mask.shape:
        raise UsageError(
            f"hidden of shape {list(hidden.shape)} does not fit mask of shape {list(mask.shape)}:"
            " expected [...,G,D] and [...,G]"
        )
    return pooling(how)(hidden, mask)


def _take(hidden: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """hidden [...,G,D] at index [...] -> [...,D], zeros where no token is unmasked."""
    index = index[..., None, None].expand(*index.shape, 1, hidden.shape[-1])
    taken = hidden.gather(-2, index).squeeze(-2)
    return taken.masked_fill(~mask.any(-1)[..., None], 0.0)
