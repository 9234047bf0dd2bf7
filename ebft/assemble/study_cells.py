"""The cells of a study: training runs and evaluations, what each needs of those before it, and what they left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ebft.assemble.evaluate import evaluate_from_options
from ebft.assemble.run import run_from_options
from ebft.assemble.starts import same_start
from ebft.errors import UsageError
from ebft.loops.ablation.study import DONE, NEW, Run, refuse_other_options, state, stored_options
from ebft.loops.history import HELD_OUT
from ebft.loops.report_curves import read_metrics
from ebft.loops.study.arms import ARMS, BASE
from ebft.loops.study.choice import choose, criterion
from ebft.loops.study.measured import Cost, Found, read_tested
from ebft.loops.study.plots import CURVES


@dataclass(frozen=True)
class Training(Run):
    """A run of an arm; the learning rate of one that is no candidate, and where it starts, are known when it begins."""

    arm: str = ""
    seed: int = 0
    lr: float | None = None


@dataclass(frozen=True)
class Testing(Run):
    """The evaluation on the test half of what an arm trained; which policy that is, is known when it begins."""

    arm: str = ""
    seed: int = 0


@dataclass
class Plan:
    """A whole study.

    Attributes:
        options: arm -> options of its runs; evaluation: options of every evaluation; base: the policy.
        grids: arm -> learning rates to choose from, by runs of the first seed.
        in_a_row: arm -> examples in a row, in the mean.
        by: name of the criterion; choices: those made so far, arm -> as `choice.choose` gives it.
    """

    out: Path
    arms: Sequence[str]
    seeds: Sequence[int]
    options: Mapping[str, Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    base: str
    grids: Mapping[str, Sequence[float]]
    by: str
    in_a_row: Mapping[str, float]
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cells(self) -> list[Run]:
        """All cells in their order: each arm's candidates, its other runs, its evaluations."""
        found: list[Run] = []
        for arm in self.arms:
            if arm == BASE:
                found.append(self._testing(arm, None))
                continue
            found += self.candidates(arm)
            rest = self.seeds if arm not in self.grids else self.seeds[1:]
            found += [self._training(arm, seed) for seed in rest]
            found += [self._testing(arm, seed) for seed in self.seeds]
        return found

    def candidates(self, arm: str) -> list[Training]:
        """The runs that its learning rate is chosen from; none of an arm that takes that of another one."""
        seed = self.seeds[0]
        return [
            self._training(arm, seed, lr=rate, folder=self.out / "runs" / arm / f"lr-{rate:g}" / f"seed-{seed}")
            for rate in self.grids.get(arm, ())
        ]

    def rate(self, arm: str) -> float:
        """The learning rate of an arm, chosen now if it has not been yet.

        Raises:
            UsageError: none of its candidates finished, or they have not been run.
        """
        arm = ARMS[arm].rate_of or arm
        if arm not in self.choices:
            metric, better = criterion(ARMS[arm], self.by)
            folders = {run.lr: run.folder for run in self.candidates(arm) if run.lr is not None}
            seed = self.seeds[0]
            self.choices[arm] = {**choose(folders, metric=metric, better=better), "split": "validation", "seed": seed}
        return self.choices[arm]["lr"]

    def final(self, arm: str, seed: int) -> Path:
        """The folder of the run of an arm and a seed at the learning rate chosen."""
        if arm in self.grids and seed == self.seeds[0]:
            rate = self.rate(arm)
            return next(run.folder for run in self.candidates(arm) if run.lr == rate)
        return self.out / "runs" / arm / f"seed-{seed}"

    def complete(self, run: Training) -> dict[str, Any]:
        """The options of a run, with those that wait for other runs.

        Raises:
            UsageError: what it waits for failed.
        """
        options = {**run.options, "lr": self.rate(run.arm) if run.lr is None else run.lr}
        before = ARMS[run.arm].after
        if before is not None:
            options["policy"] = str(_finished(self.final(before, run.seed)))
        return options

    def _training(self, arm: str, seed: int, *, lr: float | None = None, folder: Path | None = None) -> Training:
        name = f"{ARMS[arm].title}, seed {seed}" + (f", lr {lr:g}" if lr is not None else "")
        options = {**self.options[arm], "seed": seed, **({} if lr is None else {"lr": lr})}
        return Training(name, options, folder or self.final(arm, seed), arm, arm=arm, seed=seed, lr=lr)

    def _testing(self, arm: str, seed: int | None) -> Testing:
        folder = self.out / "test" / arm
        name = f"{ARMS[arm].title}, test"
        if seed is None:
            return Testing(name, self.evaluation, folder, "test", arm=arm, seed=self.seeds[0])
        return Testing(f"{name}, seed {seed}", self.evaluation, folder / f"seed-{seed}", "test", arm=arm, seed=seed)


def cell_state(run: Run) -> str:
    """Whether a cell is new, begun or done.

    Raises:
        UsageError: its folder holds a run or evaluation with other options.
    """
    if isinstance(run, Training):
        return state(run)
    path = run.folder / "evaluation.json"
    if not path.is_file():
        return NEW
    refuse_other_options(run, stored_options(path))
    return DONE


def begin_cell(plan: Plan, run: Run, resume: bool, console: Console) -> None:
    """Train or measure; as `ebft.loops.ablation.study.Begin`."""
    if isinstance(run, Testing):
        policy = plan.base if run.arm == BASE else str(_finished(plan.final(run.arm, run.seed)))
        options = {**run.options, "policy": policy}
        shutil.rmtree(run.folder, ignore_errors=True)  # what a kill left; an evaluation begins anew
        # not those of a policy's own run: all arms are measured alike, answers end where the study says
        explicit = {"data", "length", *(["stop"] if run.options["greedy"] else [])}
        evaluate_from_options(options, explicit=explicit, out=run.folder, console=console)
        return
    assert isinstance(run, Training)
    options = plan.complete(run)
    before = None if resume else same_start([other for other in plan.cells() if isinstance(other, Training)], options)
    run_from_options(options, explicit=set(options), out=run.folder, resume=resume, console=console, before=before)


def collect(plan: Plan, failures: Mapping[str, str]) -> Found:
    """Everything that there is by now."""
    tested: dict[str, dict] = {arm: {} for arm in plan.arms}
    costs: dict[str, dict[int, Cost]] = {}
    curves: dict[str, dict] = {}
    for arm in plan.arms:
        if arm == BASE:
            one = read_tested(plan.out / "test" / arm)
            tested[arm] = {} if one is None else dict.fromkeys(plan.seeds, one)
            continue
        if _undecided(plan, arm):
            continue
        for seed in plan.seeds:
            one = read_tested(plan.out / "test" / arm / f"seed-{seed}")
            if one is not None:
                tested[arm][seed] = one
            folder = plan.final(arm, seed)
            cost = _cost(folder, plan.in_a_row[arm])
            if cost is None:
                continue
            before = ARMS[arm].after
            earlier = Cost(0, 0, 0.0) if before is None else costs[before][seed]
            costs.setdefault(arm, {})[seed] = earlier + cost
            curves.setdefault(arm, {})[seed] = _curve(folder, plan.in_a_row[arm], offset=earlier.examples)
    search = {arm: _search(plan, arm) for arm in plan.grids if not _undecided(plan, arm)}
    return Found(tested, costs, search, plan.choices, curves, failures)


def tidy(plan: Plan, *, drop_policies: bool) -> None:
    """Remove what takes much room and nobody needs any more: checkpoints of finished runs, policies of candidates that
    were not chosen, and with `drop_policies` each policy once it has been measured."""
    for run in plan.cells():
        if not isinstance(run, Training) or cell_state(run) != DONE:
            continue
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        if run.arm in plan.grids and run.arm not in plan.choices:
            continue
        rejected = run.lr is not None and run.folder != plan.final(run.arm, run.seed)
        users = [run.arm, *(arm for arm in plan.arms if ARMS[arm].after == run.arm)]
        measured = [(plan.out / "test" / arm / f"seed-{run.seed}" / "evaluation.json").is_file() for arm in users]
        if rejected or (drop_policies and all(measured)):
            shutil.rmtree(run.folder / "policy", ignore_errors=True)


def _undecided(plan: Plan, arm: str) -> bool:
    return (ARMS[arm].rate_of or arm) not in plan.choices


def _finished(folder: Path) -> Path:
    if not (folder / "evaluation.json").is_file():
        raise UsageError(f"{folder}, which this starts from, did not finish")
    return folder


def _cost(folder: Path, in_a_row: float) -> Cost | None:
    if not (folder / "evaluation.json").is_file():
        return None
    step = _read(folder / "evaluation.json")["stages"]["step"]
    config = _read(folder / "config.json")
    examples = round(config["steps"] * config["options"]["batch"] * in_a_row)
    return Cost(examples, step["tokens"], step["seconds"])


def _search(plan: Plan, arm: str) -> float:
    """Seconds of the training of the candidates that were not chosen."""
    chosen = plan.final(arm, plan.seeds[0])
    costs = [_cost(run.folder, 1.0) for run in plan.candidates(arm) if run.folder != chosen]
    return sum(cost.seconds for cost in costs if cost is not None)


def _curve(folder: Path, in_a_row: float, *, offset: int) -> dict[str, list[tuple[float, float]]]:
    """Metric -> (examples seen, value on the validation half) of a finished run, its start and end at the least.

    Feature matching is left out where the run does not measure it.
    """
    config = _read(folder / "config.json")
    if (folder / HELD_OUT).is_file():
        steps, columns = read_metrics(folder / HELD_OUT)
        points = {metric: list(zip(steps, columns[metric], strict=True)) for metric in CURVES if metric in columns}
    else:
        metrics = _read(folder / "evaluation.json")["metrics"]
        ends = {metric: (metrics[metric]["before"], metrics[metric]["after"]) for metric in CURVES if metric in metrics}
        points = {metric: [(0, before), (config["steps"], after)] for metric, (before, after) in ends.items()}
    examples = config["options"]["batch"] * in_a_row
    return {metric: [(offset + step * examples, value) for step, value in own] for metric, own in points.items()}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
