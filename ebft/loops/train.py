"""The training loop: sample, embed, reward, score, update. It reads top to bottom and calls nobody back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import schema
from ebft.data.packing import batches
from ebft.errors import UsageError
from ebft.head import Compare
from ebft.objectives.counts import rollout_mask, totals
from ebft.objectives.diagnostics import signal_to_noise_of_sums
from ebft.objectives.kl_controllers import KLController
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.moments import (
    conditional_feature_matching_loss,
    distinct_rollouts,
    effective_rollouts,
    feature_matching_profile,
)
from ebft.objectives.policy_gradient import truncated_weight
from ebft.objectives.schedules import Schedule
from ebft.objectives.scores import hold_last, whole
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
    updates: int = 1,
    truncation: float | None = None,
    schedules: Mapping[str, Schedule] | None = None,
    controller: KLController | None = None,
    observers: Sequence[Callable[[TensorDictBase], None]] = (),
) -> Iterator[dict[str, float]]:
    """Train for `steps` steps, yielding the metrics of each one after its last update.

    Every random number is keyed by (seed, step), so a run that starts at `start` with restored weights, optimizer and
    controller goes on as if it had never stopped.

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
        updates: of the weights from one batch of rollouts; more than one wants a loss with ratios to old log-probs.
        truncation: cap of `policy_gradient.truncated_weight`, which makes up for a sampler whose log-probs are not
            those of scoring; None leaves the difference to the policy gradient.
        schedules: attribute of the loss (`cross_entropy_coefficient`, ...) -> its value as a function of the step.
        observers: are shown every batch after its rewards were given, as running moments want it.
        controller: sets the weight of the divergence from what was measured, and may end the training.

    Yields:
        step (1-based), loss and its terms (at the first update of a batch), reward, feature_matching_loss,
        distinct_rollouts (share), effective_rollouts (of N), with features per token feature_matching_loss_1, _2, _4,
        ... (at these horizons), the metrics of the stages, gradient_signal_to_noise (when the batch is scored in
        parts, an estimate from this batch alone, see `ebft.objectives.signal_to_noise_of_sums`), sampler_mismatch
        (mean difference in nats between the log-probs of sampling and of scoring), gradient_norm, learning_rate,
        tokens_per_second (rollout and sequence tokens over the step's time), time_* in seconds.

    Raises:
        NonFiniteLoss: names the step and the term, before the weights are touched.
    """
    parameters = list(policy.trainable().values())
    order = batches(data, batch_size=batch_size, seed=seed, start=start)
    for step in range(start, steps):
        if controller is not None and controller.stopped:
            return
        clock = Clock()
        td = at_step(next(order).to(policy.device), seed=seed, step=step)
        for name, stage in pipeline.items():
            with clock(name):
                td = stage(td)
        for observe in observers:
            observe(td)
        td.update(totals(td, cross_entropy_tokens=loss.cross_entropy_tokens))
        set_weights(loss, step, schedules=schedules or {}, controller=controller)

        parts, rate = td.split(micro_batch or batch_size), optimizer.param_groups[0]["lr"]
        history: list[dict[str, float]] = []
        for update in range(updates):
            terms: dict[str, float] = {}
            sums: list[float] = []  # squared norms of the gradient, from one part of the batch to the next
            optimizer.zero_grad(set_to_none=True)
            for part in parts:
                with clock("score"):
                    exact = loss.divergence  # of the policy as it is now; sampled log-probs of the start stay
                    new = reference if loss.kl_coefficient and (exact or not update) else None
                    entropy = bool(loss.entropy_coefficient)
                    score(policy, part, reference=new, scoring=scoring, entropy=entropy, divergence=exact)
                    if not update:
                        _add(terms, {"sampler_mismatch": mismatch(part)})
                    if truncation is not None and not update:
                        correct_mismatch(part, cap=truncation)
                    out = loss(part)
                _add(terms, {name: value.item() for name, value in out.items()})
                _refuse_non_finite(terms, step)
                with clock("update"):
                    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
                    if not history and len(parts) > 1:
                        sums.append(squared_norm(parameters))
            with clock("update"):
                norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
                _refuse_non_finite({"gradient norm": float(norm)}, step)
                optimizer.step()
            if sums:
                terms["gradient_signal_to_noise"] = signal_to_noise_of_sums(sums, shares(parts))
            history.append({**terms, "gradient_norm": float(norm)})
        if scheduler is not None:
            scheduler.step()
        first = history[0]
        if controller is not None:
            controller.update(first["kl"])

        yield {
            "step": step + 1,
            "loss": sum(value for name, value in first.items() if name.startswith("loss_")),
            **summarise(td),
            **first,
            **({"kl_coefficient": loss.kl_coefficient} if loss.kl_coefficient else {}),
            "learning_rate": rate,
            "tokens_per_second": _tokens(td) / clock.total(),
            **clock.times(),
        }


def squared_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Of the gradients that they hold."""
    norms = [p.grad.norm().double() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def shares(parts: Sequence[TensorDictBase]) -> list[float]:
    """Share of a batch's sequences up to the end of each of its parts."""
    rows = list(accumulate(len(part) for part in parts))
    return [count / rows[-1] for count in rows]


def set_weights(
    loss: EBFTLoss, step: int, *, schedules: Mapping[str, Schedule], controller: KLController | None
) -> None:
    """Give the loss the weights of this step."""
    for name, value in schedules.items():
        setattr(loss, name, value(step))
    if controller is not None:
        loss.kl_coefficient = controller.coefficient


def mismatch(part: TensorDictBase) -> float:
    """Mean |log p of sampling - log p of scoring| over the batch's tokens: the share of it that these rows hold."""
    difference = (part[schema.POLICY_LOG_PROB].detach() - part[schema.ROLLOUT_LOG_PROB]).abs()
    real = rollout_mask(part)
    return (torch.where(real, difference, 0.0).sum() / part[schema.TOTAL_TOKENS][0].clamp(min=1)).item()


def correct_mismatch(part: TensorDictBase, *, cap: float) -> None:
    """Weigh advantages for what scoring and sampling disagree on; later ratios start from the log-probs of scoring."""
    log_prob = part[schema.POLICY_LOG_PROB].detach()
    weight = truncated_weight(log_prob, part[schema.ROLLOUT_LOG_PROB], part[schema.ROLLOUT_MASK], cap=cap)
    advantage = part[schema.ADVANTAGE]
    part[schema.ADVANTAGE] = (advantage if advantage.ndim == 4 else advantage[..., None]) * weight
    part[schema.ROLLOUT_LOG_PROB] = log_prob


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
    entropy: bool = False,
    divergence: Compare | None = None,
) -> None:
    """Write the policy's log-probs of rollouts and sequences, and the reference's of the rollouts, into `td`.

    With `entropy` also that of the distributions that the rollout tokens were drawn from; with `divergence` that
    function of these distributions and the reference's, in place of the reference's log-probs.
    """
    inputs = [td[key] for key in (schema.TOKENS, schema.MASK, schema.ANCHORS, schema.ANCHOR_MASK)]
    inputs += [td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK]]
    options = {**(scoring or {}), "document_ids": td.get(schema.DOCUMENT_IDS, None)}
    start = None if divergence is None else reference
    scored = policy.score(*inputs, **options, entropy=entropy, reference=start, divergence=divergence)
    td[schema.POLICY_LOG_PROB], td[schema.POLICY_TOKEN_LOG_PROB] = scored[:2]
    if entropy:
        td[schema.POLICY_ENTROPY] = scored[2]
    if divergence is not None:
        td[schema.POLICY_DIVERGENCE] = scored[-1]
    elif reference is not None:
        with torch.no_grad():
            td[schema.REFERENCE_LOG_PROB], _ = reference.score(*inputs, **options)


def whole_features(td: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Features of whole rollouts [B,K,N,D] and targets [B,K,D]; where there are some per token, the last ones."""
    rollout, target = td[schema.ROLLOUT_FEATURES], td[schema.TARGET_FEATURES]
    if rollout.ndim == 4:
        return rollout, target
    return whole(rollout, td[schema.ROLLOUT_MASK]), whole(target, td[schema.TARGET_MASK])


def summarise(td: TensorDictBase) -> dict[str, float]:
    """Means over the valid anchors of a batch of what one watches."""
    valid = td[schema.ANCHOR_MASK]
    rollouts = td[schema.ROLLOUT_TOKENS].shape[2]
    distinct = distinct_rollouts(td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK])[valid].float().mean() / rollouts
    effective = effective_rollouts(td[schema.ROLLOUT_TOKENS], td[schema.ROLLOUT_MASK])[valid].mean()
    summary = {"reward": td[schema.REWARD][valid].mean().item(), "distinct_rollouts": distinct.item()}
    summary["effective_rollouts"] = effective.item()
    if rollouts > 1:
        matching = conditional_feature_matching_loss(*whole_features(td))
        summary["feature_matching_loss"] = matching[valid].mean().item()
    if rollouts > 1 and td[schema.ROLLOUT_FEATURES].ndim == 5:
        summary |= horizon_profile(td)
    own = td.get("metrics", None)
    return summary | ({} if own is None else {name: value[valid].mean().item() for name, value in own.items()})


def horizon_profile(td: TensorDictBase) -> dict[str, float]:
    """Feature-matching loss at horizons 1, 2, 4, ... and the last, from features per token; mean over valid anchors."""
    held = [
        hold_last(td[features], td[mask])
        for features, mask in (
            (schema.ROLLOUT_FEATURES, schema.ROLLOUT_MASK),
            (schema.TARGET_FEATURES, schema.TARGET_MASK),
        )
    ]
    profile = feature_matching_profile(*held)[td[schema.ANCHOR_MASK]].mean(0).tolist()  # [G]
    horizons = sorted({len(profile), *(2**power for power in range(len(profile).bit_length()))})
    return {f"feature_matching_loss_{g}": profile[g - 1] for g in horizons if g <= len(profile)}


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


def _add(terms: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        terms[name] = terms.get(name, 0.0) + value


def _refuse_non_finite(terms: Mapping[str, float], step: int) -> None:
    for name, value in terms.items():
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteLoss(f"step {step + 1}: {name} is {value}. Try a smaller --lr, or --dtype float32.")
