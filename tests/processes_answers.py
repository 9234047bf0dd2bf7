"""Runs of whole answers in one process and in two, which share the weights, or judge some while they draw others.

`python -m tests.processes_answers FOLDER` leaves FOLDER/results.pt. See `tests.processes`, whose harness this is.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ebft.commands.derived import run_defaults
from tests.processes import prepare, together, whole_run
from tests.runs import write_tiny_model

COUNTS = (1, 2)

# Batches of 3 are shared out as 2 + 1.
KINDS: dict[str, dict[str, Any]] = {
    "rlvr": {"method": "rlvr", "updates": 2, "drop_zero_spread": True},
    "mixed": {
        **{"method": "mixed", "stride": 3, "first": 2, "horizon": 3, "features": "hidden", "kl": 0.1},
        **{"answer_weight": 0.5, "answer_schedule": "linear_decay"},
    },
}

# Of two processes: the first has two rows of three, and so two parts.
VARIANTS: dict[str, dict[str, Any]] = {"shared": {"shard": True}, "overlapped": {"overlap": 2}}


def options_of(folder: Path) -> dict[str, Any]:
    """Options of a tiny run on prompts with answers, rewarded for the characters that they have in common."""
    model = folder / "model"
    model.mkdir()
    write_tiny_model(model)
    lines = [{"prompt": f"def f{i}(x):\n    return", "answer": f" x + {i}\n    # end\n"} for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "own.py").write_text(
        "def overlap(texts, answers):\n    return [len(set(t) & set(a)) for t, a in zip(texts, answers)]\n"
    )
    return run_defaults() | {
        "policy": str(model), "data": str(folder / "prompts.jsonl"), "device": "cpu", "dtype": "float32", "lora": 0,
        "length": 48, "rollouts": 4, "max_new_tokens": 7, "verifier": f"{folder / 'own.py'}:overlap", "steps": 2,
        "batch": 3, "micro_batch": 1, "held_out": 3, "save_every": 2, "optimizer": "sgd", "lr": 0.1,
    }  # fmt: skip


def main(folder: Path) -> None:
    prepare()
    options, results = options_of(folder), {}
    for kind, chosen in KINDS.items():
        for count in COUNTS:
            results[kind, count] = together(
                count, partial(whole_run, options | chosen, folder / f"{kind} {count}"), folder
            )
        for name, more in VARIANTS.items():
            run = partial(whole_run, options | chosen | more, folder / f"{kind} {name}")
            results[kind, name] = together(2, run, folder)
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
