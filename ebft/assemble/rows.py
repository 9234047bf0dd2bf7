"""From options to rows of training and held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDictBase
from transformers import PreTrainedTokenizerBase

from ebft import schema
from ebft.data.documents import Document
from ebft.data.example_rows import count_unfit, pack_examples, prompt_rows
from ebft.data.examples import Example, Fields
from ebft.data.named import DATA_SETS, Parts, half, load_parts, training_half
from ebft.data.packing import pack
from ebft.errors import UsageError, flag
from ebft.samplers.anchors import strided

FIELDS = ("text_field", "prompt_field", "answer_field", "tests_field")  # what a file or hub data set calls its parts


@dataclass(frozen=True)
class Data:
    """What --data names, split: documents, or examples with answers to learn."""

    train: Sequence[Document] | Sequence[Example]
    held_out: Sequence[Document] | Sequence[Example]
    answers: bool

    def example(self, number: int) -> Example:
        """The example that a row of `whole_rows` comes from, by its entry `example`: of both sides in one count."""
        behind = number - len(self.train)
        return self.train[number] if behind < 0 else self.held_out[behind]  # type: ignore[return-value]


def read_data(options: Mapping[str, Any], *, training: bool = True) -> Data:
    """The training and the held-out side of --data; needs no model, so a bad path is found at once.

    Without `training`, data for evaluation alone will do: all of it is held out.

    Raises:
        UsageError: what the loaders raise, or an option that the data has no use for.
    """
    source, parts = options["data"], read_parts(options)
    if "training" not in parts and training:
        raise UsageError(f"--data {source} is for evaluation alone, never for training: choose other data")
    train: Any = parts.get("training", ())
    held_out = parts["held out"] if "training" in parts else parts["evaluation"]
    if options.get("split") is not None:
        held_out = half(held_out, options["split"])
    if options.get("train_half") is not None:
        train = training_half(train, options["train_half"])
    answers = isinstance(held_out[0], Example)
    if options["chat"] and not answers:
        raise UsageError(
            f"--chat is for examples, and --data {source} is plain text: give a .jsonl or .tsv file with the fields"
            " 'prompt' and 'answer'"
        )
    return Data(train, held_out, answers=answers)


def read_parts(options: Mapping[str, Any]) -> Parts:
    """The parts of --data, with its fields as the options of `FIELDS` name them.

    Raises:
        UsageError: what the loaders raise, or an option that the data has no use for.
    """
    source, text_field = options["data"], options["text_field"]
    given = {name.removesuffix("_field"): options[name] for name in FIELDS[1:] if options[name] is not None}
    if source in DATA_SETS:
        for name in FIELDS:
            if options[name] is not None:
                raise UsageError(
                    f"{_given(name, options)} names a field of a file or hub dataset, and --data {source} has fields of"
                    " its own: leave it out"
                )
    elif given and text_field is not None:
        raise UsageError(
            f"--text-field {text_field} is for plain text, and {_given(f'{next(iter(given))}_field', options)} for"
            " examples: leave out one of them"
        )
    return load_parts(source, fields=Fields(**given) if given else None, text_field=text_field)


def _given(name: str, options: Mapping[str, Any]) -> str:
    return f"{flag(name)} {options[name]}"


def pack_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    resolved: Mapping[str, Mapping],
    *,
    console: Console,
) -> tuple[TensorDictBase, TensorDictBase]:
    """Training rows, and --held-out rows of held-out text: batch size [M].

    Raises:
        UsageError: fewer training rows than one batch, or no row with room for an anchor.
    """
    if options["sampler"] == "full":
        train_rows, held_rows = whole_rows(data, tokenizer, options)
    else:
        train_rows, held_rows = (
            usable_rows(pack_part(part, data.answers, tokenizer, options), options, resolved)
            for part in (data.train, data.held_out)
        )
    if data.answers:
        shape = {"length": options["length"], "chat": options["chat"]}
        left_out, cut = count_unfit([*data.train, *data.held_out], tokenizer, **shape)  # type: ignore[list-item]
        if left_out or cut:
            console.print(
                f"--length {options['length']}: {left_out} examples do not fit and are left out, {cut} lose the end of"
                " their answers",
                highlight=False,
            )
    check_batch(train_rows, options)
    return train_rows, spread_rows(held_rows, options["held_out"])


def check_batch(rows: TensorDictBase, options: Mapping[str, Any]) -> None:
    """Refuse fewer training rows than one batch."""
    if options["batch"] > len(rows):
        raise UsageError(
            f"--batch {options['batch']}: the training text gives only {len(rows)} sequences of"
            f" --length {options['length']}. Give more text, or a smaller batch or length"
        )


def pack_part(part, answers: bool, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> TensorDictBase:
    """One side of the data as rows: examples whole, documents cut."""
    if answers:
        return pack_examples(part, tokenizer, length=options["length"], chat=options["chat"])
    return pack(part, tokenizer, length=options["length"])


def whole_rows(
    data: Data, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> tuple[TensorDictBase, TensorDictBase]:
    """Both sides with a prompt and its answer in a row; the entry `example` is the number of `Data.example`.

    Raises:
        UsageError: the data has no prompts.
    """
    check_prompts(data, options)
    shape = {"length": options["length"], "chat": options["chat"]}
    train, held_out = (prompt_rows(part, tokenizer, answers=True, **shape) for part in (data.train, data.held_out))  # type: ignore[arg-type]
    held_out[schema.EXAMPLE] += len(data.train)
    return train, held_out


def check_prompts(data: Data, options: Mapping[str, Any]) -> None:
    """Refuse plain text where whole answers are wanted."""
    if not data.answers:
        raise UsageError(
            f"--data {options['data']} is plain text, and whole answers want prompts: give qa-code, translation, or a"
            " .jsonl or .tsv file with the fields 'prompt' and 'answer'"
        )


def with_tests(data: Data, options: Mapping[str, Any], *, console: Console) -> Data:
    """The examples that have tests.

    Raises:
        UsageError: a side without any.
    """
    train, held_out = ([e for e in part if getattr(e, "tests", ())] for part in (data.train, data.held_out))
    for part, side in ((train, "training"), (held_out, "held-out")):
        if not part:
            raise UsageError(
                f"--verifier unit_tests: --data {options['data']} has no {side} examples with tests;"
                " --tests-field names the field of a file that holds them"
            )
    without = len(data.train) + len(data.held_out) - len(train) - len(held_out)
    if without:
        console.print(f"{without:,} examples without tests are left out", highlight=False)
    return Data(train, held_out, answers=data.answers)  # type: ignore[arg-type]


def usable_rows(rows: TensorDictBase, options: Mapping[str, Any], resolved: Mapping[str, Mapping]) -> TensorDictBase:
    """The rows in which at least one anchor fits, so that no batch is without one.

    Raises:
        UsageError: a sampler that places no anchors.
    """
    check_anchors(options)
    placement = {"stride": 1, "first": resolved["sampler"]["first"], "horizon": options["horizon"]}
    masks = {"answer_mask": rows.get(schema.ANSWER_MASK, None), "document_ids": rows[schema.DOCUMENT_IDS]}
    _, anchor_mask = strided(rows[schema.MASK], **masks, **placement)
    return rows[anchor_mask.any(1)]


def check_anchors(options: Mapping[str, Any]) -> None:
    """Refuse the sampler that places no anchors, where they are wanted."""
    if options.get("sampler") == "full":
        raise UsageError("--sampler full: here rollouts start at anchors, not at the end of prompts; use strided")


def spread_rows(rows: TensorDictBase, count: int) -> TensorDictBase:
    """`count` rows, the same ones for every seed, spread over the whole held-out text."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:count]]
