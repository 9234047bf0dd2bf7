"""Where a name becomes a component: the samplers, feature maps, objectives and estimators that the command line offers.

Each entry says in one line what it is and which options it takes with which defaults. `build` refuses an unknown name
(with the nearest known one) and an option that the component does not take.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap
from ebft.objectives import kernels, moments, policy_gradient
from ebft.objectives.component import Values
from ebft.policy import CausalPolicy
from ebft.samplers import anchors, independent, snapshot
from ebft.samplers.component import Engine, Place


@dataclass(frozen=True)
class Component:
    """A named choice: what it is, its options with their defaults, and how to make it."""

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[..., Any] = str  # estimators are chosen by name alone


# ---- samplers: (policy, horizon, options) -> (place, engine)


def _strided(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    policy.require_shared()
    return partial(anchors.strided, stride=stride, first=first, horizon=horizon), policy.sample


def _random(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    policy.require_shared()

    def place(mask, *, seed, sequence_ids, **masks):
        count = max(1, (mask.shape[1] - horizon - first) // stride + 1)  # as many as strided has in a full row
        keys = zip(seed.tolist(), sequence_ids.tolist(), strict=True)
        generators = [torch.Generator().manual_seed(hash(key) & (2**62 - 1)) for key in keys]
        return anchors.random(mask, count=count, first=first, horizon=horizon, generator=generators, **masks)

    return place, policy.sample


def _independent(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    place = partial(anchors.strided, stride=stride, first=first, horizon=horizon)
    return place, partial(independent.sample, policy)


def _snapshot(policy: CausalPolicy, *, horizon: int, stride: int, first: int) -> tuple[Place, Engine]:
    place = partial(anchors.strided, stride=stride, first=first, horizon=horizon)
    return place, partial(snapshot.sample, snapshot.cache_reader(policy))


# ---- feature maps: (policy, reference, options) -> FeatureMap


def _sbert(policy: CausalPolicy, reference: CausalPolicy, *, encoder: str, context_tokens: int) -> FeatureMap:
    from ebft.features.sbert import sbert

    dtype = "bfloat16" if policy.autocast is torch.bfloat16 else "float32"
    return sbert(encoder, policy.tokenizer, context_tokens=context_tokens, device=str(policy.device), dtype=dtype)


def _hidden(policy: CausalPolicy, reference: CausalPolicy, *, layers: str, pooling: str) -> FeatureMap:
    from ebft.features.hidden import hidden

    return hidden(reference, layers=parse_layers(layers), pooling=pooling)


def _ngram(policy: CausalPolicy, reference: CausalPolicy, *, ngram: int) -> FeatureMap:
    from ebft.features.ngram import ngram as make

    return make(ngram, dimension=2048)


def parse_layers(text: str) -> list[int | float] | str:
    """`0.25,0.5,0.75` (depth fractions), `4,8` (indices), `last` or `mean`."""
    if text in ("last", "mean"):
        return text
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"layers {text!r}: expected depth fractions (0.25,0.5,0.75), layer indices (4,8), 'last' or 'mean'"
        ) from error


# ---- objectives: options -> values of a kernel


def _feature_matching(*, alignment: str) -> Values:
    if alignment not in ("dot", "cosine"):
        raise UsageError(f"alignment {alignment!r}: expected 'dot' or 'cosine'")

    def values(rollout, target, *, mask):
        return moments.moment_values(rollout, target, alignment=alignment)

    return values


def _kernel_score(*, kernel: str, **options: float | None) -> Values:
    if kernel not in kernels.KERNELS:
        raise UsageError(f"kernel {kernel!r}{nearest(kernel, kernels.KERNELS)}: expected {', '.join(kernels.KERNELS)}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    kernels.check_options(kernel, **given)
    return partial(kernels.kernel_values, kernel=kernel, **given)


# ---- policy gradients: options -> terms of the loss


def _reinforce() -> Callable[..., torch.Tensor]:
    return policy_gradient.reinforce


def _clipping(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def build(*, clip: str) -> Callable[..., torch.Tensor]:
        return partial(function, clip=parse_clip(clip))

    return build


def parse_clip(text: str) -> policy_gradient.Clip:
    """`0.2` for both sides of the ratio, or `0.2,0.28` (below, above)."""
    try:
        bounds = tuple(map(float, text.split(",")))
    except ValueError:
        bounds = ()
    if len(bounds) not in (1, 2):
        raise UsageError(f"clip {text!r}: expected one number (0.2), or two for below and above (0.2,0.28)")
    clip = bounds[0] if len(bounds) == 1 else (bounds[0], bounds[1])
    policy_gradient.check_clip(clip)
    return clip


_ANCHORS = {"stride": 16, "first": 16}
SAMPLERS = {
    "strided": Component("rollouts from every STRIDE-th prefix; each prefix is computed once", _ANCHORS, _strided),
    "random": Component("as many anchors as strided, drawn without replacement: an ablation", _ANCHORS, _random),
    "snapshot": Component("strided anchors, by copies of the model's own cache: recurrent layers", _ANCHORS, _snapshot),
    "independent": Component("strided anchors, one full forward per rollout and token: slow", _ANCHORS, _independent),
}
FEATURES = {
    "sbert": Component(
        "sentence embedding of the rollout's text", {"encoder": "minilm-l6", "context_tokens": 0}, _sbert
    ),
    "hidden": Component(
        "hidden states of the frozen start of the policy (the paper's)",
        {"layers": "0.25,0.5,0.75", "pooling": "last"},
        _hidden,
    ),
    "ngram": Component("hashed counts of token n-grams of the rollout", {"ngram": 2}, _ngram),
}
OBJECTIVES = {
    "feature_matching": Component(
        "distance of feature moments (the paper's (7)); alignment dot or cosine",
        {"alignment": "dot"},
        _feature_matching,
    ),
    "kernel_score": Component(
        "the same with a kernel: linear, cosine, polynomial, rbf, laplace or energy",
        {"kernel": "energy", "bandwidth": None, "power": None, "degree": None, "offset": None},
        _kernel_score,
    ),
}
ESTIMATORS = {
    "rloo": Component("leave-one-out baseline (94) of the paper: unbiased; wants 3 rollouts or more"),
    "rloo_tuned": Component("rloo with a coefficient that the other anchors determine: unbiased"),
    "mean": Component("mean reward of the others: diversity part too small by (N-2)/(N-1)"),
    "group_norm": Component("z-score over the rollouts of an anchor: biased"),
    "none": Component("no baseline: unbiased, more variance"),
}
POLICY_GRADIENTS = {
    "reinforce": Component("the paper's (91): on-policy, one update per batch of rollouts", {}, _reinforce),
    "clipped": Component(
        "PPO and GRPO: token ratios within 1 ± CLIP", {"clip": "0.2"}, _clipping(policy_gradient.clipped)
    ),
    "sequence_clipped": Component(
        "GSPO: one ratio per rollout within 1 ± CLIP", {"clip": "0.01"}, _clipping(policy_gradient.sequence_clipped)
    ),
    "cispo": Component(
        "CISPO: clipped ratios as weights, which stop no token", {"clip": "1,0.28"}, _clipping(policy_gradient.cispo)
    ),
}
GROUPS = {
    "sampler": SAMPLERS,
    "features": FEATURES,
    "objective": OBJECTIVES,
    "estimator": ESTIMATORS,
    "pg": POLICY_GRADIENTS,
}
OPTION_NAMES = tuple(
    dict.fromkeys(option for group in GROUPS.values() for entry in group.values() for option in entry.options)
)


def nearest(name: str, known) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choose(group: str, name: str) -> Component:
    """The entry `name` of a group.

    Raises:
        UsageError: unknown name; says the nearest and all known ones.
    """
    known = GROUPS[group]
    if name not in known:
        raise UsageError(f"unknown {group} {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    return known[name]


def resolve_options(chosen: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each chosen component, defaults filled in.

    Args:
        chosen: group -> name.
        given: option -> value, None where the user gave none.

    Raises:
        UsageError: unknown component, or an option that none of the chosen components takes.
    """
    entries = {group: choose(group, name) for group, name in chosen.items()}
    taken = {option for entry in entries.values() for option in entry.options}
    for option, value in given.items():
        if value is not None and option not in taken:
            takers = [f"{g} {n}" for g, known in GROUPS.items() for n, e in known.items() if option in e.options]
            selection = ", ".join(f"{group} {name}" for group, name in chosen.items())
            raise UsageError(
                f"--{option.replace('_', '-')} {value} does not apply to {selection}; it belongs to {', '.join(takers)}"
            )
    return {
        group: {
            option: default if given.get(option) is None else given[option] for option, default in entry.options.items()
        }
        for group, entry in entries.items()
    }
