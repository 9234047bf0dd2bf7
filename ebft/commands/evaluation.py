"""The options that `evaluate` and `compare` share: type and help of each; the defaults stand in the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ebft.commands.options import DATA, MODEL, OUTPUT, SAMPLING, option

FEATURES, ANSWERS, STATISTICS = "Features", "Whole answers (data with prompts and answers)", "Statistics"

Device = Annotated[str, option(MODEL, "auto (a GPU when there is one), cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, option(MODEL, "auto (float32 weights, bfloat16 compute where the hardware has it) or a torch dtype.")
]
Attention = Annotated[
    str | None, option(MODEL, "Kernel of scoring and embedding: dense, chunked, flex or rows (default: the fastest)")
]
Batch = Annotated[int, option(MODEL, "Sequences measured at once; the results do not depend on it.")]
Data = Annotated[
    str,
    option(
        DATA,
        "stdlib, a text file, a folder, a .jsonl or .tsv file or a hub dataset id; for a run's policy, by default what"
        " the run was trained on. Its held-out part is measured.",
    ),
]
TextField = Annotated[str | None, option(DATA, "Field of a JSONL file or dataset that holds the text (default text)")]
PromptField = Annotated[str | None, option(DATA, "Field that holds the prompt (default prompt)")]
AnswerField = Annotated[str | None, option(DATA, "Field that holds the answer (default answer)")]
Chat = Annotated[bool, option(DATA, "Put prompts into the model's chat template.", "--chat")]
Length = Annotated[int, option(DATA, "T, tokens of a sequence; for a run's policy, by default the run's.")]
HeldOut = Annotated[int, option(DATA, "Held-out sequences.")]
Quick = Annotated[bool, option(DATA, "A first look: 8 sequences, 8 prompts, rollouts of up to 8 tokens.", "--quick")]
Sampler = Annotated[str, option(SAMPLING, "Where rollouts start and how they are drawn.")]
Stride = Annotated[int | None, option(SAMPLING, "Tokens between neighbouring anchors (default 16)")]
First = Annotated[int | None, option(SAMPLING, "Context tokens before the first anchor (default 16)")]
Horizons = Annotated[
    str | None,
    option(
        SAMPLING,
        "Tokens of a rollout at which features are compared, one sampling for all (default 1,2,4,... up to 64, or to"
        " what half of the sequences have room for)",
    ),
]
Rollouts = Annotated[int, option(SAMPLING, "N, rollouts from every anchor.")]
Temperature = Annotated[float, option(SAMPLING, "Sampling temperature of rollouts.")]
TopP = Annotated[float, option(SAMPLING, "Nucleus of the sampling distribution, in (0, 1].")]
Seed = Annotated[int, option(SAMPLING, "Keys every random number.")]
Features = Annotated[str, option(FEATURES, "Feature maps to compare rollouts and text under, trained on or not.")]
Encoder = Annotated[str | None, option(FEATURES, "sbert: sentence encoder, a name, folder or hub id")]
ContextTokens = Annotated[int | None, option(FEATURES, "sbert: tokens of the prefix embedded with the rollout")]
Backbone = Annotated[
    str | None,
    option(
        FEATURES,
        "hidden: start (of a run, what it was trained from; else the policy itself), random, a name or a folder"
        " (default start)",
    ),
]
UnitNorm = Annotated[str | None, option(FEATURES, "hidden: layer, joint or none (default layer)")]
Layers = Annotated[str | None, option(FEATURES, "hidden: depth fractions, indices, last or mean")]
Pooling = Annotated[str | None, option(FEATURES, "hidden: last, mean, concat_quantiles, ... (default last)")]
Ngram = Annotated[int | None, option(FEATURES, "ngram: tokens of the n-grams that are counted (default 2)")]
Dimension = Annotated[int | None, option(FEATURES, "ngram: buckets of the hash (default 2048)")]
Prompts = Annotated[int, option(ANSWERS, "Held-out prompts.")]
Answers = Annotated[int, option(ANSWERS, "N, answers to each prompt.")]
AnswerTemperature = Annotated[float, option(ANSWERS, "Sampling temperature of answers; 0 is greedy.")]
MaxNewTokens = Annotated[int, option(ANSWERS, "Tokens of an answer at most.")]
K = Annotated[str | None, option(ANSWERS, "k of pass@k and best-of-k, at most N (default those of 1,4,16)")]
TestPrompt = Annotated[
    bool | None,
    option(
        ANSWERS,
        "Programs are prompt and answer together, or the answer alone (default: together where the prompt and the"
        " reference are a program)",
        "--test-prompt/--no-test-prompt",
    ),
]
TestTimeout = Annotated[float, option(ANSWERS, "Seconds for the tests of one program.")]
Bootstrap = Annotated[int, option(STATISTICS, "Resamples of sequences (prompts) behind the intervals.")]
Level = Annotated[float, option(STATISTICS, "Of the bootstrap (BCa) intervals.")]
Out = Annotated[Path | None, option(OUTPUT, "Folder for the results (default runs/<time>-...)")]

# The parameters of a command that are no options of an evaluation.
NOT_OPTIONS = ("out", "policies")
