"""Options of `run` for losses, training and what is left of it; see `declared`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ebft.commands.options import LOSS, OUTPUT, TRAINING, option


def of_training(
    *,
    steps: Annotated[int | None, option(TRAINING, "Batches to train on (default 16)")] = None,
    epochs: Annotated[
        float | None, option(TRAINING, "Passes over the training sequences, instead of --steps (default none)")
    ] = None,
    batch: Annotated[int, option(TRAINING, "B, sequences in a batch.")] = 8,
    micro_batch: Annotated[
        int | None, option(TRAINING, "Sequences scored at once; saves memory, same gradient (default batch)")
    ] = None,
    overlap: Annotated[
        int,
        option(
            TRAINING,
            "Parts of a batch: while one is drawn, a thread embeds the texts of the part before, or verifies them; for"
            " --features sbert and verifiers. Same rollouts",
        ),
    ] = 1,
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
    offload_reference: Annotated[
        bool,
        option(
            TRAINING,
            "Keep the frozen copy of the policy, and a backbone of its own, in CPU memory but for the stages that use"
            " them: less GPU memory, more time.",
            "--offload-reference",
        ),
    ] = False,
    shard: Annotated[
        bool,
        option(
            TRAINING,
            "Of several processes (torchrun) each keeps its share of weights, gradients and optimizer states alone."
            " The whole policy is gathered to sample and to measure, layer by layer to score.",
            "--shard",
        ),
    ] = False,
    seed: Annotated[int, option(TRAINING, "Keys every random number of the run.")] = 0,
    held_out: Annotated[int, option(TRAINING, "Held-out sequences measured before and after.")] = 64,
    eval_every: Annotated[
        int, option(TRAINING, "Steps between further held-out measurements, kept in held_out.csv; 0 for none.")
    ] = 0,
) -> None:
    """Steps, optimiser, measurements."""


def of_loss(
    *,
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
) -> None:
    """Terms of the loss and their weights."""


def of_output(
    *,
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
    """Folders, checkpoints, loggers."""
