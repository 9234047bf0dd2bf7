"""What features cost: hidden states of a comb against full passes, and sentences embedded once against each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import reference_algorithm
from benchmarks.contestants import Choice, Setting, random_tokens
from benchmarks.feature_maps import PAPER, Features
from benchmarks.feature_rollouts import arguments
from benchmarks.measure import peak_increase, seconds
from ebft import schema
from ebft.features.hidden import hidden, layer_numbers
from ebft.features.sbert import SentenceFeatures
from ebft.features.text import continuation_texts, distinct_texts
from ebft.policy import CausalPolicy

SMALLEST_COSINE = 0.98  # between the contestants' features; a wrong mask gives far less, rounding in bfloat16 does not


def comb(policy: CausalPolicy, setting: Setting) -> Callable[[], Features]:
    """The map `hidden` as the paper has it: one pass over `[trunk | teeth]` up to the deepest layer used."""
    inputs, rollouts = setting.inputs(policy), _rollouts(policy, setting)
    place = inputs.anchors[0, :, None] + torch.arange(setting.horizon, device=policy.device)
    target = inputs.tokens[:, place]
    everything, all_of_target = torch.ones_like(rollouts, dtype=torch.bool), torch.ones_like(target, dtype=torch.bool)
    feature_map = hidden(policy)
    return lambda: feature_map(*inputs, rollouts, everything, target, all_of_target)


def full_forwards(policy: CausalPolicy, setting: Setting) -> Callable[[], Features]:
    """N passes of the whole model, each over the sequence with one rollout of every anchor behind it; no head."""
    inputs, rollouts = setting.inputs(policy), _rollouts(policy, setting)
    layers = layer_numbers(PAPER, policy.num_layers)

    def features(states: dict[int, Tensor]) -> Tensor:
        return torch.cat([normalize(states[layer].float(), dim=-1) for layer in layers], -1)

    def run() -> Features:
        found: list[Tensor] = []
        for one in rollouts.split(1, 2):
            with policy.plain() as model:
                states, targets = reference_algorithm.hidden_states(model, inputs.tokens, inputs.anchors, one, layers)
            found.append(features(states))
        return torch.cat(found, 2), features(targets)

    return run


WAYS = {"comb": comb, "full": full_forwards}


def peak(choice: Choice, setting: Setting, name: str) -> int:
    """Bytes that a way needs above the loaded policy; for a fresh process."""
    policy = choice.load()
    WAYS[name](policy, Setting(4 * setting.horizon, setting.horizon, setting.rollouts))()
    return peak_increase(WAYS[name](policy, setting), policy.device)


def compare(choice: Choice, setting: Setting, *, repeats: int) -> dict[str, Any]:
    """Best time of each way, in turns.

    Raises:
        RuntimeError: the two do not give the same features.
    """
    policy = choice.load()
    ways = {name: make(policy, setting) for name, make in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Features] = {}
    for name in ways:  # pays once what libraries take on first use
        WAYS[name](policy, Setting(4 * setting.horizon, setting.horizon, setting.rollouts))()
    for _ in range(repeats):
        for name, way in ways.items():
            taken, found[name] = seconds(way, policy.device)
            times[name].append(taken)
    cosines = [torch.cosine_similarity(a, b, dim=-1).min() for a, b in zip(*found.values(), strict=True)]
    if min(cosines) < SMALLEST_COSINE:
        raise RuntimeError(f"the comb and the full passes give different features: cosine {float(min(cosines)):.3f}")
    row: dict[str, Any] = {"setting": str(setting), "smallest_cosine": float(min(cosines)), "repeats": repeats}
    row |= {f"{name}_s": min(values) for name, values in times.items()}
    return row


def _rollouts(policy: CausalPolicy, setting: Setting) -> Tensor:
    count = setting.inputs(policy).anchors.shape[1]
    return random_tokens(policy, (1, count, setting.rollouts, setting.horizon))


def distinct_strings(
    made: SentenceFeatures, td: Any, *, source: str, rollouts: int, repeats: int, contexts: Sequence[int]
) -> list[dict[str, Any]]:
    """Strings of one batch: how many are there twice, and the time to embed all of them or the distinct ones.

    Args:
        made: holds the encoder and the tokenizer.
        td: rollouts; the first `rollouts` of every anchor are the batch.
    """
    td = td.clone()
    for key in (schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK):
        td[key] = td[key][:, :, :rollouts]
    rows = []
    for context in contexts:
        texts = continuation_texts(made.tokenizer, *arguments(td), context_tokens=context)  # type: ignore[arg-type]
        every = sorted((t for part in texts for row in part for t in row if t is not None), key=len)
        distinct = distinct_texts(every)
        times: dict[str, list[float]] = {"all": [], "distinct": []}
        for turn in range(repeats + 1):
            for name, strings in (("all", every), ("distinct", distinct)):
                taken, _ = seconds(lambda strings=strings: _encode(made, strings), torch.device("cpu"))
                if turn:
                    times[name].append(taken)
        rows.append(
            {
                "source": source,
                "context_tokens": context,
                "strings": len(every),
                "distinct": len(distinct),
                **{f"{name}_s": min(values) for name, values in times.items()},
            }
        )
    return rows


def _encode(made: SentenceFeatures, strings: list[str]) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=made.dtype == torch.bfloat16):
        made.encoder.encode(strings, batch_size=made.batch_size, convert_to_tensor=True, show_progress_bar=False)
