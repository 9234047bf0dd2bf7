"""The pieces of `benchmarks/gpu.py`: each a function of a job, for a process of its own."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.contestants import random_tokens
from benchmarks.gpu_jobs import Job
from benchmarks.gpu_reference import reference
from benchmarks.measure import peak_increase, peak_of_process, seconds
from ebft import schema
from ebft.features.hidden import hidden
from ebft.features.module import as_module
from ebft.loading import choose_device, choose_precision
from ebft.loops.train import train
from ebft.objectives import EBFTLoss, kernel_values
from ebft.objectives.component import objective
from ebft.planning.memory import Kind, Work
from ebft.planning.plan import Step, predict
from ebft.planning.products import operations, sampling_products, scoring_products, weights
from ebft.planning.speed import Device
from ebft.policy import CausalPolicy
from ebft.samplers import sampler
from ebft.static_decode import DECODES

STAGES = ("sample", "embed", "reward", "score", "update", "step")
LAYERS = (0.25, 0.5, 0.75)  # of the feature map
COPIES = 10  # of memory, one after the other
FAST = {"kernel": "flex", "decode": "graph"}
STEPS: dict[str, dict[str, Any]] = {
    "step": {},
    "step-fast": FAST,
    "adapters": {"lora": 16},
    "adapters-fast": {"lora": 16, **FAST},
    "sft": {"rollouts": False},
    "sft-flex": {"rollouts": False, "kernel": "flex"},
}


def ceilings(job: Job) -> dict[str, Any]:
    """TFLOP/s of products in both precisions, GB/s of copies."""
    device = Device(choose_device(job.device))
    large = device.device.type == "cuda"
    source = torch.empty((2**30 if large else 2**24) // 4, device=device.device)
    target = torch.empty_like(source)
    copied = device.seconds(lambda: [target.copy_(source) for _ in range(COPIES)]) / COPIES
    found = {str(dtype)[6:]: device.throughput(dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32)}
    return {"tflops": found, "gigabytes_per_second": 2 * source.nbytes / copied / 1e9}


def step(
    job: Job, *, lora: int = 0, rollouts: bool = True, kernel: str = "chunked", decode: str = "eager"
) -> dict[str, Any]:
    """Median times by stage of steps of training, peak memory, and how many operations their products are."""
    policy = job.policy(lora=lora, kernel=kernel, decode=decode)
    sizes, frozen = job.sizes, policy.reference()
    pipeline: dict[str, Any] = {}
    if rollouts:
        engine = sampler(job.place, policy.sample, horizon=sizes.horizon, rollouts=sizes.rollouts)
        features = as_module(hidden(frozen, layers=LAYERS), documents=True)
        pipeline = {"sample": engine, "embed": features, "reward": objective(kernel_values, estimator="rloo")}
    loss = EBFTLoss(policy_gradient_coefficient=float(rollouts), cross_entropy_coefficient=1.0)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6)
    records = list(
        train(
            policy, pipeline, loss, job.rows(policy), optimizer=optimizer, steps=sizes.steps, seed=0,
            batch_size=sizes.batch, micro_batch=sizes.micro_batch,
        )
    )[2:]  # fmt: skip
    times = {
        stage: statistics.median(record[f"time_{stage}"] for record in records)
        for stage in STAGES
        if f"time_{stage}" in records[0]
    }
    return {
        "seconds": times,
        "kernel": kernel,
        "decode": decode if rollouts else None,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in records),
        "peak_bytes": torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else peak_of_process(),
        "weights": sum(p.numel() for p in policy.causal_lm.parameters()),
        "trained": sum(p.numel() for p in policy.trainable().values()),
        "dtype": str(policy.autocast or next(policy.model.parameters()).dtype)[6:],
        "mismatch": statistics.median(record["sampler_mismatch"] for record in records) if rollouts else None,
        "operations": work(job, policy) if rollouts else None,
    }


def work(job: Job, policy: CausalPolicy) -> dict[str, int]:
    """Operations of the products of a step's sampling, embedding and scoring with backward, all weights trained."""
    sizes = job.sizes
    layers, head = weights(policy)
    shape = {"length": sizes.length, "count": job.anchors, "rollouts": sizes.rollouts, "horizon": sizes.horizon}
    body = operations([(weight, 1) for weight in layers])
    tokens = sizes.length + shape["count"] * sizes.rollouts * sizes.horizon
    each = {
        "sample": operations(sampling_products(layers, head, head_rows=policy.head_rows, **shape)),
        "embed": int(max(LAYERS) * body * tokens),
        "score": 3 * operations(scoring_products(layers, head, **shape)),
    }
    return {name: count * sizes.batch for name, count in each.items()}


def plan(job: Job, *, lora: int = 0, rollouts: bool = True, decode: str = "eager") -> dict[str, Any]:
    """What `ebft.planning` says of the same step: bytes at the worst moment, and seconds by stage."""
    device, config, sizes = choose_device(job.device), job.config(), job.sizes
    dtype, autocast = choose_precision("auto", device)
    # the kernel is left open: the plan's probes run on a CPU, where `flex` has no gradient
    kind = Kind(autocast if lora and autocast else dtype, autocast, lora, None, True)
    shape = (sizes.length, job.anchors, sizes.rollouts, sizes.horizon)
    whole = Work(sizes.batch, *shape)
    found = predict(
        config,
        kind,
        Step(
            sampled=whole,
            measured=whole,
            scored=Work(min(sizes.micro_batch, sizes.batch), *shape),
            parts=-(-sizes.batch // sizes.micro_batch),
            rollouts=rollouts,
            depth=max(LAYERS) if rollouts else 0.0,
            taps=len(LAYERS) * config.get_text_config().hidden_size * (autocast or dtype).itemsize,
            captured=decode == "graph",
        ),
        make_optimizer=partial(torch.optim.AdamW, lr=1e-6),
        device=device,
    )
    return {"peak_bytes": found.peak, "seconds": {**found.seconds, "step": found.step}}


def decode(job: Job, *, mode: str) -> dict[str, Any]:
    """Seconds of sampling a batch, first call and best of three later ones, bytes, and the share of eager's tokens."""
    policy = job.policy(decode=mode)
    rows = job.rows(policy).to(policy.device)
    given = rows[schema.TOKENS], rows[schema.MASK], *job.place(rows[schema.MASK])
    options = {"rollouts": job.sizes.rollouts, "horizon": job.sizes.horizon, "seed": 0}
    sample = partial(policy.sample, *given, **options)
    first, (drawn, _, _) = seconds(sample, policy.device)
    found = {
        "first_seconds": first,
        "seconds": min(seconds(sample, policy.device)[0] for _ in range(3)),
        "bytes": peak_increase(sample, policy.device),
        "graphs": 0 if policy.static is None else policy.static.graphs,
    }
    policy.static = None
    return found | {"same_tokens": float((drawn == sample()[0]).float().mean())}


def kernel(job: Job, *, name: str) -> dict[str, Any]:
    """Seconds and bytes of scoring one micro-batch, with backward where the kernel has one on this device."""
    policy = job.policy(kernel=name)
    backward = name != "flex" or policy.device.type == "cuda"
    tokens = random_tokens(policy, (min(job.sizes.micro_batch, job.sizes.batch), job.sizes.length))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    given = tokens, mask, *job.place(mask)
    drawn = random_tokens(policy, (*given[2].shape, job.sizes.rollouts, job.sizes.horizon))

    def score() -> None:
        policy.model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            log_prob, own = policy.score(*given, drawn, torch.ones_like(drawn, dtype=torch.bool))
        if backward:
            (log_prob.sum() + own.sum()).backward()

    score()
    taken = min(seconds(score, policy.device)[0] for _ in range(3))
    return {"seconds": taken, "bytes": peak_increase(score, policy.device), "backward": backward}


PLANNED = ("step", "step-fast", "adapters", "sft")
PIECES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "ceilings": ceilings,
    **{name: partial(step, **options) for name, options in STEPS.items()},
    "reference": reference,
    **{f"plan-{name}": partial(plan, **{k: v for k, v in STEPS[name].items() if k != "kernel"}) for name in PLANNED},
    **{f"decode-{mode}": partial(decode, mode=mode) for mode in DECODES},
    **{f"kernel-{name}": partial(kernel, name=name) for name in ("chunked", "flex", "dense")},
}
OF_THE_CARD = ("ceilings",)  # which no model changes
OF_OWN_WEIGHTS = ("step", "step-fast")  # where it matters what a model has learnt: the mismatch


def measure(job: Job) -> dict[str, Any]:
    """One piece, or {"error": ...} with what stopped it."""
    start = time.perf_counter()
    try:
        found = PIECES[job.piece](job)
    except Exception as error:  # whatever it is: the next piece is measured, and this one again another time
        return failure(error)
    return {**found, "seconds_in_all": time.perf_counter() - start}


def failure(error: Exception) -> dict[str, Any]:
    """What is kept of a piece that failed."""
    said = str(error).strip()
    return {
        "error": f"{type(error).__name__}: {said}"[:1000],
        "traceback": "".join(traceback.format_exception(error))[-4000:],
    }
