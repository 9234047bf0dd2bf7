"""The results of `benchmarks/estimators.py` as JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import nan
from pathlib import Path
from typing import Any

from ebft.files import write_atomically
from ebft.objectives.baselines import ESTIMATORS

Row = Mapping[str, Any]
MAIN = 4  # N of the table over kernels


def write(out: Path, results: Mapping[str, Any], *, plot: Path | None) -> None:
    """OUT/estimators.json, OUT/estimators.md and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "estimators.json", _compact(results).encode())
    write_atomically(out / "estimators.md", markdown(results).encode())
    if plot is not None:
        draw(results["rows"], plot)


def _compact(results: Mapping[str, Any]) -> str:
    """JSON with a line for each row, numbers to 5 digits."""

    def rounded(value: Any) -> Any:
        return [None if x is None else float(f"{x:.5g}") for x in value] if isinstance(value, list) else value

    rows = [json.dumps({name: rounded(value) for name, value in row.items()}) for row in results["rows"]]
    head = json.dumps({name: value for name, value in results.items() if name != "rows"})
    return f'{head[:-1]}, "rows": [\n' + ",\n".join(rows) + "\n]}\n"


def markdown(results: Mapping[str, Any]) -> str:
    """How it was measured; a table over N for the plain dot product, and one over kernels and whitenings."""
    config = results["collection"]
    contexts = len({row["rollouts"] for row in results["rows"]})
    lines = [
        "# Estimators of the policy gradient",
        "",
        f"{config['policy']}, {config['sequences'] - results['calibration_sequences']} sequences of {config['length']}"
        f" tokens of {config['data']}, {config['rollouts']} rollouts of {config['horizon']} tokens from each of their"
        f" contexts; {config['projections']} projections of the gradient of all linear layers;"
        f" {results['repeats']} partitions into groups, seed {results['seed']}, {contexts} group sizes."
        " `python benchmarks/estimators.py FOLDER --collect`. What the columns mean stands at the head of that file;"
        " ± is half a 95 % interval.",
    ]
    for features in config["features"]:
        lines += ["", f"## Features {features}", "", "Dot product, no whitening:", ""]
        head = ("N", "estimator", "variance", "scale", "cosine", "speed-up", "over rloo", "texts anew")
        lines += [*_head(head), *(_line(str(r["rollouts"]), r) for r in _rows(results, features, kernel="linear"))]
        lines += ["", f"Speed-up over no baseline at N = {MAIN} (cosine of a biased estimate in brackets):", ""]
        names = [name for name in ESTIMATORS if name != "none"]
        lines += _head(("kernel", "whitening", *names))
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in _rows(results, features, size=MAIN, whitening=None):
            place = cells.setdefault((row["kernel"], row["whitening"]), {})
            biased = row["estimator"] in ("mean", "group_norm")
            place[row["estimator"]] = _pair(row["speed_up"]) + (f" ({_pair(row['cosine'])})" if biased else "")
        lines += [f"| {' | '.join([*key, *(cells[key][name] for name in names)])} |" for key in cells]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Rollouts needed for an equal error, by N; a panel for each feature map."""
    from matplotlib.figure import Figure

    maps = list(dict.fromkeys(row["features"] for row in rows))
    figure = Figure(figsize=(5.2 * len(maps), 4.2), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for panel, features in zip(panels, maps, strict=True):
        chosen = [r for r in rows if (r["features"], r["kernel"], r["whitening"]) == (features, "linear", "none")]
        start = next(r for r in chosen if r["estimator"] == "none" and r["rollouts"] == MAIN)
        for estimator in ESTIMATORS:
            own = [r for r in chosen if r["estimator"] == estimator]
            free = {r["rollouts"]: r["variance"][0] for r in chosen if r["estimator"] == "none"}
            sizes = [r["rollouts"] for r in own]
            variances = [r["rollouts"] * (free[r["rollouts"]] or nan) / (r["speed_up"][0] or nan) for r in own]
            needed = [variance / (MAIN * (start["variance"][0] or nan)) for variance in variances]
            shown = [value if value > 0 else nan for value in needed]  # too noisy to say
            panel.plot(sizes, shown, marker="o", label=estimator)
        panel.set(title=f"features {features}", xlabel="rollouts per context, N", xscale="log")
        if any(value > 0 for line in panel.lines for value in line.get_ydata()):
            panel.set_yscale("log")
        panel.set_xticks(sizes, [str(n) for n in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"rollouts for equal error\n(no baseline, N = {MAIN}: 1)")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _rows(
    results: Mapping[str, Any],
    features: str,
    *,
    size: int | None = None,
    kernel: str | None = None,
    whitening: str | None = "none",
) -> Iterator[Row]:
    wanted = {"features": features, "rollouts": size, "kernel": kernel, "whitening": whitening}
    for row in results["rows"]:
        if all(value is None or row[name] == value for name, value in wanted.items()):
            yield row


def _head(names: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _line(first: str, row: Row) -> str:
    numbers = (_pair(row[name]) for name in ("variance", "scale", "cosine", "speed_up", "over_rloo", "speed_up_texts"))
    return f"| {first} | {row['estimator']} | {' | '.join(numbers)} |"


def _pair(value: list[float | None]) -> str:
    number, width = ("–" if x is None else f"{x:.{digits}g}" for x, digits in zip(value, (3, 2), strict=True))
    return f"{number} ± {width}"
