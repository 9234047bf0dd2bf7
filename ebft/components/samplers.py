"""Samplers by name: (policy, horizon, options) -> (place, engine)."""

from __future__ import annotations

from functools import partial

import torch

from ebft.components.component import Component
from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from ebft.samplers import anchors, full, independent, snapshot
from ebft.samplers.component import Engine, Place
from ebft.sharding import whole


def _strided(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    policy.require_shared()
    return partial(anchors.strided, stride=stride, first=first, horizon=horizon), policy.sample


def _random(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    policy.require_shared()

    def place(mask, *, seed, sequence_ids, **masks):
        count = max(1, (mask.shape[1] - horizon - first) // stride + 1)  # as many as strided has in a full row
        keys = zip(seed.tolist(), sequence_ids.tolist(), strict=True)
        generators = [torch.Generator().manual_seed(hash(key) & (2**62 - 1)) for key in keys]
        return anchors.random(mask, count=count, first=first, horizon=horizon, generator=generators, **masks)

    return place, policy.sample


def _independent(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    place = partial(anchors.strided, stride=stride, first=first, horizon=horizon)
    return place, partial(independent.sample, policy)


def _snapshot(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    place = partial(anchors.strided, stride=stride, first=first, horizon=horizon)
    with whole(policy):
        reader = snapshot.cache_reader(policy)
    return place, partial(snapshot.sample, reader)


def _full(policy: CausalPolicy, *, horizon: int) -> tuple[Place, Engine]:
    if policy.tokenizer.eos_token_id is None:
        raise UsageError("--sampler full: whole answers end at EOS, and the policy's tokenizer has none")
    return full.place, full.full_engine(policy)


_ANCHORS = {"stride": 16, "first": 16}
SAMPLERS = {
    "strided": Component("rollouts from every STRIDE-th prefix; each prefix is computed once", _ANCHORS, _strided),
    "random": Component("as many anchors as strided, drawn without replacement: an ablation", _ANCHORS, _random),
    "snapshot": Component("strided anchors, by copies of the model's own cache: recurrent layers", _ANCHORS, _snapshot),
    "independent": Component("strided anchors, one full forward per rollout and token: slow", _ANCHORS, _independent),
    "full": Component("whole answers, from the end of every prompt to EOS; wants prompts with answers", {}, _full),
}
