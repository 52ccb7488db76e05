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
        out.append(f'<article class="clip card">{shown}{"".join(_answer(r) for r in asked)}</article>')
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
    lists = [_in_turns(found) for found in by_tasks.values()]
    lists.sort(key=lambda found: -len(found[0][1]))
    picked: list[tuple[tuple, list[dict]]] = []
    depth = 0
    while len(picked) < cards and any(depth < len(found) for found in lists):
        picked += [found[depth] for found in lists if depth < len(found)]
        depth += 1
    return picked[:cards]


def _in_turns(found: list[tuple[int, float, tuple, list]]) -> list[tuple[tuple, list]]:
    """By split; inside it mostly right and mostly wrong alternate, in a seeded order."""
    shuffled = [found[i] for i in rng(0, "gallery", len(found)).permutation(len(found))]
    out = []
    for order in sorted({f[0] for f in found}):
        good = [f for f in shuffled if f[0] == order and f[1] >= 0.5]
        bad = [f for f in shuffled if f[0] == order and f[1] < 0.5]
        for i in range(max(len(good), len(bad))):
            out += [part[i] for part in (good, bad) if i < len(part)]
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
    """The file itself where it is small, else eight of its frames."""
    if path.stat().st_size <= VIDEO_BYTES:
        data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:{MIME[path.suffix.lower()]};base64,{data}"
        return f'<video controls muted loop playsinline preload="metadata" src="{source}"></video>'
    info = video_info(path)
    frames = read_frames(path, np.linspace(0, info.frames - 1, min(8, info.frames)).astype(int).tolist())
    return "".join(_still(f, 160, "") for f in frames)


def _still(pixels: np.ndarray, side: int, overlay: str) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=82)
    data = base64.b64encode(out.getvalue()).decode()
    svg = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{overlay}</svg>' if overlay else ""
    w, h = picture.size
    return (
        f'<span class="still"><img alt="" width="{w}" height="{h}" src="data:image/jpeg;base64,{data}">{svg}</span>'
    )


def _boxes(row: dict) -> str:
    """The true box in green, the model's in red or blue (right)."""
    colours = (("#22c55e", parse_box(row["answer"])), ("#60a5fa" if row["score"] >= 1 else "#ef4444", row["parsed"]))
    return "".join(
        f'<rect x="{b[0]}" y="{b[1]}" width="{b[2] - b[0]}" height="{b[3] - b[1]}" fill="none" stroke="{c}" '
        f'stroke-width="3" vector-effect="non-scaling-stroke"/>'
        for c, b in colours if isinstance(b, list) and len(b) == 4 and all(math.isfinite(v) for v in b)
    )  # fmt: skip


def _answer(row: dict) -> str:
    right = row["score"] >= 1
    question = row["prompt"].replace("<image>", "").replace("<video>", "").strip()
    if len(question) > 160:
        question = (
            f'<details><summary>{escape(question[:140])}…</summary><div class="q">{escape(question)}</div></details>'
        )
    else:
        question = f'<div class="q">{escape(question)}</div>'
    mark = "right ✓" if right else "wrong ✗"
    return (
        f'<div class="qa{" right" if right else ""}"><div class="task"><span>{escape(row["task"])} · '
        f"{escape(row['split'])}</span><b>{mark}</b></div>{question}<dl><dt>answer</dt><dd>{escape(_plain(row['answer']))}"
        f"</dd><dt>model</dt><dd>{escape(_plain(row['response'])) or '<i>nothing</i>'}</dd></dl></div>"
    )


def _plain(text: Any, most: int = 300) -> str:
    text = str(text)
    return text if len(text) <= most else text[:most] + "…"
