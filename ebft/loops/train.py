"""The training loop: sample, embed, reward, score, update. It reads top to bottom and calls nobody back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from tensordict import TensorDictBase

from ebft import schema
from ebft.data.packing import batches
from ebft.errors import UsageError
from ebft.objectives.counts import totals
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.moments import conditional_feature_matching_loss, distinct_rollouts
from ebft.policy import CausalPolicy

Stage = Callable[[TensorDictBase], TensorDictBase]


class NonFiniteLoss(UsageError):
    """A term of the loss is not finite; the weights are those before the step."""


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
) -> Iterator[dict[str, float]]:
    """Train for `steps` steps, yielding the metrics of each one after its update.

    Every random number is keyed by (seed, step), so a run that starts at `start` with restored weights and optimizer
    goes on as if it had never stopped.

    Args:
        policy: trained in place.
        pipeline: named stages in order, each a module from TensorDict to TensorDict; together they write rollouts,
            features, reward and advantage (`time_<name>` in the metrics is a stage's time).
        loss: reads what the stages and the scoring wrote; its `loss_*` entries are summed.
        data: rows of batch size [M], see `ebft.data.packing.pack`.
        micro_batch: sequences scored at once; the gradient is that of the whole batch. None: all.
        reference: frozen start, scored when the loss has a divergence term.
        max_grad_norm: gradients are clipped to this norm, 0 for no clipping.
        scoring: temperature, top_p, ... of the sampler, so that the log-probs are those of what was sampled from.

    Yields:
        step (1-based), loss and its terms, reward, feature_matching_loss, distinct_rollouts (share), gradient_norm,
        learning_rate, tokens_per_second (rollout and sequence tokens over the step's time), time_* in seconds.

    Raises:
        NonFiniteLoss: names the step and the term, before the weights are touched.
    """
    parameters = list(policy.trainable().values())
    order = batches(data, batch_size=batch_size, seed=seed, start=start)
    for step in range(start, steps):
        clock = Clock()
        td = at_step(next(order).to(policy.device), seed=seed, step=step)
        for name, stage in pipeline.items():
            with clock(name):
                td = stage(td)
        td.update(totals(td))

        terms: dict[str, float] = {}
        optimizer.zero_grad(set_to_none=True)
        for part in td.split(micro_batch or batch_size):
            with clock("score"):
                score(policy, part, reference=reference if loss.kl_coefficient else None, scoring=scoring)
                out = loss(part)
            for name, value in out.items():
                terms[name] = terms.get(name, 0.0) + value.item()
            _refuse_non_finite(terms, step)
            with clock("update"):
                sum(value for name, value in out.items() if name.startswith("loss_")).backward()
        with clock("update"):
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
            _refuse_non_finite({"gradient norm": float(norm)}, step)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

        yield {
            "step": step + 1,
            "loss": sum(value for name, value in terms.items() if name.startswith("loss_")),
            **summarise(td),
            **terms,
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "tokens_per_second": _tokens(td) / clock.total(),
            **clock.times(),
        }


def at_step(td: TensorDictBase, *, seed: int, step: int) -> TensorDictBase:
    """The batch with the seed of this step, which together with the sequence ids keys its random numbers."""
    mixed = hash((seed, step)) & (2**62 - 1)
    return td.set(schema.SEED, torch.full((len(td),), mixed, dtype=torch.int64, device=td[schema.TOKENS].device))


def score(
    policy: CausalPolicy,
    td: TensorDictBase,
    *,
    reference: CausalPolicy | None = None,
    scoring: Mapping[str, float] | None = None,
) -> None:
    """Write the policy's log-probs of rollouts and sequences, and the reference's of the rollouts, into `td`."""
    inputs = [td[key] for key in (schema.TOKENS, schema.MASK, schema.ANCHORS, schema.ANCHOR_MASK)]
    inputs += [td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK]]
    options = {**(scoring or {}), "document_ids": td.get(schema.DOCUMENT_IDS, None)}
    td[schema.POLICY_LOG_PROB], td[schema.POLICY_TOKEN_LOG_PROB] = policy.score(*inputs, **options)
    if reference is not None:
        with torch.no_grad():
            td[schema.REFERENCE_LOG_PROB], _ = reference.score(*inputs, **options)


def summarise(td: TensorDictBase) -> dict[str, float]:
    """Means over the valid anchors of a batch of what one watches."""
    valid = td[schema.ANCHOR_MASK]
    rollouts = td[schema.ROLLOUT_TOKENS].shape[2]
    distinct = distinct_rollouts(td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK])[valid].float().mean() / rollouts
    summary = {"reward": td[schema.REWARD][valid].mean().item(), "distinct_rollouts": distinct.item()}
    if rollouts > 1:
        matching = conditional_feature_matching_loss(td[schema.ROLLOUT_FEATURES], td[schema.TARGET_FEATURES])
        summary["feature_matching_loss"] = matching[valid].mean().item()
    return summary


class Clock:
    """Wall time of the named stages of one step; waits for the GPU, so that time is booked where it was spent."""

    def __init__(self):
        self._start, self._seconds = time.perf_counter(), {}

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    def times(self) -> dict[str, float]:
        """`time_<stage>` and `time_step`, in seconds."""
        return {**{f"time_{name}": seconds for name, seconds in self._seconds.items()}, "time_step": self.total()}


def _tokens(td: TensorDictBase) -> int:
    return int(td[schema.MASK].sum() + td[schema.ROLLOUT_MASK].sum())


def _refuse_non_finite(terms: Mapping[str, float], step: int) -> None:
    for name, value in terms.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteLoss(
                f"step {step + 1}: {name} is {value}. The weights of step {step} are kept."
                " Try a smaller --lr, or --dtype float32."
            )
