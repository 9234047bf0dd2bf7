"""`run`: train a policy and measure what that did."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.declared import of_features, of_model, of_sampling, of_text
from ebft.commands.declared_rewards import of_rewards
from ebft.commands.declared_training import of_loss, of_output, of_training
from ebft.commands.options import METHOD, from_config, from_preset, given_options, option, with_options_of
from ebft.distributed import is_first, joined

EXAMPLES = (
    "run --features sbert --sampler strided --steps 100",
    "run --method sft --data qa-code --steps 200 --out runs/sft",
    "run --method ebft --policy runs/sft --data qa-code --features hidden",
    "run --method rlvr --data qa-code --verifier unit_tests --stop $'\\ndef '",
    "run --method mixed --data translation --verifier chrf --answer-weight 0.5",
    "run --preset paper --steps 50",
    "run --resume --out runs/sft",
)


@with_options_of(of_model, of_text, of_sampling, of_features, of_rewards, of_training, of_loss, of_output)
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
) -> None:
    """Fine-tune a policy and measure what that did to held-out text.

    By default (--method ebft) by feature matching: samples short rollouts from every nested prefix of the text, embeds
    them with a frozen feature map, and follows the policy gradient of the distance between the feature moments of
    rollouts and text, mixed with cross-entropy (--ce) and a divergence from the start (--kl).

    Several GPUs, or machines: torchrun --nproc-per-node 8 cli.py run ... with the same options. The processes share the
    sequences of every batch, and the run is the same as that of one process but for rounding. With --shard they share
    the weights, gradients and optimizer states, too.
    """
    from transformers.utils import logging

    from ebft.assemble import run_from_options

    logging.disable_progress_bar()

    where = ("out", "resume", "force")
    options, explicit = given_options(context, besides=("config", "preset", *where))
    console = Console() if is_first() else Console(file=io.StringIO())
    with joined():
        run_from_options(options, explicit=explicit, console=console, **{name: context.params[name] for name in where})
