"""`study`: the paper's comparison of methods on one task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.options import OUTPUT, given_options, option, with_options_of
from ebft.commands.run import run
from ebft.errors import UsageError

EXAMPLES = (
    "study code --budget small --seeds 0,1,2 --out runs/code",
    "study qa.jsonl --arms base,sft,ebft --minutes 60",
)

STUDY, EVALUATION = "Study", "Evaluation on the test half"

# Options of `run` that a study sets itself.
_SET_BY_THE_STUDY = ("out", "resume", "force", "config", "preset", "method", "lr", "seed", "split", "logger")


@with_options_of(run, without=_SET_BY_THE_STUDY)
def study(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(
            help="qa-code, code or translation; or a .jsonl or .tsv file with the fields prompt and answer (and tests),"
            " a text file or a folder."
        ),
    ],
    budget: Annotated[
        str,
        option(
            STUDY,
            "How much of everything: small (90 minutes on 2 cores with smollm2-135m), gpu (an hour on one GPU with a"
            " model of 0.5 B weights), paper (its own configuration), or a YAML file. Flags go before it.",
        ),
    ] = "small",
    seeds: Annotated[str, option(STUDY, "Seeds of every method; learning rates are chosen with the first.")] = "0,1,2",
    arms: Annotated[
        str | None,
        option(
            STUDY,
            "What is compared: base, sft, warm (the warm start alone), ebft, ebft-ws (from a warm start), rlvr, rlvr-ws"
            " (default: all; rlvr only where answers can be verified)",
        ),
    ] = None,
    lr_grid: Annotated[
        list[str] | None,
        option(
            STUDY,
            "Learning rates to choose from, for all arms as 0.0003,0.001, or for one as ebft=0.0003,0.001; again"
            " for each one (default: the budget's)",
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        option(
            STUDY,
            "What the learning rate is chosen by on the validation half: own (sft: cross_entropy, ebft:"
            " feature_matching_loss, rlvr: reward), or one of the first two for all arms that measure it (default: the"
            " budget's)",
        ),
    ] = None,
    eval_rows: Annotated[int | None, option(EVALUATION, "Sequences (default: the budget's)")] = None,
    eval_batch: Annotated[int | None, option(EVALUATION, "Sequences measured at once (default: the budget's)")] = None,
    eval_features: Annotated[
        str | None, option(EVALUATION, "Feature maps to compare rollouts and text under (default: the budget's)")
    ] = None,
    eval_horizons: Annotated[
        str | None, option(EVALUATION, "Tokens of a rollout at which features are compared (default: the budget's)")
    ] = None,
    prompts: Annotated[
        int | None, option(EVALUATION, "Prompts that are answered: of HumanEval for code (default: the budget's)")
    ] = None,
    prompt_length: Annotated[
        int | None, option(EVALUATION, "Tokens of a prompt at most (default: the budget's)")
    ] = None,
    answers: Annotated[
        int | None, option(EVALUATION, "Answers to each prompt, beside a greedy one (default: the budget's)")
    ] = None,
    answer_tokens: Annotated[
        int | None, option(EVALUATION, "Tokens of an answer at most (default: the budget's)")
    ] = None,
    answer_temperature: Annotated[
        float | None, option(EVALUATION, "Sampling temperature of answers (default: the budget's)")
    ] = None,
    bootstrap: Annotated[int, option(EVALUATION, "Resamples of test texts behind their intervals.")] = 2000,
    level: Annotated[float, option(EVALUATION, "Of all intervals.")] = 0.95,
    minutes: Annotated[
        float | None,
        option(OUTPUT, "Stop after so many minutes, as Ctrl-C does: the same command goes on (default: to the end)"),
    ] = None,
    drop_policies: Annotated[
        bool, option(OUTPUT, "Remove each trained policy once it has been measured", "--drop-policies")
    ] = False,
    out: Annotated[
        Path | None,
        option(OUTPUT, "Folder of the study; one that is there goes on (default runs/study-TASK-BUDGET)"),
    ] = None,
) -> None:
    """Compare the methods of the paper: the base, SFT, EBFT, RLVR, and both from a warm start by SFT.

    RLVR takes part where answers can be verified: by tests, or on translations. Every method sees the same number of
    examples. Its learning rate is chosen from a grid on the validation half of the
    held-out texts; the paper's Table 1 is then measured on the test half, which nothing before it looks at:
    cross-entropy, feature matching, tests passed (or BLEU and chrF) greedily and best of 1, 4 and 16, over all seeds,
    with the significance of every difference, and time and tokens spent.

    All options of `run` hold for all methods that take them. Every cell is an ordinary run or evaluation in a folder of
    its own: what is done is skipped, what was begun goes on, what fails is recorded and the others go on (exit code 1).
    """
    from transformers.utils import logging

    from ebft.assemble.study import study_from_options
    from ebft.assemble.study_budget import Settings

    logging.disable_progress_bar()
    own = {name for name in context.params if name in Settings.__dataclass_fields__}
    besides = {*own, "task", "budget", "seeds", "bootstrap", "level", "minutes", "drop_policies", "out"}
    options, explicit = given_options(context, besides=besides)
    out = out or Path("runs") / f"study-{Path(task).stem}-{Path(budget).stem}"
    found = study_from_options(
        task,
        {**options, **_of_the_study()},
        explicit=explicit,
        settings={name: context.params[name] for name in own},
        budget=budget,
        seeds=_seeds(seeds),
        out=out,
        bootstrap=bootstrap,
        level=level,
        minutes=minutes,
        drop_policies=drop_policies,
        console=Console(),
    )
    if found.failures:
        raise typer.Exit(1)


def _of_the_study() -> dict[str, object]:
    from ebft.commands.derived import run_defaults

    return {name: value for name, value in run_defaults().items() if name in _SET_BY_THE_STUDY}


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds {text!r}: expected different whole numbers, 0 or more, such as 0,1,2")
    return seeds
