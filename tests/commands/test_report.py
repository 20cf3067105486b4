import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from sivae_fast.commands.charts import Series, line_chart, number, thinned
from sivae_fast.commands.pictures import sample
from sivae_fast.commands.report import level_switches, report
from sivae_fast.files import append_line
from sivae_fast.inference import Inference
from sivae_fast.measure import detect_others
from sivae_fast.run import append_metric


class Page(HTMLParser):
    """Fails on tags that do not close; collects links to anything outside the page."""

    VOID = ("meta", "img", "line", "path", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(runs, tmp_path):
    folder = tmp_path / "00007-a&b"
    shutil.copytree(runs.residual, folder)
    model = Inference.load(folder, device="cpu", show=False)
    for i in range(1, 13):
        sample(model, folder / "samples" / f"{1000 * i:010d}.png", count=2)
        common = {
            "images": 1000 * i,
            "lod": i // 5,
            "batch": 64,
            "learning_rate": 1e-3,
            "memory_bytes": 2**30,
        }
        values = {"rec_real": 50.0 / i, "kl_real": 3.0 + i, "odd_one": i if i != 3 else math.nan}
        times = {"step_seconds": 2.0, "data_seconds": 0.5, "images_per_second": 400.0}
        append_line(folder / "stats.jsonl", {**common, **values, **times})
    for images, value in ((6000, 50.0), (12000, 25.5)):
        append_metric(folder, "fid", {"images": images, "value": value, "features": "<random>"})
    return folder


def test_the_page_holds_everything_and_loads_nothing(run, runs):
    detect_others(Inference.load(run, device="cpu", show=False), {"dark": runs.dark}, run, count=8, samples=2)
    path = report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == [] and "script" not in page.tags and "@import" not in text and "url(" not in text
    assert page.tags.count("img") == 8 + 1  # grids, histogram
    for expected in (
        "00007-a&b",
        "25.5",
        "<random>",
        "dark",
        "kind: residual",
        "odd_one",
        "0m 30s",
        "1.00 GiB",
    ):
        assert expected in page.text
    assert "viewport" in text and "<random>" not in text
    assert page.text.count("Samples") == 1 and "12k images" in page.text and "1k images" in page.text


def test_every_statistic_is_drawn_once_with_the_level_switches(run):
    text = report(run).read_text(encoding="utf-8")
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert len(titles) == len(set(titles))
    expected = {"Reconstruction error", "KL to the prior", "odd_one", "fid", "Images per second"}
    assert expected <= set(titles) and "Learning rate" not in titles  # it never changed
    chart = text[text.index("<h3>odd_one") :]
    chart = chart[: chart.index("</svg>")]
    assert chart.count('class="mark"') == 2
    assert re.search(r'class="curve c0" d="([^"]*)"', chart)[1].count("M") == 2  # a gap where it was NaN


def test_a_metric_is_a_curve_of_what_was_measured_alike(run):
    append_metric(run, "fid", {"images": 12000, "value": 7.25, "features": "inception"})
    append_metric(run, "log_likelihood", {"images": 12000, "value": -2876.4})
    page = report(run).read_text(encoding="utf-8")
    assert "<h3>fid</h3>" not in page and "7.25" in page and "-2876.4" in page
    append_metric(run, "fid", {"images": 13000, "value": 7.0, "features": "inception"})
    chart = report(run).read_text(encoding="utf-8").split("<h3>fid</h3>")[1].split("</svg>")[0]
    assert len(re.findall(r"[ML][\d.]+ [\d.]+", chart)) == 2


def test_levels_are_profiled(run):
    page = Page(report(run).read_text(encoding="utf-8"))
    # Level 0: four ticks of 1,000 images, 2.5 s each, a fifth of it waiting.
    assert "04k0m 10s40020.0%" in page.text


def test_level_switches_lie_between_ticks():
    stats = [{"images": 10 * i, "lod": lod} for i, lod in enumerate([0, 0, 1, 1, 3])]
    assert level_switches(stats) == [15, 35]


def test_a_run_that_has_just_begun_and_one_that_is_none(runs, tmp_path):
    out = report(runs.style, tmp_path / "page.html")
    assert "no statistics yet" in Page(out.read_text(encoding="utf-8")).text
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        report(tmp_path)


def test_curves_of_one_point_no_spread_and_nothing_at_all():
    assert line_chart("none", {"a": Series([1], [None])}) == ""
    assert line_chart("none", {}) == ""
    for y in ([0.0], [5.0, 5.0], [1e-9, 1e9], [-1.0, 2.0]):
        figure = line_chart("t", {"a": Series(list(range(len(y))), y)})
        Page(figure)
        places = [float(v) for v in re.findall(r"[ML](?:[\d.]+) ([\d.]+)", figure)]
        assert len(places) == len(y) and all(0 <= place <= 230 for place in places)
        assert len(re.findall(r'class="grid"', figure)) >= 2


def test_long_curves_are_thinned_by_means_and_keep_their_end():
    curve = Series(list(range(10_001)), [float(i % 2) for i in range(10_001)])
    thin = thinned(curve)
    assert len(thin.x) <= 300 and thin.x[-1] == 10_000
    assert all(abs(y - 0.5) < 0.02 for y in thin.y[:-1])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1.23M"), (1500, "1.5k"), (0.5, "0.5"), (0.000123, "1.23e-4"), (None, "none")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text
