"""From options to what the host does with some rollouts of a batch while others are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebft.assemble.loss import trains_on_rollouts
from ebft.components.objectives import VERIFIER, objective_parts
from ebft.errors import UsageError
from ebft.loops.overlap import overlapped


def overlap_stages(stages: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The stages to train with, those of the host inside of `sample` where --overlap wants them there."""
    host = host_stages(options)
    if options["overlap"] == 1 or not host:
        return dict(stages)
    place, *draw = stages["sample"]
    sample = overlapped(place, draw, [stages[name] for name in host], parts=options["overlap"])
    return {"sample": sample, **{name: stage for name, stage in stages.items() if name not in (*host, "sample")}}


def host_stages(options: Mapping[str, Any]) -> list[str]:
    """The stages between sampling and rewards that run on the host, or wait for it, and without the policy."""
    of_texts = ["embed"] * (options["features"] == "sbert")
    return of_texts + ["verify"] * (VERIFIER in objective_parts(options["objective"]))


def overlaps(*pipelines: Mapping[str, Any]) -> bool:
    """Whether one of the objectives, by their settled options, has rollouts to train on and work for the host."""
    return any(trains_on_rollouts(each) and host_stages(each) for each in pipelines)


def check_overlap(*pipelines: Mapping[str, Any], processes: int) -> None:
    """Check that --overlap has something to overlap, in one of the objectives, by their settled options.

    Raises:
        UsageError: it has not, there are fewer sequences than parts, or processes share the weights.
    """
    options, parts = pipelines[0], pipelines[0]["overlap"]
    if parts == 1:
        return
    rows = -(-options["batch"] // processes)
    if options["shard"]:
        raise UsageError(f"--overlap {parts} with --shard: a gathered policy draws a batch at once. Leave one out")
    if parts > rows:
        share = "" if processes == 1 else f" of which each of {processes} processes has {rows}"
        raise UsageError(f"--overlap {parts}: a batch of {options['batch']}{share} has no more parts than sequences")
    if not overlaps(*pipelines):
        raise UsageError(
            f"--overlap {parts}: nothing of this run is the host's: it is for --features sbert, which are embeddings"
            " of texts, and for verifiers, with rollouts to train on"
        )
