"""The report of a run: what it says, that it is self-contained, and that it survives folders of every state."""

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from ebft.errors import UsageError
from ebft.loops.report import write_report
from ebft.loops.report_curves import Curve, build_curves, curve_svg, curves_png, read_metrics, smooth
from ebft.loops.report_frame import BOTTOM, LEFT, RIGHT, TOP, Frame
from ebft.loops.report_frame import number as number_text
from ebft.loops.report_rewards import histogram, read_rewards
from ebft.loops.report_verdict import aligned, better_direction, verdict
from tests.runs import sample

EVIL = "</pre><script>alert('x')</script><img src=x onerror=\"y\">&amp;"
PLOTTED = r"loss $\frac$ " + EVIL  # neither HTML nor mathematical notation


@pytest.fixture(autouse=True)
def _picture(monkeypatch):
    monkeypatch.setattr("ebft.loops.report.curves_png", curves_png)


class Outline(HTMLParser):
    """Checks that the tags nest, and keeps the tags, the attributes and the text of every `pre`."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.pre = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "path", "img"):
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.pre[-1] += data


@pytest.fixture
def run(tmp_path):
    """A finished run whose every text is hostile."""
    folder = tmp_path / "a <b>run"
    folder.mkdir()
    rows = [
        ["step", "reward", "kl", PLOTTED, "learning_rate", "time_sample", "time_embed", "time_step",
         "tokens_per_second", "$a" + EVIL],
        *([s, 0.1 * s, "", 1 / s, 1e-5 * s, 2 + s, s, 4 + 2 * s, 1000 * s, "$a" + EVIL] for s in range(1, 41)),
    ]  # fmt: skip
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    metrics = {
        "cross_entropy": {"before": 2.5, "after": 2.25, "difference": -0.25, "standard_error": 0.031},
        "reward" + EVIL: {"before": 1.0, "after": None, "difference": math.nan, "standard_error": math.nan},
    }
    stages = {"sample": {"seconds": 8.0, "tokens": 4096, "tokens_per_second": 512.0}, EVIL: {"seconds": 2.0}}
    evaluation = {"metrics": metrics, "stages": stages, "n_sequences": 3, "n_anchors": 17, "note": EVIL}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "config.json").write_text(json.dumps({"model": {"name": EVIL, "lora": None}, EVIL: [1, "\ud800"]}))
    (folder / "samples.json").write_text(json.dumps([sample(EVIL, prefix=EVIL), {"prefix": "p", "target": "t"}]))
    return folder


def test_page_is_one_self_contained_document(run):
    path = write_report(run)
    page = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    outline = Outline(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert not {"src", "href", "onerror", "onload"} & {name for name, _ in outline.attributes}
    assert ("aria-label", f"{PLOTTED} over the training steps") in outline.attributes
    assert "<script" not in page
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    assert "$" not in page.replace("$a", "").replace(
        r"$\frac$", ""
    )  # every placeholder is filled, and user text is not a placeholder


def test_page_says_what_the_files_hold(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert "<h1>a &lt;b&gt;run</h1>" in page
    assert "40 training steps · 30 min · 3 held-out sequences · 17 anchors" in page  # Σ(4 + 2s) = 1800 s
    row = page.index("<td>cross entropy</td>")
    for text in ("fell: better", "lower is better", "2.500", "2.250", "−0.250 ± 0.031"):
        row = page.index(text, row)  # in this order
    assert "no verdict" in page
    curves, timing = page.split("Timing of every step")
    assert curves.count("<svg") == 3  # reward, the hostile loss, learning_rate
    assert timing.count("<svg") == 4  # sample, embed, step, tokens per second
    assert "Without any number: kl, $a" in page


def test_hostile_text_is_shown_as_it_is(run):
    outline = Outline(write_report(run).read_text(encoding="utf-8"))
    assert outline.pre == [EVIL, EVIL, EVIL, "p", "t"]


def test_times_of_a_step_add_up_to_the_whole(run):
    page = write_report(run).read_text(encoding="utf-8")
    # mean over s = 1..40 of 2+s, s, 4+2s is 22.5, 20.5, 45; the parts leave 2
    for label, seconds, share, width in (
        ("sample", "22.5", 50, 100),
        ("embed", "20.5", 46, 91.1),
        ("other", "2", 4, 8.9),
    ):
        pattern = f'<td>{label}</td><td><div class="bar" style="width:{width:.1f}%"></div></td>'
        pattern += f'<td class="number">{seconds}</td><td class="number">{share}%</td>'
        assert pattern in page
    assert '<td>sample</td><td><div class="bar" style="width:100.0%"></div></td><td class="number">8</td>' in page


def test_png_is_an_image_with_ink(run):
    write_report(run)
    pixels = imread(run / "report.png")
    assert pixels.shape[1] == 1440
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


def test_matplotlib_is_lazy_and_pyplot_never_loaded(run):
    code = (
        "import sys; from ebft.loops.report import write_report; assert 'matplotlib' not in sys.modules;"
        "write_report(sys.argv[1]); assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)


@pytest.mark.parametrize(
    ("text", "steps", "panels"),
    [
        ("", 0, 0),
        ("step,reward,time_step\n", 0, 0),
        ("step,reward,kl\n1,0.5,\n", 1, 1),
        ("step,reward,kl\n1,nan,inf\n", 1, 0),
        ("step,reward\n1,3\n2,3\n3,3\n", 3, 1),
        ("step,reward\n1,1e308\n2,-1e308\n3,1e38\n4,-1e38\n", 4, 1),
        ("step,reward,loss\n1,2,3\n2,2.", 2, 2),
        ("step,a\n1,0\n2,1e-300\n", 2, 1),
    ],
    ids=["empty", "header", "one-row", "no-number", "constant", "huge", "torn", "tiny"],
)
def test_partial_folders(tmp_path, text, steps, panels):
    (tmp_path / "metrics.csv").write_text(text)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    Outline(page)
    assert f'<p class="facts">{steps} training step{"" if steps == 1 else "s"}</p>' in page
    assert page.count("<svg") == panels
    assert "Not evaluated" in page
    assert not re.search(r"\bnan\b|\binf\b", page)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "report.html", "report.png"]


def test_read_metrics_keeps_the_later_of_two_rows_and_marks_gaps(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n1,10,1\n2,20,\n3,30,x\n2,21,2\n3,3")
    steps, columns = read_metrics(path)
    assert steps == [1, 2, 3]
    assert columns["a"] == [10, 21, 3]
    assert columns["b"][:2] == [1, 2]
    assert math.isnan(columns["b"][2])
    curve = build_curves(steps, columns)[1]
    assert (curve.name, curve.steps, curve.raw, curve.missing) == ("b", [1, 2], [1, 2], 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.csv", None, "no metrics.csv in"),
        ("metrics.csv", "reward,step\n1,2\n", "'reward'"),
        ("evaluation.json", "{", "not JSON"),
        ("evaluation.json", "[]", "holds a list"),
        ("evaluation.json", '{"metrics": {"a": 1}}', "'metrics' is {'a': 1}"),
        ("evaluation.json", '{"stages": [1]}', r"'stages' is \[1\]"),
        ("samples.json", "{}", "holds a dict"),
        ("samples.json", "[3]", "sample 0 is a int"),
        ("samples.json", '[{"prefix": "p"}]', "sample 0: 'target' is None"),
        ("samples.json", '[{"prefix": "p", "target": "t", "after": [{"text": 1}]}]', "sample 0: 'after' is"),
        ("samples.json", '[{"prefix": "p", "target": "t", "after": [{"text": "", "reward": "x"}]}]', "'reward': 'x'"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(run, name, content, words):
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(UsageError, match=words):
        write_report(run)
    assert not list(run.glob("*report*"))


def test_failed_write_keeps_the_old_report(run, monkeypatch):
    for name in ("report.html", "report.png"):
        (run / name).write_text("old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == (run / "report.png").read_text() == "old"
    assert not list(run.glob(".*"))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(1, 50))
def test_smoothing_is_the_normalised_weighted_sum(values, span):
    decay = 1 - 2 / (span + 1)
    for t, got in enumerate(smooth(values, span=span)):
        weights = [decay ** (t - i) for i in range(t + 1)]
        expected = math.fsum(w * v for w, v in zip(weights, values, strict=False)) / math.fsum(weights)
        assert math.isclose(got, expected, rel_tol=1e-12, abs_tol=1e-12)


def test_svg_points_are_the_data():
    steps, raw = [1, 3, 4, 9], [0.5, -1.5, 2.5, 1.0]
    svg = curve_svg(Curve("x", steps, raw, smooth(raw, span=4), 0))

    def data(css):
        path = re.search(f'class="{css}" d="M([^"]*)h0"', svg)[1]
        points = [tuple(map(float, p.split())) for p in re.split("h0M|L", path)]
        xs = [1 + (x - LEFT) / (RIGHT - LEFT) * 8 for x, _ in points]
        return xs, [2.5 - (y - TOP) / (BOTTOM - TOP) * 4 for _, y in points]

    for css, values in (("raw", raw), ("smooth", smooth(raw, span=4))):
        xs, ys = data(css)
        assert xs == pytest.approx(steps, abs=0.06 * 8 / (RIGHT - LEFT))  # coordinates have one decimal
        assert ys == pytest.approx(values, abs=0.06 * 4 / (BOTTOM - TOP))
    ticks = re.findall(rf'M{LEFT} ([0-9.]+)H{RIGHT}"/><text[^>]*>([^<]*)<', svg)
    assert len(ticks) >= 3
    for y, label in ticks:
        value = float(label.replace("−", "-"))
        assert value == pytest.approx(2.5 - (float(y) - TOP) / (BOTTOM - TOP) * 4, abs=0.06 * 4 / (BOTTOM - TOP))


@settings(deadline=None)
@given(st.lists(st.floats(-1e38, 1e38, allow_nan=False), min_size=1, max_size=8), st.integers(1, 10**7))
def test_svg_of_any_values_is_drawn_inside_the_panel_with_distinct_labels(raw, start):
    steps = list(range(start, start + len(raw)))
    svg = curve_svg(Curve("x", steps, raw, smooth(raw, span=4), 0))
    for points in re.findall('class="(?:raw|smooth)" d="([^"]*)"', svg):
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", points):
            assert LEFT <= float(x) <= RIGHT
            assert TOP <= float(y) <= BOTTOM
    labels = re.findall('text-anchor="end">([^<]*)<', svg)
    assert len(set(labels)) == len(labels)


def test_long_runs_are_thinned():
    steps = list(range(1, 5001))
    svg = curve_svg(Curve("x", steps, [float(s) for s in steps], [float(s) for s in steps], 0))
    assert svg.count("h0") == 1000 + 1


@pytest.mark.parametrize(
    ("name", "difference", "error", "expected"),
    [
        ("cross_entropy", -0.3, 0.1, ("fell: better", "good")),
        ("cross_entropy", 0.3, 0.1, ("rose: worse", "bad")),
        ("feature_matching_reward", 0.3, 0.1, ("rose: better", "good")),
        ("bleu", -0.3, 0.1, ("fell: worse", "bad")),
        ("reward", 0.5, 0.25, ("no difference shown", "")),  # exactly two standard errors
        ("reward", -0.5, 0.25, ("no difference shown", "")),
        ("reward", 0.51, 0.25, ("rose: better", "good")),
        ("response_length", -9.0, 1.0, ("fell", "")),
        ("reward", 0.0, 0.0, ("no difference shown", "")),
        ("reward", 1.0, 0.0, ("rose: better", "good")),
        ("reward", 1.0, math.nan, ("no verdict: difference or standard error not known", "")),
    ],
)
def test_verdict(name, difference, error, expected):
    assert verdict(name, difference, error) == expected


def test_direction_goes_by_whole_words():
    assert better_direction("Feature_Matching_Loss") == "lower"
    assert better_direction("pass_at_1") == "higher"
    assert better_direction("glossary") is None  # contains "loss"
    assert better_direction("reward_error") is None  # both directions


def test_numbers_for_people():
    assert [number_text(v) for v in (None, math.nan, -0.12345, 12345.6, 1.5e-7, -1e9, 0.0)] == [
        "–", "–", "−0.1235", "12,346", "1.5e−7", "−1e9", "0",
    ]  # fmt: skip
    assert aligned(2.34567, 0.0123) == "2.346"
    assert aligned(-1234.5, 120.0) == "−1,234"  # half to even
    assert aligned(2.34567, 0.0) == aligned(2.34567, math.nan) == "2.346"


# Rewards, profile, advantages


def write_rewards(folder, rows):
    with (folder / "rewards.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "reward_0", "reward_1", "reward_2", "reward_3"], *rows])


def test_rewards_are_drawn_as_a_histogram_a_column_of_steps(run):
    write_rewards(run, [[1, 0, 0, 1, 4], [2, 2, 2, 2, "torn"], [2, 0, 4, 4, 4], ["", 1, 2, 3, 4]])
    steps, rewards = read_rewards(run / "rewards.csv")
    assert (steps, rewards) == ([1, 2], [[0, 0, 1, 4], [0, 4, 4, 4]])  # the later row of step 2
    frame = Frame(0.5, 2.5, 0.0, 4.0)
    assert histogram(steps, rewards, frame, bins=4) == [
        (1, 1, 0, 0.5), (1, 1, 1, 0.25), (1, 1, 3, 0.25), (2, 2, 0, 0.25), (2, 2, 3, 0.75),
    ]  # fmt: skip
    merged = histogram(steps, rewards, frame, bins=4, columns=1)
    assert merged == [(1, 2, 0, 0.375), (1, 2, 1, 0.125), (1, 2, 3, 0.5)]
    page = write_report(run).read_text()
    assert "rewards of all rollouts" in page
    assert page.count('<rect class="cell"') == 5
    Outline(page)


def test_all_rewards_alike_and_a_single_step_are_drawn(run):
    write_rewards(run, [[7, 0.5, 0.5, 0.5, 0.5]])
    assert write_report(run).read_text().count('<rect class="cell"') == 1


PROFILE = {
    "horizons": [1, 8, 64],
    "before": [0.5, 0.75, 1.0],
    "after": [0.25, 0.5, math.nan],
    "before_standard_error": [0.01, 0.02, 0.03],
    "after_standard_error": [0.01, 0.02, math.nan],
}


def test_profile_is_drawn_with_its_errors_and_told_in_numbers(run):
    assert "horizon" not in write_report(run).read_text()
    (run / "profile.json").write_text(json.dumps(PROFILE))
    page = write_report(run).read_text()
    Outline(page)
    for text in ("0.500 ± 0.010", "0.750 ± 0.020", "0.250 ± 0.010", "1.000 ± 0.030", "– ± –"):
        assert text in page
    drawing = page[page.index("Loss over the horizon") :]
    before, after = (
        re.search(rf'class="{when}" d="M([^"]*)h0"', drawing)[1].split("L") for when in ("before", "after")
    )
    assert (len(before), len(after)) == (3, 2)
    height = {name: [float(point.split()[1]) for point in points] for name, points in (("b", before), ("a", after))}
    assert height["b"][0] == height["a"][1]  # both 0.5
    assert height["a"][0] > height["b"][0] > height["b"][2]  # up is more
    bars = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", re.search(r'class="before bars" d="([^"]*)"', drawing)[1])
    lengths = [float(low) - float(high) for _, low, high in bars]
    assert lengths == pytest.approx([lengths[0], 2 * lengths[0], 3 * lengths[0]], abs=0.21)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"after": [1, 2]}, "'after' is"), ({"before": None}, "'before' is None"), ({"horizons": [1, 1, 2]}, "rising")],
)
def test_a_profile_of_another_form_is_refused(run, change, words):
    (run / "profile.json").write_text(json.dumps({**PROFILE, **change}))
    with pytest.raises(UsageError, match=words):
        write_report(run)


def test_tokens_have_the_colour_of_their_advantage(run):
    rollout = {
        "text": "a  b\n", "reward": 1.0, "tokens": ["a ", "", " b", "\n"], "advantage": [0.5, 0.1, -1.0, 0.0],
    }  # fmt: skip
    plain = {"text": "a  b\n", "reward": 0.5}
    samples = [{"prefix": "p", "target": "t", "before": [rollout, plain], "after": []}]
    (run / "samples.json").write_text(json.dumps(samples))
    page = write_report(run).read_text()
    coloured, uncoloured = Outline(page).pre[2:4]
    assert coloured == uncoloured == "a··b↵"
    assert 'class="above" style="--strength:30%" title="advantage 0.5"' in page
    assert 'class="below" style="--strength:60%" title="advantage −1"' in page
    assert "Tokens of rollouts have the colour" in page


@pytest.mark.parametrize(
    "change", [{"advantage": [1.0]}, {"advantage": ["x", 1.0]}, {"tokens": ["a", "c"]}, {"advantage": [math.nan, 1.0]}]
)
def test_tokens_that_are_not_those_of_the_text_are_refused(run, change):
    rollout = {"text": "ab", "reward": 1.0, "tokens": ["a", "b"], "advantage": [0.5, 0.25], **change}
    (run / "samples.json").write_text(json.dumps([{"prefix": "p", "target": "t", "after": [rollout]}]))
    with pytest.raises(UsageError, match="sample 0: 'after' is"):
        write_report(run)
