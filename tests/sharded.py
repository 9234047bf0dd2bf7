"""What several processes do with shared weights: `python -m tests.sharded FOLDER`, see `tests.processes`."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebft.components.optimizers import NOT_OF_SHARES, OPTIMIZERS
from ebft.distributed import joined, rank, size
from ebft.loading import add_adapters
from ebft.loops import checkpoint
from ebft.loops.average import Average
from ebft.policy import CausalPolicy
from ebft.sharding import ShardedModel, shard
from tests.models import tiny
from tests.processes import broken_run, in_halves, prepare, run_options, together, whole_run, whole_tensor

# Batches of 5 are shared out as 3 + 2 and 2 + 1 + 1 + 1 and scored by 2, those of 3 as 2 + 1 and 1 + 1 + 1 + 0.
KINDS: dict[str, dict[str, Any]] = {
    "full weights": {"batch": 5, "momentum": 0.9, "ema": 0.5, "entropy": 0.01},
    "adapters": {"batch": 3, "momentum": 0.9, "lora": 2, "lr": 0.5, "sampler": "random", "decay": 0.9}
    | {"whitening": "population", "micro_batch": 1},
    "exact divergence": {"batch": 3, "kl_mode": "exact", "checkpointing": True, "features": "ngram"},
}
COUNTS_OF = {"full weights": (2, 4), "adapters": (2, 4), "exact divergence": (2,)}
LONGER = {**KINDS["full weights"], "ema": None, "steps": 4}


def main(folder: Path) -> None:
    prepare()
    options = run_options(folder)
    results: dict[str, Any] = {}
    for kind, chosen in KINDS.items():
        for count in (1, *COUNTS_OF[kind]):
            work = partial(whole_run, options | chosen | {"shard": count > 1}, folder / f"{kind} {count}")
            results[kind, count] = together(count, work, folder)
    in_halves(options, folder, results, shard=True)
    resumed(options | LONGER, folder, results)
    for writers, readers in ((4, (2, 1)), (1, (2,))):
        states = folder / f"states {writers}"
        results["written", writers] = together(writers, partial(save_states, states), folder)
        results["read", writers] = [
            own for count in readers for own in together(count, partial(restore_states, states), folder)
        ]
    results["optimizers"] = together(2, optimizers, folder)
    torch.save(results, folder / "results.pt")


def resumed(options: dict[str, Any], folder: Path, results: dict[str, Any]) -> None:
    """A run of 4 that breaks after its 2nd step, and those of 2, of 1 and of 2 that no longer share."""
    sharded, out = options | {"shard": True}, folder / "broken"
    results["broken"] = together(4, partial(broken_run, sharded, out), folder)
    together(1, partial(whole_run, options, folder / "never broken"), folder)
    for count in (2, 1):
        copy = shutil.copytree(out, folder / f"mended {count}")
        results["mended", count] = together(count, partial(whole_run, sharded, copy, resume=True), folder)
    copy, how = shutil.copytree(out, folder / "mended unshared"), {"resume": True, "force": True, "explicit": ["shard"]}
    results["mended", "unshared"] = together(2, partial(whole_run, options | {"shard": False}, copy, **how), folder)


def _parts(seed: int) -> dict[str, Any]:
    """What a checkpoint is of, sharded if there are several processes: some matrices have fewer rows than there are."""
    policy = CausalPolicy(add_adapters(tiny("llama", seed=seed), rank=2, seed=seed))
    if size() > 1:
        shard(policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.1)
    return {"policy": policy, "optimizer": optimizer, "stateful": {"average": Average(policy, 0.5)}}


def _content(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint of `_parts` holds, whole."""
    found = {name: whole_tensor(w.detach()) for name, w in parts["policy"].trainable().items()}
    for place, own in parts["optimizer"].state_dict()["state"].items():
        found |= {f"{place} {key}": whole_tensor(value) for key, value in own.items()}
    averages = parts["stateful"]["average"].state_dict()
    return found | {f"average {name}": whole_tensor(value) for name, value in averages.items()}


def save_states(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of two updates by AdamW, with an average."""
    with joined():
        parts = _parts(seed=0)
        policy = parts["policy"]
        for step in range(2):
            parts["optimizer"].zero_grad()
            tokens = torch.arange(8)[None] + step + rank()
            with policy.plain() as model:
                forward = model if policy.sharded is None else partial(policy.sharded.forward, model)
                forward(tokens).logits.logsumexp(-1).sum().backward()
            parts["optimizer"].step()
            parts["stateful"]["average"].update()
        checkpoint.save(folder, 2, **parts)
        return _content(parts)


def restore_states(folder: Path) -> dict[str, torch.Tensor]:
    """The same from the checkpoint."""
    with joined():
        parts = _parts(seed=1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(parts["optimizer"], lambda step: 1.0)
        assert checkpoint.restore(folder, **parts, scheduler=scheduler) == 2
        return _content(parts)


def optimizers() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Weights after two updates by every optimizer that takes shares: of a plain model and of its sharded twin."""
    found = {}
    with joined():
        for name, component in OPTIMIZERS.items():
            if name in NOT_OF_SHARES:
                continue
            after = []
            for sharded in (False, True):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
                split = ShardedModel(model, [model[2]]) if sharded else None
                optimizer = component.build(model.parameters(), lr=0.01, **component.options)
                for step in range(2):
                    optimizer.zero_grad()
                    inputs = torch.arange(10.0).view(2, 5).sin() + step
                    if split is None:
                        model(inputs).sum().backward()
                    else:
                        split.forward(model, inputs[rank()][None]).sum().backward()
                    optimizer.step()
                after.append({name: whole_tensor(w.detach()) for name, w in model.named_parameters()})
            found[name] = tuple(after)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
