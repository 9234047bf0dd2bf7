"""A sampler as one step of a pipeline: anchors, targets and rollouts, written under the schema's keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

from ebft import schema
from ebft.distributed import by_rows
from ebft.samplers.anchors import targets

Place = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Engine = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def sampler(
    place: Place, engine: Engine, *, horizon: int, documents: bool = True, answers: bool = False, **sampling
) -> TensorDictSequential:
    """Put an anchor placement and a sampling engine together.

    Args:
        place: (mask, *, document_ids, answer_mask) -> (anchors, anchor_mask), the last two if announced below; e.g.
            `functools.partial(anchors.strided, stride=8, first=8, horizon=8)`. One that draws has the parameters
            `seed` and `sequence_ids` as well and gets both, [B] int64.
        engine: `CausalPolicy.sample` of a policy, or any function with its arguments and results.
        horizon: G.
        documents, answers: whether the data carries `document_ids`, `answer_mask`; they are required then.
        sampling: passed on to the engine (rollouts, temperature, eos, ...).

    Returns:
        A module of two, `placed` and `drawn`, that reads tokens, mask, sequence_ids, seed and writes anchors,
        anchor_mask, the targets' tokens and mask, the rollouts' tokens, log_prob and mask.
    """
    return TensorDictSequential(
        placed(place, horizon=horizon, documents=documents, answers=answers),
        drawn(engine, horizon=horizon, documents=documents, **sampling),
    )


def placed(place: Place, *, horizon: int, documents: bool = True, answers: bool = False) -> TensorDictModule:
    """A module that writes anchors and targets. K is that of the row with the most; arguments as in `sampler`."""

    def write(tokens, mask, sequence_ids, seed, *optional):
        given = dict(zip(names, optional, strict=True))
        drawing = {"seed": seed, "sequence_ids": sequence_ids} if place_draws else {}
        anchors, anchor_mask = place(mask, **drawing, **given)
        return anchors, anchor_mask, *targets(tokens, mask, anchors, anchor_mask, horizon=horizon, **given)

    place_draws = "seed" in inspect.signature(place).parameters
    names = ["document_ids"] * documents + ["answer_mask"] * answers
    return TensorDictModule(
        write,
        in_keys=[schema.TOKENS, schema.MASK, schema.SEQUENCE_IDS, schema.SEED, *names],
        out_keys=[schema.ANCHORS, schema.ANCHOR_MASK, schema.TARGET_TOKENS, schema.TARGET_MASK],
        strict=True,
    )


def drawn(engine: Engine, *, horizon: int, documents: bool = True, **sampling) -> TensorDictModule:
    """A module that writes rollouts from the anchors that are there; arguments as in `sampler`.

    Its rows are independent. Of several processes each draws those of its own (`ebft.distributed`); all write all.
    """

    def write(tokens, mask, sequence_ids, seed, anchors, anchor_mask, document_ids=None):
        return by_rows(
            engine,
            tokens,
            mask,
            anchors,
            anchor_mask,
            horizon=horizon,
            seed=seed,
            sequence_ids=sequence_ids,
            document_ids=document_ids,
            **sampling,
        )

    keys = [schema.TOKENS, schema.MASK, schema.SEQUENCE_IDS, schema.SEED, schema.ANCHORS, schema.ANCHOR_MASK]
    return TensorDictModule(
        write,
        in_keys=[*keys, *[schema.DOCUMENT_IDS] * documents],
        out_keys=[schema.ROLLOUT_TOKENS, schema.ROLLOUT_LOG_PROB, schema.ROLLOUT_MASK],
        strict=True,
    )
