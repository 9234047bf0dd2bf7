"""The results of `benchmarks/sampling.py` as Markdown, and where they are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebft.files import write_atomically

MIB = 2**20


def write(out: Path, results: dict[str, Any]) -> None:
    """OUT/sampling.json and OUT/sampling.md; a reader never meets half of one."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "sampling.json", (json.dumps(results, indent=2) + "\n").encode())
    write_atomically(out / "sampling.md", markdown(results).encode())


def read(out: Path) -> dict[str, Any]:
    """What OUT/sampling.json holds; nothing when there is none."""
    path = out / "sampling.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def markdown(results: dict[str, Any]) -> str:
    """Where it was measured, and one table for each kind of result there is."""
    machine, choice = results["machine"], results["choice"]
    weights = f"LoRA of rank {choice['lora']}" if choice["lora"] else "all weights trained"
    where = machine["device"] if machine["device"] != "cpu" else machine["processor"]
    parts = [
        f"{choice['policy']}, {weights}, computed in {results['compute_dtype']}; {where}, {machine['threads']} threads,"
        f" torch {machine['versions']['torch']}. The reference scores {results['reference_copies']} copies at once."
        " Same tokens: the share of rollout tokens that both draw with the same random numbers.\n"
    ]
    if results["rows"]:
        parts.append(comparison(results["rows"]))
    if results["curve"]:
        parts.append(curve(results["curve"], results["growth"]))
    if results["memory"]:
        parts.append(memory(results["memory"]))
    return "\n".join(parts)


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every setting and stage."""
    head = (
        *("setting", "stage", "reference s", "ours s", "speed-up", "floor s", "ours/floor"),
        *("reference tokens", "ours tokens", "reference MiB", "ours MiB", "same tokens", "runs"),
    )
    lines = [
        (
            *(row["setting"], row["stage"], f"{row['reference_s']:.3g}", f"{row['ours_s']:.3g}"),
            *(f"{row['reference_s'] / row['ours_s']:.1f}×", f"{row['floor_s']:.3g}"),
            *(f"{row['ours_s'] / row['floor_s']:.2f}", str(row["reference_token_forwards"])),
            *(str(row["ours_token_forwards"]), peak(row, "reference"), peak(row, "ours")),
            f"{row['same_tokens']:.2%}" if "same_tokens" in row else "–",
            f"{row['reference_repeats']}, {row['ours_repeats']}",
        )
        for row in rows
    ]
    return table(head, lines)


def curve(points: Sequence[dict[str, Any]], growth: dict[str, float]) -> str:
    """A line for every length, and the exponents below."""
    head = ["setting"]
    for part in ("sampling", "scoring"):
        head += [f"{part} s", f"{part} tokens", f"{part} ms/token"]
    lines = []
    for point in points:
        line = [point["setting"]]
        for part in ("sampling", "scoring"):
            elapsed, tokens = point[f"{part}_s"], point[f"{part}_token_forwards"]
            line += [f"{elapsed:.3g}", str(tokens), f"{1000 * elapsed / tokens:.3g}"]
        lines.append(line)
    exponents = " and ".join(f"{part} as tokens^{exponent:.2f}" for part, exponent in growth.items())
    return table(head, lines) + (f"\nTime grows: {exponents}.\n" if growth else "")


def memory(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every setting."""
    lines = []
    for row in rows:
        known = row["ours_peak"] and row["plain_peak"]
        ratio = f"{row['ours_peak'] / row['plain_peak']:.2f}" if known else "–"
        lines.append((row["setting"], peak(row, "ours"), peak(row, "plain"), ratio))
    return table(("setting", "scoring MiB", "plain causal pass MiB", "ratio"), lines)


def peak(row: dict[str, Any], name: str) -> str:
    """MiB; – while not measured, `killed` where the process was."""
    value = row.get(f"{name}_peak", "–")
    return "killed" if value is None else value if value == "–" else f"{value / MIB:.0f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
