"""A feature map as a step of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from ebft import schema
from ebft.distributed import by_rows
from ebft.features.contract import FeatureMap, Features, at_horizons


class FeatureModule(TensorDictModule):
    """A feature map as a pipeline step that reads and writes the schema's keys.

    Of several processes each embeds its own rows (`ebft.distributed`); all write all features.

    Args:
        feature_map: the map.
        documents: also read ``document_ids`` [B,T], which must then be there.
    """

    def __init__(self, feature_map: FeatureMap, *, documents: bool = False) -> None:
        keys = [
            schema.TOKENS,
            schema.MASK,
            schema.ANCHORS,
            schema.ANCHOR_MASK,
            schema.ROLLOUT_TOKENS,
            schema.ROLLOUT_MASK,
            schema.TARGET_TOKENS,
            schema.TARGET_MASK,
        ]

        def embed(*tensors: Tensor, horizons: Sequence[int] | None = None) -> tuple[Tensor, ...]:
            """Features of rollouts and of targets, by turns where there are several horizons."""
            batch, ids = tensors[: len(keys)], tensors[-1] if documents else None

            def own(*rows: Tensor, document_ids: Tensor | None) -> tuple[Tensor, ...]:
                if horizons is None:
                    return feature_map(*rows, document_ids=document_ids)
                found = at_horizons(feature_map, *rows, horizons=horizons, document_ids=document_ids)
                return tuple(features for pair in found for features in pair)

            return by_rows(own, *batch, document_ids=ids)

        super().__init__(
            embed,
            in_keys=[*keys, schema.DOCUMENT_IDS] if documents else keys,
            out_keys=[schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES],
            strict=True,
        )
        self._features = embed

    def at_horizons(self, td: TensorDictBase, horizons: Sequence[int]) -> list[Features]:
        """Features of the first g tokens of the batch, for each g of `horizons`; see the function `at_horizons`."""
        found = self._features(*(td[key] for key in self.in_keys), horizons=horizons)
        return list(zip(found[::2], found[1::2], strict=True))


def as_module(feature_map: FeatureMap, *, documents: bool = False) -> FeatureModule:
    """A feature map as a pipeline step: `FeatureModule`."""
    return FeatureModule(feature_map, documents=documents)
