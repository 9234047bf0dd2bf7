"""`evaluate`: measure a policy on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.declared import of_features, of_model, of_sampling, of_text
from ebft.commands.options import DATA, MODEL, OUTPUT, SAMPLING, given_options, option, with_options_of

EXAMPLES = (
    "evaluate --policy runs/mine --features hidden,sbert,ngram --quick",
    "evaluate --policy smollm2-135m --data humaneval --answers 16 --k 1,16",
)

FEATURES, ANSWERS, STATISTICS = "Features", "Whole answers (data with prompts and answers)", "Statistics"
_AS_IN_A_RUN = {
    *("device", "dtype", "attention", "text_field", "prompt_field", "answer_field", "tests_field", "chat", "split"),
    *("stride", "first", "temperature", "top_p"),
}


@with_options_of(of_features, panel=FEATURES)
@with_options_of(of_model, of_text, of_sampling, only=_AS_IN_A_RUN)
def evaluate(
    context: typer.Context,
    policy: Annotated[
        str, option(MODEL, "What to measure: smollm2-135m, a folder, a hub id, or the folder of a run.")
    ] = "smollm2-135m",
    features: Annotated[
        str, option(FEATURES, "Feature maps to compare rollouts and text under, trained on or not.")
    ] = "hidden,sbert",
    quick: Annotated[
        bool, option(DATA, "A first look: 8 sequences, 8 prompts, rollouts of up to 8 tokens.", "--quick")
    ] = False,
    data: Annotated[
        str,
        option(
            DATA,
            "A name that `data` lists (stdlib, qa-code, humaneval, ...), a text file, a folder, a .jsonl or .tsv file"
            " or a hub dataset id; of a run's policy by default what the run was trained on. Its held-out part is"
            " measured.",
        ),
    ] = "stdlib",
    length: Annotated[int, option(DATA, "T, tokens of a sequence; for a run's policy, by default the run's.")] = 128,
    held_out: Annotated[int, option(DATA, "Held-out sequences.")] = 32,
    sampler: Annotated[str, option(SAMPLING, "Where rollouts start and how they are drawn.")] = "strided",
    horizons: Annotated[
        str | None,
        option(
            SAMPLING,
            "Tokens of a rollout at which features are compared, one sampling for all (default 1,2,4,... up to 64, or"
            " to what half of the sequences have room for)",
        ),
    ] = None,
    rollouts: Annotated[int, option(SAMPLING, "N, rollouts from every anchor.")] = 4,
    seed: Annotated[int, option(SAMPLING, "Keys every random number.")] = 0,
    prompts: Annotated[int, option(ANSWERS, "Held-out prompts.")] = 32,
    prompts_from: Annotated[
        str | None,
        option(ANSWERS, "Other data whose prompts are answered, as humaneval beside --data stdlib (default --data)"),
    ] = None,
    prompt_length: Annotated[
        int | None,
        option(ANSWERS, "Tokens of a prompt at most; longer ones are left out (default --length)"),
    ] = None,
    greedy: Annotated[
        bool, option(ANSWERS, "Give one more answer to each prompt, at temperature 0, and judge it apart.", "--greedy")
    ] = False,
    answers: Annotated[int, option(ANSWERS, "N, answers to each prompt.")] = 4,
    answer_temperature: Annotated[float, option(ANSWERS, "Sampling temperature of answers; 0 is greedy.")] = 0.6,
    max_new_tokens: Annotated[int, option(ANSWERS, "Tokens of an answer at most.")] = 128,
    stop: Annotated[
        list[str] | None,
        option(
            ANSWERS,
            "An answer ends where it says this, besides at EOS; again for another one (default: those of the run that"
            " the policy comes from)",
        ),
    ] = None,
    k: Annotated[str | None, option(ANSWERS, "k of pass@k and best-of-k, at most N (default those of 1,4,16)")] = None,
    test_prompt: Annotated[
        bool | None,
        option(
            ANSWERS,
            "Programs are prompt and answer together, or the answer alone (default: together where the prompt and the"
            " reference are a program)",
            "--test-prompt/--no-test-prompt",
        ),
    ] = None,
    test_timeout: Annotated[float, option(ANSWERS, "Seconds for the tests of one program.")] = 5.0,
    bootstrap: Annotated[int, option(STATISTICS, "Resamples of sequences (prompts) behind the intervals.")] = 2000,
    level: Annotated[float, option(STATISTICS, "Of the bootstrap (BCa) intervals.")] = 0.95,
    batch: Annotated[int, option(MODEL, "Sequences measured at once; the results do not depend on it.")] = 4,
    out: Annotated[Path | None, option(OUTPUT, "Folder for the results (default runs/TIME-evaluate)")] = None,
) -> None:
    """Measure a policy on held-out data, with bootstrap intervals over sequences.

    Cross-entropy and perplexity; the unbiased feature-matching loss under every map of --features and its profile over
    the length of rollouts; whether the policy's entropy drifts away from that on data as it writes; how different
    rollouts are. On data with prompts and answers also whole answers: pass@k and the share of programs that compile
    where there are tests, exact match, BLEU and chrF, in the mean and best of k.

    Writes evaluation.json, evaluation.png, and the values of every sequence and prompt as sequences.csv and
    prompts.csv, from which any two evaluations of the same data can be compared in pairs.
    """
    from transformers.utils import logging

    from ebft.assemble import evaluate_from_options

    logging.disable_progress_bar()
    options, explicit = given_options(context, besides=("out",))
    evaluate_from_options(options, explicit=explicit, out=out, console=Console())
