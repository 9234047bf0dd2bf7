"""`tilt`: an energy on top of a policy, without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.options import DATA, MATCHING, MODEL, OUTPUT, SAMPLING, given_options, option

EXAMPLES = (
    "tilt --features sbert --beta 4",
    "tilt --features ngram --max-norm 1 --per-context",
)

ENERGY = "Energy"


def tilt(
    context: typer.Context,
    policy: Annotated[str, option(MODEL, "Model to draw rollouts from: smollm2-135m, a folder or a hub id.")] = (
        "smollm2-135m"
    ),
    device: Annotated[str, option(MODEL, "auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, option(MODEL, "auto or a torch dtype.")] = "auto",
    data: Annotated[str, option(DATA, "stdlib, a text file, a folder, a .jsonl file or a hub data set id.")] = "stdlib",
    text_field: Annotated[str | None, option(DATA, "Field that holds the text (default text)")] = None,
    length: Annotated[int, option(DATA, "T, tokens of a sequence.")] = 128,
    sequences: Annotated[int, option(DATA, "Sequences to fit on.")] = 32,
    held_out: Annotated[int, option(DATA, "Held-out sequences to measure on.")] = 32,
    batch: Annotated[int, option(DATA, "Sequences at a time.")] = 8,
    sampler: Annotated[str, option(SAMPLING, "Where rollouts start and how they are drawn.")] = "strided",
    stride: Annotated[int | None, option(SAMPLING, "Tokens between neighbouring anchors (default 16)")] = None,
    first: Annotated[int | None, option(SAMPLING, "Context tokens before the first anchor (default 16)")] = None,
    horizon: Annotated[int, option(SAMPLING, "G, tokens of a rollout and of its target.")] = 8,
    rollouts: Annotated[int, option(SAMPLING, "N, rollouts from every anchor; even.")] = 16,
    temperature: Annotated[float, option(SAMPLING, "Sampling temperature.")] = 1.0,
    top_p: Annotated[float, option(SAMPLING, "Nucleus of the sampling distribution, in (0, 1].")] = 1.0,
    features: Annotated[
        str, option(MATCHING, "Feature map that the energy is linear in; several: join:hidden+0.5*sbert.")
    ] = "sbert",
    encoder: Annotated[str | None, option(MATCHING, "sbert: sentence encoder (default minilm-l6)")] = None,
    context_tokens: Annotated[
        int | None, option(MATCHING, "sbert: tokens of the prefix embedded with the rollout (default 0)")
    ] = None,
    backbone: Annotated[
        str | None, option(MATCHING, "hidden: start (the policy), random (weights), a name or folder (default start)")
    ] = None,
    unit_norm: Annotated[str | None, option(MATCHING, "hidden: layer, joint or none (default layer)")] = None,
    layers: Annotated[
        str | None, option(MATCHING, "hidden: depth fractions, indices, last or mean (default 0.25,0.5,0.75)")
    ] = None,
    pooling: Annotated[
        str | None, option(MATCHING, "hidden: last, mean, concat_quantiles or concat_all (default last)")
    ] = None,
    match: Annotated[
        str | None, option(MATCHING, "match: prefix (common beginning) or position (equal tokens) (default prefix)")
    ] = None,
    ngram: Annotated[int | None, option(MATCHING, "ngram: tokens of the n-grams that are counted (default 2)")] = None,
    dimension: Annotated[int | None, option(MATCHING, "ngram, match: buckets of the hash (default 2048)")] = None,
    beta: Annotated[
        float | None, option(ENERGY, "β, inverse weight of the divergence from the policy; larger tilts more.")
    ] = None,
    max_norm: Annotated[
        float | None, option(ENERGY, "In place of --beta: the largest norm of χ (the paper's theorem D.3).")
    ] = None,
    diversity: Annotated[float, option(ENERGY, "α in (0, 1]; below 1 tilts towards the mean of the texts.")] = 1.0,
    per_context: Annotated[
        bool,
        option(
            ENERGY,
            "One χ for each held-out context, from its own target: what an energy that knew it could do.",
            "--per-context",
        ),
    ] = False,
    seed: Annotated[int, option(SAMPLING, "Keys every random number.")] = 0,
    out: Annotated[Path | None, option(OUTPUT, "Folder of the energy (default runs/TIME-tilt-FEATURES)")] = None,
) -> None:
    """Fit an energy E = χ·φ on a policy's rollouts, and reweight held-out rollouts by exp(-E): no training.

    The policy tilted by exp(-E) is what feature matching with a divergence from the policy would train it to be (the
    paper's (10)). Rollouts drawn from the policy and weighted, or the best of N, stand for it.
    `run --objective energy --energy FILE` trains towards it.
    """
    from transformers.utils import logging

    from ebft.assemble import tilt_from_options

    logging.disable_progress_bar()
    options, _ = given_options(context, besides=("out",))
    tilt_from_options(options, out=out, console=Console())
