"""Rollouts on disk: a TensorDict as memory maps, and what it was made with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from ebft import schema
from ebft.errors import UsageError
from ebft.files import write_folder_atomically, write_json
from ebft.loops.ablation.sketch import SKETCH, Projection, score_sketches
from ebft.loops.scoring import score
from ebft.loops.stages import Stage, at_step
from ebft.policy import CausalPolicy

KIND = "ebft rollouts"


def kept_features(number: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Keys of the features of rollouts and targets under the `number`-th map that was kept."""
    return ("rollout", f"features_{number}"), ("target", f"features_{number}")


def draw(
    policy: CausalPolicy,
    sample: Stage,
    embed: Mapping[int, Stage],
    data: Iterator[TensorDictBase],
    *,
    batches: int,
    seed: int,
    scoring: dict[str, float],
    projection: Projection | None,
) -> Iterator[TensorDictBase]:
    """Batches of rollouts as the first steps of a run would draw them, had none of them changed the policy.

    Args:
        embed: number -> feature map whose features are kept.
        data: batches of rows, in the run's order.

    Yields:
        On the CPU: tokens, anchors, targets, rollouts, the log-probs of sampling and of scoring, features and sketches.
    """
    for step in range(batches):
        td = sample(at_step(next(data).to(policy.device), seed=seed, step=step))
        with torch.no_grad():
            score(policy, td, scoring=scoring)
        for number, stage in embed.items():
            embedded = stage(td.clone(False))
            for key, made in zip(kept_features(number), (schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES), strict=True):
                td[key] = embedded[made]
        if projection is not None:
            td[SKETCH] = score_sketches(policy, td, projection, scoring=scoring).to(policy.device)
        yield td.to("cpu")


def save_rollouts(out: Path, td: TensorDictBase, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Write rollouts into a folder that is complete or absent.

    Raises:
        UsageError: the disk is full or may not be written.
    """

    def fill(folder: Path) -> None:
        td.memmap(str(folder / "rollouts"))
        tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "config.json", {"kind": KIND, **config})

    write_folder_atomically(out, fill)


def load_rollouts(folder: Path) -> tuple[TensorDictBase, dict[str, Any]]:
    """What :func:`save_rollouts` wrote: rows of batch size [M] and the config. Nothing in it is executed.

    Raises:
        UsageError: it is no folder of rollouts, or it was damaged.
    """
    expected = "expected a folder that the command `rollouts` wrote"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no rollouts (no config.json that can be read): {expected}") from error
    if not isinstance(config, dict) or config.get("kind") != KIND:
        raise UsageError(f"{folder} is no folder of rollouts but something else's: {expected}")
    try:
        td = TensorDict.load_memmap(str(folder / "rollouts"), allow_pickle=False)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"{folder / 'rollouts'} cannot be read ({error}): {expected}") from error
    schema.check(td, schema.TOKENS, schema.ANCHORS, schema.ANCHOR_MASK, schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK)
    return td, config
