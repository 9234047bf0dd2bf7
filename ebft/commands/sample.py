"""`sample`: look at rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from ebft.commands.options import DATA, MODEL, SAMPLING, option

EXAMPLES = (
    "sample --text README.md --stride 32 --rollouts 2",
    "sample --text prompt.txt --sampler full --horizon 64 --policy runs/mine",
)


def sample(
    text: Annotated[Path, option(DATA, "Text file to take the prefixes from.")],
    policy: Annotated[str, option(MODEL, "Model: smollm2-135m, a folder or a hub id.")] = "smollm2-135m",
    device: Annotated[str, option(MODEL, "auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, option(MODEL, "auto or a torch dtype.")] = "auto",
    length: Annotated[int, option(DATA, "T, tokens of the text to read.")] = 128,
    sampler: Annotated[
        str,
        option(SAMPLING, "Where rollouts start and how they are drawn; full: from the end of the text to EOS."),
    ] = "strided",
    stride: Annotated[int | None, option(SAMPLING, "Tokens between neighbouring anchors (default 16)")] = None,
    first: Annotated[int | None, option(SAMPLING, "Context tokens before the first anchor (default 16)")] = None,
    horizon: Annotated[int, option(SAMPLING, "G, tokens of a rollout at most.")] = 8,
    rollouts: Annotated[int, option(SAMPLING, "N, rollouts from every anchor.")] = 4,
    temperature: Annotated[float, option(SAMPLING, "Sampling temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, option(SAMPLING, "Nucleus, in (0, 1].")] = 1.0,
    top_k: Annotated[int | None, option(SAMPLING, "Keep the K likeliest tokens.")] = None,
    min_p: Annotated[float | None, option(SAMPLING, "Keep tokens of at least this share of the likeliest.")] = None,
    seed: Annotated[int, option(SAMPLING, "Keys every random number.")] = 0,
) -> None:
    """Show rollouts at their anchors, each token coloured by its log-probability.

    For every anchor: the end of its prefix, the text's own continuation (=), and the rollouts with their summed
    log-probability under the distribution they were drawn from.
    """
    from ebft.assemble import sample_from_options

    sample_from_options(locals(), console=Console())
