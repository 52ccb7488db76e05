"""`report.html`: one file that shows a run: its pipeline, curves, scores, clips, and what went wrong.

Everything is inside (styles, SVG, clips as base64); the page asks for nothing from outside.
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from eval import responses
from eval.charts import curves, graph, last_steps, score_bars
from eval.gallery import gallery
from eval.scores import summary
from mm.common.errors import UserError
from mm.common.files import read_json, read_jsonl, write_atomic
from mm.common.progress import duration

HERE = Path(__file__).parent


@dataclass
class Pieces:
    """What a report is made of; every part may be empty.

    Args:
        nodes: {"name", "inputs": [names], "seconds", "status": done|running|failed|waiting, "note"} in order.
        logs: stage -> rows of its log.jsonl ("step", "loss" by term, "grad_norm", "tokens_per_second").
        evaluations: folders with responses.jsonl and scores.json.
        skipped: where -> {reason: how often}; the evaluations' own are added.
        environment: what a bug report needs; command: what was typed.
    """

    title: str = "A run"
    command: str = ""
    nodes: list[dict] = field(default_factory=list)
    logs: dict[str, list[dict]] = field(default_factory=dict)
    evaluations: list[Path] = field(default_factory=list)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


def collect(run_folder: str | Path) -> Pieces:
    """Pieces found in a run folder: pipeline.json (title, command, nodes, environment, skipped), every
    */log.jsonl and every folder with responses.jsonl, two levels deep. Raises UserError where there is nothing."""
    root = Path(run_folder)
    if not root.is_dir():
        raise UserError(f"{run_folder} is no run folder; give the --out of a run")
    known = read_json(root / "pipeline.json") if (root / "pipeline.json").exists() else {}
    levels = ("", "*/", "*/*/")
    logs = {
        str(p.parent.relative_to(root)): read_jsonl(p) for lv in levels for p in sorted(root.glob(f"{lv}log.jsonl"))
    }
    found = [p.parent for lv in levels for p in sorted(root.glob(f"{lv}{responses.NAME}"))]
    if not (known or logs or found):
        raise UserError(f"{run_folder} holds no pipeline.json, log.jsonl or {responses.NAME}; is it a run folder?")
    names = [n["name"] for n in known.get("nodes", [])]
    order = sorted(logs, key=lambda s: names.index(s) if s in names else len(names))
    return Pieces(
        title=known.get("title", root.name), command=known.get("command", ""), nodes=known.get("nodes", []),
        logs={s: logs[s] for s in order}, evaluations=found, skipped=known.get("skipped", {}),
        environment=known.get("environment", {}),
    )  # fmt: skip


def report(source: Pieces | str | Path, out_html: str | Path) -> Path:
    """Write the page for a run folder, or for pieces put together by the caller; returns its path."""
    pieces = source if isinstance(source, Pieces) else collect(source)
    results = [(folder, _scores(folder), responses.read(folder)[1]) for folder in pieces.evaluations]
    sections = [
        _tiles(pieces, [r for _, r, _ in results]), _pipeline(pieces), *(_evaluation(r) for _, r, _ in results),
        *(_clips(result, rows) for _, result, rows in results), _training(pieces),
        _skipped(pieces, [r for _, r, _ in results]), _environment(pieces),
    ]  # fmt: skip
    page = Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(pieces.title), css=(HERE / "report.css").read_text(encoding="utf-8"),
        subtitle=f"<code>{escape(pieces.command)}</code>" if pieces.command else "",
        body="\n".join(s for s in sections if s), footer="Made by mmstack. One file; nothing is loaded from outside.",
    )  # fmt: skip
    write_atomic(out_html, page)
    return Path(out_html)


def _scores(folder: Path) -> dict:
    from eval.scores import rescore

    return read_json(folder / "scores.json") if (folder / "scores.json").exists() else rescore(folder)


def _tiles(pieces: Pieces, results: list[dict]) -> str:
    tiles = []
    for result in results:
        for split, part in sorted(summary(result).items(), reverse=True):
            tiles.append((f"{part['mean']:+.2f}", f"mean normalised score, {split}"))
            tiles.append((f"{part['above']} / {len(part['tasks'])}", f"tasks above their floor, {split}"))
    seconds = [n["seconds"] for n in pieces.nodes if n.get("seconds")]
    if seconds:
        tiles.append((duration(sum(seconds)), "all nodes together"))
    steps = sum(len(last_steps(rows)) for rows in pieces.logs.values())
    if steps:
        tiles.append((f"{steps:,}", f"optimizer steps in {len(pieces.logs)} stages"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
    ) + "</div>" if tiles else ""  # fmt: skip


def _pipeline(pieces: Pieces) -> str:
    if not pieces.nodes:
        return ""
    return f'<h2>Pipeline</h2><div class="card scroll">{graph(pieces.nodes)}</div>'


def _evaluation(result: dict) -> str:
    run = result["run"]
    notes = "".join(f"<li>{escape(n)}</li>" for n in run.get("notes", []))
    judge = f"judge: {run['judge']}" if run.get("judge") else "no judging model: answers are decided by rules"
    return (
        f"<h2>Scores: {escape(str(run.get('benchmark', 'evaluation')))}</h2>"
        f'<p class="soft">The bar is the mean score with its 95 % interval; hatched is what needs no understanding '
        f"(the highest of four floors); the pill is (score − floor) / (ceiling − floor). {run['answers']:,} answers; "
        f'{escape(judge)}.</p>{score_bars(result)}<ul class="soft">{notes}</ul>'
    )


def _clips(result: dict, rows: list[dict]) -> str:
    data = Path(str(result["run"].get("data", ".")))
    shown = gallery(rows, [data, data / "kc"])
    if not shown:
        return ""
    buttons = "".join(
        f'<button data-show="{k}" aria-pressed="{str(k == "all").lower()}">{k}</button>'
        for k in ("all", "right", "wrong")
    )
    return (
        "<h2>What the model saw and said</h2>"
        '<p class="soft">Held-out clips and pictures, the question, the right answer and the model\'s own words. '
        "Boxes: green is the truth, blue a right answer, red a wrong one.</p>"
        f'<div class="filters">{buttons}</div><div class="gallery">{shown}</div>'
    )


def _training(pieces: Pieces) -> str:
    parts = []
    for stage, rows in pieces.logs.items():
        steps = last_steps(rows)
        if steps:
            parts.append(f'<h3>{escape(stage)}</h3><div class="curves">{curves(steps)}</div>')
    return "<h2>Training</h2>" + "".join(parts) if parts else ""


def _skipped(pieces: Pieces, results: list[dict]) -> str:
    found = dict(pieces.skipped)
    for run in (r["run"] for r in results):
        unjudged = {f"{task}: no judging model, decided by exact match": n for task, n in run["unjudged"].items()}
        found[str(run.get("benchmark", "evaluation"))] = {**run["skipped"], **unjudged}
    rows = "".join(
        f'<tr><td>{escape(where)}</td><td>{escape(reason)}</td><td class="n">{n}</td></tr>'
        for where, reasons in found.items() for reason, n in reasons.items()
    )  # fmt: skip
    named = [name for r in results for name in r["run"].get("skipped_items", [])][:50]
    listed = f"<details><summary>which</summary><pre>{escape(chr(10).join(named))}</pre></details>" if named else ""
    body = f'<div class="card"><table>{rows}</table></div>{listed}' if rows else '<p class="soft">Nothing.</p>'
    return f"<h2>What was skipped or left undecided</h2>{body}" if found else ""


def _environment(pieces: Pieces) -> str:
    if not pieces.environment and not pieces.command:
        return ""
    rows = "".join(
        f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in pieces.environment.items()
    )
    command = f"<pre>{escape(pieces.command)}</pre>" if pieces.command else ""
    table = f'<div class="card"><table>{rows}</table></div>' if rows else ""
    return f"<h2>Environment</h2>{command}{table}"
