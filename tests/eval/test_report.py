"""The page: complete, self-contained, right and wrong both shown; opened in Chromium where there is one."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from eval.charts import graph, last_steps
from eval.gallery import choose
from eval.report import Pieces, report
from mm.common.errors import UserError


class Links(HTMLParser):
    """Every address an element would load; and that tags close."""

    def __init__(self):
        super().__init__()
        self.found, self.open, self.tags = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href", "poster", "srcset", "data")]
        if tag not in ("meta", "link", "img", "br", "input", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_one_file_with_all_there_is(run_folder, tmp_path):
    page = report(run_folder, tmp_path / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert not links.open
    outside = [u for u in links.found if not u.startswith(("data:", "#"))]
    assert outside == [] and "@import" not in page and not re.search(r"url\((?!['\"]?(#|data:))", page)
    assert links.tags["video"] >= 3 and links.tags["img"] >= 6
    for text in ("mm run keye --size tiny", "s3_anneal_a", "5m10s", "gradient norm", "Unseen", "counting", "judge",
                 "right ✓", "wrong ✗", "0 frames", "torch"):  # fmt: skip
        assert text in page, text
    assert len(page) < 20_000_000


def test_both_right_and_wrong_are_chosen_unseen_first():
    rows = [
        {"task": t, "id": f"{i}", "split": "unseen" if i % 2 else "seen", "variant": "model", "media": [f"{t}{i}"],
         "score": float(i % 4 < 2)}
        for t in ("a", "b") for i in range(40)
    ]  # fmt: skip
    picked = choose(rows, 12)
    asked = [r for _, found in picked for r in found]
    assert {r["score"] for r in asked} == {0.0, 1.0} and {r["task"] for r in asked} == {"a", "b"}
    assert all(r["split"] == "unseen" for r in asked)


def test_text_from_outside_stays_text(tmp_path):
    nodes = [{"name": "<script>alert(1)</script>", "inputs": ["gone"], "seconds": None, "status": "failed"}]
    page = report(
        Pieces(
            title="</title><b>", command="<i>", nodes=nodes, environment={"<u>": "<u>"}, skipped={"<s>": {"<s>": 1}}
        ),
        tmp_path / "r.html",
    ).read_text()
    assert "alert(1)</script>" not in page and "<u>" not in page and "<i>" not in page and "<s>" not in page


def test_steps_done_twice_show_once():
    rows = [{"step": s, "loss": {"a": 1.0}} for s in (1, 2, 3, 4, 3, 4, 5)]
    assert [r["step"] for r in last_steps(rows)] == [1, 2, 3, 4, 5]
    assert last_steps(rows)[2] is rows[4]


def test_graph_of_one_and_of_nothing():
    assert "<svg" in graph([{"name": "a"}]) and "<svg" in graph([])


def test_graph_draws_what_is_needed_directly_and_no_line_behind_a_box():
    """Two roads of unlike length that meet: the shorter one runs straight on, in a row of its own."""
    needs = {"world": [], "a": ["world"], "b": ["world"], "b2": ["b", "world"], "end": ["b2", "a", "world"]}
    drawn = graph([{"name": n, "inputs": of} for n, of in needs.items()])
    boxes = dict(re.findall(r"<title>(\w+)</title><rect [^>]*x=\"\d+\" y=\"(\d+)\"", drawn))
    assert boxes["world"] == boxes["a"] == boxes["end"] < boxes["b"] == boxes["b2"]
    assert drawn.count("<path") == 5  # none from the world to b2 and end, which need it by way of others


def test_no_run_no_page(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report(tmp_path / "gone", tmp_path / "r.html")
    with pytest.raises(UserError, match="is it a run folder"):
        report(tmp_path, tmp_path / "r.html")


BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_opens_without_console_errors(run_folder, tmp_path):
    page = report(run_folder, tmp_path / "report.html")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'chrome'}",
         "--dump-dom", f"file://{page}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'data-show="wrong"' in done.stdout
