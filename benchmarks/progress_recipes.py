"""The recipes of `progress.py`, and what they are measured on."""

from __future__ import annotations

from collections.abc import Mapping

from ebft.loops.evaluation import quantities
from ebft.loops.evaluation.quantities import Quantity

POLICY = "smollm2-135m"


def parse(text: str) -> dict[str, str]:
    """`a=1 b=2` to options by name."""
    return dict(part.split("=", 1) for part in text.split())


# The policy gradient alone: no cross-entropy, no divergence; in the precision that every machine has. What a recipe
# says itself goes before this.
COMMON = parse(
    "data=stdlib length=128 stride=16 first=16 horizon=8 rollouts=4 batch=8 lora=16 lr=0.001 ce=0 kl=0 dtype=float32"
)  # fmt: skip
_PLAIN = "features=hidden estimator=rloo_tuned"
_MEAN = "features=hidden pooling=mean whitening=group estimator=rloo_tuned"
_REWARD = "features=hidden whitening=group alignment=cosine estimator=rloo"  # (9) and (94) of the paper
# All of Table 2 and the authors' code (see ebft/presets/paper-code.yaml) but the length of a sequence. Parts of 4
# sequences have the same gradient and spare memory.
_PAPER = (
    f"{_REWARD} layers=0.25,0.5,0.75 unit_norm=layer pooling=last objective=feature_matching diversity=1.0"
    " stride=8 first=8 temperature=0.6 pg=reinforce normalization=sequence lora=0 batch=16 micro_batch=4"
    " optimizer=adamw betas=0.9,0.95 weight_decay=0.0 lr=1e-6 lr_schedule=constant warm_up=0.03 max_grad_norm=1.0"
)
RECIPES: dict[str, str] = {
    "paper": _PAPER,
    "paper-mixture": f"{_PAPER} ce=0.8",  # gamma 0.1, the largest of Table 2, times the horizon
    "paper-adapters": _REWARD,
    "defaults": "features=sbert ce=2.0",
    "plain": _PLAIN,
    "mean": _MEAN,
    "all-horizons": "features=hidden pooling=none credit=reward_to_go token_baseline=ridge estimator=rloo",
    # One change of the optimiser at a time
    "averaged": f"{_PLAIN} ema=0.99",
    # Clipped gradients have norm 1, which is 6e-4 in each of the 2.5 million weights that have one at the start; summed
    # with this momentum such steps are as long as those of AdamW at a rate of 0.001
    "momentum": f"{_PLAIN} optimizer=sgd momentum=0.9 lr=0.5",
    # What did best in benchmarks/results/signal.md
    "more-rollouts": f"{_PLAIN} rollouts=8",
    "alignment": f"{_PLAIN} diversity=0",
    "equal-tokens": "features=match match=position diversity=0 estimator=rloo_tuned",
    "large-batch": f"{_PLAIN} batch=16 micro_batch=8",  # its step takes twice as long: half as many fit
    "unclipped": f"{_PLAIN} max_grad_norm=0",
    "clipped-tightly": f"{_PLAIN} max_grad_norm=0.1",
    # EBFT's mixture with cross-entropy: gamma 0.5
    "mixture": f"{_PLAIN} ce=4",
    "mean-mixture": f"{_MEAN} ce=4",
}

MEASURE = parse(
    "data=stdlib length=128 features=hidden held_out=64 horizons=8 stride=16 first=16 rollouts=4 seed=0 dtype=float32"
)  # fmt: skip
METRICS = {
    "feature_matching_loss": Quantity(quantities.MATCHING, "hidden", 8),
    "cross_entropy": Quantity(quantities.CROSS_ENTROPY, quantities.ALL),
}


def options_of(recipe: str) -> dict[str, str]:
    """All options of `run` that a recipe gives, but steps and seed."""
    return {**COMMON, **parse(RECIPES[recipe])}


def flags(options: Mapping[str, str]) -> list[str]:
    """{a_b: 1} to --a-b 1."""
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
