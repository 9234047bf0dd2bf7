"""What is compared: a row of the paper's Table 1 each (arXiv 2603.12248)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        title: its name in tables.
        method: of `run`; None trains nothing.
        share: of the examples that it sees itself, in (0, 1]. An arm `after` another one starts from what that one
            trained, and the two see all examples together.
        after: the arm that it starts from, of the same seed.
        rate_of: the arm whose learning rate it takes instead of one of its own.
        own: metric of its run, on the validation half, that it is trained for, and whether it should be `lower` or
            `higher`.
        verified: whether it wants a verifier; its runs then answer prompts and measure no feature matching.
    """

    title: str
    method: str | None
    share: float = 1.0
    after: str | None = None
    rate_of: str | None = None
    own: tuple[str, str] = ("cross_entropy", "lower")
    verified: bool = False


BASE, WARM = "base", "warm"
_MATCHING = ("feature_matching_loss", "lower")
_REWARD = ("reward", "higher")

# In the order in which they are trained and shown: an arm comes after those that it needs.
ARMS = {
    BASE: Arm("Base", None),
    "sft": Arm("SFT", "sft"),
    WARM: Arm("Warm start", "sft", share=0.5, rate_of="sft"),
    "ebft": Arm("EBFT", "ebft", own=_MATCHING),
    "ebft-ws": Arm("EBFT (ws)", "ebft", share=0.5, after=WARM, own=_MATCHING),
    "rlvr": Arm("RLVR", "rlvr", own=_REWARD, verified=True),
    "rlvr-ws": Arm("RLVR (ws)", "rlvr", share=0.5, after=WARM, own=_REWARD, verified=True),
}


def needed(name: str) -> list[str]:
    """The arms without which `name` cannot be."""
    arm = ARMS[name]
    direct = [other for other in (arm.after, arm.rate_of) if other is not None]
    return [*(further for other in direct for further in needed(other)), *direct]
