"""The training loss: feature matching by policy gradient, cross-entropy and divergence from a reference."""

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
from ebft.objectives.cross_entropy import cross_entropy, prediction_mask
from ebft.objectives.kl import kl_estimate
from ebft.objectives.policy_gradient import reinforce

_OPTIONAL_KEYS = ("answer_mask", "document_ids", "total_rollouts", "total_tokens", "total_trunk_tokens")


class EBFTLoss(LossModule):
    """L = c_pg · policy gradient + c_ce · cross-entropy + c_kl · divergence (arXiv 2603.12248, section 2 and (10)).

    Normalisation. ``"sequence"`` sums the terms of a rollout over its tokens and averages over the rollouts of valid
    anchors: the estimator of the paper, (91), whose expected gradient is that of the conditional feature-matching loss.
    ``"token"`` averages over the unmasked rollout tokens, as the paper's released code does; with full horizons that
    is 1/G of the former. The divergence is normalised like the policy gradient. Cross-entropy is always the average
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
        kl_estimator: "k1", "k2" or "k3" of ``kl.kl_estimate``, which says what each descends.
        kl_scope: "token" for the divergence between next-token distributions in the contexts visited; "rollout" for
            the one between distributions of rollouts, as in (10) of the paper (exact in expectation with "k2" and
            ``normalization="sequence"``).
        normalization: "sequence" or "token".

    Reads (schema's names; change them with ``set_keys``) ``anchor_mask`` and ``("rollout", "mask")``, and per term:
    ``("policy", "log_prob")`` and ``("rollout", "advantage")`` [B,K,N] or [B,K,N,G], with ``("rollout", "log_prob")``
    where the function takes ``old_log_prob``; ``("policy", "token_log_prob")``, ``mask`` and, where present,
    ``answer_mask`` and ``document_ids``; ``("reference", "log_prob")``. A term with coefficient 0 reads and returns
    nothing.

    Returns a TensorDict without batch size: ``loss_policy_gradient``, ``loss_cross_entropy``, ``loss_kl``, weighted
    and with gradient, to be summed; ``cross_entropy`` (nats per token) and ``kl`` (k3 estimate, unbiased on-policy
    whatever the `kl_estimator`, in nats per rollout or per token as normalised), detached and without weights.

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
        kl_estimator: str = "k2",
        kl_scope: str = "token",
        normalization: str = "sequence",
    ) -> None:
        super().__init__()
        _check_choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
        _check_choice("kl_scope", kl_scope, ("token", "rollout"))
        _check_choice("normalization", normalization, ("sequence", "token"))
        _check_coefficients(
            policy_gradient_coefficient=policy_gradient_coefficient,
            cross_entropy_coefficient=cross_entropy_coefficient,
            kl_coefficient=kl_coefficient,
        )
        self.policy_gradient = policy_gradient
        self.needs_old_log_prob = _takes_old_log_prob(policy_gradient)
        self.policy_gradient_coefficient = policy_gradient_coefficient
        self.cross_entropy_coefficient = cross_entropy_coefficient
        self.kl_coefficient = kl_coefficient
        self.kl_estimator = kl_estimator
        self.kl_scope = kl_scope
        self.normalization = normalization

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
        }
        used = [name for name, coefficient in terms.items() if coefficient]
        return [f"loss_{name}" for name in used] + [name for name in used if name != "policy_gradient"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        inputs = self._inputs(tensordict)
        out: dict[str, Tensor] = {}
        if self.policy_gradient_coefficient:
            value = self._mean(self._policy_gradient_terms(inputs), inputs)
            out["loss_policy_gradient"] = self.policy_gradient_coefficient * value
        if self.cross_entropy_coefficient:
            value = _cross_entropy(inputs)
            out["loss_cross_entropy"] = self.cross_entropy_coefficient * value
            out["cross_entropy"] = value.detach()
        if self.kl_coefficient:
            out["loss_kl"] = self.kl_coefficient * self._mean(self._kl_terms(inputs, self.kl_estimator), inputs)
            with torch.no_grad():
                out["kl"] = self._mean(self._kl_terms(inputs, "k3", summed=False), inputs)
        return TensorDict(out, batch_size=[])

    def _required(self) -> list[str]:
        names: list[str] = []
        if self.policy_gradient_coefficient or self.kl_coefficient:
            names += ["anchor_mask", "rollout_mask", "policy_log_prob"]
        if self.policy_gradient_coefficient:
            names += ["advantage"] + ["rollout_log_prob"] * self.needs_old_log_prob
        if self.kl_coefficient:
            names += ["reference_log_prob"]
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
            advantage=inputs[schema.ADVANTAGE],
            mask=_rollout_mask(inputs),
            **old,
        )
        return torch.where(_rollout_mask(inputs), terms, 0.0)

    def _kl_terms(self, inputs: TensorDict, estimator: str, *, summed: bool | None = None) -> Tensor:
        """Terms [B,K,N,G], or [B,K,N] of summed log-probs; zero log-ratios have zero terms in every estimator."""
        mask = _rollout_mask(inputs)
        log_prob = torch.where(mask, inputs[schema.POLICY_LOG_PROB], 0.0)
        reference = torch.where(mask, inputs[schema.REFERENCE_LOG_PROB], 0.0)
        if self.kl_scope == "rollout" if summed is None else summed:
            log_prob, reference = log_prob.sum(-1), reference.sum(-1)
        return kl_estimate(log_prob, reference, estimator=estimator)

    def _mean(self, terms: Tensor, inputs: TensorDict) -> Tensor:
        """Sum of the terms of all rollouts over the number of rollouts, or of tokens."""
        if self.normalization == "sequence":
            return terms.sum() / _denominator(inputs, schema.TOTAL_ROLLOUTS, _count_rollouts).to(terms.dtype)
        return terms.sum() / _denominator(inputs, schema.TOTAL_TOKENS, _count_tokens).to(terms.dtype)


def totals(td: TensorDictBase) -> TensorDict:
    """Counts over a whole batch, by which the losses of its parts are to be divided.

    Args:
        td: has ``anchor_mask`` [B,K], ``("rollout", "mask")`` [B,K,N,G], ``mask`` [B,T] and, optionally,
            ``answer_mask`` and ``document_ids``.

    Returns:
        A TensorDict of batch size [B] with ``("total", "rollouts")`` (of valid anchors), ``("total", "tokens")``
        (unmasked ones of those rollouts) and ``("total", "trunk_tokens")`` (under cross-entropy), float32, the same
        number in every row: ``td.update(totals(td))``, then split.

    Raises:
        UsageError: a missing key or a wrong shape.
    """
    schema.check(td, schema.ANCHOR_MASK, schema.ROLLOUT_MASK, schema.MASK)
    counts = {
        schema.TOTAL_ROLLOUTS: _count_rollouts(td),
        schema.TOTAL_TOKENS: _count_tokens(td),
        schema.TOTAL_TRUNK_TOKENS: _count_trunk_tokens(td),
    }
    rows = td[schema.ANCHOR_MASK].shape[0]
    result = TensorDict({}, batch_size=[rows])
    for key, count in counts.items():
        result.set(key, count.float().expand(rows).clone())
    return result


def _rollout_mask(td: TensorDictBase) -> Tensor:
    return td[schema.ROLLOUT_MASK] & td[schema.ANCHOR_MASK][..., None, None]


def _count_rollouts(td: TensorDictBase) -> Tensor:
    return td[schema.ANCHOR_MASK].sum() * td[schema.ROLLOUT_MASK].shape[2]


def _count_tokens(td: TensorDictBase) -> Tensor:
    return _rollout_mask(td).sum()


def _count_trunk_tokens(td: TensorDictBase) -> Tensor:
    return prediction_mask(td[schema.MASK], td.get(schema.ANSWER_MASK, None), td.get(schema.DOCUMENT_IDS, None)).sum()


def _cross_entropy(inputs: TensorDict) -> Tensor:
    terms, _ = cross_entropy(
        inputs[schema.POLICY_TOKEN_LOG_PROB],
        inputs[schema.MASK],
        inputs.get(schema.ANSWER_MASK, None),
        inputs.get(schema.DOCUMENT_IDS, None),
    )
    return terms.sum() / _denominator(inputs, schema.TOTAL_TRUNK_TOKENS, _count_trunk_tokens).to(terms.dtype)


def _denominator(inputs: TensorDict, key: NestedKey, count: Callable[[TensorDictBase], Tensor]) -> Tensor:
    """The whole batch's count when the loop wrote counts, else that of the rows at hand; at least 1."""
    if inputs.get("total", None) is None:
        return count(inputs).clamp(min=1)
    schema.check(inputs, key)
    return inputs[key][0].clamp(min=1)


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


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r} is not known; expected one of {', '.join(map(repr, allowed))}")


def _check_coefficients(**coefficients: float) -> None:
    for name, value in coefficients.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name}={value!r}: a weight of the loss must be a finite number of at least 0")
    if not any(coefficients.values()):
        raise UsageError(f"all weights of the loss are 0 ({', '.join(coefficients)}): give at least one above 0")
