"""From options to the parts of an evaluation, which are the same for every policy that is compared."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase

from ebft import schema
from ebft.assemble.checks import check_ranges, check_stop
from ebft.assemble.pipeline import build_sampler
from ebft.assemble.policy import policy_folder, run_options
from ebft.assemble.reward import decoder, reader
from ebft.assemble.rows import FIELDS, Data, check_anchors, pack_part, read_data, spread_rows, usable_rows
from ebft.components import choose, resolve_options
from ebft.components.features import FEATURES
from ebft.data.example_rows import prompt_rows
from ebft.draw import check_sampling
from ebft.errors import UsageError, flag
from ebft.features.contract import FeatureMap
from ebft.loops.display import Display
from ebft.loops.evaluation.run import Measured, Prompts, measure_policy
from ebft.policy import CausalPolicy
from ebft.samplers.full import full_engine
from ebft.samplers.stop import stopping

HORIZONS = (1, 2, 4, 8, 16, 32, 64)
KS = (1, 4, 16)
MAP_OPTIONS = tuple(dict.fromkeys(option for entry in FEATURES.values() for option in entry.options))
# Where data comes from: for a run's policy, what the run had, where nothing else is asked for.
_OF_THE_DATA = ("data", *FIELDS, "chat", "length")
# What --quick takes for options that are not given.
QUICK = {"held_out": 8, "prompts": 8, "horizons": "1,2,4,8"}
_ANSWERS = (
    *("prompts", "prompt_length", "answers", "greedy", "answer_temperature", "max_new_tokens", "stop", "k"),
    *("test_prompt", "test_timeout"),
)


@dataclass(frozen=True)
class Evaluation:
    """What policies are measured on: the rows, feature maps and prompts, the same for all of them."""

    options: Mapping[str, Any]
    sampler: Mapping[str, Mapping]
    data: Data
    rows: TensorDictBase
    maps: Mapping[str, FeatureMap]
    horizons: Sequence[int]
    prompts: Prompts | None
    notes: Sequence[str]


def settle_options(options: Mapping[str, Any], explicit: Collection[str], *, policy: str) -> dict[str, Any]:
    """The options with what --quick and the run that `policy` comes from say about those not given.

    Raises:
        UsageError: an option out of its range.
    """
    settled = dict(options)
    if options["quick"]:
        settled |= {name: value for name, value in QUICK.items() if name not in explicit}
    trained = run_options(policy) or {}
    # one of them given: another text, so that what the run had says nothing about the others but the length
    inherited = ("length",) if any(n in explicit for n in _OF_THE_DATA[:-1]) else _OF_THE_DATA
    for name in (*inherited, "stop"):  # and where its answers end
        if trained.get(name) is not None and name not in explicit:
            settled[name] = trained[name]
    _check(settled)
    return settled


def resolve_maps(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Feature map -> its options, of --features a,b,...

    Raises:
        UsageError: an unknown map or one that is there twice, or an option that none of them takes.
    """
    names = [name.strip() for name in options["features"].split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"--features {options['features']!r}: expected feature maps, each once, such as hidden,sbert")
    given = {name: options[name] for name in MAP_OPTIONS}
    taken = {option for name in names for option in choose("features", name).options}
    for option, value in given.items():
        if value is not None and option not in taken:
            resolve_options({"features": names[0]}, {option: value})  # refuses it, and says where it belongs
    found = {}
    for name in names:
        own = {option: given[option] for option in choose("features", name).options}
        found[name] = resolve_options({"features": name}, own)["features"]
    return found


def prepare(policy: CausalPolicy, name: str, options: Mapping[str, Any], data: Data) -> Evaluation:
    """Rows, feature maps and prompts, from settled options.

    Args:
        policy: the first of those that are measured, whose tokenizer is used; name: what it was loaded by. The network
            behind `hidden` with --backbone start is the policy that the run `name` started from, or the policy itself.

    Raises:
        UsageError: no held-out row has room for a rollout, or a feature map cannot be made.
    """
    place = resolve_options({"sampler": options["sampler"]}, {n: options[n] for n in ("stride", "first")})
    packed = pack_part(data.held_out, data.answers, policy.tokenizer, options)
    horizons = _horizons(packed, options, place)
    options = {**options, "horizon": horizons[-1]}
    rows = spread_rows(usable_rows(packed, options, place), options["held_out"])
    maps, notes = {}, []
    start: CausalPolicy | None = None
    for feature, own in resolve_maps(options).items():
        if start is None and own.get("backbone") == "start":
            start, note = _start(policy, name, options)
            notes.append(note)
        made = choose("features", feature).build(policy, start or policy, **own)
        maps[feature] = made.embed
        notes.append(f"{feature}: {made.note}")
    asked = read_data(_elsewhere(options), training=False) if options["prompts_from"] is not None else data
    prompts = _prompts(asked, policy, options) if asked.answers else None
    if prompts is not None and (left_out := len(asked.held_out) - prompts.fitting):
        notes.append(f"{left_out} of {len(asked.held_out)} prompts are longer than --prompt-length and are left out")
    return Evaluation(options, place, data, rows, maps, horizons, prompts, notes)


def load(name: str, options: Mapping[str, Any]) -> CausalPolicy:
    """A policy to measure: an embedded name, a folder, a hub id or the folder of a run."""
    return CausalPolicy.from_pretrained(
        policy_folder(name),
        device=options["device"],
        dtype=options["dtype"],
        kernel=options["attention"],
        frozen=True,
    )


def measure(evaluation: Evaluation, policy: CausalPolicy, *, label: str, display: Display, stop) -> Measured:
    """One policy's totals on the evaluation's rows and prompts."""
    options, engine = evaluation.options, full_engine(policy)
    if options["stop"]:
        engine = stopping(engine, read=reader(policy.tokenizer), stop=options["stop"])
    return measure_policy(
        policy,
        build_sampler(policy, options, evaluation.sampler, answers=evaluation.data.answers),
        evaluation.maps,
        evaluation.rows,
        horizons=evaluation.horizons,
        batch_size=options["batch"],
        seed=options["seed"],
        scoring={"temperature": options["temperature"], "top_p": options["top_p"]},
        prompts=evaluation.prompts,
        engine=engine,
        decode=decoder(policy.tokenizer, stop=options["stop"] or ()),
        display=display,
        stop=stop,
        label=label,
    )


def bootstrap_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of `ebft.loops.evaluation.bootstrap.bootstrap`."""
    return {"replicates": options["bootstrap"], "level": options["level"], "seed": options["seed"]}


def new_folder(out: Path | None, what: str) -> Path:
    """The folder for results: --out, or a new one under runs/ named after the time.

    Raises:
        UsageError: it exists and is not empty.
    """
    out = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{what}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is not empty: choose another folder")
    return out


def load_data(options: Mapping[str, Any], explicit: Collection[str]) -> Data:
    """What --data names; refuses options of answers where there are no prompts, and other prompts that are none."""
    data = read_data(options, training=False)
    if options["prompts_from"] is not None:
        if not read_data(_elsewhere(options), training=False).answers:
            raise UsageError(
                f"--prompts-from {options['prompts_from']} is plain text: expected data with prompts and answers"
            )
    elif not data.answers:
        for name in _ANSWERS:
            if name in explicit:
                raise UsageError(
                    f"{flag(name)} is for data with prompts and answers, and --data {options['data']} is plain text"
                )
    return data


def _elsewhere(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the data of --prompts-from, all of its held-out part."""
    fields = dict.fromkeys((*FIELDS, "split"))
    return {**options, **fields, "data": options["prompts_from"]}


def _horizons(packed: TensorDictBase, options: Mapping[str, Any], place: Mapping[str, Mapping]) -> list[int]:
    """Those of --horizons, or powers of 2 up to the longest for which half of the rows have room."""
    if options["horizons"] is not None:
        return parse_numbers("horizons", options["horizons"])
    for longest in reversed(HORIZONS[1:]):
        try:
            room = len(usable_rows(packed, {**options, "horizon": longest}, place))
        except UsageError:
            continue
        if 2 * room >= len(packed):
            return [g for g in HORIZONS if g <= longest]
    return [1]


def parse_numbers(name: str, text: str) -> list[int]:
    """`1,2,4` to increasing whole numbers of 1 or more."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise UsageError(f"--{name} {text!r}: expected increasing whole numbers of 1 or more, such as 1,4,16")
    return numbers


def _start(policy: CausalPolicy, name: str, options: Mapping[str, Any]) -> tuple[CausalPolicy, str]:
    """The network of the features `hidden` and what to say about it."""
    trained = run_options(name)
    if trained is None:
        return policy, f"hidden states are those of {name}"
    began = trained["policy"]
    try:
        found = load(began, {**options, "attention": None})
    except UsageError as error:
        raise UsageError(f"--backbone start: {name} started from {began}, which cannot be loaded: {error}") from error
    return found, f"hidden states are those of {began}, which {name} started from"


def _prompts(data: Data, policy: CausalPolicy, options: Mapping[str, Any]) -> Prompts:
    length = options["prompt_length"] or options["length"]
    fitting = prompt_rows(data.held_out, policy.tokenizer, length=length, chat=options["chat"])  # type: ignore[arg-type]
    rows = spread_rows(fitting, options["prompts"])
    examples = [data.held_out[i] for i in rows[schema.EXAMPLE].tolist()]
    if policy.tokenizer.eos_token_id is None:
        raise UsageError("the policy's tokenizer has no EOS token, at which answers end")
    settings = {
        "samples": options["answers"],
        "max_new_tokens": options["max_new_tokens"],
        "ks": _ks(options),
        "eos": policy.tokenizer.eos_token_id,
        "test_prompt": options["test_prompt"],
        "fenced": bool(options["chat"]),
        "timeout": options["test_timeout"],
        "temperature": options["answer_temperature"],
        "top_p": options["top_p"],
    }
    return Prompts(rows, examples, settings, greedy=options["greedy"], fitting=len(fitting))  # type: ignore[arg-type]


def _ks(options: Mapping[str, Any]) -> list[int]:
    if options["k"] is None:
        return [k for k in KS if k <= options["answers"]]
    found = parse_numbers("k", options["k"])
    if found[-1] > options["answers"]:
        raise UsageError(f"--k {options['k']}: expected at most {options['answers']}, the number of --answers")
    return found


def _check(options: Mapping[str, Any]) -> None:
    check_ranges(options)
    check_anchors(options)
    check_sampling(temperature=options["temperature"], top_p=options["top_p"])
    check_sampling(temperature=options["answer_temperature"])
    least = {"rollouts": 2, "prompts": 1, "answers": 1, "max_new_tokens": 1, "bootstrap": 2, "test_timeout": 1e-3}
    least |= {"prompt_length": 1} if options["prompt_length"] is not None else {}
    for name, minimum in least.items():
        if options[name] < minimum:
            raise UsageError(f"{flag(name)} {options[name]}: expected a number >= {minimum}")
    if not 0 < options["level"] < 1:
        raise UsageError(f"--level {options['level']}: expected a share between 0 and 1, such as 0.95")
    if options["horizons"] is not None and parse_numbers("horizons", options["horizons"])[-1] >= options["length"]:
        raise UsageError(
            f"--horizons {options['horizons']} does not fit --length {options['length']}: a sequence needs context and"
            " a target"
        )
    check_stop(options)
    _ks(options)
    resolve_maps(options)
    if options["pooling"] == "none" and "hidden" in options["features"]:
        raise UsageError("--pooling none: features of tokens, which an evaluation does not compare; use last or mean")


def same_vocabulary(policies: Mapping[str, CausalPolicy]) -> None:
    """Check that token ids mean the same to all policies: they are measured on the same rows.

    Raises:
        UsageError: names the first that differs.
    """
    first, *others = policies.items()
    for name, policy in others:
        if policy.tokenizer.get_vocab() != first[1].tokenizer.get_vocab():
            raise UsageError(
                f"{name} has another tokenizer than {first[0]}, so the same tokens mean other text: their losses cannot"
                " be compared. Evaluate each alone"
            )
