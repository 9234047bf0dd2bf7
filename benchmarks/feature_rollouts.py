"""Real rollouts over held-out code and prose, drawn once and kept on disk, for all feature maps alike."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from ebft import schema
from ebft.data.documents import Document, load_documents, split_documents
from ebft.data.packing import pack
from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from ebft.samplers.anchors import strided
from ebft.samplers.component import sampler


def _prose() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(name, text) for name, text in sorted(topics.items())]


SOURCES: dict[str, Callable[[], list[Document]]] = {"code": lambda: load_documents("stdlib"), "prose": _prose}


@dataclass(frozen=True)
class Draw:
    """How much is drawn: `resamples` groups of N rollouts from each anchor, independent of each other."""

    sequences: int
    length: int
    stride: int
    first: int
    horizon: int
    rollouts: int
    resamples: int
    seed: int


def held_out_rows(source: str, tokenizer: Any, draw: Draw) -> TensorDict:
    """A full row from the middle of each of as many held-out documents: batch size [B].

    Raises:
        UsageError: too few documents are long enough.
    """
    _, documents = split_documents(SOURCES[source](), held_out=0.5 if source == "prose" else 0.1)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(draw.seed)).tolist()
    rows: list[TensorDictBase] = []
    for number in order:
        if len(rows) == draw.sequences:
            break
        packed = pack([documents[number]], tokenizer, length=draw.length)
        full = packed[packed[schema.MASK].all(1)]
        if len(full):
            rows.append(full[len(full) // 2])
    if len(rows) < draw.sequences:
        raise UsageError(
            f"--sequences {draw.sequences}: only {len(rows)} held-out documents of {source} have {draw.length} tokens"
        )
    return TensorDict.stack(rows).exclude(schema.DOCUMENT_IDS)  # type: ignore[arg-type]


def draw_rollouts(policy: CausalPolicy, source: str, draw: Draw) -> TensorDict:
    """Rows with anchors, targets and N·R rollouts of every anchor under the schema's keys.

    Raises:
        UsageError: no anchor fits, or too few documents.
    """
    rows = held_out_rows(source, policy.tokenizer, draw).to(policy.device)
    rows[schema.SEED] = torch.full_like(rows[schema.SEQUENCE_IDS], draw.seed)
    sample = sampler(
        partial(strided, stride=draw.stride, first=draw.first, horizon=draw.horizon),
        policy.sample,
        horizon=draw.horizon,
        documents=False,
        rollouts=draw.rollouts * draw.resamples,
        eos=policy.tokenizer.eos_token_id,
    )
    drawn = TensorDict.cat([sample(row.clone()) for row in rows.split(1)])
    if not drawn[schema.ANCHOR_MASK].all():
        raise UsageError(
            f"--length {draw.length}: no anchor fits behind --first {draw.first}, with {draw.horizon} more"
        )
    return drawn


def stored_rollouts(policy: Callable[[], CausalPolicy], name: str, source: str, draw: Draw, cache: Path) -> TensorDict:
    """`draw_rollouts`, or what it gave the last time with this policy (called `name`), source and `draw`."""
    folder = cache / f"{source}-{key_of(name, source, asdict(draw))}"
    if not (folder / "meta.json").is_file():
        drawn = draw_rollouts(policy(), source, draw)
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        drawn.cpu().memmap(partial_folder)
        partial_folder.rename(folder)
    return TensorDict.load_memmap(folder)  # type: ignore[return-value]


def key_of(*parts: Any) -> str:
    """A short name for a choice of settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def arguments(td: TensorDictBase) -> list[torch.Tensor]:
    """The arguments of a feature map, in their order."""
    keys = (
        *(schema.TOKENS, schema.MASK, schema.ANCHORS, schema.ANCHOR_MASK),
        *(schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK, schema.TARGET_TOKENS, schema.TARGET_MASK),
    )
    return [td[key].clone() for key in keys]


def agreement(td: TensorDictBase) -> torch.Tensor:
    """Share of a target's tokens that a rollout has at the same places: [B,K,M]."""
    own = td[schema.ROLLOUT_MASK] & td[schema.TARGET_MASK][:, :, None]
    same = (td[schema.ROLLOUT_TOKENS] == td[schema.TARGET_TOKENS][:, :, None]) & own
    return same.sum(-1) / td[schema.TARGET_MASK].sum(-1)[..., None]
