"""The training loop: sample, embed, reward, score, update. It reads top to bottom and calls nobody back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.data.packing import batches
from ebft.distributed import sum_gradients
from ebft.draw import is_truncated
from ebft.errors import UsageError
from ebft.loops.average import Average
from ebft.loops.clock import Clock
from ebft.loops.numbers import of_update, part_shares, read
from ebft.loops.objective import Objective, called, check_minibatches, minibatch_parts, set_weights, term_names
from ebft.loops.scoring import correct_mismatch, has_rollouts, mismatch, score
from ebft.loops.stages import Stage, at_step
from ebft.loops.summary import measures, squared_norm
from ebft.objectives.kl_controllers import KLController
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.schedules import Schedule
from ebft.policy import CausalPolicy
from ebft.sharding import clip_gradients, whole_head


class NonFiniteLoss(UsageError):
    """A term of the loss is not finite; the weights are those before the update that it would have made."""


def train(
    policy: CausalPolicy,
    pipeline: Mapping[str, Stage],
    loss: EBFTLoss,
    data: TensorDictBase,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int,
    seed: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    start: int = 0,
    micro_batch: int | None = None,
    reference: CausalPolicy | None = None,
    max_grad_norm: float = 1.0,
    scoring: Mapping[str, float] | None = None,
    updates: int = 1,
    minibatches: int = 1,
    average: Average | None = None,
    truncation: float | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    controller: KLController | None = None,
    observers: Sequence[Callable[[TensorDictBase], None]] = (),
    further: Mapping[str, Objective] | None = None,
) -> Iterator[dict[str, float]]:
    """Train for `steps` steps, yielding the metrics of each one after its last update.

    Every random number is keyed by (seed, step), so a run that starts at `start` with restored weights, optimizer and
    controller goes on as if it had never stopped.

    Of several processes (`ebft.distributed`) each scores its own rows of every batch; the gradients are summed, and the
    update and the metrics are those of the whole batch in every process. Of a sharded policy (`ebft.sharding`) each
    process updates its share of the weights; the stages that run the policy are made by `ebft.sharding.run_whole`.

    Args:
        policy: trained in place.
        pipeline: named stages in order, each a module from TensorDict to TensorDict; together they write what the loss
            wants: rollouts, features, reward and advantage (`time_<name>` in the metrics is a stage's time). None at
            all for a loss of cross-entropy alone.
        loss: reads what the stages and the scoring wrote; its `loss_*` entries are summed.
        data: rows of batch size [M], see `ebft.data.packing.pack`.
        micro_batch: sequences that a process scores at once; the gradient is that of the whole batch. None: all.
        reference: frozen start, scored when the loss has a divergence term.
        max_grad_norm: gradients are clipped to this norm, 0 for no clipping.
        scoring: temperature, top_p, ... of the sampler, so that the log-probs are those of what was sampled from.
        updates: passes over one batch of rollouts, each an update of the weights; more than one wants a loss with
            ratios to old log-probs.
        minibatches: equal parts of a batch, each an update of its own in every pass; wants the same.
        average: of the weights, updated after each update of them.
        truncation: cap of `policy_gradient.truncated_weight`, which makes up for a sampler whose log-probs are not
            those of scoring; None leaves the difference to the policy gradient.
        schedules: attribute of the loss (`cross_entropy_coefficient`, ...) -> its value as a function of the step.
        observers: are shown every batch after its rewards were given, as running moments want it.
        controller: sets the weight of the divergence from what was measured, and may end the training.
        further: objectives by name whose losses are added: the update is one of the sum. Each draws batches of its own
            rows, with random numbers of its own; scoring, reference, micro_batch, updates, minibatches and controller
            are shared. Its metrics are `<name>_...` and `loss_<name>_...`.

    Yields:
        step (1-based), loss and its terms (of the first pass over a batch, the mean of its minibatches), reward,
        feature_matching_loss, distinct_rollouts (share), effective_rollouts (of N), with features per token
        feature_matching_loss_1, _2, _4, ... (at these horizons), the metrics of the stages, gradient_signal_to_noise
        (when the batch is scored in parts, by one process or by several, an estimate from this batch alone, see
        `ebft.objectives.signal_to_noise_of_sums`), sampler_mismatch (mean difference in nats between the log-probs of
        sampling and of scoring), gradient_norm, learning_rate, tokens_per_second (rollout and sequence tokens over the
        step's time), time_* in seconds.

    Raises:
        NonFiniteLoss: names the step and the term, before the weights are touched.
        UsageError: a batch that does not split into `minibatches`, or options that do not go together.
    """
    parameters, sharded = list(policy.trainable().values()), policy.sharded is not None
    objectives = {"": Objective(pipeline, loss, data, batch_size, schedules or {}), **(further or {})}
    for objective in objectives.values():
        check_minibatches(objective.batch_size, minibatches, truncation=truncation)
    seeds = {label: hash((seed, place)) if place else seed for place, label in enumerate(objectives)}
    orders = {
        label: batches(each.data, batch_size=each.batch_size, seed=seeds[label], start=start)
        for label, each in objectives.items()
    }
    for step in range(start, steps):
        if controller is not None and controller.stopped:
            return
        clock = Clock()
        drawn: dict[str, TensorDictBase] = {}
        for label, objective in objectives.items():
            td = at_step(next(orders[label]).to(policy.device), seed=seeds[label], step=step)
            for name, stage in objective.pipeline.items():
                with clock(name):
                    td = stage(td)
            drawn[label] = td
            set_weights(objective.loss, step, schedules=objective.schedules, controller=controller)
        for observe in observers:
            observe(drawn[""])

        rate, history = optimizer.param_groups[0]["lr"], list[dict[str, float]]()
        rows = batch_size // minibatches
        shares = [] if further else part_shares(rows, micro_batch or rows, alike=sharded)
        parts = minibatch_parts(objectives, drawn, minibatches, micro_batch, alike=sharded)
        for update, minibatch in ((update, part) for update in range(updates) for part in parts):
            names = term_names(objectives, drawn, mismatches=not history)
            terms: dict[str, Tensor] = {}
            sums: list[Tensor] = []  # squared norms of the gradient, from one part of the batch to the next
            optimizer.zero_grad(set_to_none=True)
            for label, part, counts in minibatch:
                own = objectives[label].loss
                exact = own.divergence  # of the policy as it is now; sampled log-probs of the start stay
                new = reference if own.kl_coefficient and (exact or not update) else None
                with whole_head(new if exact else None):
                    with clock("score"):
                        entropy = bool(own.entropy_coefficient)
                        score(policy, part, reference=new, scoring=scoring, entropy=entropy, divergence=exact)
                        measured = called("sampler_mismatch", label) in names
                        found = {"sampler_mismatch": mismatch(part)} if measured else {}
                        if truncation is not None and not update:
                            correct_mismatch(part, cap=truncation)
                        out = own(part)
                        found |= {name: value.detach() for name, value in out.items()}
                    if counts:
                        _add(terms, {called(name, label): value for name, value in found.items()})
                    with clock("update"):
                        (counts * sum(value for name, value in out.items() if name.startswith("loss_"))).backward()
                        if not history and shares:
                            sums.append(squared_norm(parameters))
            with clock("update"):
                if not sharded:  # then each backward pass has done it
                    sum_gradients(parameters)
                norm = clip_gradients(parameters, max_grad_norm or float("inf"))
                record = of_update(terms, norm, sums, names=names, shares=[] if history else shares, alike=sharded)
                _refuse_non_finite({name: record[name] for name in (*names, "gradient_norm")}, step, scoring or {})
                optimizer.step()
                if average is not None:
                    average.update()
            history.append(record)
        if scheduler is not None:
            scheduler.step()
        first = _means(history[:minibatches])
        if controller is not None:
            controller.update(first["kl"])

        found = {called(name, label): value for label, td in drawn.items() for name, value in measures(td).items()}
        summary = read(found | {"tokens": torch.stack([_tokens(td) for td in drawn.values()]).sum()})
        tokens, times = summary.pop("tokens"), clock.times()
        yield {
            "step": step + 1,
            "loss": sum(value for name, value in first.items() if name.startswith("loss_")),
            **summary,
            **first,
            **({"kl_coefficient": loss.kl_coefficient} if loss.kl_coefficient else {}),
            "learning_rate": rate,
            "tokens_per_second": tokens / times["time_step"],
            **times,
        }


def _tokens(td: TensorDictBase) -> Tensor:
    own = td[schema.MASK].sum()
    return own + td[schema.ROLLOUT_MASK].sum() if has_rollouts(td) else own


def _means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each entry over the records that have it."""
    found = {name: [record[name] for record in records if name in record] for name in records[0]}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _add(terms: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        terms[name] = terms.get(name, 0.0) + value.double()


def _refuse_non_finite(terms: Mapping[str, float], step: int, scoring: Mapping[str, Any]) -> None:
    advice = "Try a smaller --lr, or --dtype float32."
    if is_truncated(scoring):
        advice += (
            " Or --top-p 1, without --top-k and --min-p: a token that was drawn at the edge of what they keep may, by"
            " rounding or by an update, be outside of it when it is scored."
        )
    for name, value in terms.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(f"step {step + 1}: {name} is {value}. {advice}")
