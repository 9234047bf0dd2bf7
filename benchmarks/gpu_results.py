"""gpu.json: what was measured, an entry for each machine and sizes, so that none takes the place of another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_jobs import Job, Sizes
from ebft.errors import UsageError
from ebft.files import write_json

Results = dict[str, list[dict[str, Any]]]


def load(out: Path) -> Results:
    """The results in the folder, none if there are none.

    Raises:
        UsageError: a file that holds something else, which saving would destroy.
    """
    path = out / "gpu.json"
    if not path.exists():
        return {"entries": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for one in found["entries"]:
            _ = one["machine"], one["sizes"], one["card"], one["models"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--out {out}: {path} does not hold results of this benchmark; give another folder") from error
    return found


def entry(results: Results, machine: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The entry of a machine and sizes, a new one if there is none yet.

    The platform may differ: it names the build of the system's kernel, which differs between machines that are lent.
    """

    def kind(where: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in where.items() if name != "platform"}

    for found in results["entries"]:
        if kind(found["machine"]) == kind(machine) and found["sizes"] == asdict(sizes):
            return found
    results["entries"].append({"machine": machine, "sizes": asdict(sizes), "card": {}, "models": {}})
    return results["entries"][-1]


def pieces(entry: dict[str, Any], job: Job) -> dict[str, Any]:
    """Where the results of the job's model are, or of the card."""
    return entry["models"].setdefault(job.label, {}) if job.label else entry["card"]


def put(entry: dict[str, Any], job: Job, found: dict[str, Any]) -> None:
    """Keep what was found. A result stays where a later attempt failed."""
    own = pieces(entry, job)
    if "error" not in found or "error" in own.get(job.piece, {"error": ""}):
        own[job.piece] = found


def remaining(entry: dict[str, Any], jobs: Sequence[Job], *, again: bool) -> list[Job]:
    """The jobs that have no result: those never tried, then those that failed, so that none of these blocks the rest.

    `again`: then those that have one, too.
    """
    known = [pieces(entry, job).get(job.piece) for job in jobs]
    ranks = [0 if found is None else 1 if "error" in found else 2 for found in known]
    return [job for rank in range(2 + again) for job, own in zip(jobs, ranks, strict=True) if own == rank]


def save(out: Path, results: Results) -> None:
    """gpu.json, whole or not at all."""
    write_json(out / "gpu.json", results)
