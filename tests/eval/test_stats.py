"""Intervals against published numbers, and scores.json against a table made by hand."""

import math

import pytest
from rich.console import Console

from eval.scores import FLOORS, print_scores, scores, summary
from eval.stats import bootstrap, interval, normalised, wilson


@pytest.mark.parametrize(
    "hits, n, low, high",  # Newcombe 1998 (Stat. Med. 17:857), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
     (29, 29, 0.8830, 1.0)],
)  # fmt: skip
def test_wilson(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_interval_picks_its_method():
    assert interval([1.0, 0.0] * 50) == wilson(50, 100)
    values = [0.25, 0.5, 0.75, 1.0] * 40
    low, high = interval(values)
    half = 1.96 * 0.2795 / math.sqrt(160)
    assert (low, high) == pytest.approx((0.625 - half, 0.625 + half), abs=0.006)
    assert interval(values) == bootstrap(values)  # the same draws each time
    assert interval([]) == (0.0, 1.0)


def test_normalised():
    assert normalised(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert normalised(0.1, 0.2, 1.0) < 0
    assert normalised(0.9, 0.9, 0.9) == 0.0


def row(task, number, variant, score, *, split="unseen", parsed="x", **more) -> dict:
    return {
        "task": task, "id": str(number), "type": "t", "split": split, "variant": variant, "prompt": "?", "media": [],
        "answer": "x", "choices": None, "chance": 0.25, "ceiling": 0.9, "space": "closed", "response": "x",
        "parsed": parsed, "score": score, "verdict_by": "rule", **more,
    }  # fmt: skip


def table() -> list[dict]:
    rows = [row("order", i, "model", float(i < 8)) for i in range(10)]
    rows += [row("order", i, "blind", float(i < 3)) for i in range(10)]
    rows += [row("order", i, "majority", float(i < 2)) for i in range(10)]
    rows += [row("order", i, "probe", float(i < 4)) for i in range(10)]
    rows += [row("order", i, "model", 0.0, split="seen", parsed=None, unjudged=True) for i in range(10, 14)]
    bad = {k: v for k, v in row("order", 99, "model", 0).items() if k not in ("score", "response", "parsed")}
    return [*rows, {**bad, "skipped": "0 frames"}]


def test_scores_by_hand():
    result = scores(table(), {"benchmark": "world", "seconds": 3.0})
    entry = result["tasks"]["order/unseen"]
    assert set(entry) == {"value", "n", "ci95", "ceiling", "split", *FLOORS}
    assert entry | {"ci95": None} == {
        "value": 0.8, "n": 10, "ci95": None, "chance": 0.25, "majority": 0.2, "blind": 0.3, "probe": 0.4,
        "ceiling": 0.9, "split": "unseen",
    }  # fmt: skip
    assert result["tasks"]["order/seen"]["blind"] is None  # nobody asked
    run = result["run"]
    assert run["skipped"] == {"0 frames": 1} and run["skipped_items"] == ["order/99: 0 frames"]
    assert run["unparsed"] == {"order": 4} and "no judge decided 4 of order" in run["notes"][0]


def test_summary_and_table():
    result = scores(table(), {})
    found = summary(result)
    task = found["unseen"]["tasks"]["order/unseen"]
    assert task["normalised"] == pytest.approx(0.8) and (task["floor"], task["floor_name"]) == (0.4, "probe")
    assert task["above"] and found["unseen"]["above"] == 1  # Wilson of 8/10 begins at 0.49
    assert found["seen"]["mean"] < 0
    console = Console(record=True, width=120)
    print_scores(result, console)
    text = console.export_text()
    assert "order/unseen" in text and "0.40 probe" in text and "+0.80" in text and "skipped 1: 0 frames" in text
