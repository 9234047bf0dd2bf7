"""What `progress.py` compares: recipes, and what they are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ebft.errors import flag
from ebft.loops.evaluation import quantities
from ebft.loops.evaluation.quantities import Quantity

POLICY = "smollm2-135m"


def parse(text: str) -> dict[str, str]:
    """`a=1 b=2` to options by name."""
    return dict(part.split("=", 1) for part in text.split())


@dataclass(frozen=True)
class Plan:
    """One comparison.

    Attributes:
        common: options of `run` that every recipe has; what a recipe says itself goes before them.
        recipes: name -> its options, `a=1 b=2`. One that gives `steps` has those, any other as many as fit into the
            time of a cell.
        against: the recipe that others are compared with.
        measure: options of `evaluate`.
        metrics: name -> what is read of the evaluation; the first is shown seed by seed.
    """

    common: Mapping[str, str]
    recipes: Mapping[str, str]
    against: str
    measure: Mapping[str, str]
    metrics: Mapping[str, Quantity]

    def options_of(self, recipe: str) -> dict[str, str]:
        """All options of `run` that a recipe gives, but the seed."""
        return {**self.common, **parse(self.recipes[recipe])}


_SHAPE = "data=stdlib length=128 stride=16 first=16 horizon=8 rollouts=4"
_REWARD = "features=hidden whitening=group alignment=cosine estimator=rloo"  # (9) and (94) of the paper
# All of Table 2 and the authors' code (see ebft/presets/paper-code.yaml) but the length of a sequence. Parts of 4
# sequences have the same gradient and spare memory.
_PAPER = (
    f"{_REWARD} layers=0.25,0.5,0.75 unit_norm=layer pooling=last objective=feature_matching diversity=1.0"
    " stride=8 first=8 temperature=0.6 pg=reinforce normalization=sequence lora=0 batch=16 micro_batch=4"
    " optimizer=adamw betas=0.9,0.95 weight_decay=0.0 lr=1e-6 lr_schedule=constant warm_up=0.03 max_grad_norm=1.0"
)
_MEAN = "features=hidden pooling=mean whitening=group alignment=cosine"
_LEXICAL = "features=ngram ngram=4 whitening=sample alignment=cosine"
_PREFIX = "features=match pooling=none credit=reward_to_go"
_MEASURE = "data=stdlib length=128 horizons=8 stride=16 first=16 rollouts=4 seed=0"
_CROSS_ENTROPY = Quantity(quantities.CROSS_ENTROPY, quantities.ALL)
# In the precision that every machine has
HALF_HOUR = Plan(
    common=parse(f"{_SHAPE} batch=8 lora=16 lr=0.001 ce=0 dtype=float32"),
    recipes={
        "paper": f"{_PAPER} kl=0",
        "defaults": "features=sbert ce=2.0 kl=0",
        "cross-entropy": "method=sft ce=2.0",
        "prefix-alone-16": f"{_PREFIX} rollouts=16 kl=0",
    },
    against="paper",
    measure=parse(f"{_MEASURE} features=hidden held_out=64 dtype=float32"),
    metrics={
        "feature_matching_loss": Quantity(quantities.MATCHING, "hidden", 8),
        "cross_entropy": _CROSS_ENTROPY,
    },
)

# The first run that a user makes, in the precision that `run` chooses, and one change of it at a time: 128 sequences
# for each.
LEVERS = Plan(
    common=parse(f"{_SHAPE} batch=8 lora=16 lr=0.001 features=sbert ce=2.0 steps=16 dtype=auto"),
    recipes={
        "defaults": "",
        # The optimiser
        "averaged": "ema=0.9",
        # The gradient's norm is about 1, which is 6e-4 in each of the 2.5 million weights that have one at the start;
        # summed with this momentum such steps are about as long as those of AdamW at a rate of 0.001
        "momentum": "optimizer=sgd momentum=0.9 lr=0.5",
        "clipped": "max_grad_norm=0.1",
        "all-weights": "lora=0 lr=1e-5",
        "large-batch": "batch=16 micro_batch=8 steps=8",
        "small-batch": "batch=4 steps=32",
        "faster": "lr=0.003",
        # The objective
        "cross-entropy": "method=sft",
        "policy-gradient": "ce=0",
        "policy-gradient-16": "ce=0 rollouts=16",
        "more-rollouts": "rollouts=8",
        "denser": "stride=8 first=8",
        "cooler": "temperature=0.6",
        "mean": _MEAN,
        "paper-reward": _REWARD,
        # Rewards with more signal within sequences than that of sbert, with cross-entropy and alone
        "lexical": _LEXICAL,
        "lexical-alone": f"{_LEXICAL} ce=0",
        "prefix": _PREFIX,
        "prefix-alone": f"{_PREFIX} ce=0",
        "prefix-alone-16": f"{_PREFIX} ce=0 rollouts=16",
        "mean-alone": f"{_MEAN} ce=0",
        # Whitening as the one difference from policy-gradient
        "whitened-alone": "whitening=group alignment=cosine ce=0",
    },
    against="defaults",
    measure=parse(f"{_MEASURE} features=sbert,hidden held_out=128 dtype=auto"),
    metrics={
        "feature_matching_loss_sbert": Quantity(quantities.MATCHING, "sbert", 8),
        "feature_matching_loss_hidden": Quantity(quantities.MATCHING, "hidden", 8),
        "cross_entropy": _CROSS_ENTROPY,
    },
)

PLANS = {"half-hour": HALF_HOUR, "levers": LEVERS}


def flags(options: Mapping[str, str]) -> list[str]:
    """{a_b: 1} to --a-b 1."""
    return [word for name, value in options.items() for word in (flag(name), value)]
