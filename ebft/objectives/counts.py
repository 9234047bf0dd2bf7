"""What the terms of the loss are divided by: counts of the whole batch, so that its parts can be scored one by one."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives.cross_entropy import prediction_mask

CROSS_ENTROPY_TOKENS = ("auto", "all", "answers")


def totals(td: TensorDictBase, *, cross_entropy_tokens: str = "auto") -> TensorDict:
    """Counts over a whole batch, by which the losses of its parts are to be divided.

    Args:
        td: has ``mask`` [B,T] and, optionally, ``answer_mask`` and ``document_ids``, and, where there are rollouts,
            ``anchor_mask`` [B,K] and ``("rollout", "mask")`` [B,K,N,G].
        cross_entropy_tokens: as of the loss.

    Returns:
        A TensorDict of batch size [B] with ``("total", "rollouts")`` (of valid anchors), ``("total", "tokens")``
        (unmasked ones of those rollouts) and ``("total", "trunk_tokens")`` (under cross-entropy), float32, the same
        number in every row: ``td.update(totals(td))``, then split. Without rollouts only the last of them.

    Raises:
        UsageError: a missing key or a wrong shape.
    """
    drawn = td.get(schema.ROLLOUT_MASK, None) is not None
    schema.check(td, schema.MASK, *([schema.ANCHOR_MASK, schema.ROLLOUT_MASK] if drawn else []))
    learnt = prediction_mask(td[schema.MASK], answers(td, cross_entropy_tokens), td.get(schema.DOCUMENT_IDS, None))
    counts: dict[NestedKey, Tensor] = {schema.TOTAL_TRUNK_TOKENS: learnt.sum()}
    if drawn:
        counts |= {schema.TOTAL_ROLLOUTS: count_rollouts(td), schema.TOTAL_TOKENS: count_tokens(td)}
    rows = td[schema.MASK].shape[0]
    result = TensorDict({}, batch_size=[rows])
    for key, count in counts.items():
        result.set(key, count.float().expand(rows).clone())
    return result


def rollout_mask(td: TensorDictBase) -> Tensor:
    """[B,K,N,G]: tokens of rollouts of valid anchors."""
    return td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]


def count_rollouts(td: TensorDictBase) -> Tensor:
    return td[schema.ANCHOR_MASK].sum() * td[schema.ROLLOUT_MASK].shape[2]


def count_tokens(td: TensorDictBase) -> Tensor:
    return rollout_mask(td).sum()


def answers(td: TensorDictBase, cross_entropy_tokens: str) -> Tensor | None:
    """``answer_mask`` [B,T] if it rules the cross-entropy; "auto" lets it where the data has one.

    Raises:
        UsageError: "answers" of data without ``answer_mask``, or an unknown choice.
    """
    check_cross_entropy_tokens(cross_entropy_tokens)
    marked = None if cross_entropy_tokens == "all" else td.get(schema.ANSWER_MASK, None)
    if cross_entropy_tokens == "answers" and marked is None:
        raise UsageError(
            "cross_entropy_tokens='answers', but the data marks no answers (there is no answer_mask):"
            " use data of questions and answers, or 'all'"
        )
    return marked


def check_cross_entropy_tokens(value: str) -> None:
    """Check which tokens are to be under cross-entropy."""
    if value not in CROSS_ENTROPY_TOKENS:
        allowed = ", ".join(map(repr, CROSS_ENTROPY_TOKENS))
        raise UsageError(f"cross_entropy_tokens={value!r} is not known; expected one of {allowed}")


def denominator(inputs: TensorDictBase, key: NestedKey, count: Callable[[TensorDictBase], Tensor]) -> Tensor:
    """The whole batch's count when the loop wrote counts, else that of the rows at hand; at least 1."""
    if inputs.get("total", None) is None:
        return count(inputs).clamp(min=1)
    schema.check(inputs, key)
    return inputs[key][0].clamp(min=1)
