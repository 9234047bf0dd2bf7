"""What is compared: a row of the paper's Table 1 each (arXiv 2603.12248)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        title: its name in tables.
        method: of `run`; None trains nothing.
        half: of the training texts that it sees, as `run --train-half`; None: all. An arm `after` another one sees the
            other half, and the two together as many examples as any arm. Of whole passes over the data (`--epochs`)
            each makes half of them over all of it, as in the paper.
        after: the arm that it starts from, of the same seed.
        rate_of: the arm whose learning rate it takes instead of one of its own.
        own: metric of its run, on the validation half, that it is trained for, and whether it should be `lower` or
            `higher`.
        verified: whether it wants a verifier; its runs then answer prompts and measure no feature matching.
    """

    title: str
    method: str | None
    half: str | None = None
    after: str | None = None
    rate_of: str | None = None
    own: tuple[str, str] = ("cross_entropy", "lower")
    verified: bool = False

    @property
    def share(self) -> float:
        """Of the examples that it sees itself."""
        return 1.0 if self.half is None else 0.5


BASE, WARM = "base", "warm"
_MATCHING = ("feature_matching_loss", "lower")
_REWARD = ("reward", "higher")

# In the order in which they are trained and shown: an arm comes after those that it needs.
ARMS = {
    BASE: Arm("Base", None),
    "sft": Arm("SFT", "sft"),
    WARM: Arm("Warm start", "sft", half="first", rate_of="sft"),
    "ebft": Arm("EBFT", "ebft", own=_MATCHING),
    "ebft-ws": Arm("EBFT (ws)", "ebft", half="second", after=WARM, own=_MATCHING),
    "rlvr": Arm("RLVR", "rlvr", own=_REWARD, verified=True),
    "rlvr-ws": Arm("RLVR (ws)", "rlvr", half="second", after=WARM, own=_REWARD, verified=True),
}


def needed(name: str) -> list[str]:
    """The arms without which `name` cannot be."""
    arm = ARMS[name]
    direct = [other for other in (arm.after, arm.rate_of) if other is not None]
    return [*(further for other in direct for further in needed(other)), *direct]
