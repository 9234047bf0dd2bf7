"""A whole step on a GPU, stage by stage, against this card's ceilings and the authors' algorithm in the same run.

    python benchmarks/gpu.py [--model smollm2-135m,qwen2.5-0.5b,qwen2.5-1.5b] [--piece step,step-fast] [--minutes 9]

Models have the shapes of those names and random weights: speed does not ask what they have learnt. How far sampling and
scoring in bfloat16 are apart does: --policy measures the steps of a model with its own weights over text. Pieces:

    ceilings       matrix products and copies of memory: the most that this card gives
    step           steps of training (hidden features), all weights trained: time and memory by stage
    adapters       the same with LoRA, the weights below in bfloat16
    sft            steps of cross-entropy alone over the same sequences
    ...-fast, -flex   these with FlexAttention, and with sampling as one CUDA graph
    plan-...       what `plan` predicts of them
    decode-...     sampling by each way to decode: shrinking shapes, torch.compile, one CUDA graph
    kernel-...     scoring with backward by each attention kernel
    reference      the authors' algorithm: N copies of the row, a full forward pass for every token

Every piece runs in a process of its own and is saved when it is done. One that fails is saved with what stopped it, and
the next begins. Started again, it measures what has no result in OUT yet from the same machine and sizes, what failed
last; results from other machines and sizes stay. It ends after --minutes, and no piece may take more than 9: one that
was stopped because it began late comes first the next time, and fails if the time is not enough then either. With
`--device cpu --model tiny` everything that a CPU can do runs in a few minutes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_report, gpu_results
from benchmarks.gpu_jobs import MEASURED, MODELS, Job, Sizes
from benchmarks.gpu_pieces import OF_OWN_WEIGHTS, OF_THE_CARD, PIECES, failure, measure
from benchmarks.measure import in_fresh_process, machine
from ebft.errors import UsageError
from ebft.files import make_folder
from ebft.loading import choose_device

RESULTS = Path(__file__).parent / "results"
PIECE_SECONDS = 540.0


def jobs(models: list[str], policies: list[str], pieces: list[str], device: str, sizes: Sizes) -> list[Job]:
    """What is asked for: first what no model changes, then model by model."""
    card = [Job("", piece, device, sizes) for piece in pieces if piece in OF_THE_CARD]
    rest = [piece for piece in pieces if piece not in OF_THE_CARD]
    drawn = [Job(model, piece, device, sizes) for model in models for piece in rest]
    own = [p for p in rest if p in OF_OWN_WEIGHTS]
    return card + drawn + [Job(policy, piece, device, sizes, own=True) for policy in policies for piece in own]


def attempt(job: Job, limit: float, *, last: bool) -> dict[str, Any] | None:
    """What the piece gave, or what stopped it; None if time did, and it is to be tried again.

    Args:
        limit: seconds; last: there is no more time to be had, so that being stopped is its result.
    """
    try:
        # None: the system killed it, which it does when memory runs out
        return in_fresh_process(measure, job, limit=limit) or {"error": "the system killed the process"}
    except TimeoutError:
        return {"error": f"stopped after {limit / 60:g} minutes"} if last else None
    except Exception as error:
        return failure(error)


def main(
    model: Annotated[str, typer.Option(help=f"Some of {', '.join(MODELS)}.")] = ",".join(MEASURED),
    policy: Annotated[str, typer.Option(help="Embedded names or folders, measured with their own weights.")] = "",
    piece: Annotated[str, typer.Option(help="Some of the pieces, with commas between.")] = ",".join(PIECES),
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = Sizes.batch,
    micro_batch: Annotated[int, typer.Option(help="Sequences scored at once.")] = Sizes.micro_batch,
    length: Annotated[int, typer.Option(help="T, tokens of a sequence.")] = Sizes.length,
    horizon: Annotated[int, typer.Option(help="G, also the stride of the anchors.")] = Sizes.horizon,
    rollouts: Annotated[int, typer.Option(help="N.")] = Sizes.rollouts,
    steps: Annotated[int, typer.Option(help="Steps of training; the first two are not counted.")] = Sizes.steps,
    minutes: Annotated[float, typer.Option(help="End after so long, with what is done by then.")] = 9.0,
    again: Annotated[bool, typer.Option("--again", help="Also what has a result.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu.md.")] = RESULTS,
) -> None:
    """Measure a step of training on a GPU."""
    models, policies, pieces = ([one for one in asked.split(",") if one] for asked in (model, policy, piece))
    for name, asked, known in (("model", models, list(MODELS)), ("piece", pieces, list(PIECES))):
        if unknown := [one for one in asked if one not in known]:
            raise UsageError(f"--{name} {unknown[0]}: expected some of {', '.join(known)}")
    if steps < 3:
        raise UsageError(f"--steps {steps}: expected 3 or more, since the first two are not counted")
    sizes = Sizes(batch, length, horizon, rollouts, micro_batch, steps)
    where = machine(choose_device(device))
    make_folder(out)
    results, console = gpu_results.load(out), Console()
    entry = gpu_results.entry(results, where, sizes)
    start = time.perf_counter()
    wanted = jobs(models, policies, pieces, device, sizes)
    for number, job in enumerate(gpu_results.remaining(entry, wanted, again=again)):
        left = 60 * minutes - (time.perf_counter() - start)
        done, name = None, f"{job.label or 'the card'}, {job.piece}"
        if left > 0:
            console.log(name)
            # the first has all the time there is: were it not saved as failed, it would come first for ever
            done = attempt(job, min(left, PIECE_SECONDS), last=not number or left >= PIECE_SECONDS)
        if done is None:
            console.print(f"{minutes:g} minutes are over at {name}: run it again for the rest")
            break
        if "error" in done:
            console.print(f"  {done['error'].splitlines()[0]}", markup=False)
        gpu_results.put(entry, job, done)
        gpu_results.save(out, results)
        gpu_report.write(out, results)
    console.print(gpu_report.markdown(results), markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
