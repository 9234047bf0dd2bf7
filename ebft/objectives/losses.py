"""The training loss: feature matching by policy gradient, cross-entropy, divergence from a reference, entropy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives.counts import (
    answers,
    check_cross_entropy_tokens,
    count_rollouts,
    count_tokens,
    denominator,
    rollout_mask,
)
from ebft.objectives.cross_entropy import cross_entropy
from ebft.objectives.kl import EXACT, kl_estimate, kl_penalty
from ebft.objectives.policy_gradient import reinforce

_OPTIONAL_KEYS = ("answer_mask", "document_ids", "total_rollouts", "total_tokens", "total_trunk_tokens")


class EBFTLoss(LossModule):
    """L = c_pg · policy gradient + c_ce · cross-entropy + c_kl · divergence - c_h · entropy.

    (arXiv 2603.12248, section 2 and (10); the paper has no entropy term.)

    Normalisation. ``"sequence"`` sums the terms of a rollout over its tokens and averages over the rollouts of valid
    anchors: the estimator of the paper, (91), whose expected gradient is that of the conditional feature-matching loss.
    ``"token"`` averages over the unmasked rollout tokens, as the paper's released code does; with full horizons that
    is 1/G of the former, and in general the former times (rollouts / their unmasked tokens). The divergence and the
    entropy are normalised like the policy gradient. Cross-entropy is always the average
    over the tokens it counts (``cross_entropy.prediction_mask``). The paper's L_CE, (4), is about a whole completion;
    with ``"sequence"`` its weight γ on completions of G tokens is ``cross_entropy_coefficient = G·γ`` here, and with
    ``"token"`` the coefficient is the γ of the released code.

    Large batches. A batch can be split on B: write :func:`totals` of the whole batch into it first, and the entries of
    the outputs (losses and values alike) of the parts sum to those of the whole. Without those keys the counts are of
    the TensorDict at hand. With data parallelism the counts are summed over the processes before, and the gradients
    summed (not averaged) after.

    Rollouts of masked anchors, masked tokens and padding contribute nothing, whatever they hold. A loss that is not
    finite is returned as it is. With nothing to average over a term is 0 and still has a (zero) gradient.

    Args:
        policy_gradient: function of ``log_prob``, ``advantage``, ``mask`` and, if it has that parameter,
            ``old_log_prob``, passed by keyword, that returns terms [B,K,N,G] as those of
            ``ebft.objectives.policy_gradient``. Bind further arguments: ``functools.partial(clipped, clip=0.2)``.
        policy_gradient_coefficient: weight of the policy gradient.
        cross_entropy_coefficient: weight of the cross-entropy per token.
        kl_coefficient: weight of the divergence; a controller may assign it between steps.
        kl_in: "loss" for a term of its own; "reward" takes it off the advantage (``kl.kl_penalty``), so that the
            policy gradient carries it, clipping and c_pg included: c_pg · (feature matching + c_kl · divergence).
        kl_estimator: "k1", "k2" or "k3" of ``kl.kl_estimate``, which says what each descends in the loss and in the
            reward; None takes the one whose gradient is that of KL(policy ‖ reference): "k2" in the loss, "k1" in the
            reward. "exact" is KL(policy ‖ reference) and "exact_forward" KL(reference ‖ policy) of the next-token
            distributions that the rollout tokens were drawn from, summed over the vocabulary: the values and gradients
            that "k1" (in value), "k2" (in gradient) and "k3" (in gradient) per token have on average over the token,
            without the noise of its draw. They are for the loss and per token only.
        kl_scope: in the loss, "token" for the divergence between next-token distributions in the contexts visited;
            "rollout" for the one between distributions of rollouts, as in (10) of the paper (exact in expectation with
            "k2" and ``normalization="sequence"``). In the reward both are the latter, "token" with less variance.
        entropy_coefficient: weight of a bonus on the entropy of the next-token distributions that the rollout tokens
            were drawn from. Its gradient is that of the entropies in the contexts visited, not of where they lead.
        cross_entropy_tokens: "all"; "answers", those under ``answer_mask``, which must be there; "auto", the answers
            where the data marks them and all otherwise. A token counts once, however many rollouts there are.
        normalization: "sequence" or "token".

    Reads (schema's names; change them with ``set_keys``) ``anchor_mask`` and ``("rollout", "mask")``, and per term:
    ``("policy", "log_prob")`` and ``("rollout", "advantage")`` [B,K,N] or [B,K,N,G], with ``("rollout", "log_prob")``
    where the function takes ``old_log_prob``; ``("policy", "token_log_prob")``, ``mask`` and, where present,
    ``answer_mask`` and ``document_ids``; ``("reference", "log_prob")``, for an exact divergence ``("policy",
    "divergence")`` in its place; ``("policy", "entropy")``. A term with coefficient 0 reads and returns nothing.

    Returns a TensorDict without batch size: ``loss_policy_gradient``, ``loss_cross_entropy``, ``loss_kl`` (not when the
    divergence is in the reward), ``loss_entropy``, weighted and with gradient, to be summed; ``cross_entropy`` (nats
    per token), ``kl`` (the divergence itself if `kl_estimator` is exact, else the k3 estimate, unbiased on-policy) and
    ``entropy``, both in nats per rollout or per token as normalised; these are detached and without weights.

    Raises:
        UsageError: at construction, an option out of range or a function that cannot be called so; when called, a
            missing key or a wrong shape.
    """

    @dataclass
    class _AcceptedKeys(LossModule._AcceptedKeys):
        anchor_mask: NestedKey = schema.ANCHOR_MASK
        rollout_mask: NestedKey = schema.ROLLOUT_MASK
        rollout_log_prob: NestedKey = schema.ROLLOUT_LOG_PROB
        advantage: NestedKey = schema.ADVANTAGE
        policy_log_prob: NestedKey = schema.POLICY_LOG_PROB
        policy_token_log_prob: NestedKey = schema.POLICY_TOKEN_LOG_PROB
        policy_entropy: NestedKey = schema.POLICY_ENTROPY
        policy_divergence: NestedKey = schema.POLICY_DIVERGENCE
        reference_log_prob: NestedKey = schema.REFERENCE_LOG_PROB
        mask: NestedKey = schema.MASK
        answer_mask: NestedKey = schema.ANSWER_MASK
        document_ids: NestedKey = schema.DOCUMENT_IDS
        total_rollouts: NestedKey = schema.TOTAL_ROLLOUTS
        total_tokens: NestedKey = schema.TOTAL_TOKENS
        total_trunk_tokens: NestedKey = schema.TOTAL_TRUNK_TOKENS

    default_keys = _AcceptedKeys

    def __init__(
        self,
        *,
        policy_gradient: Callable[..., Tensor] = reinforce,
        policy_gradient_coefficient: float = 1.0,
        cross_entropy_coefficient: float = 0.0,
        kl_coefficient: float = 0.0,
        kl_in: str = "loss",
        kl_estimator: str | None = None,
        kl_scope: str = "token",
        entropy_coefficient: float = 0.0,
        cross_entropy_tokens: str = "auto",
        normalization: str = "sequence",
    ) -> None:
        super().__init__()
        _check_choice("kl_in", kl_in, ("loss", "reward"))
        if kl_estimator is None:
            kl_estimator = "k2" if kl_in == "loss" else "k1"
        _check_choice("kl_estimator", kl_estimator, ("k1", "k2", "k3", *EXACT))
        if kl_estimator in EXACT:
            _check_exact(kl_estimator, kl_in, kl_scope)
        check_cross_entropy_tokens(cross_entropy_tokens)
        _check_choice("kl_scope", kl_scope, ("token", "rollout"))
        _check_choice("normalization", normalization, ("sequence", "token"))
        _check_coefficients(
            policy_gradient_coefficient=policy_gradient_coefficient,
            cross_entropy_coefficient=cross_entropy_coefficient,
            kl_coefficient=kl_coefficient,
            entropy_coefficient=entropy_coefficient,
        )
        if kl_in == "reward" and not policy_gradient_coefficient:
            raise UsageError(
                f"kl_in='reward' with policy_gradient_coefficient={policy_gradient_coefficient!r}: without a policy"
                " gradient nobody sees the reward; use kl_in='loss'"
            )
        self.policy_gradient = policy_gradient
        self.needs_old_log_prob = _takes_old_log_prob(policy_gradient)
        self.policy_gradient_coefficient = policy_gradient_coefficient
        self.cross_entropy_coefficient = cross_entropy_coefficient
        self.kl_coefficient = kl_coefficient
        self.kl_in = kl_in
        self.kl_estimator = kl_estimator
        self.kl_scope = kl_scope
        self.entropy_coefficient = entropy_coefficient
        self.cross_entropy_tokens = cross_entropy_tokens
        self.normalization = normalization

    @property
    def divergence(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Function of policy's and reference's logits that ``("policy", "divergence")`` is to hold; None: no need."""
        return EXACT.get(self.kl_estimator) if self.kl_coefficient else None

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """There is no value estimator to tell about changed keys."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that must be there; optional ones are read when they are."""
        return [getattr(self.tensor_keys, name) for name in self._required()]

    @property
    def out_keys(self) -> list[NestedKey]:
        terms = {
            "policy_gradient": self.policy_gradient_coefficient,
            "cross_entropy": self.cross_entropy_coefficient,
            "kl": self.kl_coefficient,
            "entropy": self.entropy_coefficient,
        }
        used = [name for name, coefficient in terms.items() if coefficient]
        losses = [f"loss_{name}" for name in used if name != "kl" or self.kl_in == "loss"]
        return losses + [name for name in used if name != "policy_gradient"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        inputs = self._inputs(tensordict)
        out: dict[str, Tensor] = {}
        if self.policy_gradient_coefficient:
            value = self._mean(self._policy_gradient_terms(inputs), inputs)
            out["loss_policy_gradient"] = self.policy_gradient_coefficient * value
        if self.cross_entropy_coefficient:
            value = self._cross_entropy(inputs)
            out["loss_cross_entropy"] = self.cross_entropy_coefficient * value
            out["cross_entropy"] = value.detach()
        if self.kl_coefficient and self.divergence is not None:
            terms = torch.where(rollout_mask(inputs), inputs[schema.POLICY_DIVERGENCE], 0.0)
            value = self._mean(terms, inputs)
            out["loss_kl"], out["kl"] = self.kl_coefficient * value, value.detach()
        elif self.kl_coefficient and self.kl_in == "loss":
            out["loss_kl"] = self.kl_coefficient * self._mean(self._kl_terms(inputs, self.kl_estimator), inputs)
        if self.kl_coefficient and self.divergence is None:
            with torch.no_grad():
                out["kl"] = self._mean(self._kl_terms(inputs, "k3", summed=False), inputs)
        if self.entropy_coefficient:
            value = self._mean(torch.where(rollout_mask(inputs), inputs[schema.POLICY_ENTROPY], 0.0), inputs)
            out["loss_entropy"] = -self.entropy_coefficient * value
            out["entropy"] = value.detach()
        return TensorDict(out, batch_size=[])

    def _required(self) -> list[str]:
        names: list[str] = []
        if self.policy_gradient_coefficient or self.kl_coefficient or self.entropy_coefficient:
            names += ["anchor_mask", "rollout_mask"]
        sampled_kl = self.kl_coefficient and self.divergence is None
        if self.policy_gradient_coefficient or sampled_kl:
            names += ["policy_log_prob"]
        if self.policy_gradient_coefficient:
            names += ["advantage"] + ["rollout_log_prob"] * self.needs_old_log_prob
        if self.kl_coefficient:
            names += ["reference_log_prob" if sampled_kl else "policy_divergence"]
        if self.entropy_coefficient:
            names += ["policy_entropy"]
        if self.cross_entropy_coefficient:
            names += ["mask", "policy_token_log_prob"]
        return names

    def _inputs(self, tensordict: TensorDictBase) -> TensorDict:
        """What is read, checked and under the schema's own names."""
        inputs = TensorDict({}, batch_size=[])
        default = self.default_keys()
        for name in (*self._required(), *_OPTIONAL_KEYS):
            value = tensordict.get(getattr(self.tensor_keys, name), None)
            if value is not None:
                inputs.set(getattr(default, name), value)
        required = [getattr(default, name) for name in self._required()]
        advantage = inputs.get(schema.ADVANTAGE, None)
        if advantage is not None and advantage.ndim == 4:  # one per token; the policy gradient checks its shape
            required.remove(schema.ADVANTAGE)
        schema.check(inputs, *required)
        return inputs

    def _policy_gradient_terms(self, inputs: TensorDict) -> Tensor:
        old = {"old_log_prob": inputs[schema.ROLLOUT_LOG_PROB]} if self.needs_old_log_prob else {}
        terms = self.policy_gradient(
            log_prob=inputs[schema.POLICY_LOG_PROB],
            advantage=self._advantage(inputs),
            mask=rollout_mask(inputs),
            **old,
        )
        return torch.where(rollout_mask(inputs), terms, 0.0)

    def _advantage(self, inputs: TensorDict) -> Tensor:
        """[B,K,N] or [B,K,N,G]; less the divergence when that is in the reward."""
        advantage = inputs[schema.ADVANTAGE]
        if not self.kl_coefficient or self.kl_in == "loss":
            return advantage
        penalty = kl_penalty(
            inputs[schema.POLICY_LOG_PROB],
            inputs[schema.REFERENCE_LOG_PROB],
            rollout_mask(inputs),
            estimator=self.kl_estimator,
            scope=self.kl_scope,
        )
        return (advantage if advantage.ndim == 4 else advantage[..., None]) - self.kl_coefficient * penalty

    def _kl_terms(self, inputs: TensorDict, estimator: str, *, summed: bool | None = None) -> Tensor:
        """Terms [B,K,N,G], or [B,K,N] of summed log-probs; zero log-ratios have zero terms in every estimator."""
        mask = rollout_mask(inputs)
        log_prob = torch.where(mask, inputs[schema.POLICY_LOG_PROB], 0.0)
        reference = torch.where(mask, inputs[schema.REFERENCE_LOG_PROB], 0.0)
        if self.kl_scope == "rollout" if summed is None else summed:
            log_prob, reference = log_prob.sum(-1), reference.sum(-1)
        return kl_estimate(log_prob, reference, estimator=estimator)

    def _mean(self, terms: Tensor, inputs: TensorDict) -> Tensor:
        """Sum of the terms of all rollouts over the number of rollouts, or of tokens."""
        if self.normalization == "sequence":
            count = denominator(inputs, schema.TOTAL_ROLLOUTS, count_rollouts)
        else:
            count = denominator(inputs, schema.TOTAL_TOKENS, count_tokens)
        return terms.sum() / count.to(terms.dtype)

    def _cross_entropy(self, inputs: TensorDict) -> Tensor:
        terms, learnt = cross_entropy(
            inputs[schema.POLICY_TOKEN_LOG_PROB],
            inputs[schema.MASK],
            answers(inputs, self.cross_entropy_tokens),
            inputs.get(schema.DOCUMENT_IDS, None),
        )
        count = denominator(inputs, schema.TOTAL_TRUNK_TOKENS, lambda _: learnt.sum())
        return terms.sum() / count.to(terms.dtype)


def _takes_old_log_prob(policy_gradient: Callable[..., Tensor]) -> bool:
    """Whether the function wants old log-probs; refuses one that wants arguments the loss does not have."""
    parameters = inspect.signature(policy_gradient).parameters
    known = {"log_prob", "old_log_prob", "advantage", "mask"}
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unbound = {name for name in named - known if parameters[name].default is inspect.Parameter.empty}
    if unbound or not known - {"old_log_prob"} <= named:
        raise UsageError(
            f"policy_gradient has the parameters {sorted(named)}; expected log_prob, advantage, mask and optionally"
            f" old_log_prob, anything else with a default or bound by functools.partial (unbound: {sorted(unbound)})"
        )
    return "old_log_prob" in named


def _check_exact(estimator: str, kl_in: str, kl_scope: str) -> None:
    if kl_in != "loss":
        raise UsageError(
            f"kl_estimator={estimator!r} in the reward: it is the same whatever token is drawn, so that a reward of it"
            " has no gradient at the token's own position; use it in the loss, or 'k1' in the reward"
        )
    if kl_scope != "token":
        raise UsageError(
            f"kl_estimator={estimator!r} with kl_scope={kl_scope!r}: summed over the vocabulary at each position, it"
            " has the gradient of next-token distributions in the contexts visited only; use kl_scope='token', or 'k2'"
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r} is not known; expected one of {', '.join(map(repr, allowed))}")


def _check_coefficients(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name}={value!r}: a weight of the loss must be a finite number of at least 0")
    if not any(coefficients.values()):
        raise UsageError(f"all weights of the loss are 0 ({', '.join(coefficients)}): give at least one above 0")
