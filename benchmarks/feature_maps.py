"""The feature maps that the benchmark compares, by name, and the whitened values of their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.feature_rollouts import arguments
from ebft.components.features import frozen_network
from ebft.components.objectives import build_objective
from ebft.components.whitenings import WHITENINGS
from ebft.features.contract import FeatureMap
from ebft.features.hidden import hidden, layer_numbers
from ebft.features.join import join
from ebft.features.ngram import ngram
from ebft.features.sbert import sbert
from ebft.objectives.scores import Values
from ebft.policy import CausalPolicy

Features = tuple[Tensor, Tensor]  # rollouts [B,K,M,D], targets [B,K,D]

PAPER = (0.25, 0.5, 0.75)
# name -> layers and pooling
HIDDEN: dict[str, dict[str, Any]] = {
    "hidden": {"layers": PAPER},
    "hidden-0.25": {"layers": (0.25,)},
    "hidden-0.5": {"layers": (0.5,)},
    "hidden-0.75": {"layers": (0.75,)},
    "hidden-last": {"layers": "last"},
    "hidden-pooled": {"layers": PAPER, "pooling": "mean"},
}
SBERT = {"sbert-0": 0, "sbert-16": 16, "sbert-64": 64}
NGRAM = {f"ngram-{n}": n for n in (1, 2, 3, 4)}
JOINS = {
    "hidden+sbert-0": ("hidden", "sbert-0"),
    "hidden+ngram-1": ("hidden", "ngram-1"),
    "sbert-0+ngram-1": ("sbert-0", "ngram-1"),
}
NAMES = (*HIDDEN, "random", *SBERT, *NGRAM, *JOINS)
MEANING = {
    "hidden": "frozen start of the policy, layers at 0.25, 0.5 and 0.75 of its depth, last token (the paper's)",
    "hidden-0.25, -0.5, -0.75, -last": "one of its layers",
    "hidden-pooled": "as hidden, the mean over the rollout's tokens",
    "random": "as hidden, of the same architecture with random weights",
    "sbert-C": "sentence embedding of the text of the rollout behind the last C tokens of its prefix",
    "ngram-n": "hashed counts of token n-grams",
    "a+b": "two maps of unit norm side by side",
}
KEPT_DIRECTIONS = 512  # of a population moment: more than its contexts span


class StatesOnce:
    """A backbone that computes the states of all layers that are going to be asked for in one pass, once."""

    def __init__(self, policy: CausalPolicy, layers: Sequence[int]) -> None:
        self.policy, self.layers = policy, sorted(set(layers))
        self._kept: tuple[Tensor, Any] | None = None

    @property
    def num_layers(self) -> int:
        return self.policy.num_layers

    def hidden_states(self, tokens: Tensor, *rest: Tensor, layers: Sequence[int], document_ids: Tensor | None = None):
        """As of `CausalPolicy`, row by row to bound the memory; the last call's are kept."""
        if self._kept is None or not torch.equal(self._kept[0], tokens):
            rows = [
                self.policy.hidden_states(*(x[b : b + 1] for x in (tokens, *rest)), layers=self.layers)
                for b in range(len(tokens))
            ]
            both = [{layer: torch.cat([row[i][layer] for row in rows]) for layer in self.layers} for i in (0, 1)]
            self._kept = tokens, both
        return self._kept[1]


class FeatureBank:
    """Features of one set of rollouts under each map, computed when first asked for."""

    def __init__(self, policy: CausalPolicy, encoder: Any) -> None:
        self.policy, self.encoder = policy, encoder
        self._backbones: dict[str, StatesOnce] = {}

    def _backbone(self, name: str) -> StatesOnce:
        if name not in self._backbones:
            network = frozen_network(self.policy, self.policy.reference(), name)
            wanted = [i for chosen in HIDDEN.values() for i in layer_numbers(chosen["layers"], network.num_layers)]
            layers = wanted if name == "start" else layer_numbers(PAPER, network.num_layers)
            self._backbones[name] = StatesOnce(network, layers)
        return self._backbones[name]

    def map(self, name: str) -> FeatureMap:
        """The feature map `name`."""
        if name in HIDDEN:
            return hidden(self._backbone("start"), **HIDDEN[name])  # type: ignore[arg-type]
        if name == "random":
            return hidden(self._backbone("random"), layers=PAPER)  # type: ignore[arg-type]
        if name in NGRAM:
            return ngram(NGRAM[name], dimension=2048)
        precision = "bfloat16" if self.policy.autocast is torch.bfloat16 else "float32"
        made = sbert(self.encoder, self.policy.tokenizer, context_tokens=SBERT[name], dtype=precision)
        self.encoder = made.encoder  # loaded once
        return made

    def features(self, td: Any, names: Sequence[str]) -> Iterator[tuple[str, Features]]:
        """Name and features of each map over the rollouts of `td`; what joins need is kept until the end."""
        kept: dict[str, Features] = {}

        def embed(name: str) -> Features:
            if name not in kept:
                kept[name] = self.map(name)(*arguments(td))
            return kept[name]

        needed = {part for name in names for part in JOINS.get(name, ())}
        for name in names:
            if name in JOINS:
                maps = [partial(_known, embed(part)) for part in JOINS[name]]
                yield name, join(maps)(*arguments(td))  # type: ignore[arg-type]
            else:
                yield name, embed(name)
                if name not in needed:
                    del kept[name]


def _known(features: Features, *tensors: Tensor, document_ids: Tensor | None = None) -> Features:
    return features


def whitened_values(name: str, dimension: int) -> Values:
    """Values under the whitening `name`: with the cosine for the two that the paper and its code use it with."""
    values = build_objective("feature_matching", {"alignment": "cosine" if name in ("group", "sample") else "dot"})
    options: dict[str, Any] = {"rank": KEPT_DIRECTIONS if dimension > KEPT_DIRECTIONS else None}
    return WHITENINGS[name].build(values, **(options if name == "population" else {}))


def folds(name: str, features: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Values]]:
    """Numbers of sequences, and the values to score them with.

    A population moment is taken from the other half of the sequences, so that no rollout is whitened by itself.

    Args:
        features: rollout [B,A,N,D] and target [B,A,D].
    """
    rollout, target = features["rollout"], features["target"]
    everything = torch.arange(len(rollout))
    if name != "population":
        yield everything, whitened_values(name, rollout.shape[-1])
        return
    for half in (0, 1):
        values: Any = whitened_values(name, rollout.shape[-1])
        others = everything % 2 != half
        values.observe(rollout[others], target[others], torch.ones(target[others].shape[:2], dtype=torch.bool))
        yield everything[~others], values
