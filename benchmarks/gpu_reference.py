"""The authors' algorithm on a GPU, with as much of the batch at once as there is memory for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import reference_algorithm
from benchmarks.contestants import random_tokens
from benchmarks.gpu_jobs import Job
from benchmarks.measure import seconds


def portions(sequences: int, copies: int) -> Iterator[tuple[int, int]]:
    """How many sequences, and copies of each, to try at once: all, then half of what there is, down to one."""
    while True:
        yield sequences, copies
        if sequences > 1:
            sequences //= 2
        elif copies > 1:
            copies //= 2
        else:
            return


def largest(run: Callable[[int, int], Any], sequences: int, copies: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the second call with the largest portion that fits into memory, that portion, and why no larger one.

    Raises:
        RuntimeError: one copy of one sequence does not fit.
    """
    found: dict[str, Any] = {}
    for portion in portions(sequences, copies):
        try:
            run(*portion)
            taken, _ = seconds(lambda portion=portion: run(*portion), device)
            return {"seconds": taken, "sequences": portion[0], "copies": portion[1], **found}
        except RuntimeError as error:  # of memory, or of a kernel that counts with 32 bits
            if portion == (1, 1):
                raise
            found = {"larger": f"{type(error).__name__}: {str(error)[:200]}"}
        # here and not above: the exception holds the tensors of every frame that it went through
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("portions end with (1, 1)")


def reference(job: Job) -> dict[str, Any]:
    """Seconds for the whole batch by stage, in proportion to the largest portion of it that fits, and that portion.

    Nothing is computed again on the way back, and there are no states of an optimizer: it has more memory, and does
    less, than the step that it is held against.
    """
    policy = job.policy(checkpointing=False)
    sizes = job.sizes
    tokens = random_tokens(policy, (sizes.batch, sizes.length))
    anchors, _ = job.place(torch.ones_like(tokens, dtype=torch.bool))
    drawn = random_tokens(policy, (*anchors.shape, sizes.rollouts, sizes.horizon))

    def sample(sequences: int, copies: int) -> None:
        with policy.plain() as model:
            reference_algorithm.sample(
                model, tokens[:sequences], anchors[:sequences], rollouts=copies, horizon=sizes.horizon, seed=0
            )

    def embed(sequences: int, copies: int) -> None:
        with policy.plain() as model:
            part = tokens[:sequences], anchors[:sequences], drawn[:sequences, :, :copies]
            reference_algorithm.hidden_states(model, *part, [1])

    def score(sequences: int, copies: int) -> None:
        policy.model.zero_grad(set_to_none=True)
        with policy.plain() as model:
            part = tokens[:sequences], anchors[:sequences], drawn[:sequences, :, :copies]
            log_prob, own = reference_algorithm.score(model, *part)
            (log_prob.sum() + own.sum()).backward()

    found: dict[str, Any] = {"seconds": {}, "at_once": {}}
    for name, run in (("sample", sample), ("embed", embed), ("score and update", score)):
        part = largest(run, sizes.batch, sizes.rollouts, policy.device)
        share = part["sequences"] * part["copies"] / (sizes.batch * sizes.rollouts)
        found["seconds"][name] = part.pop("seconds") / share
        found["at_once"][name] = part
    return found
