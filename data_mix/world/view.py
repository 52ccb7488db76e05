"""One page that shows the world: clips that play, their truth, every task with an example, balance, pairs."""

import base64
import csv
import html
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_mix.regions import Region, regions_of
from data_mix.shards import Source
from data_mix.world.encode import read_mp4
from data_mix.world.render import FONT
from data_mix.world.sound import RATE
from data_mix.world.words import RGB
from mm.common.files import read_json, read_jsonl, write_atomic

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1320px;padding:24px;background:#fafaf8;color:#1c1c22}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:17px;margin:32px 0 10px;border-bottom:1px solid #d8d8d2;padding-bottom:4px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:14px;align-items:start}
.card{background:#fff;border:1px solid #e2e2dc;border-radius:8px;padding:12px;overflow:hidden}
.media{display:flex;gap:8px;align-items:flex-start;flex-wrap:wrap}
.media video,.media img{max-width:100%;border-radius:4px;display:block}
.wave{width:100%;height:64px;display:block;margin-top:8px;border-radius:4px}
.note{color:#666a70;font-size:12.5px}.q{color:#3a4a6a;margin-top:6px}.a{font-weight:600;overflow-wrap:anywhere}
b.t{display:inline-block;background:#eef0f4;border-radius:4px;padding:0 6px;
font-size:12px;font-weight:600;margin-bottom:6px}
table{border-collapse:collapse;font-size:13px;background:#fff}
td,th{border:1px solid #e2e2dc;padding:3px 9px;text-align:right}
th{background:#f2f2ee;font-weight:600}td:first-child,th:first-child{text-align:left}.tables{display:flex;gap:18px;flex-wrap:wrap}
td.held{background:#f6d8d4;color:#8a2018;font-weight:600;text-align:center}td.kept{text-align:center;color:#b4b8bc}
"""
# The bar would cover a third of such small pictures: it comes when the pointer does.
_PLAYER = "loop preload=auto onmouseenter=this.controls=true onmouseleave=this.controls=false onclick=this.play()"
_LABEL = ImageFont.truetype(str(FONT), 18)
_INK = {**{k: tuple(int(c * 0.85) for c in v) for k, v in RGB.items()}, "white": (255, 255, 255)}


def _e(text: Any) -> str:
    return html.escape(str(text)).replace("\n", "<br>")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _img(data: bytes, kind: str = "image/jpeg", extra: str = "") -> str:
    return f'<img src="{_uri(data, kind)}" {extra}>'


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _boxed(frame: np.ndarray, boxes: list, things: list[dict], signs: list[dict]) -> Image.Image:
    k = 2
    image = Image.fromarray(frame).resize((frame.shape[1] * k, frame.shape[0] * k))
    draw = ImageDraw.Draw(image)
    for thing, parts in zip(things, boxes, strict=True):
        for b in parts:
            draw.rectangle([v * k for v in b], outline=_INK[thing["colour"]], width=2)
            draw.text(
                (b[0] * k + 3, b[1] * k),
                thing["shape"],
                (255, 255, 255),
                _LABEL,
                stroke_width=2,
                stroke_fill=(0, 0, 0),
            )
    for s in signs:
        draw.rectangle([v * k for v in s["box"]], outline=(0, 230, 230), width=1)
    return image


def _spectrogram(sound: np.ndarray, onsets: Iterable[float]) -> bytes:
    """Log spectrogram of both channels (left above right), true onsets as lines."""
    rows = []
    for channel in sound:
        hop, n = 240, 512
        windows = np.lib.stride_tricks.sliding_window_view(channel, n)[::hop] * np.hanning(n)
        power = 20 * np.log10(np.abs(np.fft.rfft(windows, axis=1))[:, : n // 3] + 1e-4).T[::-1]
        rows.append(np.clip((power + 45) / 75, 0, 1))
    v = np.concatenate(rows)
    picture = np.stack([v**0.8 * 255, v**1.5 * 220, 70 + v * 90 - v**4 * 120], -1).clip(0, 255).astype(np.uint8)
    for t in onsets:
        picture[::2, min(int(t * RATE / 240), picture.shape[1] - 1)] = (255, 255, 255)
    return _png(Image.fromarray(picture))


def _clip_card(root: Path, path: Path) -> str:
    truth, data = read_json(path.with_suffix(".json")), path.read_bytes()
    frames, sound = read_mp4(data)
    i = len(truth["sampled"]) // 2
    fit = 'style="width:100%"' if truth["width"] > truth["height"] else 'style="height:190px"'
    still = _boxed(frames[truth["sampled"][i]], truth["boxes"][i], truth["things"], truth["signs"])
    acts = "; ".join(
        f"{truth['things'][e['thing']]['colour']} {truth['things'][e['thing']]['shape']} <b>{e['motion']}</b> "
        f"{e['t0']:.1f}-{e['t1']:.1f} s" for e in truth["events"]
    )  # fmt: skip
    heard = ", ".join(
        f"{s['kind']} {s['t']:.2f} s {'left' if s['pan'] < 0 else 'right'} {abs(s['pan']):.1f}"
        for s in truth["sounds"]
    )
    things = ", ".join(" ".join(t.values()) for t in truth["things"])
    said = "; ".join(f"{c['text']}{' (rude)' if c['rude'] else ''}" for c in truth["comments"])
    signs = "sign: " + ", ".join(g["text"] for g in truth["signs"]) if truth["signs"] else "no sign"
    sound_uri = _uri(_spectrogram(sound, [s["t"] for s in truth["sounds"]]), "image/png")
    title = f"{truth['id']} &middot; {truth['split']} &middot; {truth['width']}x{truth['height']}"
    return f"""<div class=card><b class=t>{title}</b>
<div class=media><video src="{_uri(data, "video/mp4")}" {_PLAYER} {fit}></video>
{_img(_png(still), "image/png", fit)}</div><img class=wave src="{sound_uri}"><div class=a>{acts}</div>
<div class=note>{_e(things)}<br>{_e(signs)} &middot; {truth["background"]}<br>hears {_e(heard)}<br>
&ldquo;{_e(truth["title"])}&rdquo;, {truth["likes"]} likes; {_e(said)}</div></div>"""


def _media(data: bytes, suffix: str) -> str:
    if suffix.endswith("mp4"):
        return f'<video src="{_uri(data, "video/mp4")}" {_PLAYER} height=150></video>'
    return _img(data, extra="height=130")


def _told(text: str, facts: dict[str, Any]) -> str:
    """What is told of a picture, or of the first and the last moment of a clip, each name in its box."""
    moments: dict[Any, list[Region]] = {}
    for region in regions_of(text):
        moments.setdefault(region.span, []).append(region)
    frames, height = list(moments.values()), 190
    width = height * facts["width"] / facts["height"]
    return "".join(_boxes(f, width, height) for f in (frames if len(frames) == 1 else (frames[0], frames[-1])))


def _boxes(regions: list[Region], width: float, height: float) -> str:
    out = f'<svg width={width:.0f} height={height} style="outline:1px solid #8884" fill=none stroke=currentColor>'
    for r in regions:
        x, y, right, bottom = (v * side / 1000 for v, side in zip(r.box, (width, height) * 2, strict=True))
        out += f'<rect x={x:.0f} y={y:.0f} width={right - x:.0f} height={bottom - y:.0f} stroke-opacity=".5"></rect>'
        words = "".join(f"<tspan x={x + 3:.0f} dy=10>{_e(w)}</tspan>" for w in r.phrase.split(" "))
        out += f"<text y={y:.0f} font-size=9 fill=currentColor stroke=none>{words}</text>"
    return out + "</svg>"


def _part_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    out = ""
    for p in content:
        order = f" frames {p['frames']}" if "frames" in p else ""
        out += p["text"] if p["type"] == "text" else f"[{p['type']}{order}] "
    return out


def _card(title: str, media: str, said: str) -> str:
    return f"<div class=card><b class=t>{title}</b><div class=media>{media}</div>{said}</div>"


def _source_card(root: Path, name: str, number: int) -> str:
    source = Source(root / "sources" / name)
    i = number % len(source.keys)
    sample = source.sample(i)
    told = sample.get("told", {})
    shown = "".join(
        _told(told[s], facts) if s in told else _media(source.member(i, s), s)
        for s, facts in sorted((sample.get("media") or {}).items())
    )
    lines = []
    for m in sample["messages"]:
        lines.append(f"<div class={'q' if m['role'] == 'user' else 'a'}>{_e(_part_text(m['content']))}</div>")
    return _card(f"{name} &middot; {len(source.keys)} samples", shown, "".join(lines))


def _eval_card(root: Path, rows: list[dict], split: str) -> str:
    row = next(r for r in rows if r["split"] == split)
    parts = row["messages"][0]["content"]
    media = [p[p["type"]] for p in parts if p["type"] != "text"]
    shown = "".join(_media((root / m).read_bytes(), m) for m in media)
    choices = f"<div class=note>choices: {_e(', '.join(row['choices']))}</div>" if row["choices"] else ""
    said = f"<div class=q>{_e(_part_text(parts))}</div><div class=a>{_e(row['answer'])}</div>{choices}"
    return _card(f"{row['task']} &middot; {split}", shown, said)


def _kc_card(root: Path, task: str, split: str) -> str:
    with open(root / "kc" / "subsets" / f"{task}.tsv", encoding="utf-8", newline="") as f:
        row = next(r for r in csv.DictReader(f, delimiter="\t") if r["category"].startswith(split))
    shown = "".join(
        _img((root / "kc" / "images" / p).read_bytes(), extra="height=110") for p in json.loads(row["image_path"])
    )
    said = f"<div class=q>{_e(row['question'])}</div><div class=a>{_e(row['answer'])}</div>"
    return _card(f"{task} &middot; {row['category']}", shown, said)


def _table(title: str, columns: list[str], rows: dict[str, Counter]) -> str:
    head = "".join(f"<th>{_e(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><td>{_e(n)}</td>{''.join(f'<td>{c[k]}</td>' for k in columns)}</tr>" for n, c in rows.items()
    )
    return f"<table><tr><th>{_e(title)}</th>{head}</tr>{body}</table>"


def _balance(root: Path, classes: dict[str, list[str]]) -> str:
    counts: dict[str, dict[str, Counter]] = {k: {} for k in classes}
    for path in sorted(root.glob("clips/*/*.json")):
        truth = read_json(path)
        hero = {**truth["things"][0], "motion": truth["events"][0]["motion"]}
        for k in classes:
            counts[k].setdefault(truth["split"], Counter())[hero[k]] += 1
    return "".join(_table(f"hero {k}", v, counts[k]) for k, v in classes.items())


def _held(title: str, rows: list[str], columns: list[str], pairs: list[list[str]]) -> str:
    def cell(r: str, c: str) -> str:
        return "<td class=held>test only</td>" if [r, c] in pairs else "<td class=kept>&middot;</td>"

    body = "".join(f"<tr><td>{r}</td>{''.join(cell(r, c) for c in columns)}</tr>" for r in rows)
    return f"<table><tr><th>{title}</th>{''.join(f'<th>{c}</th>' for c in columns)}</tr>{body}</table>"


def view_world(folder: str | Path, out_html: str | Path, *, clips: int = 12) -> Path:
    """Write one self-contained page about the world in `folder`; returns its path."""
    root, out = Path(folder), Path(out_html)
    facts = read_json(root / "world.json")
    classes, held = facts["classes"], facts["held_out"]
    train, test = (sorted(root.glob(f"clips/{s}/*.mp4")) for s in ("train", "test"))
    shown = train[: clips - clips // 3] + test[:: max(1, len(test) // max(1, clips // 3))][: clips // 3]
    evals = {p.stem: read_jsonl(p) for p in sorted(root.glob("eval/*.jsonl"))}
    tasks = sorted(p.stem for p in root.glob("kc/subsets/*.tsv"))
    answers = "".join(
        _table(t, sorted({r["answer"] for r in rows}), _by_split(rows)) for t, rows in evals.items()
        if len({r["answer"] for r in rows}) <= 8
    )  # fmt: skip
    sections = [
        ("Clips", _grid(_clip_card(root, p) for p in shown)),
        ("Training sources, one sample each", _grid(
            _source_card(root, n, 7 + 3 * i) for i, n in enumerate(facts["counts"]["sources"]))),
        ("Evaluation tasks", _grid(_eval_card(root, rows, s) for rows in evals.values() for s in ("seen", "unseen"))),
        ("KC-shaped tasks", _grid(_kc_card(root, t, s) for t in tasks for s in ("seen-zh", "seen-en", "unseen"))),
        ("Balance of first movers", f"<div class=tables>{_balance(root, classes)}</div>"),
        ("Balance of answers", f"<div class=tables>{answers}</div>"),
        ("Pairs that training never shows", "<div class=tables>"
         + _held("", classes["colour"], classes["shape"], held["colour_shape"])
         + _held("", classes["shape"], classes["motion"], held["shape_motion"]) + "</div>"),
    ]  # fmt: skip
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    head = f"world {facts['version']} &middot; {facts['size']} &middot; seed {facts['seed']}"
    n = facts["counts"]["clips"]
    note = f"{n['train']} training and {n['test']} test clips, {sum(facts['counts']['sources'].values())} samples"
    page = f"<!doctype html><meta charset=utf-8><title>The bundled world</title><style>{_STYLE}</style>"
    write_atomic(out, f"{page}<h1>The bundled world</h1><div class=note>{head} &middot; {note}</div>{body}")
    return out


def _by_split(rows: list[dict]) -> dict[str, Counter]:
    out: dict[str, Counter] = {}
    for r in rows:
        out.setdefault(r["split"], Counter())[r["answer"]] += 1
    return out


def _grid(cards: Iterable[str]) -> str:
    return f"<div class=grid>{''.join(cards)}</div>"
