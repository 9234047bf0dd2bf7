"""`compare`: runs and policies side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ebft.commands import evaluation as o
from ebft.commands.options import given_options


def compare(
    context: typer.Context,
    policies: Annotated[
        list[str], typer.Argument(help="Folders of runs, or policies: an embedded name, a folder, a hub id.")
    ],
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Evaluate the policies of runs too, on the same prompts and random numbers."),
    ] = False,
    features: o.Features = "hidden,sbert",
    quick: o.Quick = False,
    data: o.Data = "stdlib",
    text_field: o.TextField = None,
    prompt_field: o.PromptField = None,
    answer_field: o.AnswerField = None,
    chat: o.Chat = False,
    length: o.Length = 128,
    held_out: o.HeldOut = 32,
    sampler: o.Sampler = "strided",
    stride: o.Stride = None,
    first: o.First = None,
    horizons: o.Horizons = None,
    rollouts: o.Rollouts = 4,
    temperature: o.Temperature = 1.0,
    top_p: o.TopP = 1.0,
    seed: o.Seed = 0,
    encoder: o.Encoder = None,
    context_tokens: o.ContextTokens = None,
    backbone: o.Backbone = None,
    unit_norm: o.UnitNorm = None,
    layers: o.Layers = None,
    pooling: o.Pooling = None,
    ngram: o.Ngram = None,
    dimension: o.Dimension = None,
    prompts: o.Prompts = 32,
    answers: o.Answers = 4,
    answer_temperature: o.AnswerTemperature = 0.6,
    max_new_tokens: o.MaxNewTokens = 128,
    k: o.K = None,
    test_prompt: o.TestPrompt = None,
    test_timeout: o.TestTimeout = 5.0,
    bootstrap: o.Bootstrap = 2000,
    level: o.Level = 0.95,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    attention: o.Attention = None,
    batch: o.Batch = 4,
    out: o.Out = None,
) -> None:
    """Put runs or policies into one table with plots.

    Of runs: which options differ, held-out metrics before and after, and curves; this takes no model. Of policies (of
    runs with --evaluate): everything that `evaluate` measures, on the same rows, prompts and random numbers, and the
    paired difference of each from the first.

    Writes compare.md, compare.csv and compare.png.

    Example: `compare runs/a runs/b --evaluate --quick`
    """
    from transformers.utils import logging

    from ebft.assemble import compare_from_options

    logging.disable_progress_bar()
    options, explicit = given_options(context, besides=o.NOT_OPTIONS)
    compare_from_options(policies, options, explicit=explicit, out=out, console=Console())
