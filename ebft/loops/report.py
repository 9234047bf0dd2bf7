"""What a run leaves for people: `samples.md`, and one self-contained `report.html` with the curves as `report.png`."""

from __future__ import annotations

import json
import math
import string
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from ebft.errors import UsageError
from ebft.files import write_atomically
from ebft.loops.history import HELD_OUT, REWARDS
from ebft.loops.report_curves import (
    TIME_PREFIX,
    Curve,
    build_curves,
    curve_svg,
    curves_png,
    held_out_curves,
    read_metrics,
    smoothing_span,
)
from ebft.loops.report_frame import number
from ebft.loops.report_profile import LEGEND as PROFILE_LEGEND
from ebft.loops.report_profile import check_profile, profile_rows, profile_svg
from ebft.loops.report_rewards import read_rewards, rewards_svg
from ebft.loops.report_samples import COLOURS, LEGEND, samples_html, samples_markdown
from ebft.loops.report_table import bars, table
from ebft.loops.report_verdict import aligned, better_direction, verdict

_STEP_TIME = "time_step"
_TIMING = (TIME_PREFIX, "tokens_per_second")


def write_samples(samples: list[dict[str, Any]], path: str | PathLike[str]) -> Path:
    """Write held-out samples as Markdown: prefix tail, ground truth, rollouts before and after with their rewards.

    Args:
        samples: list of `{"prefix": str, "target": str, "before": [{"text": str, "reward": float}], "after": [...]}`;
            `before` and `after` may be missing, a reward may be None or NaN. A rollout may also have `tokens` (texts
            that make up its text) with an `advantage` each, which the report colours.
        path: file to write; replaced as a whole.

    Raises:
        UsageError: a sample has another form.
    """
    path = Path(path)
    write_atomically(path, samples_markdown(samples).encode())
    return path


def write_report(run_dir: str | PathLike[str]) -> Path:
    """Write `report.html` and `report.png` into a run's folder and return the path of the former.

    Reads `metrics.csv`, and `rewards.csv`, `config.json`, `evaluation.json`, `samples.json` and `profile.json` (see
    `report_profile.check_profile`) where they are there, so that it also serves a run that is still going on or was
    interrupted. The page needs no network and no script.

    Raises:
        UsageError: there is no `metrics.csv`, or a file does not have the form that the training loop writes.
    """
    folder = Path(run_dir)
    steps, columns = read_metrics(folder / "metrics.csv")
    curves = [*build_curves(steps, columns), *held_out_curves(folder / HELD_OUT)]
    evaluation = _read_json(folder / "evaluation.json", dict)
    name = folder.resolve().name
    body = [
        _section("Before and after", _verdicts(evaluation)),
        _section("Loss over the horizon", _profile(_read_json(folder / "profile.json", dict))),
        _section("Training", _panels(steps, columns, curves, *read_rewards(folder / REWARDS))),
        _section("Where the time goes", _step_times(curves) + _stage_times(evaluation)),
        _section("Samples", _samples(_read_json(folder / "samples.json", list))),
        _section("Record", _record(_read_json(folder / "config.json", dict), evaluation)),
    ]
    template = string.Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(name), facts=_facts(steps, columns, evaluation), body="\n".join(body))
    write_atomically(folder / "report.png", curves_png(curves, title=name))
    write_atomically(folder / "report.html", page.encode("utf-8", errors="backslashreplace"))
    return folder / "report.html"


def _read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, or an empty `kind` where there is no such file."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON ({error}): mend or remove it") from error
    if not isinstance(content, kind):
        raise UsageError(f"{str(path)!r} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def _records(evaluation: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    records = evaluation.get(key, {})
    if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
        raise UsageError(f"evaluation.json: {key!r} is {records!r}, expected {{name: {{entry: number}}}}")
    return records


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>\n" if content else ""


def _facts(steps: list[int], columns: dict[str, list[float]], evaluation: dict[str, Any]) -> str:
    facts = [f"{len(steps):,} training steps" if len(steps) != 1 else "1 training step"]
    seconds = sum(t for t in columns.get(_STEP_TIME, []) if math.isfinite(t))
    if seconds:
        facts.append(f"{number(seconds / 60, 3)} min" if seconds >= 60 else f"{number(seconds, 3)} s")
    for key, words in (("n_sequences", "held-out sequences"), ("n_anchors", "anchors")):
        if isinstance(evaluation.get(key), int):
            facts.append(f"{evaluation[key]:,} {words}")
    return " · ".join(facts)


def _value(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def _verdicts(evaluation: dict[str, Any]) -> str:
    metrics = _records(evaluation, "metrics")
    if not metrics:
        return '<p class="muted">Not evaluated: the run has no evaluation.json with metrics (yet).</p>'
    rows = []
    for name, record in metrics.items():
        keys = ("before", "after", "difference", "standard_error")
        before, after, difference, error = (_value(record, key) for key in keys)
        words, css = verdict(name, difference, error)
        better = better_direction(name)
        sign = "+" if difference > 0 else ""
        rows.append([
            escape(name.replace("_", " ")),
            f'<span class="{css}">{words}</span><small>{f"{better} is better" if better else "not judged"}</small>',
            aligned(before, error),
            aligned(after, error),
            f"{sign}{aligned(difference, error)} ± {aligned(error, error)}",
        ])  # fmt: skip
    note = (
        "Held-out data. The difference is after − before, ± its paired standard error; a change within two standard"
        " errors counts as no difference shown."
    )
    header = ["metric", "verdict", "before", "after", "difference"]
    return table(header, rows, numbers=(2, 3, 4), stack=True) + f'<p class="muted">{note}</p>'


def _profile(content: dict[str, Any]) -> str:
    profile = check_profile(content)
    if not profile:
        return ""
    key = '<span><i class="key before"></i>before <i class="key after"></i>after</span>'
    panel = f"<figure><figcaption><b>feature matching</b>{key}</figcaption>{profile_svg(profile)}</figure>"
    rows = table(["tokens", "before", "after"], profile_rows(profile), numbers=(0, 1, 2))
    details = f"<details><summary>Numbers</summary>{rows}</details>"
    return f'<p class="muted">{PROFILE_LEGEND}</p><div class="grid">{panel}</div>{details}'


def _panels(
    steps: list[int],
    columns: dict[str, list[float]],
    curves: list[Curve],
    reward_steps: list[int],
    rewards: list[list[float]],
) -> str:
    if not steps:
        return '<p class="muted">No finished step (yet).</p>'
    timing = [c for c in curves if c.name.startswith(_TIMING)]
    others = [c for c in curves if not c.name.startswith(_TIMING)]
    note = (
        f"Points are single steps, the line is their exponentially weighted mean (span {smoothing_span(len(steps)):.0f}"
        " steps), the number its last value."
    )
    drawn = {c.name for c in curves}
    empty = ", ".join(name.replace("_", " ") for name in columns if name not in drawn)
    panels = list(map(_panel, others))
    if rewards:
        caption = "<b>rewards of all rollouts</b><small>darker: more of them; the line is the median</small>"
        panels.append(f"<figure><figcaption>{caption}</figcaption>{rewards_svg(reward_steps, rewards)}</figure>\n")
    parts = [f'<p class="muted">{note}</p><div class="grid">{"".join(panels)}</div>']
    if empty:
        parts.append(f'<p class="muted">Without any number: {escape(empty)}.</p>')
    if timing:
        timings = "".join(map(_panel, timing))
        parts.append(f'<details><summary>Timing of every step</summary><div class="grid">{timings}</div></details>')
    return "\n".join(parts)


def _panel(curve: Curve) -> str:
    steps = "step" if curve.missing == 1 else "steps"
    missing = f"<small>{curve.missing:,} {steps} without a finite number</small>" if curve.missing else ""
    caption = f"<b>{escape(curve.title)}</b><span>{number(curve.smooth[-1])}</span>{missing}"
    return f"<figure><figcaption>{caption}</figcaption>{curve_svg(curve)}</figure>\n"


def _step_times(curves: list[Curve]) -> str:
    """Mean seconds of a training step and of its parts; what the parts leave of the whole is called other."""
    means = {c.name: sum(c.raw) / len(c.raw) for c in curves if c.name.startswith(TIME_PREFIX)}
    whole = means.pop(_STEP_TIME, math.nan)
    if not means:
        return ""
    other = whole - sum(means.values())
    if other > 0.01 * whole:
        means["other"] = other
    total = sum(means.values())
    rows = [(n.removeprefix(TIME_PREFIX), s, [f"{s / total:.0%}" if total else "–"]) for n, s in means.items()]
    return "<h3>A training step, on average</h3>" + bars(["part", "", "seconds", "share"], rows)


def _stage_times(evaluation: dict[str, Any]) -> str:
    rows = []
    for name, record in _records(evaluation, "stages").items():
        tokens, rate = _value(record, "tokens"), _value(record, "tokens_per_second")
        rows.append(
            (name, _value(record, "seconds"), [f"{tokens:,.0f}" if math.isfinite(tokens) else "–", number(rate)])
        )
    header = ["stage", "", "seconds", "tokens", "tokens a second"]
    return "<h3>Training, by stage</h3>" + bars(header, rows) if rows else ""


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    page = samples_html(samples)
    return f'<p class="muted">{LEGEND} {COLOURS if "--strength" in page else ""}</p>{page}'


def _record(config: dict[str, Any], evaluation: dict[str, Any]) -> str:
    rest = {key: value for key, value in evaluation.items() if key not in ("metrics", "profile", "stages")}
    parts = []
    for title, content in (("Configuration", config), ("Further values of the evaluation", rest)):
        rows = [[escape(key), escape(value)] for key, value in _flat(content)]
        if rows:
            values = table(["key", "value"], rows)
            parts.append(f'<details class="config"><summary>{title}</summary>{values}</details>')
    return "".join(parts)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of a nested dict with dotted keys; a list is a leaf."""
    if isinstance(value, dict) and value:
        return [leaf for key, v in value.items() for leaf in _flat(v, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))] if prefix else []
