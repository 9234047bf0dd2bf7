"""The tables of `benchmarks/gpu.py`, with the aims that it is held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft.files import write_atomically

# Aims for a card of NVIDIA's Hopper generation: speed-up of a step over the authors' algorithm, share of the matrix
# products' ceiling in scoring with backward, a step over one of cross-entropy alone, GB of the largest model's step.
AIMS = {"speed-up": 8.0, "share": 0.4, "over_sft": 10.0, "gigabytes": 80.0}
STEPS = ("step", "step-fast", "adapters", "adapters-fast", "sft", "sft-flex")
_STAGES = ("sample", "embed", "reward", "score", "update", "step")
_PLANNED = ("sample", "embed", "score", "update", "step")
_DERIVED = {
    "share of sample": "sampling / ceiling",
    "share": f"scoring + backward / ceiling (aim {AIMS['share']:.0%})",
    "share of step": "step / ceiling",
    "speed-up": f"over the authors' algorithm (aim {AIMS['speed-up']:g}×)",
    "over_sft": f"over an SFT step (aim below {AIMS['over_sft']:g})",
    "gigabytes": f"peak GB (aim below {AIMS['gigabytes']:g})",
}

Row = Sequence[str | float | None]


def derived(entry: Mapping[str, Any], model: str, piece: str = "step") -> dict[str, float]:
    """What follows for a step from the pieces that are there: shares of the ceiling, speed-up, ratios.

    The step of cross-entropy that it is held against is the fastest that there is.
    """
    pieces = _good(entry["models"].get(model, {}))
    if piece not in pieces:
        return {}
    step = pieces[piece]
    times, found = step["seconds"], {"gigabytes": step["peak_bytes"] / 1e9}
    ceiling = _good(entry["card"]).get("ceilings", {}).get("tflops", {}).get(step["dtype"])
    if ceiling:
        work = step["operations"]
        found["share of sample"] = work["sample"] / times["sample"] / ceiling / 1e12
        found["share"] = work["score"] / (times["score"] + times["update"]) / ceiling / 1e12
        found["share of step"] = sum(work.values()) / times["step"] / ceiling / 1e12
    if "reference" in pieces:
        found["speed-up"] = sum(pieces["reference"]["seconds"].values()) / times["step"]
    alone = [pieces[name]["seconds"]["step"] for name in ("sft", "sft-flex") if name in pieces]
    if alone:
        found["over_sft"] = times["step"] / min(alone)
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of all machines and sizes."""
    return "\n".join(_of_entry(entry) for entry in results["entries"])


def _of_entry(entry: Mapping[str, Any]) -> str:
    sizes, where, models = entry["sizes"], entry["machine"], entry["models"]
    text = [
        f"## {where['device']}, {where['processor']}, torch {where['versions']['torch']}",
        "",
        f"Batch {sizes['batch']}, T={sizes['length']}, stride = first = G = {sizes['horizon']}, N={sizes['rollouts']},"
        f" scored {sizes['micro_batch']} sequences at a time with recomputation. Weights are random, so that the"
        " mismatch between sampling and scoring says nothing of a trained model, unless a row says `own weights`.",
        "",
    ]
    tops = _good(entry["card"]).get("ceilings")
    if tops:
        speeds = " and ".join(f"{value:.3g} TFLOP/s in {dtype}" for dtype, value in tops["tflops"].items())
        text += [f"Ceilings: {speeds}; copies {tops['gigabytes_per_second']:.3g} GB/s.", ""]
    columns = [f"{name} s" for name in _STAGES]
    text += _table(["model", "piece", *columns, "tokens/s", "GB", "mismatch"], _steps(models))
    text += _table(["model", "piece", *_DERIVED.values()], _ratios(entry))
    sides = [f"{name} s planned | taken" for name in _PLANNED]
    text += _table(["model", "piece", "GB planned | taken", *sides], _plans(models))
    text += _table(["model", "decode", "sample s", "first call s", "GB", "eager's tokens"], _decodes(models))
    text += _table(["model", "kernel", "score + backward s", "GB"], _kernels(models))
    text += _table(
        ["model", "the authors' algorithm", "s of a batch", "sequences · copies at once"], _reference(models)
    )
    text += _table(["model", "piece that failed", "why"], _failures(entry))
    return "\n".join(text)


def _steps(models: Mapping[str, Any]) -> Iterator[Row]:
    for model, name, row in _named(models, STEPS):
        times = [row["seconds"].get(stage) for stage in _STAGES]
        yield [model, name, *times, row["tokens_per_second"], row["peak_bytes"] / 1e9, row["mismatch"]]


def _ratios(entry: Mapping[str, Any]) -> Iterator[Row]:
    for model, name, _ in _named(entry["models"], ("step", "step-fast")):
        found = derived(entry, model, name)
        yield [model, name, *(found.get(column) for column in _DERIVED)]


def _plans(models: Mapping[str, Any]) -> Iterator[Row]:
    for model, name, row in _named(models, [f"plan-{name}" for name in STEPS]):
        name = name.removeprefix("plan-")
        taken = _good(models[model]).get(name, {"peak_bytes": None, "seconds": {}})
        cells = [f"{_cell(side['peak_bytes'], 1e9)}" for side in (row, taken)]
        for stage in _PLANNED:
            cells += [_cell(side["seconds"].get(stage)) for side in (row, taken)]
        yield [model, name, *cells]


def _decodes(models: Mapping[str, Any]) -> Iterator[Row]:
    for model, name, row in _named(models, [f"decode-{mode}" for mode in ("eager", "compile", "graph")]):
        values = row["seconds"], row["first_seconds"], row["bytes"] / 1e9, row["same_tokens"]
        yield [model, name.removeprefix("decode-"), *values]


def _kernels(models: Mapping[str, Any]) -> Iterator[Row]:
    for model, name, row in _named(models, [f"kernel-{kernel}" for kernel in ("chunked", "flex", "dense")]):
        name = name.removeprefix("kernel-") + ("" if row["backward"] else " (forward alone)")
        yield [model, name, row["seconds"], row["bytes"] / 1e9]


def _reference(models: Mapping[str, Any]) -> Iterator[Row]:
    for model, _, row in _named(models, ["reference"]):
        for stage, taken in row["seconds"].items():
            part = row["at_once"][stage]
            yield [model, stage, taken, f"{part['sequences']} · {part['copies']}"]


def _failures(entry: Mapping[str, Any]) -> Iterator[Row]:
    for model, pieces in {"the card": entry["card"], **entry["models"]}.items():
        for name, row in pieces.items():
            if "error" in row:
                first = next(iter(row["error"].splitlines()), "")
                yield [model, name, first[:300].replace("|", "\\|")]


def _good(pieces: Mapping[str, Any]) -> dict[str, Any]:
    """Those that did not fail."""
    return {name: row for name, row in pieces.items() if "error" not in row}


def _named(models: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for model, pieces in models.items():
        for name in names:
            if name in _good(pieces):
                yield model, name, pieces[name]


def _table(columns: Sequence[str], rows: Iterator[Row]) -> list[str]:
    """A table with a line after it; nothing without rows."""
    lines = ["| " + " | ".join(x if isinstance(x, str) else _cell(x) for x in row) + " |" for row in rows]
    header = "| " + " | ".join(columns) + " |"
    return [header, "|" + " --- |" * (header.count("|") - 1), *lines, ""] if lines else []


def _cell(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def write(out: Path, results: Mapping[str, Any]) -> None:
    """gpu.md."""
    write_atomically(out / "gpu.md", markdown(results).encode())
