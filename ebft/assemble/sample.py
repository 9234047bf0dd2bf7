"""From options to rollouts on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console

from ebft import schema
from ebft.assemble.checks import check_ranges
from ebft.assemble.policy import policy_folder
from ebft.components import choose, resolve_options
from ebft.data.documents import load_documents
from ebft.data.packing import pack
from ebft.draw import check_sampling
from ebft.errors import UsageError
from ebft.loops.show import SCALE, rollout_lines
from ebft.policy import CausalPolicy
from ebft.samplers import full


def sample_from_options(options: Mapping[str, Any], *, console: Console) -> None:
    """Draw rollouts from the prefixes of one text and print them.

    Args:
        options: those of the command `sample`, by parameter name.

    Raises:
        UsageError: any bad input.
    """
    check_ranges(options)
    settings = {name: options[name] for name in ("temperature", "top_p", "top_k", "min_p")}
    check_sampling(**settings)
    if options["sampler"] == "full":
        placement = {}
        for name in ("stride", "first"):
            if options[name] is not None:
                raise UsageError(f"--{name} {options[name]} does not apply to sampler full: it starts after the text")
    else:
        given = {name: options[name] for name in ("stride", "first")}
        placement = resolve_options({"sampler": options["sampler"]}, given)["sampler"]
    if not options["text"].is_file():
        raise UsageError(f"--text {options['text']}: no such file")
    document = load_documents(str(options["text"]))[0]
    name = policy_folder(options["policy"])
    policy = CausalPolicy.from_pretrained(name, device=options["device"], dtype=options["dtype"], frozen=True)
    tokens = pack([document], policy.tokenizer, length=options["length"], eos=False)[0].to(policy.device)
    tokens = tokens[schema.TOKENS][tokens[schema.MASK]]
    place, engine = _place_and_engine(
        policy, options["sampler"], placement, horizon=options["horizon"], seed=options["seed"]
    )
    anchors, anchor_mask = place(torch.ones_like(tokens, dtype=torch.bool)[None])
    legend = ", ".join(f"[{style}]{bound:g} and more[/{style}]" for bound, style in SCALE)
    console.print(f"probability of a token: {legend}", highlight=False)
    draw = {"rollouts": options["rollouts"], "seed": options["seed"], "eos": policy.tokenizer.eos_token_id, **settings}
    whole = options["sampler"] == "full"  # one prompt, its answers in full; else a line for each rollout
    for line in rollout_lines(
        policy.tokenizer, engine, tokens, anchors, anchor_mask, horizon=options["horizon"], **draw
    ):
        console.print(line, overflow="fold" if whole else "ellipsis", no_wrap=not whole)


def _place_and_engine(policy: CausalPolicy, name: str, placement: Mapping[str, int], *, horizon: int, seed: int):
    """Where the rollouts of one text start and how they are drawn; `full` goes on after the text's end."""
    if name == "full":
        return full.place, full.full_engine(policy)
    place, engine = choose("sampler", name).build(policy, horizon=horizon, **placement)
    if name == "random":
        place = partial(place, seed=torch.tensor([seed & (2**63 - 1)]), sequence_ids=torch.zeros(1, dtype=torch.int64))
    return place, engine
