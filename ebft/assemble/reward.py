"""From options to the stage that rewards rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

from tensordict.nn import TensorDictModule, TensorDictSequential
from tensordict.utils import NestedKey

from ebft import schema
from ebft.components import choose
from ebft.components.objectives import COMBINE, MATCHING, VERIFIER, build_objective, objective_parts
from ebft.components.verifiers import Reference, Verifier
from ebft.errors import UsageError
from ebft.objectives.combine import combine
from ebft.objectives.component import objective
from ebft.objectives.energy import LinearEnergy
from ebft.objectives.energy_reward import energy_reward
from ebft.objectives.scores import Values
from ebft.objectives.shaping import Stage, shaped
from ebft.objectives.verifiers import Decode, verified, verify
from ebft.samplers.stop import Read, cut_text

_AS_IT_IS = {"clean_up_tokenization_spaces": False}
_SHAPING = ("drop_zero_spread", "normalize_advantage", "clip_advantage")


def check_reward_options(options: Mapping[str, Any]) -> None:
    """What can be known to be wrong about --objective and what goes with it from the options alone.

    Raises:
        UsageError: names the option, its value and what is expected.
    """
    name, parts = options["objective"], objective_parts(options["objective"])
    if options["credit"] is not None and not (len(parts) == 1 and name in MATCHING):
        raise UsageError(
            f"--credit {options['credit']}: {name} rewards whole rollouts; rewards of tokens want --objective"
            f" {' or '.join(MATCHING)}"
        )
    if set(parts) & set(MATCHING):
        return
    why = f"--objective {name} compares no features of rollouts and targets; {' and '.join(MATCHING)} do"
    if options["whitening"] != "none":
        raise UsageError(f"--whitening {options['whitening']}: {why}")
    if options["diversity"] != 1.0:
        raise UsageError(f"--diversity {options['diversity']}: {why}")


def build_values(options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> dict[str, Values]:
    """Kernel values of features, whitened as asked for, of each objective that compares features."""
    whiten = choose("whitening", options["whitening"]).build
    return {
        name: whiten(build_objective(name, resolved["objective"]), **resolved["whitening"])
        for name in objective_parts(options["objective"])
        if name in MATCHING
    }


def build_reward(
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    *,
    decode: Decode,
    values: Mapping[str, Values] | None = None,
    examples: Callable[[int], Reference] | None = None,
    by: NestedKey = schema.SEQUENCE_IDS,
    judged: bool = False,
) -> Stage:
    """The stage that writes reward and advantage, and the metrics of each of its parts.

    Args:
        options, resolved: of a run, and of its components.
        decode: (tokens [M,G], mask [M,G]) -> M strings, for verifiers and messages; see :func:`decoder`.
        values: of :func:`build_values`, made here when left out.
        examples: the example that a row comes from (its prompt, answer and tests, which verifiers compare with), by the
            row's number in the entry `by`. None: data without examples, where a rollout is compared with the text that
            follows its anchor.
        judged: a stage of `build_verify` has judged the texts before this one.

    Raises:
        UsageError: an objective that cannot be built, or that needs what the data does not have.
    """
    values = build_values(options, resolved) if values is None else values
    parts = objective_parts(options["objective"])
    shape = {name: options[name] for name in _SHAPING}
    judge = None if judged else build_verify(options, resolved, decode=decode, examples=examples, by=by)
    make = partial(_stage, options=options, resolved=resolved, decode=decode, judge=judge)
    if options["objective"] in MATCHING:  # shapes by itself: it knows the size of the terms of its rewards
        return _matching(values[options["objective"]], options, **shape)
    stages = {name: _matching(values[name], options) if name in values else make(name) for name in parts}
    if not options["objective"].startswith(COMBINE):
        return shaped(stages[options["objective"]], **shape)
    return shaped(combine(stages, parts, decode=decode), **shape)


def build_verify(
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    *,
    decode: Decode,
    examples: Callable[[int], Reference] | None = None,
    by: NestedKey = schema.SEQUENCE_IDS,
) -> TensorDictModule | None:
    """The stage that judges the texts of rollouts; None where no part of the objective is a verifier.

    Args, raises: as in `build_reward`.
    """
    if VERIFIER not in objective_parts(options["objective"]):
        return None
    made: Verifier = build_objective(VERIFIER, resolved["objective"])
    if examples is None and made.wants == "example":
        raise UsageError(
            f"--verifier {options['verifier']} wants examples with tests, and --data {options['data']} has none: give"
            " data with the fields prompt, answer and tests and --method rlvr, or use chrf, bleu or exact_match"
        )
    references = None if examples is None else lambda number: made.reference(examples(number))
    fenced = made.wants == "example" and options.get("chat")
    score = partial(made.score, fenced=True) if fenced else made.score
    return verify(score, decode=decode, references=references, group=made.group, by=by)


def decoder(tokenizer: Any, *, stop: Sequence[str] = ()) -> Decode:
    """What turns tokens [M,G] with their mask [M,G] into M strings; special tokens are dropped.

    Args:
        stop: texts are cut where one of these sequences begins.
    """

    def decode(tokens, mask) -> list[str]:
        rows = (list(compress(*pair)) for pair in zip(tokens.tolist(), mask.tolist(), strict=True))
        return [cut_text(tokenizer.decode(row, skip_special_tokens=True, **_AS_IT_IS), stop) for row in rows]

    return decode


def reader(tokenizer: Any) -> Read:
    """What turns the tokens of a rollout into text, special tokens included."""
    return partial(tokenizer.decode, skip_special_tokens=False, **_AS_IT_IS)


def _matching(values: Values, options: Mapping[str, Any], **shape: Any) -> Stage:
    return objective(
        values,
        credit=options["credit"],
        horizons=options["horizons"] or "uniform",
        token_baseline=options["token_baseline"] or "none",
        trace=1.0 if options["trace"] is None else options["trace"],
        estimator=options["estimator"],
        diversity=options["diversity"],
        **shape,
    )


def _stage(
    name: str,
    *,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    decode: Decode,
    judge: TensorDictModule | None,
) -> Stage:
    if name == VERIFIER:
        reward = verified(decode=decode, estimator=options["estimator"])
        return reward if judge is None else TensorDictSequential(judge, reward)
    energy, about = build_objective(name, resolved["objective"])
    _check_energy(energy, about, options, resolved)
    return energy_reward(energy, estimator=options["estimator"])


def _check_energy(
    energy: LinearEnergy, about: Mapping[str, Any], options: Mapping[str, Any], resolved: Mapping[str, Mapping]
) -> None:
    """Check that the energy was fitted on the features of this run."""
    ours = {"features": options["features"], **resolved["features"]}
    theirs = about.get("features", {})
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            raise UsageError(
                f"--energy {options['energy']} was fitted on features with {name} {theirs.get(name)}, and this run has"
                f" {name} {ours.get(name)}: choose the features it was fitted on, or fit another"
            )
