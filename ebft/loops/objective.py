"""What a step of training descends: objectives with rows of their own, in parts that are scored at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tensordict import TensorDictBase

from ebft.errors import UsageError
from ebft.loops.numbers import own_parts
from ebft.loops.scoring import has_rollouts
from ebft.loops.stages import Stage
from ebft.objectives.counts import totals
from ebft.objectives.kl_controllers import KLController
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.schedules import Schedule


@dataclass(frozen=True)
class Objective:
    """What a step descends besides: rows of its own, the stages they go through, and a loss with its schedules.

    Rows that are held out go through the stages `measuring`, where those are others.
    """

    pipeline: Mapping[str, Stage]
    loss: EBFTLoss
    data: TensorDictBase
    batch_size: int
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    held_out: TensorDictBase | None = None
    measuring: Mapping[str, Stage] | None = None


def called(name: str, label: str) -> str:
    """The name of a metric of the objective `label`: `loss_kl` is `loss_answers_kl`, `reward` is `answers_reward`."""
    if not label:
        return name
    start, rest = ("loss_", name.removeprefix("loss_")) if name.startswith("loss_") else ("", name)
    return f"{start}{label}_{rest.removeprefix('answer_').removeprefix('answers_')}"


def term_names(
    objectives: Mapping[str, Objective], drawn: Mapping[str, TensorDictBase], *, mismatches: bool
) -> list[str]:
    """What is added up over the parts of a batch: the losses' own values, and with `mismatches` that of the sampler."""
    return [
        called(name, label)
        for label, objective in objectives.items()
        for name in ["sampler_mismatch"] * (mismatches and has_rollouts(drawn[label])) + objective.loss.out_keys
    ]


def minibatch_parts(
    objectives: Mapping[str, Objective],
    drawn: Mapping[str, TensorDictBase],
    count: int,
    micro_batch: int | None,
    *,
    alike: bool = False,
) -> list[list[tuple[str, TensorDictBase, bool]]]:
    """The parts that are scored at once, minibatch by minibatch, each with the name of its objective.

    The last of each says whether the part counts, see `own_parts`, which `alike` is of.
    """
    found: list[list[tuple[str, TensorDictBase, bool]]] = [[] for _ in range(count)]
    for label, objective in objectives.items():
        rows = objective.batch_size // count
        for place, part in enumerate(drawn[label].split(rows)):
            own = own_parts(counted(part, objective.loss), micro_batch or rows, alike=alike)
            found[place] += [(label, micro, counts) for micro, counts in own]
    return found


def check_minibatches(batch_size: int, minibatches: int, *, truncation: float | None = None) -> None:
    """Check that a batch splits into `minibatches`, and that no weight is wanted that the first of them would spoil."""
    if batch_size % minibatches:
        raise UsageError(f"minibatches {minibatches}: a batch of {batch_size} does not split into so many equal parts")
    if minibatches > 1 and truncation is not None:
        raise UsageError(f"truncation {truncation} wants log-probs from before the first update: use 1 minibatch")


def counted(td: TensorDictBase, loss: EBFTLoss) -> TensorDictBase:
    """With the counts that the loss of its parts is divided by."""
    return td.update(totals(td, cross_entropy_tokens=loss.cross_entropy_tokens))


def set_weights(
    loss: EBFTLoss, step: int, *, schedules: Mapping[str, Schedule], controller: KLController | None
) -> None:
    """Give the loss the weights of this step."""
    for name, value in schedules.items():
        setattr(loss, name, value(step))
    if controller is not None:
        loss.kl_coefficient = controller.coefficient
