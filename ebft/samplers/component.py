"""A sampler as one step of a pipeline: anchors, targets and rollouts, written under the schema's keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from tensordict.nn import TensorDictModule

from ebft import schema
from ebft.distributed import by_rows
from ebft.samplers.anchors import targets

Place = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Engine = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def sampler(
    place: Place, engine: Engine, *, horizon: int, documents: bool = True, answers: bool = False, **sampling
) -> TensorDictModule:
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
        A module that reads tokens, mask, sequence_ids, seed and writes anchors, anchor_mask, the targets' tokens and
        mask, the rollouts' tokens, log_prob and mask. Of several processes each draws the rollouts of its own rows
        (`ebft.distributed`); all write all of them.
    """

    def sample(tokens, mask, sequence_ids, seed, *optional):
        given = dict(zip(names, optional, strict=True))
        drawing = {"seed": seed, "sequence_ids": sequence_ids} if place_draws else {}
        anchors, anchor_mask = place(mask, **drawing, **given)
        target_tokens, target_mask = targets(tokens, mask, anchors, anchor_mask, horizon=horizon, **given)
        rollouts = by_rows(
            engine,
            tokens,
            mask,
            anchors,
            anchor_mask,
            horizon=horizon,
            seed=seed,
            sequence_ids=sequence_ids,
            document_ids=given.get("document_ids"),
            **sampling,
        )
        return anchors, anchor_mask, target_tokens, target_mask, *rollouts

    place_draws = "seed" in inspect.signature(place).parameters
    names = ["document_ids"] * documents + ["answer_mask"] * answers
    return TensorDictModule(
        sample,
        in_keys=[schema.TOKENS, schema.MASK, schema.SEQUENCE_IDS, schema.SEED, *names],
        out_keys=[
            schema.ANCHORS,
            schema.ANCHOR_MASK,
            schema.TARGET_TOKENS,
            schema.TARGET_MASK,
            schema.ROLLOUT_TOKENS,
            schema.ROLLOUT_LOG_PROB,
            schema.ROLLOUT_MASK,
        ],
        strict=True,
    )
