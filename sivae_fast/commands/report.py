"""report: everything about a run on one self-contained HTML page."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sivae_fast.commands.arguments import named, positive
from sivae_fast.commands.charts import Series, line_chart, number
from sivae_fast.files import write_text
from sivae_fast.progress import duration
from sivae_fast.run import read_metrics, read_stats

#: Curves that belong together: title, {statistic: label}, what a reader should look for.
CHARTS = (
    (
        "Reconstruction error",
        {"rec_real": "real", "rec_rec": "reconstruction", "rec_fake": "sample", "rec_swap": "swapped"},
        "Summed over the values of an image. Real images should fall; a rise at a level switch is normal.",
    ),
    (
        "KL to the prior",
        {"kl_real": "real", "kl_rec": "reconstruction", "kl_fake": "sample", "kl_swap": "swapped"},
        "The encoder raises the KL of fakes, the decoder lowers it. Fakes should stay above real images by a "
        "margin; if they fall below, or run away, change beta_neg.",
    ),
    (
        "exp(ELBO) of fakes",
        {"exp_elbo_rec": "reconstruction", "exp_elbo_fake": "sample", "exp_elbo_swap": "swapped"},
        "What the encoder pushes towards 0. At 0 it has won: the push is gone and only the decoder learns.",
    ),
    ("Hinge of fakes", {"hinge_rec": "reconstruction", "hinge_fake": "sample", "hinge_swap": "swapped"}, ""),
    (
        "Losses",
        {"loss_vae": "VAE (warm-up)", "loss_encoder": "encoder", "loss_decoder": "decoder"},
        "The two phases play against each other, so that neither has to fall.",
    ),
)
#: Statistics with a place of their own on the page.
ELSEWHERE = {"images", "time", "lod", "blend", "batch", "learning_rate", "images_per_second"}
ELSEWHERE |= {"step_seconds", "data_seconds", "memory_bytes"}
_SECONDS = {"step_seconds": "step", "data_seconds": "waiting for data"}


def report(folder: str | os.PathLike, out: str | os.PathLike | None = None, pictures: int = 8) -> Path:
    """Writes the page of a run folder, `report.html` in it unless `out` is given, and returns its path.

    pictures: how many of the sample grids are shown, the last one large. Nothing on the page is loaded from
    elsewhere. Raises FileNotFoundError for what is no run folder, ValueError for a name that is not .html.
    """
    positive(pictures=pictures)
    out = named(out, ".html", ".htm") if out else Path(folder) / "report.html"
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no run.json")
    stats, metrics = read_stats(folder), read_metrics(folder)
    switches = level_switches(stats)
    sections = [
        _summary(stats),
        _pictures(sorted((folder / "samples").glob("*.png")), pictures),
        _section("Metrics", _metric_table(metrics) + _metric_charts(metrics)),
        _section("Other data", _other_data(folder)),
        _section("Training", _curves(stats, switches)),
        _section("Speed", _speed(stats, switches)),
        _section("Configuration", _config(folder)),
    ]
    page = PAGE.replace("$title", escape(folder.resolve().name)).replace("$style", STYLE)
    write_text(out, page.replace("$body", "\n".join(sections)))
    return out


def level_switches(stats: Sequence[dict]) -> list[float]:
    """Images seen where the level of detail changes, between the two ticks around it."""
    pairs = itertools.pairwise(stats)
    return [(a["images"] + b["images"]) / 2 for a, b in pairs if a.get("lod") != b.get("lod")]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _summary(stats: Sequence[dict]) -> str:
    if not stats:
        return "<p>This run has no statistics yet.</p>"
    last = stats[-1]
    seconds = sum((s.get("step_seconds") or 0) + (s.get("data_seconds") or 0) for s in stats)
    facts = {"images seen": number(last["images"]), "training time": duration(seconds)}
    if last.get("images_per_second"):
        facts["images/s, last"] = number(last["images_per_second"])
    if last.get("memory_bytes"):
        facts["memory, peak"] = f"{max(s.get('memory_bytes') or 0 for s in stats) / 2**30:.2f} GiB"
    if any(s.get("lod") for s in stats):
        facts["level, pixels"] = f"{last['lod']}, {4 << last['lod']}"
    cells = "".join(f"<div><b>{value}</b>{key}</div>" for key, value in facts.items())
    return f'<div class="facts">{cells}</div>'


def _pictures(paths: Sequence[Path], count: int) -> str:
    if not paths:
        return ""
    last = len(paths) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count - 1)} | {last})
    *before, final = [_picture(paths[i]) for i in chosen]
    strip = f'<div class="strip">{"".join(before)}</div>' if before else ""
    note = (
        "<p>The same images and latents every time. Rows: real, reconstruction, sample; of densities, side "
        "by side: data, samples, learned density.</p>"
    )
    return _section("Samples", f'<div class="final">{final}</div>{note}{strip}')


def _picture(path: Path, caption: str = "") -> str:
    caption = caption or (f"{number(int(path.stem))} images" if path.stem.isdigit() else escape(path.stem))
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _metric_table(metrics: dict[str, list[dict]]) -> str:
    """The last record of every metric; those with the same circumstances share a table."""
    tables: dict[str, list[str]] = {}
    for name, records in metrics.items():
        if records:
            record = dict(records[-1])
            row = f"<tr><th>{escape(name)}</th><td>{digits(record.pop('value', None))}</td></tr>"
            about = "; ".join(f"{key.replace('_', ' ')}: {text}" for key, text in texts(record).items())
            tables.setdefault(escape(about), []).append(row)
    return "".join(f"<table>{''.join(rows)}</table><p>{about}</p>" for about, rows in tables.items())


def digits(value: float | None) -> str:
    """A measured value as people read it; None is what files have in place of NaN and infinity."""
    return "not finite" if value is None else f"{value:.5g}"


def _metric_charts(metrics: dict[str, list[dict]]) -> str:
    """Over images seen, of the records that were measured as the last one was."""
    charts = []
    for name, records in metrics.items():
        alike = [r for r in records if r.get("value") is not None and _how(r) == _how(records[-1])]
        points = sorted({r["images"]: r["value"] for r in alike}.items())
        if len(points) > 1:
            charts.append(line_chart(name, {name: Series(*zip(*points, strict=True))}))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _how(record: dict) -> dict:
    """How a record was measured: all but what changes from one measurement to the next.

    Baselines beside a value are part of it, since they tell one set from another; in text, since their last
    digits differ between machines.
    """
    changes = ("images", "value", "range_over_draws", "resolution")
    return {key: text for key, text in texts(record).items() if key not in changes}


def texts(record: dict) -> dict[str, str]:
    """The parts of a metric's record as people read them."""
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in record.items()}


def _other_data(folder: Path) -> str:
    if not (folder / "ood.json").is_file():
        return ""
    found = json.loads((folder / "ood.json").read_text(encoding="utf-8"))
    scores = next(iter(found["auroc"].values()))
    head = "".join(f"<th>{escape(score)}</th>" for score in scores)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value:.3f}</td>' for value in values.values())}</tr>"
        for name, values in found["auroc"].items()
    )
    note = (
        f"<p>Area under the ROC curve against the {escape(found['own_images'])}, a column for each score; "
        f"1 tells every image apart, 0.5 is chance. Log-likelihood: {found['samples']} draws an image, "
        f"proposal '{escape(found['proposal'])}', decoder variance {found['variance']:g}.</p>"
    )
    figure = _picture(folder / "ood.png", "log-likelihoods") if (folder / "ood.png").is_file() else ""
    return f'<div class="scroll"><table><tr><th>set</th>{head}</tr>{rows}</table></div>{note}{figure}'


def _curves(stats: Sequence[dict], switches: Sequence[float]) -> str:
    charts, seen = [], set(ELSEWHERE)
    for title, names, note in CHARTS:
        seen |= set(names)
        charts.append(line_chart(title, _series(stats, names), switches, note, start=0))
    others = [key for s in stats for key, value in s.items() if isinstance(value, (int, float))]
    for name in dict.fromkeys(others):
        if name not in seen and not name.startswith("metric/"):  # those have their own section
            charts.append(line_chart(name, _series(stats, {name: name}), switches, start=0))
    note = "<p>Over images seen. Dashed lines: level switches. Beside the names: last values.</p>"
    return f'{note}<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _speed(stats: Sequence[dict], switches: Sequence[float]) -> str:
    if not stats:
        return ""
    before = [0, *(s["images"] for s in stats)]
    costs = []
    for s, start in zip(stats, before, strict=False):
        cost = {key: 1e3 * (s.get(key) or 0) / max(s["images"] - start, 1) for key in _SECONDS}
        costs.append({"images": s["images"], **cost})
    charts = [
        line_chart("Images per second", _series(stats, {"images_per_second": "images/s"}), switches, start=0),
        line_chart("Milliseconds an image", _series(costs, _SECONDS), switches, start=0),
    ]
    for key, title in {"learning_rate": "Learning rate", "batch": "Images a batch"}.items():
        if len({s.get(key) for s in stats}) > 1:
            charts.append(line_chart(title, _series(stats, {key: key.replace("_", " ")}), switches, start=0))
    return f'{_profile(stats)}<div class="charts">{"".join(charts)}</div>'


def _profile(stats: Sequence[dict]) -> str:
    """A table: what each level took."""
    levels: dict[int, list[float]] = {}
    before = 0
    for s in stats:
        row = levels.setdefault(s.get("lod", 0), [0, 0.0, 0.0])
        row[0] += s["images"] - before
        row[1] += s.get("step_seconds") or 0
        row[2] += s.get("data_seconds") or 0
        before = s["images"]
    rows = "".join(
        f"<tr><th>{lod}</th><td>{number(images)}</td><td>{duration(step + data)}</td>"
        f"<td>{number(images / max(step + data, 1e-9))}</td>"
        f"<td>{100 * data / max(step + data, 1e-9):.1f}%</td></tr>"
        for lod, (images, step, data) in levels.items()
    )
    heads = ("level", "images", "time", "images/s", "waiting for data")
    head = "".join(f"<th>{title}</th>" for title in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _series(stats: Sequence[dict], names: dict[str, str]) -> dict[str, Series]:
    found = {}
    for name, label in names.items():
        points = [(s["images"], s[name]) for s in stats if name in s]
        if points:
            found[label] = Series(*zip(*points, strict=True))
    return found


def _config(folder: Path) -> str:
    path = folder / "config.yaml"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>$style</style></head>
<body><main><h1>$title</h1>
$body
</main></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --paper: #fff;
  --c0: #2166ac; --c1: #d6604d; --c2: #35978f; --c3: #8e63b5; --c4: #b8860b; --c5: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #333c48;
  --paper: #14181e;
  --c0: #74b3f0; --c1: #f2937f; --c2: #6fd0c5; --c3: #c5a3e6; --c4: #e0b94a; --c5: #aaa; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 0 0 .25rem; font-size: 1rem; } p { color: var(--soft); margin: .5rem 0; font-size: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 28px; color: var(--soft); font-size: .85rem; }
.facts b { display: block; font-size: 1.3rem; color: var(--ink); }
figure { margin: 0; } img { max-width: 100%; display: block; }
.final img, .strip img { image-rendering: pixelated; }
figcaption { font-size: .8rem; color: var(--soft); }
.strip { display: flex; gap: 12px; overflow-x: auto; padding-bottom: 8px; }
.strip figure { flex: 0 0 min(300px, 75%); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr));
  gap: 24px; margin-top: 16px; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); } .mark { stroke: var(--soft); stroke-dasharray: 3 4; opacity: .6; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.curve { stroke: var(--c); }
.legend i { background: var(--c); display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; } pre { overflow-x: auto; font-size: .8rem; }
"""
