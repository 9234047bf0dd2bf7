"""Where a name becomes a component: the samplers, feature maps, objectives and estimators that the command line offers.

Each entry says in one line what it is and which options it takes with which defaults. `build` refuses an unknown name
(with the nearest known one) and an option that the component does not take.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ebft.errors import UsageError
from ebft.features.contract import FeatureMap
from ebft.features.whitening import PopulationWhitening, whiten
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


def _hidden(
    policy: CausalPolicy, reference: CausalPolicy, *, backbone: str, layers: str, unit_norm: str, pooling: str
) -> FeatureMap:
    from ebft.features.hidden import hidden

    network = frozen_network(policy, reference, backbone)
    return hidden(network, layers=parse_layers(layers), normalization=unit_norm, pooling=pooling)


def frozen_network(policy: CausalPolicy, reference: CausalPolicy, name: str) -> CausalPolicy:
    """The network whose states are features: the policy's `start`, its architecture with `random` weights, or a model.

    Raises:
        UsageError: a model that cannot be loaded, or whose token ids mean something else than the policy's.
    """
    if name == "start":
        return reference
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(copy.deepcopy(policy.causal_lm.config), attn_implementation="sdpa")
        weights = next(policy.causal_lm.parameters())
        model = model.to(weights.device, weights.dtype).eval().requires_grad_(False)
        return CausalPolicy(model, policy.tokenizer, autocast=policy.autocast)
    other = CausalPolicy.from_pretrained(name, device=str(policy.device))
    if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UsageError(
            f"backbone {name!r} has another tokenizer than the policy, so its token ids mean other text: give a"
            " model of the policy's family"
        )
    other.model.requires_grad_(False)
    return other


def _ngram(policy: CausalPolicy, reference: CausalPolicy, *, ngram: int, dimension: int) -> FeatureMap:
    from ebft.features.ngram import ngram as make

    return make(ngram, dimension=dimension)


def _joined(text: str) -> Component:
    """`hidden+0.5*sbert`: the parts, each of unit norm, side by side, with weights."""
    parts: dict[str, float] = {}
    for part in text.split("+"):
        weight, star, name = part.rpartition("*")
        choose("features", name)
        try:
            value = float(weight) if star else 1.0
        except ValueError as error:
            raise UsageError(f"features join:{text}: expected a number before the *, found {weight!r}") from error
        if name in parts:
            raise UsageError(f"features join:{text}: {name} is there twice; give each map once")
        parts[name] = value
    entries = {name: choose("features", name) for name in parts}

    def build(policy: CausalPolicy, reference: CausalPolicy, **options: Any) -> FeatureMap:
        from ebft.features.join import join

        maps = [
            entry.build(policy, reference, **{option: options[option] for option in entry.options})
            for entry in entries.values()
        ]
        return join(maps, list(parts.values()))

    return Component(
        f"{text} side by side", {o: v for entry in entries.values() for o, v in entry.options.items()}, build
    )


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

    values.alignment = alignment  # type: ignore[attr-defined]
    return values


def _kernel_score(*, kernel: str, **options: float | None) -> Values:
    if kernel not in kernels.KERNELS:
        raise UsageError(f"kernel {kernel!r}{nearest(kernel, kernels.KERNELS)}: expected {', '.join(kernels.KERNELS)}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    kernels.check_options(kernel, **given)
    return partial(kernels.kernel_values, kernel=kernel, **given)


# ---- whitenings: (values of a kernel, options) -> values of whitened features


def _group_whitening(values: Values) -> Values:
    def whitened(rollout, target, *, mask):
        return values(*whiten(rollout, target, mode="group"), mask=mask)

    return whitened


def _sample_whitening(values: Values) -> Values:
    if getattr(values, "alignment", None) != "cosine":
        raise UsageError(
            "whitening sample is defined for the cosine with the target only: use --objective feature_matching"
            " --alignment cosine, or --whitening group"
        )

    def whitened(rollout, target, *, mask):
        rollout, targets = whiten(rollout, target, mode="sample")
        return torch.cosine_similarity(rollout, targets, dim=-1), rollout @ rollout.mT

    return whitened


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
        {"backbone": "start", "layers": "0.25,0.5,0.75", "unit_norm": "layer", "pooling": "last"},
        _hidden,
    ),
    "ngram": Component("hashed counts of token n-grams of the rollout", {"ngram": 2, "dimension": 2048}, _ngram),
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
WHITENINGS = {
    "none": Component("features as they are", {}, lambda values: values),
    "group": Component(
        "by the anchor's own rollouts (the paper's (8)): diversity sees duplicates only", {}, _group_whitening
    ),
    "sample": Component("the authors' code: by an N x N matrix; with --alignment cosine only", {}, _sample_whitening),
    "population": Component(
        "by a second moment of other contexts, which keeps similarities",
        {"calibration": 2, "decay": None, "shrinkage": 0.1, "centred": False, "rank": None},
        PopulationWhitening,
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
    "whitening": WHITENINGS,
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
    if group == "features" and name.startswith("join:"):
        return _joined(name.removeprefix("join:"))
    if name not in known:
        more = ", or several of them as join:hidden+0.5*sbert" if group == "features" else ""
        raise UsageError(f"unknown {group} {name!r}{nearest(name, known)}: expected one of {', '.join(known)}{more}")
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
