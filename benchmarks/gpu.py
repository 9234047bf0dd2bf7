"""A whole step on a GPU, stage by stage, against this card's ceilings and the authors' algorithm in the same run.

    python benchmarks/gpu.py [--model smollm2-135m,qwen2.5-0.5b,qwen2.5-1.5b] [--piece ceilings,step,...] [--minutes 8]

Models have the shapes of those names and random weights: speed does not ask what they have learnt. Pieces:

    ceilings    matrix products and copies of memory: the most that this card gives
    step        steps of training as `run` takes them (hidden features), all weights trained: time and memory by stage
    adapters    the same with LoRA, the weights below in bfloat16
    sft         steps of cross-entropy alone over the same sequences
    decode      sampling by each way to decode: shrinking shapes, torch.compile, one CUDA graph
    kernels     scoring with backward by each attention kernel
    reference   the authors' algorithm: N copies of the row, a full forward pass for every token

Every piece of a model runs in a process of its own and is saved when it is done; those that OUT holds from the same
machine and sizes are not run again. No piece is begun after --minutes, so that a machine lent for a while
gives something whole: start it again for the rest. With `--device cpu --model tiny` everything runs in a minute.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from tensordict import TensorDict

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_report, reference_algorithm
from benchmarks.contestants import Choice, random_tokens
from benchmarks.measure import in_fresh_process, machine, peak_increase, peak_of_process, seconds
from ebft import schema
from ebft.errors import UsageError
from ebft.features.hidden import hidden
from ebft.features.module import as_module
from ebft.files import make_folder, write_json
from ebft.loading import choose_device
from ebft.loops.train import train
from ebft.objectives import EBFTLoss, kernel_values
from ebft.objectives.component import objective
from ebft.planning.products import operations, sampling_products, scoring_products, weights
from ebft.planning.speed import Device
from ebft.policy import CausalPolicy
from ebft.samplers import sampler
from ebft.samplers.anchors import strided
from ebft.static_decode import DECODES

RESULTS = Path(__file__).parent / "results"
_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "smollm2-135m": {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        **{"max_position_embeddings": 8192},
    },
    "qwen2.5-0.5b": {
        **_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14
    },
    "qwen2.5-1.5b": {
        **_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12
    },
}  # fmt: skip
MEASURED = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b")
PIECES = ("ceilings", "step", "adapters", "sft", "decode", "kernels", "reference")
STAGES = ("sample", "embed", "reward", "score", "update", "step")


@dataclass(frozen=True)
class Sizes:
    """B sequences of T tokens, anchors every G, N rollouts; `micro_batch` sequences are scored at once."""

    batch: int = 16
    length: int = 1024
    horizon: int = 8
    rollouts: int = 4
    micro_batch: int = 4
    steps: int = 5  # the first two are not counted: they pay what is paid once


@dataclass(frozen=True)
class Job:
    """One piece of one model, for a process of its own."""

    model: str
    piece: str
    device: str
    sizes: Sizes

    def policy(self, *, lora: int = 0, kernel: str | None = None, decode: str = "eager") -> CausalPolicy:
        """The model with random weights."""
        choice = Choice("config:" + json.dumps(MODELS[self.model]), device=self.device, lora=lora)
        policy = choice.load()
        policy.checkpointing = True
        if kernel is not None:
            policy.kernel = policy._choose_kernel(kernel)
        policy.static = policy._choose_decoder(decode)
        return policy

    def rows(self, policy: CausalPolicy) -> TensorDict:
        """B rows of random tokens."""
        tokens = random_tokens(policy, (self.sizes.batch, self.sizes.length)).cpu()
        return TensorDict(
            {
                schema.TOKENS: tokens,
                schema.MASK: torch.ones_like(tokens, dtype=torch.bool),
                schema.DOCUMENT_IDS: torch.zeros_like(tokens),
                schema.SEQUENCE_IDS: torch.arange(len(tokens)),
            },
            batch_size=[len(tokens)],
        )

    @property
    def place(self) -> Any:
        """Where anchors stand."""
        return partial(strided, stride=self.sizes.horizon, first=self.sizes.horizon, horizon=self.sizes.horizon)


def ceilings(job: Job) -> dict[str, Any]:
    """TFLOP/s of products in both precisions, GB/s of copies."""
    device = Device(choose_device(job.device))
    large = device.device.type == "cuda"
    source = torch.empty((2**30 if large else 2**24) // 4, device=device.device)
    target = torch.empty_like(source)
    copied = device.seconds(lambda: target.copy_(source))
    found = {str(dtype)[6:]: device.throughput(dtype) / 1e12 for dtype in (torch.bfloat16, torch.float32)}
    return {"tflops": found, "gigabytes_per_second": 2 * source.nbytes / copied / 1e9}


def step(job: Job, *, lora: int = 0, rollouts: bool = True) -> dict[str, Any]:
    """Median times by stage of steps of training, peak memory, and how many operations their products are."""
    policy = job.policy(lora=lora)
    sizes, reference = job.sizes, policy.reference()
    pipeline: dict[str, Any] = {}
    if rollouts:
        engine = sampler(job.place, policy.sample, horizon=sizes.horizon, rollouts=sizes.rollouts)
        features = as_module(hidden(reference, layers=[0.25, 0.5, 0.75]), documents=True)
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
    found = {
        "seconds": times,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in records),
        "peak_bytes": torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else peak_of_process(),
        "weights": sum(p.numel() for p in policy.causal_lm.parameters()),
        "trained": sum(p.numel() for p in policy.trainable().values()),
        "dtype": str(policy.autocast or next(policy.model.parameters()).dtype)[6:],
        "mismatch": statistics.median(record["sampler_mismatch"] for record in records) if rollouts else None,
    }
    return found | {"operations": work(job, policy) if rollouts else None}


def work(job: Job, policy: CausalPolicy) -> dict[str, int]:
    """Operations of the products of a step's sampling, embedding and scoring with backward, all weights trained."""
    sizes = job.sizes
    layers, head = weights(policy)
    mask = torch.ones(1, sizes.length, dtype=torch.bool)
    shape = {"length": sizes.length, "count": job.place(mask)[0].shape[1], "rollouts": sizes.rollouts}
    shape |= {"horizon": sizes.horizon, "head_rows": policy.head_rows}
    body = operations([(weight, 1) for weight in layers])
    tokens = sizes.length + shape["count"] * sizes.rollouts * sizes.horizon
    each = {
        "sample": operations(sampling_products(layers, head, **shape)),
        "embed": int(0.75 * body * tokens),
        "score": 3 * operations(scoring_products(layers, head, **shape)),
    }
    return {name: count * sizes.batch for name, count in each.items()}


def decode(job: Job) -> dict[str, Any]:
    """Seconds of sampling a batch, first call and best of three later ones, bytes, and the share of eager's tokens."""
    found: dict[str, Any] = {}
    tokens = None
    for mode in DECODES:
        try:
            policy = job.policy(decode=mode)
        except UsageError as error:
            found[mode] = {"refused": str(error)}
            continue
        rows = job.rows(policy).to(policy.device)
        given = rows[schema.TOKENS], rows[schema.MASK], *job.place(rows[schema.MASK])
        options = {"rollouts": job.sizes.rollouts, "horizon": job.sizes.horizon, "seed": 0}
        sample = partial(policy.sample, *given, **options)
        first, (drawn, _, _) = seconds(sample, policy.device)
        tokens = drawn if tokens is None else tokens
        found[mode] = {
            "first_seconds": first,
            "seconds": min(seconds(sample, policy.device)[0] for _ in range(3)),
            "bytes": peak_increase(sample, policy.device),
            "same_tokens": float((drawn == tokens).float().mean()),
            "graphs": 0 if policy.static is None else policy.static.graphs,
        }
        del policy, sample
        gc.collect()
    return found


def kernels(job: Job) -> dict[str, Any]:
    """Seconds and bytes of scoring one micro-batch, with backward where the kernel has one on this device."""
    found: dict[str, Any] = {}
    for kernel in ("chunked", "flex", "dense"):
        policy = job.policy(kernel=kernel)
        backward = kernel != "flex" or policy.device.type == "cuda"
        rows = min(job.sizes.micro_batch, job.sizes.batch)
        tokens = random_tokens(policy, (rows, job.sizes.length))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        given = tokens, mask, *job.place(mask)
        drawn = random_tokens(policy, (*given[2].shape, job.sizes.rollouts, job.sizes.horizon))

        def score(policy=policy, given=given, drawn=drawn, backward=backward) -> None:
            policy.model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(backward):
                log_prob, own = policy.score(*given, drawn, torch.ones_like(drawn, dtype=torch.bool))
            if backward:
                (log_prob.sum() + own.sum()).backward()

        try:
            score()
            taken = min(seconds(score, policy.device)[0] for _ in range(3))
            found[kernel] = {"seconds": taken, "bytes": peak_increase(score, policy.device), "backward": backward}
        except torch.OutOfMemoryError:
            found[kernel] = {"out_of_memory": True}
        del policy, score
        gc.collect()
    return found


def reference(job: Job) -> dict[str, Any]:
    """Seconds of the authors' algorithm for one sequence: sampling, embedding, scoring with backward."""
    policy = job.policy()
    policy.checkpointing = False
    tokens = random_tokens(policy, (1, job.sizes.length))
    anchors, _ = job.place(torch.ones_like(tokens, dtype=torch.bool))
    drawn = random_tokens(policy, (*anchors.shape, job.sizes.rollouts, job.sizes.horizon))
    options = {"rollouts": job.sizes.rollouts, "horizon": job.sizes.horizon, "seed": 0}

    def score() -> None:
        policy.model.zero_grad(set_to_none=True)
        for part in drawn.split(1, 2):  # a copy of the row at a time, which needs the least memory
            with policy.plain() as model:
                log_prob, own = reference_algorithm.score(model, tokens, anchors, part)
                (log_prob.sum() + own.sum()).backward()

    with policy.plain() as model:
        calls: dict[str, Callable[[], Any]] = {
            "sample": lambda: reference_algorithm.sample(model, tokens, anchors, **options),
            "embed": lambda: reference_algorithm.hidden_states(model, tokens, anchors, drawn, [1]),
        }
        found = {name: _second(call, policy.device) for name, call in calls.items()}
    return {"seconds_of_a_sequence": {**found, "score and update": _second(score, policy.device)}}


def _second(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the second of two calls."""
    call()
    return seconds(call, device)[0]


def measure(job: Job) -> dict[str, Any]:
    """One piece."""
    pieces: dict[str, Callable[[Job], dict[str, Any]]] = {
        "ceilings": ceilings,
        "step": step,
        "adapters": partial(step, lora=16),
        "sft": partial(step, rollouts=False),
        "decode": decode,
        "kernels": kernels,
        "reference": reference,
    }
    start = time.perf_counter()
    return {**pieces[job.piece](job), "seconds_in_all": time.perf_counter() - start}


def main(
    model: Annotated[str, typer.Option(help=f"Some of {', '.join(MODELS)}.")] = ",".join(MEASURED),
    piece: Annotated[str, typer.Option(help="Some of the pieces, with commas between.")] = ",".join(PIECES),
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = Sizes.batch,
    micro_batch: Annotated[int, typer.Option(help="Sequences scored at once.")] = Sizes.micro_batch,
    length: Annotated[int, typer.Option(help="T, tokens of a sequence.")] = Sizes.length,
    horizon: Annotated[int, typer.Option(help="G, also the stride of the anchors.")] = Sizes.horizon,
    rollouts: Annotated[int, typer.Option(help="N.")] = Sizes.rollouts,
    steps: Annotated[int, typer.Option(help="Steps of training; the first two are not counted.")] = Sizes.steps,
    minutes: Annotated[float, typer.Option(help="Begin no piece after so long.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu.md.")] = RESULTS,
) -> None:
    """Measure a step of training on a GPU."""
    for name, asked, known in (("model", model, MODELS), ("piece", piece, PIECES)):
        if unknown := [one for one in asked.split(",") if one not in known]:
            raise UsageError(f"--{name} {unknown[0]}: expected some of {', '.join(known)}")
    if steps < 3:
        raise UsageError(f"--steps {steps}: expected 3 or more, since the first two are not counted")
    sizes = Sizes(batch, length, horizon, rollouts, micro_batch, steps)
    results: dict[str, Any] = {"machine": machine(choose_device(device)), "sizes": asdict(sizes)}
    make_folder(out)
    path, console, start = out / "gpu.json", Console(), time.perf_counter()
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    same = all(earlier.get(key) == value for key, value in results.items())
    results["models"] = earlier["models"] if same else {}
    jobs = [Job(m, p, device, sizes) for m in model.split(",") for p in piece.split(",")]
    for job in jobs:
        done = results["models"].setdefault(job.model, {})
        if job.piece in done:
            continue
        if time.perf_counter() - start > 60 * minutes:
            console.print(f"{minutes:g} minutes are over before {job.model}, {job.piece}: run it again for the rest")
            break
        console.log(f"{job.model}: {job.piece}")
        # None: the system killed it, which it does when memory runs out
        done[job.piece] = in_fresh_process(measure, job) or {"killed": True}
        write_json(path, results)
        gpu_report.write(out, results)
    console.print(gpu_report.markdown(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
