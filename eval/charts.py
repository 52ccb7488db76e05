"""Pieces of the report as HTML and inline SVG: pipeline graph, training curves, score bars."""

import io
import re
from html import escape
from itertools import pairwise
from typing import Any

from eval.scores import FLOORS, summary
from mm.common.progress import duration

BOX = (128, 56)
GAP = (30, 16)


# ---- pipeline


def graph(nodes: list[dict]) -> str:
    """Nodes {"name", "inputs", "seconds", "status", "note"} as an SVG graph, left to right by what needs what. What a
    node needs by way of another has no line of its own; a road goes on in its row or below."""
    needs = _direct(nodes)
    column = _columns(needs)
    rows: dict[int, int] = {}
    row: dict[str, int] = {}
    place: dict[str, tuple[int, int]] = {}
    for node in nodes:
        name = node["name"]
        c, above = column[name], min((row[i] for i in needs[name] if i in row), default=0)
        row[name] = max(rows.get(c, 0), above)
        place[name] = (c * (BOX[0] + GAP[0]) + 4, row[name] * (BOX[1] + GAP[1]) + 4)
        rows[c] = row[name] + 1
    width = (max(rows, default=0) + 1) * (BOX[0] + GAP[0]) - GAP[0] + 8
    height = max(rows.values(), default=0) * (BOX[1] + GAP[1]) - GAP[1] + 8
    edges = "".join(_edge(place[i], place[name]) for name, of in needs.items() for i in of)
    boxes = "".join(_box(n, *place[n["name"]]) for n in nodes)
    return (
        f'<svg class="graph" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="pipeline">{edges}{boxes}</svg>'
    )


def _direct(nodes: list[dict]) -> dict[str, list[str]]:
    """The inputs of each node that it does not need by way of another input; what is no node counts as given."""
    inputs = {n["name"]: n.get("inputs", []) for n in nodes}
    inputs = {name: [i for i in of if i in inputs] for name, of in inputs.items()}
    before = {name: set(of) for name, of in inputs.items()}
    for _ in nodes:
        before = {name: of.union(*(before[i] for i in of)) for name, of in before.items()}
    return {name: [i for i in of if not any(i in before[j] for j in of)] for name, of in inputs.items()}


def _columns(needs: dict[str, list[str]]) -> dict[str, int]:
    """Longest way from a node without inputs."""
    column = dict.fromkeys(needs, 0)
    for _ in needs:
        column = {name: max((column[i] + 1 for i in of), default=0) for name, of in needs.items()}
    return column


def _edge(start: tuple[int, int], stop: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + BOX[0], start[1] + BOX[1] / 2, stop[0], stop[1] + BOX[1] / 2
    bend = GAP[0] / 2
    return f'<path d="M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"/>'


def _box(node: dict, x: int, y: int) -> str:
    seconds = node.get("seconds")
    time = duration(seconds) if seconds is not None and seconds >= 1 else ("<1s" if seconds is not None else "")
    status = node.get("status", "done")
    label = " · ".join(t for t in (time, node.get("note") or ("" if status == "done" else status)) if t)
    return (
        f"<g><title>{escape(node['name'])}</title>"
        f'<rect class="{escape(status)}" x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="9"/>'
        f'<text x="{x + 12}" y="{y + 25}">{escape(_short(node["name"], 17))}</text>'
        f'<text class="t" x="{x + 12}" y="{y + 44}">{escape(_short(label, 18))}</text></g>'
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# ---- curves

INK, FAINT, LINE = "#010203", "#040506", "#070809"
SERIES = {"#010a01": "--blue", "#010a02": "--pink", "#010a03": "--amber", "#010a04": "--violet"}


def curves(rows: list[dict]) -> str:
    """Loss by term, gradient norm and tokens per second over steps of one stage, one small SVG each."""
    terms = sorted({k for r in rows for k in r.get("loss", {})})
    loss = {t: [(r["step"], r["loss"][t]) for r in rows if t in r.get("loss", {})] for t in terms}
    panels = [("loss", loss)]
    for key, label in (("grad_norm", "gradient norm"), ("tokens_per_second", "tokens / s")):
        panels.append((label, {"": [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]}))
    return "".join(f'<figure class="card">{_panel(label, series)}</figure>' for label, series in panels)


def _panel(label: str, series: dict[str, list[tuple[float, float]]]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(3.7, 2.15), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), colour in zip(series.items(), SERIES, strict=False):
            points = [p for p in points if p[1] == p[1] and abs(p[1]) != float("inf")]
            points = points[:: max(1, len(points) // 400)]
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.9)
            axes.plot(x, _smooth(y), color=colour, linewidth=1.6, label=name or None)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=FAINT)
        axes.set_title(label, fontsize=9.5, loc="left", color=INK)
        axes.tick_params(colors=FAINT, length=0)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.margins(x=0.01)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), label)


def _smooth(values: list[float]) -> list[float]:
    """Centred mean over a twenty-fifth of the steps; shorter at both ends, so that nothing lags."""
    half = len(values) // 50
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


def _inline(svg: str, label: str) -> str:
    """An SVG for the middle of a page: no prolog, no metadata, and colours of the page's light or dark."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    for colour, name in {INK: "--ink", FAINT: "--soft", LINE: "--line", **SERIES}.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


# ---- scores

LEGEND = (("chance", "--soft"), ("majority", "--blue"), ("blind (grey frames)", "--violet"),
          ("colour probe", "--pink"), ("score above its floor", "--green"), ("not above", "--amber"))  # fmt: skip


def score_bars(result: dict) -> str:
    """Per split a list of tasks: bar with interval, a tick per floor, the ceiling dotted."""
    legend = "".join(f'<span style="--c:var({c})">{name}</span>' for name, c in LEGEND)
    parts = [f'<div class="legend">{legend}</div>']
    for split, part in summary(result).items():
        rows = "".join(_score_row(name, result["tasks"][name], t) for name, t in part["tasks"].items())
        parts.append(
            f"<h3>{escape(SPLITS.get(split, split))}</h3>"
            f'<p class="soft">mean normalised {part["mean"]:+.2f}; {part["above"]} of {len(part["tasks"])} tasks '
            f'have their whole interval above the floor</p><div class="card scores">{rows}</div>'
        )
    return "".join(parts)


SPLITS = {"unseen": "Unseen: pairs of factors that training never showed", "seen": "Seen: new clips of known pairs"}


def _score_row(name: str, entry: dict, task: dict) -> str:
    low, high = entry["ci95"]
    ticks = "".join(
        f'<i class="tick {f}" style="left:{_percent(entry[f])}" title="{f} {entry[f]:.3f}"></i>'
        for f in FLOORS if entry[f] is not None
    )  # fmt: skip
    above = " above" if task["above"] else ""
    track = (
        f'<div class="track" title="{escape(_hint(entry))}">'
        f'<i class="under" style="width:{_percent(task["floor"])}"></i>'
        f'<i class="bar{above}" style="width:{_percent(entry["value"])}"></i>'
        f'<i class="top" style="left:{_percent(entry["ceiling"])}" title="ceiling {entry["ceiling"]:.3f}"></i>{ticks}'
        f'<i class="ci" style="left:{_percent(low)};width:{_percent(high - low)}"></i></div>'
    )
    return (
        f'<div class="row"><div class="name">{escape(name.partition("/")[0].replace("_", " "))}</div>{track}'
        f'<div class="num"><b>{entry["value"]:.2f}</b> [{low:.2f}, {high:.2f}] n {entry["n"]} '
        f'<span class="pill{above}">{task["normalised"]:+.2f}</span></div></div>'
    )


def _hint(entry: dict) -> str:
    floors = ", ".join(f"{f} {entry[f]:.3f}" for f in FLOORS if entry[f] is not None)
    return f"score {entry['value']:.3f}, {floors}, ceiling {entry['ceiling']:.3f}, n {entry['n']}"


def _percent(x: float) -> str:
    return f"{100 * min(max(x, 0.0), 1.0):.2f}%"


def last_steps(rows: list[dict]) -> list[dict]:
    """Log rows by step; of a step done twice (after a resumption) the later."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "step" in row:
            by_step = {s: r for s, r in by_step.items() if s < row["step"]} if row["step"] in by_step else by_step
            by_step[row["step"]] = row
    ordered = sorted(by_step.values(), key=lambda r: r["step"])
    assert all(a["step"] < b["step"] for a, b in pairwise(ordered))
    return ordered
