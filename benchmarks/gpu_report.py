"""The table of `benchmarks/gpu.py`, with the aims that it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebft.files import write_atomically

# Aims for a card of NVIDIA's Hopper generation: speed-up of a step over the authors' algorithm, share of the matrix
# products' ceiling in scoring with backward, a step over one of cross-entropy alone, GB of the largest model's step.
AIMS = {"speed-up": 8.0, "share": 0.4, "over_sft": 10.0, "gigabytes": 80.0}


def derived(results: dict[str, Any], model: str) -> dict[str, float]:
    """What follows from the pieces that are there: shares of the ceiling, speed-up, ratios."""
    pieces, sizes = results["models"].get(model, {}), results["sizes"]
    step, found = pieces.get("step", {}), {}
    if "seconds" not in step:
        return {}
    times = step["seconds"]
    found["gigabytes"] = step["peak_bytes"] / 1e9
    ceiling = pieces.get("ceilings", {}).get("tflops", {}).get(step["dtype"])
    if ceiling:
        work = step["operations"]
        found["share of sample"] = work["sample"] / times["sample"] / ceiling / 1e12
        found["share"] = work["score"] / (times["score"] + times["update"]) / ceiling / 1e12
        found["share of step"] = sum(work.values()) / times["step"] / ceiling / 1e12
    whole = pieces.get("reference", {}).get("seconds_of_a_sequence")
    if whole:
        found["speed-up"] = sizes["batch"] * sum(whole.values()) / times["step"]
    sft = pieces.get("sft", {}).get("seconds")
    if sft:
        found["over_sft"] = times["step"] / sft["step"]
    return found


def markdown(results: dict[str, Any]) -> str:
    """Tables of all models that there are results for."""
    sizes, where = results["sizes"], results["machine"]
    lines = [
        f"{where['device']}, {where['processor']}, torch {where['versions']['torch']}. Batch {sizes['batch']},"
        f" T={sizes['length']}, stride = first = G = {sizes['horizon']}, N={sizes['rollouts']}, scored"
        f" {sizes['micro_batch']} sequences at a time with recomputation. Random weights.",
        "",
        "| model | piece | sample s | embed s | reward s | score s | update s | step s | tokens/s | GB | mismatch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, pieces in results["models"].items():
        for piece in ("step", "adapters", "sft"):
            row = pieces.get(piece, {})
            if "seconds" in row:
                names = ("sample", "embed", "reward", "score", "update", "step")
                cells = [_number(row["seconds"].get(name)) for name in names]
                cells += [_number(row["tokens_per_second"]), _number(row["peak_bytes"] / 1e9), _number(row["mismatch"])]
                lines.append(f"| {model} | {piece} | " + " | ".join(cells) + " |")
    lines += ["", "| model | bf16 TFLOP/s | fp32 TFLOP/s | copy GB/s | " + " | ".join(_COLUMNS.values()) + " |"]
    lines.append("| --- | --- | --- | --- | " + " | ".join("---" for _ in _COLUMNS) + " |")
    for model, pieces in results["models"].items():
        tops, found = pieces.get("ceilings", {}), derived(results, model)
        speeds = [tops.get("tflops", {}).get(dtype) for dtype in ("bfloat16", "float32")]
        cells = [_number(value) for value in (*speeds, tops.get("gigabytes_per_second"))]
        cells += [_number(found.get(name)) for name in _COLUMNS]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| model | decode | sample s | first call s | GB | eager's tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, pieces in results["models"].items():
        for mode, row in pieces.get("decode", {}).items():
            if isinstance(row, dict) and "seconds" in row:
                values = (row["seconds"], row["first_seconds"], row["bytes"] / 1e9, row["same_tokens"])
                lines.append(f"| {model} | {mode} | " + " | ".join(map(_number, values)) + " |")
    lines += ["", "| model | kernel | score + backward s | GB |", "| --- | --- | --- | --- |"]
    for model, pieces in results["models"].items():
        for kernel, row in pieces.get("kernels", {}).items():
            if isinstance(row, dict) and "seconds" in row:
                name = kernel if row["backward"] else f"{kernel} (forward alone)"
                lines.append(f"| {model} | {name} | {_number(row['seconds'])} | {_number(row['bytes'] / 1e9)} |")
            elif isinstance(row, dict):
                lines.append(f"| {model} | {kernel} | out of memory | |")
    return "\n".join(lines) + "\n"


_COLUMNS = {
    "share of sample": "sampling / ceiling",
    "share": f"scoring + backward / ceiling (aim {AIMS['share']:.0%})",
    "share of step": "step / ceiling",
    "speed-up": f"over the authors' algorithm (aim {AIMS['speed-up']:g}×)",
    "over_sft": f"over an SFT step (aim below {AIMS['over_sft']:g})",
    "gigabytes": f"peak GB (aim below {AIMS['gigabytes']:g})",
}


def write(out: Path, results: dict[str, Any]) -> None:
    """gpu.md."""
    write_atomically(out / "gpu.md", markdown(results).encode())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
