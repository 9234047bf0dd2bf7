"""What a run shows in windows of several widths, and where there is no window."""

import io
import re

import pytest
import torch
from rich.console import Console
from rich.text import Span, Text

from ebft.loops.display import Display, result_table, watch_line
from ebft.loops.show import coloured, rollout_lines

RECORD = {
    "reward": -0.0123, "feature_matching_loss": 1.441, "cross_entropy": 2.77, "kl": 0.0035, "gradient_norm": 3.6,
    "tokens_per_second": 1234.0,
}  # fmt: skip
METRICS = {
    name: {"before": 11.1893, "after": 12.2457, "difference": 1.0564, "standard_error": 0.0398}
    for name in ("feature_matching_loss", "cross_entropy")
}


def console(width, *, terminal=True):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("label", ["training", "held-out before"])
def test_count_and_time_left_are_seen_in_a_narrow_window(width, label):
    shown = console(width)
    for _ in Display(shown).track([1, 2], label=label, total=300, describe=lambda item: watch_line(RECORD)):
        pass
    lines = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", shown.file.getvalue())
    bar = next(line for line in lines if "2/300" in line)
    assert re.search(rf"{label} .*2/300 +0:00:00 +ETA", bar)
    assert any(line.startswith("reward -0.012  FM 1.441  CE 2.770  KL 0.0035") for line in lines)
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_and_verdicts_of_the_result_are_whole_in_a_narrow_window(width):
    shown = console(width)
    shown.print(result_table(METRICS, width=width))
    text = shown.file.getvalue()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for words in ("feature matching loss", "cross entropy"):
        assert words in text
    assert text.count("rose: worse") == 2
    for number in ("11.1893", "12.2457", "+1.0564", "0.0398"):
        assert text.count(number) == 2


def test_lines_where_there_is_no_terminal():
    shown = console(60, terminal=False)
    for _ in Display(shown, lines=2).track(range(4), label="training", total=4, describe=lambda item: f"item {item}"):
        pass
    assert shown.file.getvalue().splitlines() == ["training 2/4  item 1", "training 4/4  item 3"]


class Letters:
    """A tokenizer of one letter for each token; token 3 is a line break."""

    def decode(self, tokens):
        return "".join("abc\n"[token] for token in tokens)


@pytest.mark.parametrize(
    ("probability", "colour"),
    [(1.0, "green"), (0.5, "green"), (0.49, "yellow"), (0.1, "yellow"), (0.09, "dark_orange"), (0.0099, "red")],
)
def test_the_colour_of_a_token_is_its_probability(probability, colour):
    log_prob = torch.tensor([probability], dtype=torch.float64).log()
    assert coloured(Letters(), torch.tensor([1]), log_prob) == Text("b", spans=[Span(0, 1, colour)])


def test_every_token_of_a_rollout_has_the_colour_of_its_own_log_prob():
    drawn = torch.tensor([[[[0, 3, 2, 1], [2, 1, 0, 0]]]])
    log_prob = torch.tensor([[[[0.9, 0.05, 0.2, 0.001], [0.3, 0.7, 1.0, 1.0]]]]).log()
    alive = torch.tensor([[[[True] * 4, [True, True, False, False]]]])
    lines = list(
        rollout_lines(
            Letters(),
            lambda *_, **__: (drawn, log_prob, alive),
            torch.tensor([0, 1, 2, 0]),
            torch.tensor([[2]]),
            torch.tensor([[True]]),
            horizon=4,
        )
    )
    assert [line.plain for line in lines] == ["    2 ab", "    = ca", "  -11.62  a↵cb", "   -1.56  cb"]
    colours = [[(line.plain[span.start : span.end], span.style) for span in line.spans] for line in lines[2:]]
    assert colours == [
        [("a", "green"), ("↵", "dark_orange"), ("c", "yellow"), ("b", "red")],
        [("c", "yellow"), ("b", "green")],
    ]
