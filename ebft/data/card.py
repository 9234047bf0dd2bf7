"""The data card: what there is to know about data before training on it, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ebft.data.documents import Document
from ebft.data.examples import Example

Texts = Sequence[Example] | Sequence[Document]
QUANTILES = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "longest": 1.0}


def part_rows(part: str, items: Texts, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A row for each kind of text of a part (documents; prompts and answers), with its lengths in tokens.

    Returns:
        Dicts of part, what, count, tests (examples that have some), `QUANTILES` of lengths in tokens, tokens in all.
    """
    texts: dict[str, list[str]] = {}
    for item in items:
        fields = {"prompts": item.prompt, "answers": item.answer} if isinstance(item, Example) else {"texts": item.text}
        for what, text in fields.items():
            texts.setdefault(what, []).append(text)
    tests = sum(isinstance(item, Example) and bool(item.tests) for item in items)
    rows = []
    for what, own in texts.items():
        encoded = tokenizer(own, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        rows.append({"part": part, "what": what, "count": len(own), "tests": tests, **lengths(encoded)})
    return rows


def lengths(encoded: Sequence[Sequence[int]]) -> dict[str, int]:
    """`QUANTILES` of the lengths, each of them a length that occurs, and their total."""
    sizes = sorted(map(len, encoded))
    at = {name: sizes[min(int(q * len(sizes)), len(sizes) - 1)] for name, q in QUANTILES.items()}
    return {**at, "tokens": sum(sizes)}


def sample(items: Texts) -> Mapping[str, str]:
    """The example, or document, in the middle."""
    item = items[len(items) // 2]
    if isinstance(item, Document):
        return {"name": item.name, "text": item.text}
    return {"group": item.group, "prompt": item.prompt, "answer": item.answer, "tests": "\n".join(item.tests)}
