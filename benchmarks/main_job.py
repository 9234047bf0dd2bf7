"""The README's first command over several seeds: what it does to held-out text, and how sure that is.

    python benchmarks/main_job.py OUT [SEED ...]

runs the command once for every seed (default 0 1 2) into OUT/seed-N, where that folder does not hold a finished run
already, and writes OUT/main_job.json and OUT/main_job.md with each seed's paired differences and the pooled ones.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.commands import command

METRICS = ("feature_matching_loss", "cross_entropy", "kl", "distinct_rollouts")


def pooled(rows: list[dict[str, float]]) -> tuple[float, float]:
    """Mean difference over seeds and its standard error, from the seeds' own (paired) standard errors."""
    errors = [row["standard_error"] for row in rows]
    return sum(row["difference"] for row in rows) / len(rows), math.sqrt(sum(e * e for e in errors)) / len(rows)


def table(results: dict[str, dict]) -> str:
    """Markdown: a row a metric, a column a seed, pooled last."""
    lines = ["| metric | " + " | ".join(f"seed {seed}" for seed in results) + " | pooled |"]
    lines.append("|---" * (len(results) + 2) + "|")
    for name in METRICS:
        rows = [result["metrics"][name] for result in results.values()]
        cells = [
            f"{r['before']:.4f} → {r['after']:.4f} ({r['difference']:+.4f} ± {r['standard_error']:.4f})" for r in rows
        ]
        difference, error = pooled(rows)
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {difference:+.4f} ± {error:.4f} |")
    return "\n".join(lines) + "\n"


def main(out: Path, seeds: list[str]) -> None:
    results, machine = {}, {}
    for seed in seeds:
        run = out / f"seed-{seed}"
        if not (run / "evaluation.json").exists():
            command("run", "--features", "sbert", "--sampler", "strided", "--seed", seed, "--out", str(run))
        results[seed] = json.loads((run / "evaluation.json").read_text())
        config = json.loads((run / "config.json").read_text())
        machine = {"machine": config["machine"], "versions": config["versions"], "options": config["options"]}
    text = table(results)
    (out / "main_job.json").write_text(json.dumps({**machine, "seeds": results}, indent=2) + "\n")
    (out / "main_job.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:] or ["0", "1", "2"])
