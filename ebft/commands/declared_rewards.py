"""Options of `run` for what becomes of features and texts: rewards and advantages; see `declared`."""

from __future__ import annotations

from typing import Annotated

from ebft.commands.options import MATCHING, option


def of_rewards(
    *,
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
) -> None:
    """Whitening, objectives, baselines, credit, shaping."""
