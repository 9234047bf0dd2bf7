"""Rollouts at their anchors, for a person to look at: each token coloured by its log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from rich.text import Text

# Probability down to which a token has the colour, likeliest first.
SCALE = ((0.5, "green"), (0.1, "yellow"), (0.01, "dark_orange"), (0.0, "red"))


def coloured(tokenizer, tokens: torch.Tensor, log_prob: torch.Tensor) -> Text:
    """Tokens [G] as text on one line, coloured by their log-probs [G] along `SCALE`; line breaks and tabs are shown."""
    text = Text()
    for token, value in zip(tokens.tolist(), log_prob.tolist(), strict=True):
        style = next(style for bound, style in SCALE if math.exp(value) >= bound)
        text.append(visible(tokenizer.decode([token])), style=style)
    return text


def visible(text: str) -> str:
    """One line: control characters that would break it become symbols."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def rollout_lines(
    tokenizer,
    engine: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    anchor_mask: torch.Tensor,
    *,
    horizon: int,
    context: int = 12,
    **sampling,
) -> Iterator[Text]:
    """For each anchor of one sequence: the end of its prefix, the true continuation if there is one, and its rollouts.

    Args:
        tokenizer: decodes tokens.
        engine: draws rollouts, with the arguments and results of `CausalPolicy.sample`.
        tokens: [T]; anchors, anchor_mask: [1,K].
        context: tokens of the prefix to show.
        sampling: of the engine (rollouts, seed, temperature, ...).
    """
    mask = torch.ones_like(tokens, dtype=torch.bool)[None]
    drawn, log_prob, alive = engine(tokens[None], mask, anchors, anchor_mask, horizon=horizon, **sampling)
    decode = tokenizer.decode
    for k in anchor_mask[0].nonzero()[:, 0].tolist():
        a = int(anchors[0, k])
        yield Text(f"{a:>5} ", style="bold") + Text(visible(decode(tokens[max(0, a - context) : a].tolist())), "dim")
        if a < len(tokens):
            yield Text("    = ") + Text(visible(decode(tokens[a : a + horizon].tolist())), style="bold")
        for n in range(drawn.shape[2]):
            kept = alive[0, k, n]
            total = float(log_prob[0, k, n][kept].sum())
            yield Text(f"{total:>8.2f}  ") + coloured(tokenizer, drawn[0, k, n][kept], log_prob[0, k, n][kept])
