"""Held-out clips that play, with what was asked, what is right, and what the model said."""

import base64
import io
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.scorers import parse_box
from mm.common.errors import BadSample
from mm.common.seeds import rng
from vision.media import read_frames, video_info

VIDEO_BYTES, TOTAL_BYTES = 1_500_000, 14_000_000
MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".m4v": "video/mp4"}


def gallery(rows: Iterable[dict], roots: list[Path], *, cards: int = 21) -> str:
    """Cards of clips or pictures with every question the model was asked about them.

    Args: rows of the model; roots: folders in which a row's media paths may lie.
    """
    out, size = [], 0
    for media, asked in choose(rows, cards):
        shown = _media(media, asked, roots)
        if shown is None or size + len(shown) > TOTAL_BYTES:
            continue
        size += len(shown)
        out.append(f'<article class="clip card">{shown}{_answers(asked)}</article>')
    return "".join(out)


def choose(rows: Iterable[dict], cards: int) -> list[tuple[tuple[str, ...], list[dict]]]:
    """Media with their rows: unseen before seen, every task in turn, right and wrong answers taking turns."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        if row["variant"] == "model" and "skipped" not in row and row["media"]:
            groups.setdefault(tuple(row["media"]), []).append(row)
    by_tasks: dict[tuple, list] = {}
    for media, asked in groups.items():
        order = ("unseen", "test", "seen").index(asked[0]["split"])
        right = sum(r["score"] >= 1 for r in asked) / len(asked)
        by_tasks.setdefault((tuple(sorted({r["task"] for r in asked}))), []).append((order, right, media, asked))
    lists = [_in_turns(found, right_first=k % 2 == 0) for k, found in enumerate(by_tasks.values())]
    lists.sort(key=lambda found: -len(found[0][1]))
    picked: list[tuple[tuple, list[dict]]] = []
    depth = 0
    while len(picked) < cards and any(depth < len(found) for found in lists):
        picked += [found[depth] for found in lists if depth < len(found)]
        depth += 1
    return picked[:cards]


def _in_turns(found: list[tuple[int, float, tuple, list]], *, right_first: bool) -> list[tuple[tuple, list]]:
    """By split; inside it mostly right and mostly wrong alternate, in a seeded order."""
    shuffled = [found[i] for i in rng(0, "gallery", len(found)).permutation(len(found))]
    out = []
    for order in sorted({f[0] for f in found}):
        good = [f for f in shuffled if f[0] == order and f[1] >= 0.5]
        bad = [f for f in shuffled if f[0] == order and f[1] < 0.5]
        for i in range(max(len(good), len(bad))):
            turn = (good, bad) if right_first else (bad, good)
            out += [part[i] for part in turn if i < len(part)]
    return [(media, asked) for _, _, media, asked in out]


# ---- one card


def _media(media: tuple[str, ...], asked: list[dict], roots: list[Path]) -> str | None:
    """HTML of the clip or pictures, or None where the files are gone."""
    paths = [next((r / m for r in roots if (r / m).is_file()), None) for m in media]
    if any(p is None for p in paths):
        return None
    files = [p for p in paths if p is not None]
    try:
        if len(files) == 1 and files[0].suffix.lower() in MIME:
            return f'<div class="media">{_video(files[0])}</div>'
        boxes = [_boxes(r) for r in asked if r["task"] == "grounding"] if len(files) == 1 else []
        side = 480 if len(files) == 1 else 200
        stills = "".join(_still(np.asarray(Image.open(p).convert("RGB")), side, "".join(boxes)) for p in files)
        return f'<div class="media{" strip" if len(files) > 1 else ""}">{stills}</div>'
    except (OSError, BadSample):
        return None


def _video(path: Path) -> str:
    """The file itself where it is small (its first frame stands until it plays), else eight of its frames."""
    small = path.stat().st_size <= VIDEO_BYTES
    last, n = video_info(path).frames - 1, 1 if small else 8
    frames = read_frames(path, np.unique(np.linspace(0, last, n).astype(np.int64)))
    if not small:
        return "".join(_still(f, 160, "") for f in frames)
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<video muted loop playsinline preload="metadata" poster="{_jpeg(frames[0], 360)[0]}" '
        f'src="data:{MIME[path.suffix.lower()]};base64,{data}"></video>'
    )


def _still(pixels: np.ndarray, side: int, overlay: str) -> str:
    source, (w, h) = _jpeg(pixels, side)
    svg = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{overlay}</svg>' if overlay else ""
    return f'<span class="still"><img alt="" width="{w}" height="{h}" src="{source}">{svg}</span>'


def _jpeg(pixels: np.ndarray, side: int) -> tuple[str, tuple[int, int]]:
    """(data address, (width, height)) of a picture at most `side` px wide and high."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", picture.size


def _boxes(row: dict) -> str:
    """The true box in green, the model's in red or blue (right)."""
    colours = (("#22c55e", parse_box(row["answer"])), ("#60a5fa" if row["score"] >= 1 else "#ef4444", row["parsed"]))
    return "".join(
        f'<rect x="{b[0]}" y="{b[1]}" width="{b[2] - b[0]}" height="{b[3] - b[1]}" fill="none" stroke="{c}" '
        f'stroke-width="3" vector-effect="non-scaling-stroke"/>'
        for c, b in colours if isinstance(b, list) and len(b) == 4 and all(math.isfinite(v) for v in b)
    )  # fmt: skip


def _answers(asked: list[dict]) -> str:
    """One block per prompt: a caption that three tasks score is shown once, with a mark for each."""
    blocks: dict[tuple[str, str], list[dict]] = {}
    for row in asked:
        blocks.setdefault((row["prompt"], row["response"]), []).append(row)
    return "".join(_block(rows) for rows in blocks.values())


def _block(rows: list[dict]) -> str:
    right, first = sum(r["score"] >= 1 for r in rows), rows[0]
    kind, mark = ("right", "right ✓") if right == len(rows) else ("some", f"{right} of {len(rows)} right")
    if not right:
        kind, mark = "", "wrong ✗"
    tasks = first["task"] if len(rows) == 1 else first["task"].partition("_")[0]
    truth = f"<dt>answer</dt><dd>{escape(_plain(first['answer']))}</dd>" if len(rows) == 1 else ""
    return (
        f'<div class="qa {kind}"><div class="task"><span>{escape(tasks)} · {escape(first["split"])}</span>'
        f"<b>{mark}</b></div>{_question(first['prompt'])}<dl>{truth}<dt>model</dt>"
        f"<dd>{escape(_plain(first['response'])) or '<i>nothing</i>'}</dd></dl>"
        f"{_chips(rows) if len(rows) > 1 else ''}</div>"
    )


def _question(prompt: str) -> str:
    text = prompt.replace("<image>", "").replace("<video>", "").strip()
    if len(text) <= 160:
        return f'<div class="q">{escape(text)}</div>'
    return f'<details><summary>{escape(text[:140])}…</summary><div class="q">{escape(text)}</div></details>'


def _chips(rows: list[dict]) -> str:
    """`colour: red ✓`: what is right, and whether the model said so."""
    chips = []
    for r in rows:
        right, name = r["score"] >= 1, r["task"].rpartition("_")[2]
        said = "" if right or r["parsed"] is None else f", not {r['parsed']}"
        text = escape(f"{name}: {_plain(r['answer'], 60)}{_plain(said, 60)} {'✓' if right else '✗'}")
        chips.append(f'<span class="chip{" right" if right else ""}">{text}</span>')
    return f'<div class="chips">{"".join(chips)}</div>'


def _plain(text: Any, most: int = 300) -> str:
    text = str(text)
    return text if len(text) <= most else text[:most] + "…"
