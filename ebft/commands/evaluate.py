"""`evaluate`: measure a policy on held-out data."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ebft.commands import evaluation as o
from ebft.commands.options import MODEL, given_options, option


def evaluate(
    context: typer.Context,
    policy: Annotated[
        str, option(MODEL, "What to measure: smollm2-135m, a folder, a hub id, or the folder of a run.")
    ] = "smollm2-135m",
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
    """Measure a policy on held-out data, with bootstrap intervals over sequences.

    Cross-entropy and perplexity; the unbiased feature-matching loss under every map of --features and its profile over
    the length of rollouts; whether the policy's entropy drifts away from that on data as it writes; how different
    rollouts are. On data with prompts and answers also whole answers: pass@k and the share of programs that compile
    where there are tests, exact match, BLEU and chrF, in the mean and best of k.

    Writes evaluation.json, evaluation.png, and the values of every sequence and prompt as sequences.csv and
    prompts.csv, from which any two evaluations of the same data can be compared in pairs.

    Example: `evaluate --policy runs/mine --features hidden,sbert,ngram --quick`
    """
    from transformers.utils import logging

    from ebft.assemble import evaluate_from_options

    logging.disable_progress_bar()
    options, explicit = given_options(context, besides=o.NOT_OPTIONS)
    evaluate_from_options(options, explicit=explicit, out=out, console=Console())
