"""Signal of the gradient: every lever in one table, and those with one expected gradient against each other.

    python benchmarks/gradient_signal.py OUT [BATCHES] [levers|features|second]

measures smollm2-135m on the standard library's source (2 sequences of 128 tokens in a batch, 15 anchors each, rollouts
of 8 tokens; gradients of rank-8 adapters of the last four layers) with `cli.py signal` in OUT, which goes on where it
was stopped, and writes signal.json, signal.md and signal.png into OUT. Copy them to benchmarks/results to keep them.
`levers` has everything that can be turned, `features` many rewards, with their rollouts drawn more often, and `second`
the strongest of these on other sequences, with 4 and 16 rollouts.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.commands import command
from ebft.files import write_atomically, write_json
from ebft.loops.signal.run import judge
from ebft.loops.signal.show import interval
from ebft.loops.signal.store import GradientStore

PARAMETERS = r"layers\.(26|27|28|29)\..*lora_B"  # those of lora_A have no gradient at the start
HIDDEN, TOKENS = "features=hidden", "pooling=none credit=reward_to_go"


@dataclass(frozen=True)
class Table:
    """One measurement.

    Attributes:
        configurations: name -> parts and options; the estimator is (94) where none is said.
        families: names with one expected gradient, the first the one that others are measured against.
        reference: whose mean gradient cosines refer to.
        replicates: how often the rollouts of a batch are drawn.
        seed: of the sequences and the rollouts.
    """

    configurations: dict[str, str]
    families: tuple[tuple[str, ...], ...]
    reference: str
    replicates: int
    seed: int = 0


_LEVERS = {
    "paper": f"{HIDDEN} whitening=group alignment=cosine",
    "dot": HIDDEN,
    "dot, no baseline": f"{HIDDEN} estimator=none",
    "dot, tuned baseline": f"{HIDDEN} estimator=rloo_tuned",
    "dot, last horizon, ridge": f"{HIDDEN} {TOKENS} horizons=last token_baseline=ridge",
    "dot, 8 rollouts": f"{HIDDEN} rollouts=8",
    "dot, 8 rollouts, 4 branches": f"{HIDDEN} rollouts=8 first_token=branches strata=4",
    "alignment": f"{HIDDEN} diversity=0",
    "alignment, 4 branches": f"{HIDDEN} diversity=0 first_token=branches strata=4",
    "alignment, 4 distinct": f"{HIDDEN} diversity=0 first_token=distinct strata=4",
    "population whitening": f"{HIDDEN} whitening=population",
    "energy kernel": f"{HIDDEN} objective=kernel_score kernel=energy",
    "sbert": "features=sbert",
    "all horizons": f"{HIDDEN} {TOKENS}",
    "all horizons, ridge": f"{HIDDEN} {TOKENS} token_baseline=ridge",
    "all horizons, ridge, λ 0.5": f"{HIDDEN} {TOKENS} token_baseline=ridge trace=0.5",
    "all horizons, weights 0.5": f"{HIDDEN} {TOKENS} horizons=geometric:0.5",
    "equal tokens": "features=match match=position",
    "equal tokens, alignment": "features=match match=position diversity=0",
    "equal tokens, alignment, 4 branches": "features=match match=position diversity=0 first_token=branches strata=4",
    "common prefix": "features=match",
    "common prefix, by token": f"features=match {TOKENS}",
    "common prefix, by token, ridge": f"features=match {TOKENS} token_baseline=ridge",
    "hidden and equal tokens": "features=join:hidden+match match=position",
}
_FAMILIES_OF_LEVERS = (
    ("dot", "dot, no baseline", "dot, tuned baseline", "dot, last horizon, ridge", "dot, 8 rollouts",
     "dot, 8 rollouts, 4 branches"),
    ("alignment", "alignment, 4 branches", "alignment, 4 distinct"),
    ("all horizons", "all horizons, ridge"),
    ("equal tokens, alignment", "equal tokens, alignment, 4 branches"),
    ("common prefix, by token", "common prefix, by token, ridge"),
)  # fmt: skip
_PAPER = "whitening=group alignment=cosine"
_SAMPLE = "whitening=sample alignment=cosine"  # the whitening of the authors' code
_FEATURES = {
    "dot": HIDDEN,
    "dot, 32 rollouts": f"{HIDDEN} rollouts=32",
    "paper": f"{HIDDEN} {_PAPER}",
    "paper, temperature 0.6": f"{HIDDEN} {_PAPER} temperature=0.6",
    "paper, horizon 4": f"{HIDDEN} {_PAPER} horizon=4",
    "paper, horizon 16": f"{HIDDEN} {_PAPER} horizon=16",
    "mean": f"{HIDDEN} pooling=mean",
    "mean, group": f"{HIDDEN} pooling=mean {_PAPER}",
    "mean, sample": f"{HIDDEN} pooling=mean {_SAMPLE}",
    "sbert": "features=sbert",
    "sbert, 16 context tokens, group": f"features=sbert context_tokens=16 {_PAPER}",
    "1-grams, sample": f"features=ngram ngram=1 {_SAMPLE}",
    "4-grams": "features=ngram ngram=4",
    "4-grams, sample": f"features=ngram ngram=4 {_SAMPLE}",
    "mean and 4-grams": "features=join:hidden+ngram pooling=mean ngram=4",
    "sbert and 4-grams": "features=join:sbert+ngram ngram=4",
    "sbert and common prefix": "features=join:sbert+match",
    "common prefix, by token": f"features=match {TOKENS}",
    "defaults of run": "features=sbert estimator=rloo_tuned stride=16 first=16",
}
_FAMILIES_OF_FEATURES = (("dot", "dot, 32 rollouts"),)
_ALSO_WITH_16 = ("dot", "mean, sample", "1-grams, sample", "common prefix, by token")
_SECOND = {name: _FEATURES[name] for name in ("paper", *_ALSO_WITH_16)} | {
    f"{name}, 16 rollouts": f"{_FEATURES[name]} rollouts=16" for name in _ALSO_WITH_16
}
# Not those under whitening, whose expected gradient depends on the number of rollouts
_FAMILIES_OF_SECOND = tuple((name, f"{name}, 16 rollouts") for name in ("dot", "common prefix, by token"))
TABLES = {
    "levers": Table(_LEVERS, _FAMILIES_OF_LEVERS, reference="paper", replicates=2),
    "features": Table(_FEATURES, _FAMILIES_OF_FEATURES, reference="dot, 32 rollouts", replicates=4),
    "second": Table(_SECOND, _FAMILIES_OF_SECOND, reference="dot, 16 rollouts", replicates=2, seed=1),
}


def measurement(out: Path, batches: int, table: Table) -> list[str]:
    """What `cli.py` is asked for."""
    options = {
        "out": str(out), "batches": str(batches), "batch": "2", "parameters": PARAMETERS,
        "reference": table.reference, "replicates": str(table.replicates),
        "set": "stride=8 first=8 horizon=8 rollouts=4", "dtype": "float32", "seed": str(table.seed),
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    for name, text in table.configurations.items():
        own = "" if "estimator" in text or "first_token" in text else " estimator=rloo"
        arguments += ["--config", f"{name}: {text}{own}"]
    return ["signal", *arguments]


def families(out: Path, result: dict, table: Table) -> tuple[dict, str]:
    """Noise of rollouts over that of the first of each family: JSON and Markdown."""
    names = list(result["rows"])
    shape = (len(names), result["replicates"], result["weights"])
    store = GradientStore.open(out / "gradients", shape=shape)
    gram = store.gram()
    found, lines = (
        {},
        ["| against | configuration | noise of rollouts, ratio | token-forwards, ratio |", "|---|---|---:|---:|"],
    )
    for base, *others in table.families:
        rows = judge(gram, names, store.cost, reference=base)["rows"]
        for name in others:
            cost = rows[name]["token_forwards"] / rows[base]["token_forwards"]
            found[f"{name} / {base}"] = {"noise": rows[name]["noise_ratio"], "cost": cost}
            lines.append(f"| {base} | {name} | {interval(rows[name]['noise_ratio'], 3)} | {cost:.2f} |")
    return found, "\n".join(lines)


def main(out: Path, batches: int, table: Table) -> None:
    command(*measurement(out, batches, table))
    result = json.loads((out / "signal.json").read_text())
    found, text = families(out, result, table)
    write_json(out / "signal.json", {**result, "families": found})
    first = (out / "signal.md").read_text().partition("\n\n## ")[0].rstrip()
    note = "## Configurations with the same expected gradient\n\nBelow 1: less noise. ± 95 % jackknife intervals."
    write_atomically(out / "signal.md", f"{first}\n\n{note}\n\n{text}\n".encode())
    print(text)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4 or sys.argv[3:4] not in ([], *([name] for name in TABLES)):
        raise SystemExit(__doc__)
    given = [*sys.argv[2:], *("12", "levers")[len(sys.argv) - 2 :]]
    main(Path(sys.argv[1]), int(given[0]), TABLES[given[1]])
