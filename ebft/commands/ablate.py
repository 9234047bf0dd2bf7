"""`ablate`: vary options of `run` and see what each does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.derived import NOT_OF_THE_RUN, parse_option, run_defaults, with_run_options
from ebft.commands.options import given_options, option
from ebft.errors import UsageError

EXAMPLES = (
    "ablate --over features=hidden,sbert --over estimator=rloo,mean,none --seeds 3 --steps 30",
    "ablate --over whitening=none,group --config runs/mine/config.json --one-at-a-time",
    "ablate --replay rollouts --over features=hidden,sbert,ngram --out replay",
)

STUDY = "Study"


@with_run_options()
def ablate(
    context: typer.Context,
    over: Annotated[
        list[str],
        option(
            STUDY,
            "An option of `run` and its values: features=hidden,sbert,ngram; again for each further axis. Values with"
            " commas are separated by semicolons; `default` is the option's default.",
        ),
    ],
    out: Annotated[
        Path | None,
        option(
            STUDY,
            "Folder of the study; one that is there goes on (default runs/ablate-AXES-HASH of the other options:"
            " the same command goes on)",
        ),
    ] = None,
    seeds: Annotated[int, option(STUDY, "Runs of every cell, with seeds from --seed on.")] = 1,
    one_at_a_time: Annotated[
        bool,
        option(
            STUDY,
            "Vary one option at a time, instead of the grid. The others are as given by themselves, or as by default.",
            "--one-at-a-time",
        ),
    ] = False,
    replay: Annotated[
        Path | None,
        option(
            STUDY,
            "Train nothing: measure what cells make of the rollouts in this folder, which `rollouts` wrote. Options of"
            " features, whitening, objective, estimator and policy gradient can be varied.",
        ),
    ] = None,
) -> None:
    """Run a grid of training runs and compare them: what does each option do to held-out text?

    Every cell is an ordinary run of its own below --out, with every other option of `run` as given here. What is done
    is skipped, what was begun goes on, what fails is recorded and the others go on (exit code 1). Leaves results.csv
    (a row for every cell, seed and metric), results.md (means with 95 % intervals over seeds, differences to the first
    cell paired by seed) and a plot for every axis.
    """
    from transformers.utils import logging

    from ebft.assemble import ablate_from_options, replay_from_options
    from ebft.assemble.grid import default_name, parse_axes

    logging.disable_progress_bar()
    own = ("over", "out", "seeds", "one_at_a_time", "replay")
    options, explicit = given_options(context, besides=(*NOT_OF_THE_RUN, *own))
    axes = parse_axes(over, known=run_defaults(), parse=parse_option)
    rest = {name: value for name, value in options.items() if name not in axes}
    out = out or Path("runs") / default_name(axes, {**rest, "replay": None if replay is None else str(replay)})
    if replay is not None:
        if seeds != 1:
            raise UsageError(
                f"--seeds {seeds} with --replay: the rollouts are there already, of one seed; leave it out"
            )
        given = {name: options[name] for name in explicit}
        replay_from_options(replay, given, over=axes, one_at_a_time=one_at_a_time, out=out, console=Console())
        return
    results = ablate_from_options(
        options, explicit=explicit, over=axes, seeds=seeds, one_at_a_time=one_at_a_time, out=out, console=Console()
    )
    if results.failures:
        raise typer.Exit(1)
