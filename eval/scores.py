"""Scores from responses alone: `scores(rows, run)` is pure, and `rescore(folder)` repeats it at any time.

A split "seen" or "unseen" makes one entry per task and split, "counting/seen" and "counting/unseen";
data without such splits make one entry per task. An entry:

    value     mean score of the model's answers          n        items answered
    ci95      Wilson (0/1 scores) or bootstrap           split    "seen", "unseen" or "test"
    chance    a uniform guess in the answer space        majority the commonest training answer, per question type
    blind     the same checkpoint, every frame grey      probe    logistic regression on colours and question type
    ceiling   what an oracle that sees the truth gets

`blind` and `probe` are null only where the run was told to leave them out.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval import responses
from eval.stats import interval, normalised
from mm.common.files import write_json

SPLIT_ORDER = ("unseen", "seen", "test")
FLOORS = ("chance", "majority", "blind", "probe")


def scores(rows: list[dict], run: dict) -> dict:
    """{"tasks": {NAME: {...}}, "run": {...}} from the rows and the run line of a responses.jsonl."""
    groups: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
    for row in rows:
        if "skipped" not in row:
            group = groups.setdefault((row["task"], row["split"]), {})
            group.setdefault(row["variant"], {})[row["id"]] = row
    order = run.get("tasks", [])
    ranked = sorted(
        groups, key=lambda g: (SPLIT_ORDER.index(g[1]), order.index(g[0]) if g[0] in order else len(order))
    )
    tasks = {entry_name(*g): _entry(groups[g], g[1]) for g in ranked if groups[g].get("model")}
    return {"tasks": tasks, "run": _run(rows, run)}


def entry_name(task: str, split: str) -> str:
    return f"{task}/{split}" if split in ("seen", "unseen") else task


def _entry(variants: dict[str, dict[str, dict]], split: str) -> dict:
    model = variants["model"]
    values = [r["score"] for r in model.values()]
    low, high = interval(values)
    return {
        "value": _round(_mean(values)), "n": len(values), "ci95": [_round(low), _round(high)],
        "chance": _round(_mean([r["chance"] for r in model.values()])),
        **{name: _floor(variants.get(name), model) for name in FLOORS[1:]},
        "ceiling": _round(_mean([r["ceiling"] for r in model.values()])), "split": split,
    }  # fmt: skip


def _floor(rows: dict[str, dict] | None, model: dict[str, dict]) -> float | None:
    """Mean over the items the model answered; null where nobody asked for this floor."""
    values = [rows[i]["score"] for i in model if i in rows] if rows else []
    return _round(_mean(values)) if values else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _round(x: float) -> float:
    return round(float(x), 6)


def _run(rows: list[dict], run: dict) -> dict:
    skipped = [r for r in rows if "skipped" in r]
    model = [r for r in rows if r["variant"] == "model" and "skipped" not in r]
    judged = Counter(r["verdict_by"] for r in model)
    unsure = Counter(r["task"] for r in model if r.get("unjudged"))
    open_tasks = sorted({r["task"] for r in model if r["space"] == "open"})
    notes = []
    if unsure:
        notes.append(
            "no judge decided "
            + ", ".join(f"{n} of {t}" for t, n in unsure.items())
            + ": exact match after normalisation; a judge may find more of them right"
        )
    if open_tasks:
        notes.append(f"open answers ({', '.join(open_tasks)}): majority and probe can only repeat training answers")
    if run.get("floors_from") == "test":
        notes.append("no training rows: majority is the commonest test answer, the probe is cross-validated")
    return {
        **run, "answers": len(model), "verdicts": dict(judged), "unjudged": dict(unsure), "notes": notes,
        "unparsed": dict(Counter(r["task"] for r in model if r["parsed"] is None)),
        "skipped": dict(Counter(r["skipped"] for r in skipped)),
        "skipped_items": [f"{r['task']}/{r['id']}: {r['skipped']}" for r in skipped[:200]],
    }  # fmt: skip


def rescore(folder: str | Path) -> dict:
    """Compute scores.json of a run folder anew, from its responses.jsonl."""
    run, rows = responses.read(folder)
    result = scores(rows, run)
    write_json(Path(folder) / "scores.json", result)
    return result


def floor(entry: dict) -> tuple[float, str]:
    """(highest floor, its name)."""
    return max((entry[name], name) for name in FLOORS if entry[name] is not None)


def summary(result: dict) -> dict:
    """{split: {"mean", "above", "tasks": {NAME: {"normalised", "floor", "floor_name", "above"}}}}.

    normalised = (value - floor) / (ceiling - floor); above: the whole interval lies over the floor.
    """
    out: dict[str, Any] = {}
    for name, entry in result["tasks"].items():
        low, by = floor(entry)
        out.setdefault(entry["split"], {"mean": 0.0, "above": 0, "tasks": {}})["tasks"][name] = {
            "normalised": _round(normalised(entry["value"], low, entry["ceiling"])),
            "floor": low, "floor_name": by, "above": entry["ci95"][0] > low,
        }  # fmt: skip
    for part in out.values():
        part["mean"] = _round(_mean([t["normalised"] for t in part["tasks"].values()]))
        part["above"] = sum(t["above"] for t in part["tasks"].values())
    return out


def print_scores(result: dict, console: Console | None = None) -> None:
    """A table with a bar per task: filled to the value, `|` at the floor."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table(title=result["run"].get("benchmark", "scores"), title_justify="left", box=None, pad_edge=False)
    for column in ("task", "", "value", "95 %", "floor", "ceiling", "normalised", "n"):
        table.add_column(column, justify="left" if column in ("task", "") else "right", no_wrap=True)
    width = max(6, min(28, console.width - 92))
    for split, part in summary(result).items():
        for name, t in part["tasks"].items():
            e = result["tasks"][name]
            table.add_row(
                name, _bar(e, t, width), f"{e['value']:.3f}", f"{e['ci95'][0]:.2f}-{e['ci95'][1]:.2f}",
                f"{t['floor']:.2f} {t['floor_name']}", f"{e['ceiling']:.2f}",
                Text(f"{t['normalised']:+.2f}", style="green" if t["above"] else "yellow"), str(e["n"]),
            )  # fmt: skip
        mean = (Text(f"mean, {split}", style="bold"), f"{part['above']} of {len(part['tasks'])} above their floor")
        table.add_row(*mean, "", "", "", "", f"{part['mean']:+.2f}", "", end_section=True)
    console.print(table)
    for note in result["run"]["notes"]:
        console.print(f"  {note}", style="dim")
    for reason, n in result["run"]["skipped"].items():
        console.print(f"  skipped {n}: {reason}", style="yellow")


def _bar(entry: dict, task: dict, width: int) -> Text:
    filled, tick = round(entry["value"] * width), min(width - 1, round(task["floor"] * width))
    text = Text("━" * filled, style="green" if task["above"] else "yellow")
    text.append("─" * (width - filled), style="bright_black")
    return Text.assemble(text[:tick], ("|", "bold red"), text[tick + 1 :])
