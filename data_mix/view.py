"""One page with the very tensors that the model gets: frames, tokens, loss mask, positions, pack boundaries."""

import base64
import html
import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_mix.assemble import Assembler, Pending
from data_mix.decode import DecodePool
from data_mix.media_plan import first_media, video_plan
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.sample import media_parts, suffix_of
from data_mix.shards import Source
from data_mix.stats import alike, source_folders
from mm.batch import Batch, PairBatch
from mm.common.errors import UserError
from mm.common.files import write_atomic
from mm.processor import Processor
from mm.tokenizer import Tokenizer
from mm.told import spelt

CELL = 48  # px of a patch whose words are written out
COLOURS = ("#4c78dd", "#e0803a", "#3f9b6c", "#b9569d", "#8d7b3a", "#5f6ec4", "#c2504a", "#3b94a8")


def view(
    what: PackPlan | str | Path, out: str | Path, *, n: int = 4, start: int = 0, processor: Processor | None = None,
    tokenizer: Tokenizer | None = None, token_budget: int = 2048, visual_budget: int = 1024,
) -> Path:  # fmt: skip
    """Write `out`, a self-contained page of packs start ... start + n - 1, and return its path.

    `what`: a plan, or a source folder (or a folder of them, each by its samples, told pictures aside), which takes
    `processor`, `tokenizer` and budgets to be packed. Raises UserError as PackPlan does.
    """
    plan = what if isinstance(what, PackPlan) else _plan(what, processor, tokenizer, token_budget, visual_budget)
    with DecodePool(plan.processor, workers=1) as pool:
        assembler = Assembler(plan, pool)
        packs = "\n".join(_pack(assembler, i) for i in range(start, start + n))
    names = ", ".join(s.name for s in plan.mix.sources)
    facts = [f"plan {plan.fingerprint}", f"sources: {names}", f"processor {plan.processor.hash}",
             f"{len(plan.refused)} samples refused", f"kind: {plan.kind}"]  # fmt: skip
    template = Template(Path(__file__).with_name("view.html").read_text(encoding="utf-8"))
    title = f"Packs {start} to {start + n - 1}: what the model gets"
    page = template.substitute(
        title=title, facts="".join(f"<span>{html.escape(f)}</span>" for f in facts), packs=packs
    )
    write_atomic(out, page)
    return Path(out)


def _plan(
    folder: str | Path, processor: Processor | None, tokenizer: Tokenizer | None, tokens: int, visual: int
) -> PackPlan:
    if processor is None or tokenizer is None:
        raise UserError(f"{folder} must be packed to be viewed: give a processor and a tokenizer, or a checkpoint's")
    kind, paths = alike(source_folders(folder))
    specs = [SourceSpec(p, len(Source(p)), "samples") for p in paths]
    return PackPlan(Mix(specs), processor, tokenizer, tokens, visual, kind=kind)


# ---- from a batch to what is drawn


@dataclass
class Medium:
    """One row of grid_thw: frames uint8 [T, h, w, 3] taken back out of pixel_values, and what to say of them."""

    grid: tuple[int, int, int]
    frames: np.ndarray
    captions: list[str]
    kind: str


@dataclass
class Token:
    """One token or a run that is one thing (a character of several tokens, a picture's pads)."""

    text: str
    classes: str
    hover: str


def unpatchify(pixel_values: torch.Tensor, grid: tuple[int, int, int], patch: int) -> np.ndarray:
    """uint8 [N, 3 * patch * patch] -> uint8 [T, h, w, 3]: the processor's patchify, undone."""
    t, h, w = grid
    x = pixel_values.numpy().reshape(t, h, w, 3, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(t, h * patch, w * patch, 3)


def _pack(assembler: Assembler, number: int) -> str:
    pending = assembler.begin(number)
    made = assembler.finish(pending)
    assert isinstance(made.batch, Batch | PairBatch)  # a page's plan is never of kind "regions"
    reasons, plan = dict(made.samples), assembler.plan
    kept = [p for p in pending if p.name in made.batch.draws]
    media = _media(made.batch, kept, plan)
    lengths = made.batch.cu_seqlens.diff().tolist()
    visual = int(sum(plan.processor.tokens(m.grid) for row in media for m in row))
    segments = "".join(
        _segment(made.batch, k, p.name, reasons[p.name], media[k], plan, number) for k, p in enumerate(kept)
    )
    bars = _bar("tokens", sum(lengths), plan.token_budget) + _bar("visual tokens", visual, plan.visual_budget)
    return (
        f"<section><h2>Pack {number} <span class='soft'>{len(kept)} segments</span></h2>"
        f"<div class='budgets'>{bars}</div>{_strip(lengths, kept, plan.token_budget, number)}{segments}</section>"
    )


def _media(batch: Batch | PairBatch, pack: list[Pending], plan: PackPlan) -> list[list[Medium]]:
    """Per segment its rows of grid_thw, un-patched in order."""
    grids = [tuple(g) for g in batch.grid_thw.tolist()]
    patches = iter(batch.pixel_values.split([t * h * w for t, h, w in grids]))
    rows, rest = [], iter(grids)
    for p in pack:
        parts = [first_media(p.sample)] if plan.kind == "pairs" else media_parts(p.sample["messages"])
        row = []
        for part in parts:
            grid, values = next(rest), next(patches)
            frames = unpatchify(values, grid, plan.processor.patch_size)
            if plan.kind == "told":
                frames = written(values, grid, plan.processor.patch_size, plan.tokenizer)
            row.append(Medium(grid, frames, _captions(part, p, plan.processor), part["type"]))
        rows.append(row)
    return rows


def written(pixel_values: torch.Tensor, grid: tuple[int, int, int], patch: int, tokenizer: Tokenizer) -> np.ndarray:
    """The words that the patches of a told picture spell (`mm.told`), each patch CELL px wide: uint8 [T, h, w, 3]."""
    t, h, w = grid
    canvas = [Image.new("RGB", (w * CELL, h * CELL), (228, 228, 232)) for _ in range(t)]
    for place, ids in enumerate(spelt(pixel_values, patch).tolist()):
        draw, (row, column) = ImageDraw.Draw(canvas[place // (h * w)]), divmod(place % (h * w), w)
        if words := [tokenizer.decode([i]).strip() for i in ids if i >= 0]:
            x, y = column * CELL, row * CELL
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), (255, 255, 255))
            draw.multiline_text((x + 2, y), "\n".join(words), (20, 20, 24), font_size=8, spacing=0)
    return np.stack([np.asarray(c) for c in canvas])


def _captions(part: dict[str, Any], p: Pending, processor: Processor) -> list[str]:
    if part["type"] == "image":
        return [suffix_of(part)]
    plan = video_plan(p.sample["media"][suffix_of(part)], processor)
    plan = plan.reordered(part["frames"]) if "frames" in part else plan
    return [f"{time:.2f} s" for time in plan.times]


# ---- html


def _bar(label: str, used: int, budget: int) -> str:
    share = used / budget
    return (
        f"<div>{label} {used:,} of {budget:,} <span class='soft'>({share:.1%})</span>"
        f"<div class='bar'><i style='width:{min(share, 1):.1%}'></i></div></div>"
    )


def _strip(lengths: list[int], pack: list[Pending], budget: int, number: int) -> str:
    """The row of the pack to scale: a block per segment, and what is left of the budget."""
    blocks = "".join(
        f"<a href='#p{number}s{k}' title='{html.escape(p.name, quote=True)}: {n} tokens' "
        f"style='width:{n / max(budget, sum(lengths)):.3%};background:{COLOURS[k % len(COLOURS)]}'>{k}</a>"
        for k, (n, p) in enumerate(zip(lengths, pack, strict=True))
    )
    return f"<div class='strip'>{blocks}<b title='unused'></b></div>"


def _segment(
    batch: Batch | PairBatch, k: int, name: str, reason: str, media: list[Medium], plan: PackPlan, number: int
) -> str:
    a, b = batch.cu_seqlens[k : k + 2].tolist()
    trained = int(batch.loss_mask[a:b].sum()) if isinstance(batch, Batch) else 0
    said = f"tokens {a} to {b - 1} ({b - a}" + (f", {trained} trained)" if isinstance(batch, Batch) else ")")
    badge = f"<span class='badge'>hole: {html.escape(reason)}</span>" if reason else ""
    tokens = "".join(
        f"<span class='{t.classes}' title='{html.escape(t.hover, quote=True)}'>{html.escape(t.text)}</span>"
        for t in _tokens(batch, k, plan.tokenizer)
    )
    return (
        f"<article id='p{number}s{k}'><i style='background:{COLOURS[k % len(COLOURS)]}'></i><div><div class='head'>"
        f"<span class='soft'>segment {k}</span><code>{html.escape(name)}</code><span class='soft'>{said}</span>"
        f"{badge}</div>{''.join(_frames(m, plan.processor) for m in media)}<div class='body'><div class='tokens'>"
        f"{tokens}</div>{_positions(batch, a, b, plan.tokenizer)}</div></div></article>"
    )


def _frames(m: Medium, processor: Processor) -> str:
    t, h, w = m.grid
    figures = "".join(
        f"<figure><img src='{_data_uri(frame)}' width='{frame.shape[1]}' alt=''>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for frame, caption in zip(m.frames, m.captions, strict=True)
    )
    size = f"{m.frames.shape[2]} x {m.frames.shape[1]} px"
    said = f"{m.kind}: grid {t} x {h} x {w} patches, {size}, {processor.tokens(m.grid)} tokens"
    return f"<div class='media'><div class='soft'>{said}</div><div class='frames'>{figures}</div></div>"


def _data_uri(frame: np.ndarray) -> str:
    """Small frames without loss; large ones as good JPEG, so that the page stays a page."""
    out, small = io.BytesIO(), frame.size < 3 * 256 * 256
    Image.fromarray(frame).save(out, "PNG" if small else "JPEG", **({} if small else {"quality": 92}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"


def _tokens(batch: Batch | PairBatch, k: int, tokenizer: Tokenizer) -> list[Token]:
    a, b = batch.cu_seqlens[k : k + 2].tolist()
    ids, out, i = batch.input_ids.tolist(), [], a
    pads = {tokenizer.id("<|image_pad|>"), tokenizer.id("<|video_pad|>")}
    special = set(tokenizer.special.values())
    while i < b:
        j = i + 1
        if ids[i] in pads:
            while j < b and ids[j] == ids[i]:
                j += 1
            text, classes = f"▦ {j - i}", "v"
        else:
            while "\ufffd" in (text := tokenizer.decode(ids[i:j], skip_special=False)) and j < min(b, i + 4):
                j += 1  # a character that takes several tokens
            classes = "s" if ids[i] in special else ""
        trained = isinstance(batch, Batch) and bool(batch.loss_mask[i])
        out.append(Token(text.replace("\n", "⏎\n"), f"{classes}{' t' if trained else ''}",
                         _hover(batch, k, i, j, ids, trained)))  # fmt: skip
        i = j
    return out


def _hover(batch: Batch | PairBatch, k: int, i: int, j: int, ids: list[int], trained: bool) -> str:
    number = f"{i}" if j == i + 1 else f"{i} to {j - 1}"
    text = f"token {number}, id {', '.join(map(str, ids[i : min(j, i + 4)]))}, segment {k}"
    if not isinstance(batch, Batch):
        return text
    first, last = batch.position_ids[:, i].tolist(), batch.position_ids[:, j - 1].tolist()
    where = f"{tuple(first)}" if first == last else f"{tuple(first)} to {tuple(last)}"
    return f"{text}, position {where}, {'trained' if trained else 'not trained'}"


def _positions(batch: Batch | PairBatch, a: int, b: int, tokenizer: Tokenizer) -> str:
    """A table row per run of text or picture: the range of its position ids on each axis."""
    if not isinstance(batch, Batch):
        return ""
    pads = torch.tensor([tokenizer.id("<|image_pad|>"), tokenizer.id("<|video_pad|>")])
    visual = torch.isin(batch.input_ids[a:b], pads)
    cuts = [0, *((visual[1:] != visual[:-1]).nonzero().flatten() + 1).tolist(), b - a]
    rows = []
    for start, stop in pairwise(cuts):
        ids = batch.position_ids[:, a + start : a + stop]
        spans = "".join(f"<td>{lo}</td>" if lo == hi else f"<td>{lo} to {hi}</td>"
                        for lo, hi in zip(ids.amin(1).tolist(), ids.amax(1).tolist(), strict=True))  # fmt: skip
        rows.append(f"<tr><td>{'picture' if visual[start] else 'text'}</td><td>{stop - start}</td>{spans}</tr>")
    head = "<tr><th>position ids</th><th>tokens</th><th>t</th><th>h</th><th>w</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"
