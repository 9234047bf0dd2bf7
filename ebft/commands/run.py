"""`run`: train a policy and measure what that did."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.options import (
    DATA,
    LOSS,
    MATCHING,
    METHOD,
    MODEL,
    OUTPUT,
    SAMPLING,
    TRAINING,
    from_config,
    from_preset,
    given_options,
    option,
)
from ebft.distributed import is_first, joined

EXAMPLES = (
    "run --features sbert --sampler strided --steps 100",
    "run --method sft --data qa-code --steps 200 --out runs/sft",
    "run --method ebft --policy runs/sft --data qa-code --features hidden",
    "run --method rlvr --data qa-code --verifier unit_tests --stop $'\\ndef '",
    "run --method mixed --data translation --verifier chrf --answer-weight 0.5",
    "run --preset paper-small --steps 50",
    "run --resume --out runs/sft",
)


def run(
    context: typer.Context,
    config: Annotated[
        Path | None,
        option(
            METHOD,
            "File of options, YAML or the config.json of an earlier run, as `lr: 0.001`; flags go before it.",
            is_eager=True,
            callback=from_config,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        option(
            METHOD,
            "Options of the paper: paper-qa-code, paper-code, paper-translation, or paper, its recipe at a CPU's size;"
            " --config and flags go before it.",
            is_eager=True,
            callback=from_preset,
        ),
    ] = None,
    method: Annotated[
        str,
        option(METHOD, "ebft, sft, rlvr or mixed; `components` says what each is and lists the options it takes."),
    ] = "ebft",
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
        str, option(MODEL, "auto (float32 weights, bfloat16 compute where the hardware has it) or a torch dtype.")
    ] = "auto",
    attention: Annotated[
        str | None,
        option(
            MODEL,
            "Kernel of scoring and embedding: dense, chunked, flex, or rows, a plain forward pass per rollout"
            " (default: the fastest known for model and device)",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, option(MODEL, "Compute activations again in backward: less memory, more time.", "--checkpointing")
    ] = False,
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
        str | None, option(DATA, "Field that holds the tests of a program, a string or a list (default tests)")
    ] = None,
    chat: Annotated[
        bool, option(DATA, "Put prompts into the model's chat template, as instruct models expect.", "--chat")
    ] = False,
    split: Annotated[
        str | None,
        option(
            DATA,
            "Half of the held-out texts that is measured: validation, to make choices on, or test, to judge them on"
            " (default: both)",
        ),
    ] = None,
    length: Annotated[int, option(DATA, "T, tokens of a sequence: documents are packed into rows of it.")] = 128,
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
            "hidden: the frozen network: start, the policy as it is loaded (after a warm start, that); random"
            " (weights); or a name or folder, as of the base model; with another tokenizer the text is re-tokenised"
            " (default start)",
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
    whitening: Annotated[str | None, option(MATCHING, "Of features, before they are compared (default none)")] = None,
    calibration: Annotated[
        int | None, option(MATCHING, "population: batches that its moment is taken from (default 2)")
    ] = None,
    decay: Annotated[
        float | None,
        option(MATCHING, "population: keep it running, with this weight for the past (default: fixed)"),
    ] = None,
    shrinkage: Annotated[float | None, option(MATCHING, "population: share of the identity (default 0.1)")] = None,
    centred: Annotated[bool | None, option(MATCHING, "population: subtract the mean", "--centred")] = None,
    rank: Annotated[int | None, option(MATCHING, "population: directions kept (default all)")] = None,
    objective: Annotated[
        str | None,
        option(
            MATCHING,
            "Reward of a rollout; several: combine:feature_matching+0.1*verifier (default feature_matching)",
        ),
    ] = None,
    alignment: Annotated[
        str | None,
        option(
            MATCHING,
            "feature_matching, with the target: dot, cosine (the paper's (9)) or unit_target (its (52)) (default dot)",
        ),
    ] = None,
    kernel: Annotated[str | None, option(MATCHING, "kernel_score: which kernel (default energy)")] = None,
    bandwidth: Annotated[
        float | None, option(MATCHING, "kernel_score rbf, laplace: scale of distances (default their median)")
    ] = None,
    power: Annotated[float | None, option(MATCHING, "kernel_score energy: of the distance, in (0, 2)")] = None,
    degree: Annotated[int | None, option(MATCHING, "kernel_score polynomial: its degree")] = None,
    offset: Annotated[float | None, option(MATCHING, "kernel_score polynomial: added to the product")] = None,
    verifier: Annotated[
        str | None,
        option(
            MATCHING,
            "verifier: exact_match, bleu, chrf, unit_tests, or FILE.py:FUNCTION, a function of your own of texts and"
            " references (answers, or the text that follows) (default chrf)",
        ),
    ] = None,
    group_aware: Annotated[
        bool | None,
        option(MATCHING, "verifier: call FILE.py:FUNCTION with the texts of one anchor at a time", "--group-aware"),
    ] = None,
    word_order: Annotated[
        int | None, option(MATCHING, "verifier chrf: n-grams of words to count too; 2 is chrF++ (default 0)")
    ] = None,
    bleu_tokenizer: Annotated[
        str | None, option(MATCHING, "verifier bleu: 13a, intl, char, zh or none (default 13a)")
    ] = None,
    lowercase: Annotated[
        bool | None, option(MATCHING, "verifier chrf, bleu: upper and lower case are the same", "--lowercase")
    ] = None,
    test_credit: Annotated[
        str | None,
        option(MATCHING, "verifier unit_tests: reward all or nothing (all), or the share passed (default all)"),
    ] = None,
    test_timeout: Annotated[
        float | None, option(MATCHING, "verifier unit_tests: seconds of a run in the sandbox (default 5)")
    ] = None,
    test_prompt: Annotated[
        bool | None,
        option(
            MATCHING,
            "verifier unit_tests: programs are prompt and answer together, or the answer alone (default: together where"
            " the prompt and the reference are a program)",
            "--test-prompt/--no-test-prompt",
        ),
    ] = None,
    energy: Annotated[
        str | None, option(MATCHING, "energy: its file, an energy.safetensors as the command tilt writes it")
    ] = None,
    diversity: Annotated[
        float | None, option(MATCHING, "Weight of the diversity term; below 1 seeks modes (default 1)")
    ] = None,
    estimator: Annotated[
        str | None, option(MATCHING, "Baseline of the policy gradient (default rloo_tuned; rlvr: group_norm)")
    ] = None,
    credit: Annotated[
        str | None,
        option(MATCHING, "Reward tokens, from their own features: reward_to_go, total or own (default: rollouts)"),
    ] = None,
    horizons: Annotated[
        str | None,
        option(MATCHING, "--credit: weights of the horizons: uniform, last or geometric:RATIO (default uniform)"),
    ] = None,
    token_baseline: Annotated[
        str | None,
        option(MATCHING, "--credit: baseline of single tokens: none, or ridge, from other sequences (default none)"),
    ] = None,
    trace: Annotated[
        float | None, option(MATCHING, "--credit: λ of generalised advantages, 0 to 1; below 1 biased (default 1)")
    ] = None,
    drop_zero_spread: Annotated[
        bool | None, option(MATCHING, "Leave out anchors whose rollouts all have one reward", "--drop-zero-spread")
    ] = None,
    normalize_advantage: Annotated[
        bool | None, option(MATCHING, "Standardise advantages over the batch", "--normalize-advantage")
    ] = None,
    clip_advantage: Annotated[float | None, option(MATCHING, "Largest advantage by size (default none)")] = None,
    steps: Annotated[int | None, option(TRAINING, "Batches to train on (default 16)")] = None,
    epochs: Annotated[
        float | None, option(TRAINING, "Passes over the training sequences, instead of --steps (default none)")
    ] = None,
    batch: Annotated[int, option(TRAINING, "B, sequences in a batch.")] = 8,
    micro_batch: Annotated[
        int | None, option(TRAINING, "Sequences scored at once; saves memory, same gradient (default batch)")
    ] = None,
    optimizer: Annotated[str, option(TRAINING, "Of torch.optim, in small letters: adamw, sgd, ...")] = "adamw",
    lr: Annotated[float | None, option(TRAINING, "Learning rate, after warm-up (default 0.001; rlvr: 0.0001)")] = None,
    lr_schedule: Annotated[
        str, option(TRAINING, "constant, linear or cosine: what becomes of it after warm-up.")
    ] = "linear",
    warm_up: Annotated[
        float | None, option(TRAINING, "Share of the steps over which it rises to --lr, 0 for none (default 0.1)")
    ] = None,
    lr_end: Annotated[
        float | None, option(TRAINING, "linear, cosine: what is left of it at the last step (default 0.05; cosine 0.1)")
    ] = None,
    betas: Annotated[
        str | None, option(TRAINING, "adam...: decay of the two moments (default 0.9,0.95 of adamw and adam)")
    ] = None,
    momentum: Annotated[float | None, option(TRAINING, "sgd, rmsprop, muon (default torch's)")] = None,
    nesterov: Annotated[bool | None, option(TRAINING, "sgd, muon: momentum that looks ahead", "--nesterov")] = None,
    weight_decay: Annotated[float | None, option(TRAINING, "(default 0 of adamw; of others torch's)")] = None,
    eps: Annotated[float | None, option(TRAINING, "What the optimiser adds to divisors (default torch's)")] = None,
    max_grad_norm: Annotated[float, option(TRAINING, "Clip gradients to this norm; 0 for no clipping.")] = 1.0,
    ema: Annotated[
        float | None,
        option(
            TRAINING,
            "Keep a moving average of the weights with this weight for the past, as 0.99; the measurement after"
            " training and policy/ are then of the average (default none)",
        ),
    ] = None,
    pg: Annotated[str | None, option(LOSS, "Policy gradient (default reinforce; rlvr: clipped)")] = None,
    clip: Annotated[
        str | None,
        option(LOSS, "clipped, sequence_clipped, cispo: bounds of the ratio, 0.2 or 0.2,0.28"),
    ] = None,
    updates: Annotated[
        int | None, option(LOSS, "Passes over each batch of rollouts, each an update of the weights (default 1)")
    ] = None,
    minibatches: Annotated[
        int | None, option(LOSS, "Equal parts of a batch, each an update of its own in every pass (default 1)")
    ] = None,
    truncate_weights: Annotated[
        float | None,
        option(LOSS, "Weigh tokens by p of scoring over p of sampling, at most this (default: no weights)"),
    ] = None,
    score_temperature: Annotated[
        float | None,
        option(
            LOSS,
            "Temperature of the rollouts' log-probs in the loss. Another than --temperature is the mismatch of public"
            " code: no gradient of a loss, and biased (default --temperature)",
        ),
    ] = None,
    normalization: Annotated[
        str | None,
        option(
            LOSS,
            "sequence: sum over a rollout's tokens (the paper); token: mean over tokens (its code) (default sequence;"
            " rlvr: token)",
        ),
    ] = None,
    pg_weight: Annotated[float | None, option(LOSS, "Weight of the policy gradient (default 1)")] = None,
    pg_schedule: Annotated[
        str | None, option(LOSS, "Of that weight: constant, linear_decay[:END] or warm_up[:SHARE] (default constant)")
    ] = None,
    answer_weight: Annotated[
        float | None, option(LOSS, "mixed: weight of the policy gradient of whole answers (default 1)")
    ] = None,
    answer_schedule: Annotated[str | None, option(LOSS, "mixed: schedule of that weight (default constant)")] = None,
    ce: Annotated[
        float | None,
        option(
            LOSS, "Weight of the cross-entropy per token: the paper's γ times the horizon (default 2; sft: 1; rlvr: 0)"
        ),
    ] = None,
    ce_tokens: Annotated[str, option(LOSS, "Tokens under cross-entropy: all, answers, or auto.")] = "auto",
    ce_schedule: Annotated[str | None, option(LOSS, "Schedule of --ce (default constant)")] = None,
    kl: Annotated[
        float | None, option(LOSS, "β, weight of the divergence from the start (default 0; rlvr: 0.04)")
    ] = None,
    kl_mode: Annotated[
        str | None,
        option(
            LOSS,
            "Estimator k1, k2 or k3; exact or exact_forward, KL(policy ‖ start) or KL(start ‖ policy) over the whole"
            " vocabulary at every token, in the loss (default: what descends KL(policy ‖ start): k2, in the"
            " reward k1; rlvr: k3)",
        ),
    ] = None,
    kl_in: Annotated[str | None, option(LOSS, "Divergence in the loss or in the reward (default loss)")] = None,
    kl_scope: Annotated[
        str | None, option(LOSS, "Divergence per token, or of whole rollouts as in the paper's (10) (default token)")
    ] = None,
    kl_schedule: Annotated[str | None, option(LOSS, "Schedule of --kl (default constant)")] = None,
    kl_target: Annotated[
        float | None, option(LOSS, "Let --kl follow this divergence, in nats (default: constant)")
    ] = None,
    kl_stop: Annotated[float | None, option(LOSS, "End training above this divergence, in nats")] = None,
    entropy: Annotated[float | None, option(LOSS, "Weight of a bonus on the policy's entropy (default 0)")] = None,
    seed: Annotated[int, option(TRAINING, "Keys every random number of the run.")] = 0,
    held_out: Annotated[int, option(TRAINING, "Held-out sequences measured before and after.")] = 64,
    eval_every: Annotated[
        int, option(TRAINING, "Steps between further held-out measurements, kept in held_out.csv; 0 for none.")
    ] = 0,
    out: Annotated[Path | None, option(OUTPUT, "Folder of the run (default runs/TIME-METHOD-FEATURES-SAMPLER)")] = None,
    resume: Annotated[bool, option(OUTPUT, "Go on with the run in --out; its options are kept.", "--resume")] = False,
    force: Annotated[
        bool, option(OUTPUT, "With --resume: go on with the options given here, though they differ.", "--force")
    ] = False,
    save_every: Annotated[int, option(OUTPUT, "Steps between checkpoints.")] = 10,
    keep: Annotated[int, option(OUTPUT, "Newest checkpoints that are kept; two survive damage to one.")] = 2,
    logger: Annotated[
        str | None, option(OUTPUT, "Show metrics in tensorboard, wandb, mlflow or csv too (default none)")
    ] = None,
) -> None:
    """Fine-tune a policy and measure what that did to held-out text.

    By default (--method ebft) by feature matching: samples short rollouts from every nested prefix of the text, embeds
    them with a frozen feature map, and follows the policy gradient of the distance between the feature moments of
    rollouts and text, mixed with cross-entropy (--ce) and a divergence from the start (--kl).

    Several GPUs, or machines: torchrun --nproc-per-node 8 cli.py run ... with the same options. The processes share the
    sequences of every batch, and the run is the same as that of one process but for rounding.
    """
    from transformers.utils import logging

    from ebft.assemble import run_from_options

    logging.disable_progress_bar()

    options, explicit = given_options(context, besides=("config", "preset", "out", "resume", "force"))
    console = Console() if is_first() else Console(file=io.StringIO())
    with joined():
        run_from_options(options, explicit=explicit, out=out, resume=resume, force=force, console=console)
