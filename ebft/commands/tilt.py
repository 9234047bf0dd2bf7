"""`tilt`: an energy on top of a policy, without training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.declared import of_features, of_model, of_sampling, of_text
from ebft.commands.options import DATA, MATCHING, MODEL, OUTPUT, SAMPLING, given_options, option, with_options_of

EXAMPLES = (
    "tilt --features sbert --beta 4",
    "tilt --features ngram --max-norm 1 --per-context",
)

ENERGY = "Energy"
_AS_IN_A_RUN = ("device", "dtype", "text_field", "stride", "first", "temperature", "top_p")


@with_options_of(of_features)
@with_options_of(of_model, of_text, of_sampling, only=_AS_IN_A_RUN)
def tilt(
    context: typer.Context,
    policy: Annotated[str, option(MODEL, "Model to draw rollouts from: smollm2-135m, a folder or a hub id.")] = (
        "smollm2-135m"
    ),
    data: Annotated[str, option(DATA, "stdlib, a text file, a folder, a .jsonl file or a hub data set id.")] = "stdlib",
    length: Annotated[int, option(DATA, "T, tokens of a sequence.")] = 128,
    sequences: Annotated[int, option(DATA, "Sequences to fit on.")] = 32,
    held_out: Annotated[int, option(DATA, "Held-out sequences to measure on.")] = 32,
    batch: Annotated[int, option(DATA, "Sequences at a time.")] = 8,
    sampler: Annotated[str, option(SAMPLING, "Where rollouts start and how they are drawn.")] = "strided",
    horizon: Annotated[int, option(SAMPLING, "G, tokens of a rollout and of its target.")] = 8,
    rollouts: Annotated[int, option(SAMPLING, "N, rollouts from every anchor; even.")] = 16,
    features: Annotated[
        str, option(MATCHING, "Feature map that the energy is linear in; several: join:hidden+0.5*sbert.")
    ] = "sbert",
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
