"""Held-out samples for reading: ground truth and rollouts before and after training, as Markdown and as HTML."""

from __future__ import annotations

import math
import re
import unicodedata
from html import escape
from itertools import accumulate
from statistics import fmean
from typing import Any

from ebft.errors import UsageError
from ebft.loops.report_frame import number

LEGEND = (
    "Whitespace is shown: · space (first, last or several in a line), ⇥ tab, ↵ line break,"
    " ⟨U+…⟩ other characters that cannot be seen."
)
COLOURS = (
    'Tokens of rollouts have the colour of their advantage, <span class="above" style="--strength:45%">above</span> or'
    ' <span class="below" style="--strength:45%">below</span> zero, the stronger the larger it is within the sample.'
)
_TAIL_LINES = 10
_TAIL_CHARACTERS = 1500  # text without line breaks must be cut too
_INVISIBLE = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}
_WHEN = ("before", "after")


def visible(text: str) -> str:
    """Make whitespace and control characters visible.

    Of all invisible characters the result has only single spaces inside a line, and the line breaks after each ↵
    except a last one.
    """
    return "".join(visible_pieces([text]))


def visible_pieces(pieces: list[str]) -> list[str]:
    """The pieces of a text as `visible` shows the whole of it."""
    text = "".join(pieces)
    dotted = re.sub(r"(?m)^ +| +$| {2,}", lambda match: "·" * len(match[0]), text)  # of the same length
    ends = list(accumulate(map(len, pieces)))
    shown = [dotted[end - len(piece) : end] for piece, end in zip(pieces, ends, strict=True)]
    shown = ["".join(map(_visible_character, piece)) for piece in shown]
    last = max((i for i, piece in enumerate(shown) if piece), default=None)
    if last is not None:
        shown[last] = shown[last].removesuffix("\n")
    return shown


def _visible_character(c: str) -> str:
    if c == "\n":
        return "↵\n"
    if c == "\t":
        return "⇥"
    return f"⟨U+{ord(c):04X}⟩" if c != " " and unicodedata.category(c) in _INVISIBLE else c


def fence(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}\n"


def prefix_tail(text: str) -> tuple[str, int]:
    """The last lines of a prefix, and how many characters were left out before them."""
    tail = "\n".join(text.split("\n")[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]
    return tail, len(text) - len(tail)


def check_samples(samples: Any) -> list[dict[str, Any]]:
    """Return `samples` if they have the documented form.

    Raises:
        UsageError: names the sample and the entry that is missing or of another kind.
    """
    if not isinstance(samples, list):
        raise UsageError(
            f"samples are a {type(samples).__name__}, expected a list of {{prefix, target, before, after}}"
        )
    for i, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise UsageError(f"sample {i} is a {type(sample).__name__}, expected {{prefix, target, before, after}}")
        for key in ("prefix", "target"):
            if not isinstance(sample.get(key), str):
                raise UsageError(f"sample {i}: {key!r} is {sample.get(key)!r}, expected a text")
        for key in _WHEN:
            rollouts = sample.get(key) or []
            if not isinstance(rollouts, list) or not all(map(_is_rollout, rollouts)):
                wanted = "a list of {'text': a text, 'reward': a number}, with 'tokens' their texts' 'advantage' each"
                raise UsageError(f"sample {i}: {key!r} is {rollouts!r}, expected {wanted}")
    return samples


def _is_rollout(item: Any) -> bool:
    if not (isinstance(item, dict) and isinstance(item.get("text"), str)):
        return False
    tokens, advantage = item.get("tokens", []), item.get("advantage", [])
    if not (isinstance(tokens, list) and isinstance(advantage, list) and len(tokens) == len(advantage)):
        return False
    if not all(isinstance(token, str) for token in tokens) or (tokens and "".join(tokens) != item["text"]):
        return False
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in advantage):
        return False
    return isinstance(item.get("reward"), int | float | None)


def _mean_reward(rollouts: list[dict[str, Any]]) -> float:
    """Mean over the rollouts; NaN where one of them has no reward."""
    return fmean(math.nan if r.get("reward") is None else r["reward"] for r in rollouts)


def _reward(value: float | None) -> str:
    return number(value, 3)


def samples_markdown(samples: list[dict[str, Any]]) -> str:
    """All samples as one Markdown document."""
    parts = ["# Samples\n", LEGEND + "\n"]
    for i, sample in enumerate(check_samples(samples)):
        tail, omitted = prefix_tail(sample["prefix"])
        parts.append(f"## Sample {i + 1}\n")
        parts.append("Prefix" + (f" (after {omitted:,} characters that are left out)" if omitted else "") + ":\n")
        parts.append(fence(visible(tail)))
        parts += ["Ground truth:\n", fence(visible(sample["target"]))]
        for when in _WHEN:
            rollouts = sample.get(when) or []
            if rollouts:
                parts.append(f"### {when.capitalize()} training: mean reward {_reward(_mean_reward(rollouts))}\n")
            for n, rollout in enumerate(rollouts):
                parts.append(f"Rollout {n + 1}, reward {_reward(rollout.get('reward'))}:\n")
                parts.append(fence(visible(rollout["text"])))
    return "\n".join(parts)


def samples_html(samples: list[dict[str, Any]]) -> str:
    """All samples as HTML `details` elements; only the first is open."""
    parts = []
    for i, sample in enumerate(check_samples(samples)):
        tail, omitted = prefix_tail(sample["prefix"])
        teaser = escape(" ".join(visible(tail[-300:]).split())[-60:])
        rewards = " → ".join(_reward(_mean_reward(sample[w])) for w in _WHEN if sample.get(w))
        badge = f'<span class="reward">reward {rewards}</span>' if rewards else ""
        left_out = f"<small>after {omitted:,} characters that are left out</small>" if omitted else ""
        parts.append(
            f"<details{'' if i else ' open'}><summary><span>{i + 1}. <q>…{teaser}</q></span>{badge}</summary>"
            f"<h4>Prefix {left_out}</h4>{_pre(tail)}<h4>Ground truth</h4>{_pre(sample['target'])}"
            f'<div class="pair">{"".join(_rollouts_html(sample, when) for when in _WHEN)}</div></details>'
        )
    return "".join(parts)


def _rollouts_html(sample: dict[str, Any], when: str) -> str:
    rollouts = sample.get(when) or []
    top = max((abs(a) for w in _WHEN for r in sample.get(w) or [] for a in r.get("advantage", ())), default=0.0)
    items = "".join(
        f'<li><span class="reward">{_reward(r.get("reward"))}</span>{_tokens(r, top) if top else _pre(r["text"])}</li>'
        for r in rollouts
    )
    return f'<div><h4>{when.capitalize()} training</h4><ul class="rollouts">{items}</ul></div>' if rollouts else ""


def _tokens(rollout: dict[str, Any], top: float) -> str:
    """The text of a rollout, every token in the colour of its advantage, the strongest at the size `top`."""
    tokens, advantage = rollout.get("tokens"), rollout.get("advantage")
    if not tokens or not advantage:
        return _pre(rollout["text"])
    parts = []
    for text, value in zip(visible_pieces(tokens), advantage, strict=True):
        side, strength = (
            ("above" if value > 0 else "below"),
            min(1.0, abs(value) / top) if math.isfinite(value) else 0.0,
        )
        style = f'class="{side}" style="--strength:{60 * strength:.0f}%" title="advantage {number(value, 3)}"'
        parts.append(f"<span {style}>{_marked(text)}</span>" if text else "")
    return f"<pre>{''.join(parts)}</pre>"


def _pre(text: str) -> str:
    return f"<pre>{_marked(visible(text))}</pre>"


def _marked(shown: str) -> str:
    return re.sub("[·⇥↵]+|⟨U\\+[0-9A-F]+⟩", r'<span class="ws">\g<0></span>', escape(shown))
