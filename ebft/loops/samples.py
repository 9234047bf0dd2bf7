"""A few held-out prefixes with their target and rollouts as text, each token with its advantage."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from ebft import schema

SAMPLED_PREFIXES = 4


def take_samples(td: TensorDictBase, tokenizer) -> list[dict[str, Any]]:
    """One anchor from each of the first sequences of a batch that the pipeline has gone through.

    Returns:
        A list of {"prefix", "target": text, "before": rollouts}, a rollout being {"text", "reward"} and, where the
        pipeline wrote advantages, "tokens": texts that make up its text, with an "advantage" each.
    """
    samples = []
    for row in td[:SAMPLED_PREFIXES]:
        valid = row[schema.ANCHOR_MASK].nonzero()[:, 0].tolist()
        if not valid:
            continue
        k = valid[len(valid) // 2]

        def text(tokens, mask):
            return tokenizer.decode(tokens[mask].tolist())

        context = torch.arange(len(row[schema.TOKENS]), device=row.device) < row[schema.ANCHORS][k]
        if schema.DOCUMENT_IDS in set(row.keys()):
            ids = row[schema.DOCUMENT_IDS]
            context &= ids == ids[row[schema.ANCHORS][k] - 1]
        samples.append(
            {
                "prefix": text(row[schema.TOKENS], context),
                "target": text(row[schema.TARGET_TOKENS][k], row[schema.TARGET_MASK][k]),
                "before": _rollouts(row, k, tokenizer),
            }
        )
    return samples


def _rollouts(row: TensorDictBase, k: int, tokenizer) -> list[dict[str, Any]]:
    reward = row[schema.REWARD][k].flatten(1).sum(1) if row[schema.REWARD].ndim == 3 else row[schema.REWARD][k]
    advantage = row.get(schema.ADVANTAGE, None)
    rollouts = []
    for n, (tokens, mask) in enumerate(zip(row[schema.ROLLOUT_TOKENS][k], row[schema.ROLLOUT_MASK][k], strict=True)):
        ids = tokens[mask].tolist()
        rollout = {"text": tokenizer.decode(ids), "reward": round(float(reward[n]), 4)}
        if advantage is not None:
            each = advantage[k, n].expand(len(tokens))[mask]
            rollout |= {"tokens": pieces(ids, tokenizer), "advantage": [float(f"{a:.4g}") for a in each.tolist()]}
        rollouts.append(rollout)
    return rollouts


def pieces(ids: list[int], tokenizer) -> list[str]:
    """The text of each token, so that together they are the text of all.

    A token that ends within a character gives the whole of it to the token that completes it.
    """
    whole, done, result = tokenizer.decode(ids), "", []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end]) if end < len(ids) else whole
        if text.startswith(done) and whole.startswith(text):
            result.append(text[len(done) :])
            done = text
        else:
            result.append("")
    return result
