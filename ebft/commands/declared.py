"""Options that several commands have, each declared once: functions that say what there is and do nothing.

`options.with_options_of` gives them to a command.
"""

from __future__ import annotations

from typing import Annotated

from ebft.commands.options import DATA, MATCHING, MODEL, SAMPLING, option


def of_model(
    *,
    policy: Annotated[
        str,
        option(
            MODEL,
            "Model to train: smollm2-135m, a folder, a hub id, or the folder of an earlier run (a warm start from what"
            " it trained).",
        ),
    ] = "smollm2-135m",
    lora: Annotated[int, option(MODEL, "Rank of LoRA adapters; 0 trains all weights.")] = 16,
    device: Annotated[str, option(MODEL, "auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        option(
            MODEL,
            "auto (float32 weights, bfloat16 compute where the hardware has it, and for weights that are not trained)"
            " or a torch dtype.",
        ),
    ] = "auto",
    attention: Annotated[
        str | None,
        option(
            MODEL,
            "Kernel of scoring and embedding: dense, chunked, flex, or rows, a plain forward pass per rollout"
            " (default: the fastest known for model and device)",
        ),
    ] = None,
    decode: Annotated[
        str,
        option(
            MODEL,
            "Steps of sampling: eager, without the rollouts that have ended; compile or graph, in static shapes by"
            " torch.compile or as one CUDA graph.",
        ),
    ] = "eager",
    checkpointing: Annotated[
        bool, option(MODEL, "Compute activations again in backward: less memory, more time.", "--checkpointing")
    ] = False,
) -> None:
    """The policy and what computes it."""


def of_text(
    *,
    data: Annotated[
        str,
        option(
            DATA,
            "A data set by name (`ebft data` lists them: stdlib, qa-code, translation, ...), a text file, a folder, a"
            " .jsonl or .tsv file or a hub dataset id.",
        ),
    ] = "stdlib",
    text_field: Annotated[
        str | None, option(DATA, "Field of a JSONL file or dataset that holds the text (default text)")
    ] = None,
    prompt_field: Annotated[
        str | None,
        option(
            DATA,
            "Field of a .jsonl, .tsv or dataset that holds the prompt; with answers, only they are learnt"
            " (default prompt)",
        ),
    ] = None,
    answer_field: Annotated[str | None, option(DATA, "Field that holds the answer (default answer)")] = None,
    tests_field: Annotated[
        str | None, option(DATA, "Field that holds the tests of a program: a string, or a list of them (default tests)")
    ] = None,
    chat: Annotated[
        bool,
        option(
            DATA,
            "Put prompts into the model's chat template, as instruct models expect; a program that is tested is taken"
            " out of the first ``` fence of the answer, where it is in one",
            "--chat",
        ),
    ] = False,
    split: Annotated[
        str | None,
        option(
            DATA,
            "Half of the held-out texts that is measured: validation, to make choices on, or test, to judge them on"
            " (default: both)",
        ),
    ] = None,
    train_half: Annotated[
        str | None,
        option(
            DATA,
            "Half of the training texts that is trained on: first, or second, as what goes on with a run of the first"
            " one may want (default: both)",
        ),
    ] = None,
    length: Annotated[int, option(DATA, "T, tokens of a sequence: documents are packed into rows of it.")] = 128,
) -> None:
    """The data."""


def of_sampling(
    *,
    sampler: Annotated[
        str | None, option(SAMPLING, "Where rollouts start and how they are drawn (default strided)")
    ] = None,
    stride: Annotated[int | None, option(SAMPLING, "Tokens between neighbouring anchors (default 16)")] = None,
    first: Annotated[int | None, option(SAMPLING, "Context tokens before the first anchor (default 16)")] = None,
    horizon: Annotated[int | None, option(SAMPLING, "G, tokens of a rollout and of its target (default 8)")] = None,
    max_new_tokens: Annotated[
        int | None, option(SAMPLING, "rlvr, mixed: tokens of a whole answer at most (default 128)")
    ] = None,
    stop: Annotated[
        list[str] | None,
        option(
            SAMPLING,
            "rlvr, mixed: a whole answer ends where it says this, besides at EOS; again for another one. What follows"
            " is neither rewarded nor learnt (default: EOS alone)",
        ),
    ] = None,
    rollouts: Annotated[
        int | None,
        option(SAMPLING, "N, rollouts from every anchor; the baseline wants 3 or more (default 4; rlvr: 8)"),
    ] = None,
    temperature: Annotated[
        float, option(SAMPLING, "Sampling temperature; the gradient is the tempered policy's.")
    ] = 1.0,
    top_p: Annotated[float, option(SAMPLING, "Nucleus of the sampling distribution, in (0, 1].")] = 1.0,
) -> None:
    """Rollouts."""


def of_features(
    *,
    features: Annotated[
        str | None,
        option(MATCHING, "Feature map whose moments are matched; several: join:hidden+0.5*sbert (default sbert)"),
    ] = None,
    encoder: Annotated[
        str | None, option(MATCHING, "sbert: sentence encoder, a name, folder or hub id (default minilm-l6)")
    ] = None,
    context_tokens: Annotated[
        int | None, option(MATCHING, "sbert: tokens of the prefix embedded with the rollout (default 0)")
    ] = None,
    backbone: Annotated[
        str | None,
        option(
            MATCHING,
            "hidden: the frozen network: start, the policy as it is loaded (of a run that is measured, what it was"
            " trained from); random (weights); or a name or folder, as of the base model; with another tokenizer"
            " the text is re-tokenised (default start)",
        ),
    ] = None,
    unit_norm: Annotated[
        str | None, option(MATCHING, "hidden: layer (the paper), joint (its code) or none (default layer)")
    ] = None,
    layers: Annotated[
        str | None, option(MATCHING, "hidden: depth fractions, indices, last or mean (default 0.25,0.5,0.75)")
    ] = None,
    pooling: Annotated[
        str | None,
        option(
            MATCHING,
            "hidden: last, mean (of the rollout), mean_with_context, concat_quantiles, concat_all; match: sum; either:"
            " none, for --credit (default last, sum)",
        ),
    ] = None,
    match: Annotated[
        str | None, option(MATCHING, "match: prefix (common beginning) or position (equal tokens) (default prefix)")
    ] = None,
    ngram: Annotated[int | None, option(MATCHING, "ngram: tokens of the n-grams that are counted (default 2)")] = None,
    dimension: Annotated[int | None, option(MATCHING, "ngram, match: buckets of the hash (default 2048)")] = None,
) -> None:
    """Feature maps and the options of each, as `ebft.components.features` has them."""
