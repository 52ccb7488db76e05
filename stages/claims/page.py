"""The result of a claim: tables in the terminal, result.json, and a picture."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mm.common.config import to_dict
from mm.common.files import write_json
from mm.common.progress import duration
from stages.claims.claim import Cell, Claim, Effect, Lines, Row, decide, effect
from stages.environment import environment

MARK = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


def show(claim: Claim, rows: list[Row], folder: Path, console: Console) -> dict[str, Any]:
    """Print, write result.json, plot.svg and plot.png; returns the result."""
    effects = [effect(c, rows) for c in claim.contrasts]
    verdict, cells = decide(effects), claim.table(rows)
    console.print(f"[bold]{claim.name}[/]: {claim.says}\n[dim]{claim.source}[/]")
    console.print(measured(claim, cells))
    console.print(differences(claim, effects))
    for note in claim.notes(rows):
        console.print(f"  {note}")
    seconds = sum(r["seconds"] for r in rows)
    console.print(f"Verdict over {len(rows)} seeds: [bold {MARK[verdict]}]{verdict}[/]  "
                  f"({duration(seconds)} of seeds; {folder / 'result.json'}, plot.svg)")  # fmt: skip
    result = {
        "claim": claim.name, "says": claim.says, "source": claim.source, "verdict": verdict, "unit": claim.unit,
        "effects": [asdict(e) for e in effects], "table": {"columns": list(claim.columns), "lines": cells},
        "notes": claim.notes(rows), "seeds": rows, "config": to_dict(claim.config), "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    plot(claim, effects, cells, verdict, folder)
    return result


def measured(claim: Claim, cells: Lines) -> Table:
    """A line for each column of the claim, so that it fits a narrow terminal."""
    table = Table("", *cells, title=f"mean over seeds ± deviation, {claim.unit}")
    for i, column in enumerate(claim.columns):
        table.add_row(column, *(_cell(line[i]) for line in cells.values()))
    return table


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell[0]:.3f}" + (f" ±{cell[1]:.3f}" if cell[1] else "")


def differences(claim: Claim, effects: list[Effect]) -> Table:
    table = Table("paired difference", "mean", "95 % interval", "not below 0?", title="effect over seeds")
    for e in effects:
        bounds = "needs 2 seeds" if e.low is None else f"{e.low:+.4f} to {e.high:+.4f}"
        says = f"[{MARK[e.verdict]}]{e.verdict}[/]" if e.decides else "[dim]for information[/]"
        table.add_row(f"{e.name}\n[dim]{e.says}[/]", f"{e.mean:+.4f}", bounds, says)
    return table


def plot(claim: Claim, effects: list[Effect], cells: Lines, verdict: str, folder: Path) -> None:
    """plot.svg and plot.png. Left: lines of the table; right: effects."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    draw_lines(left, claim, cells)
    draw_effects(right, effects)
    figure.suptitle(f"{claim.name}: {verdict} ({len(effects[0].values)} seeds)")
    for kind in ("svg", "png"):
        figure.savefig(folder / f"plot.{kind}", dpi=120)
    pyplot.close(figure)


def draw_lines(axes: Any, claim: Claim, cells: Lines) -> None:
    """Mean and deviation over seeds per column, lines side by side; floors and ceilings dashed."""
    shown = {k: v for k, v in cells.items() if k not in claim.hidden}
    solid = [k for k in shown if k not in claim.dashed]
    for name, line in shown.items():
        there = [(i, *c) for i, c in enumerate(line[: claim.plotted]) if c is not None]
        at, mean, deviation = ([cell[k] for cell in there] for k in range(3))
        if name in claim.dashed:
            axes.plot(at, mean, "_--", color="0.3", alpha=0.5 + 0.5 * (name != "ceiling"), lw=0.8, label=name,
                      dashes=(2 + 3 * claim.dashed.index(name), 3))  # fmt: skip
        else:
            aside = 0.08 * (solid.index(name) - (len(solid) - 1) / 2)
            axes.errorbar([x + aside for x in at], mean, yerr=deviation, fmt="o", capsize=3, ms=5, label=name)
    axes.set_xticks(range(claim.plotted), claim.columns[: claim.plotted])
    axes.set_ylabel(claim.unit)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    axes.grid(axis="y", alpha=0.3)


def draw_effects(axes: Any, effects: list[Effect]) -> None:
    """Each effect with its interval (blue where it decides) and the seeds' own values."""
    for i, e in enumerate(reversed(effects)):
        colour = "C0" if e.decides else "0.6"
        if e.low is not None and e.high is not None:
            axes.plot([e.low, e.high], [i, i], color=colour, lw=3)
        axes.plot(e.values, [i - 0.18] * len(e.values), "o", color="0.35", ms=3)
        axes.plot([e.mean], [i], "D", color=colour)
    axes.set_yticks(range(len(effects)), [e.name for e in reversed(effects)], fontsize=8)
    axes.set_ylim(-0.6, len(effects) - 0.4)
    axes.axvline(0, color="k", lw=0.8)
    axes.set_xlabel("paired difference: mean, 95 % interval, seeds")
    axes.grid(axis="x", alpha=0.3)
