"""From clips and stills to training conversations about clips and to the rows of WORLD/eval."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_mix.world import encode, stills, text
from data_mix.world.scene import FPS, draw_sign_text
from data_mix.world.words import (
    COLOUR_SHAPE,
    COLOURS,
    HELD_COLOUR_SHAPE,
    HELD_SHAPE_MOTION,
    MOTIONS,
    SHAPE_MOTION,
    SHAPES,
    held_out,
)
from mm.common.seeds import rng

EVAL_TASKS = ("caption_colour", "caption_shape", "caption_motion", "counting", "ocr", "order", "grounding")
Hero = tuple[str, str, str]  # colour, shape, motion

TRAIN_HEROES: tuple[Hero, ...] = tuple((c, s, m) for c, s in COLOUR_SHAPE for z, m in SHAPE_MOTION if z == s)
UNSEEN_COLOUR: tuple[Hero, ...] = tuple((c, s, m) for c, s in HELD_COLOUR_SHAPE for m in MOTIONS)
UNSEEN_MOTION: tuple[Hero, ...] = tuple((c, s, m) for s, m in HELD_SHAPE_MOTION for c, z in COLOUR_SHAPE if z == s)


class Deck:
    """Draws cells so that each single factor, and each pair of neighbouring factors, comes equally often."""

    def __init__(self, random: np.random.Generator, width: int = 16):
        self.random, self.width, self.used = random, width, Counter[Any]()

    def draw(self, cells: Sequence[tuple]) -> tuple:
        tried = [cells[int(i)] for i in self.random.integers(len(cells), size=self.width)]
        best = min(tried, key=self._cost)
        self.used.update(self._faces(best))
        return best

    def _cost(self, cell: tuple) -> float:
        return sum(self.used[f] * (3 if len(f) == 2 else 2) for f in self._faces(cell))

    @staticmethod
    def _faces(cell: tuple) -> list[tuple]:
        singles = [(i, v) for i, v in enumerate(cell)]
        return singles + [(i, *cell[i : i + 2]) for i in range(len(cell) - 1)]


def clip_specs(seed: int, split: str, n: int, second: Sequence[bool]) -> list[tuple[str, Hero, bool]]:
    """(name, hero, whether a second thing acts) of each clip; split: train | brief | seen | unseen."""
    deck, out = Deck(rng(seed, "deck", split)), []
    start = {"train": 0, "brief": 100_000, "seen": 500_000, "unseen": 600_000}[split]
    for i in range(n):
        cells = TRAIN_HEROES if split != "unseen" else (UNSEEN_COLOUR, UNSEEN_MOTION)[i % 2]
        out.append((f"clip-{start + i:06d}", deck.draw(cells), second[i % len(second)]))
    return out


def language(random: np.random.Generator) -> str:
    return "zh" if random.random() < 0.15 else "en"


def video_part(frames: list[int] | None = None) -> list[dict]:
    part: dict[str, Any] = {"type": "video", "video": "mp4"}
    return [{**part, "frames": frames} if frames else part]


def caption_turn(truth: dict, lang: str, random: np.random.Generator) -> text.Turn:
    """Half with the plainest request, the one that the evaluation uses."""
    k = 0 if random.random() < 0.5 else int(random.integers(1, 3))
    return {"type": "caption", "q": text.REQUESTS["video", lang][k], "a": text.caption(truth, lang)}


def video_caption(truth: dict, random: np.random.Generator) -> dict:
    """Half asked for in plain words, after who acts first where two do; half a dense caption."""
    lang = language(random)
    turns = [caption_turn(truth, lang, random)]
    if random.random() < 0.5:
        turns = [{"type": "dense", "q": "", "a": text.dense_caption(truth, lang, random)}]
    elif len(truth["events"]) > 1:
        turns.insert(0, text.order(truth, lang, random))
    return stills.conversation(video_part(), turns, "video_caption", {"lang": lang})


def video_qa(truth: dict, random: np.random.Generator) -> dict:
    """Four to nine turns; about half begin with the caption and go on to what it does not say.

    Where two act, those ask first which acts first: after the caption it would be copying.
    """
    lang = language(random)
    first = [caption_turn(truth, lang, random)] if random.random() < 0.55 else []
    if first and len(truth["events"]) > 1:
        first.insert(0, text.order(truth, lang, random))
    turns = text.clip_questions(truth, lang, random, first[-1]["a"] if first else "")
    turns = [*first, *turns[: int(random.integers(4, 8))]]
    return stills.conversation(video_part(), turns, "video_qa", {"lang": lang})


def motion(truth: dict, lang: str) -> dict | None:
    """What each thing does that slides, rises, falls or bounces, and nothing besides (of brief clips): told only by
    comparing frames, and in a caption one word of twenty. None where nothing does."""
    turns = [text.action(truth, e, lang) for e in truth["events"] if e["motion"] not in ("splits", "vanishes")]
    return stills.conversation(video_part(), turns, "motion", {"lang": lang}) if turns else None


def _places(truth: dict) -> list[np.ndarray]:
    """Per sampled frame: the centres of all parts and which things are there, in short sides."""
    side = min(truth["width"], truth["height"])
    out = []
    for frame in truth["boxes"]:
        row: list[float] = []
        for parts in frame:
            xs = [((b[0] + b[2]) / 2 / side, (b[1] + b[3]) / 2 / side) for b in parts[:2]]
            first, last = (xs[0], xs[-1]) if xs else ((-1.0, -1.0), (-1.0, -1.0))
            row += [*first, *last, float(len(parts))]
        out.append(np.array(row))
    return out


def reorder(truth: dict, random: np.random.Generator) -> dict | None:
    """Four to six sampled frames, shuffled; the question says what happens, so that time has a direction.

    None where fewer than four frames are plainly different (or a bounce makes them repeat).
    """
    if any(e["motion"] == "bounces" for e in truth["events"]):
        return None
    places = _places(truth)
    kept: list[int] = []
    for i, p in enumerate(places):
        if all(np.abs(p - places[j]).max() >= 0.08 for j in kept):
            kept.append(i)
    if len(kept) < 4:
        return None
    kept = sorted(int(i) for i in random.permutation(kept)[: min(6, len(kept))])
    while (order := [int(i) for i in random.permutation(len(kept))]) == sorted(order):
        pass
    lang = language(random)
    story = text.caption({**truth, "signs": []}, lang)
    q = (
        f"帧被打乱了。{story}写出正确的顺序。"
        if lang == "zh"
        else f"The frames are shuffled: {story} Give the right order."
    )
    answer = " ".join(str(order.index(i) + 1) for i in range(len(kept)))
    turn = {"type": "reorder", "q": q, "a": answer}
    return stills.conversation(video_part([kept[i] for i in order]), [turn], "reorder", {"lang": lang})


def clip_samples(seed: int, name: str, truth: dict, family: str) -> dict[str, dict]:
    """{source: sample} of a training clip; `family`: video_caption or video_qa."""
    random = rng(seed, "talk", name)
    samples = {family: (video_caption if family == "video_caption" else video_qa)(truth, random)}
    if truth["fps"] != FPS:
        samples["tracks"] = named_clip(truth)
        if moves := motion(truth, language(rng(seed, "asked of motion", name))):
            samples["motion"] = moves
    mixed = reorder(truth, rng(seed, "reorder", name))
    if mixed:
        samples["reorder"] = mixed
    for s in samples.values():
        s["media"], s["meta"]["clip"] = {"mp4": clip_facts(truth)}, name
    return samples


def clip_facts(truth: dict) -> dict[str, Any]:
    return {
        "kind": "video", "width": truth["width"], "height": truth["height"], "frames": truth["frames"],
        "fps": float(truth["fps"]), "seconds": truth["seconds"], "rotation": 0, "audio": truth["fps"] == FPS,
    }  # fmt: skip


def acting(truth: dict, i: int, k: int, shown: list[int]) -> str:
    """'red wood ring falls passing', without 'passing' where it stands in another of the shown frames as in frame
    k, 'red wood ring still' of what never acts."""
    words = [stills.unsized(truth["things"][i], "en"), text.still("en")]
    for e in truth["events"]:
        if e["thing"] == i:
            words[1:] = [e["motion"]]
            if not any(_same_place(truth, i, k, other) for other in shown if other != k):
                words.append("passing")
    return " ".join(words)


def _same_place(truth: dict, i: int, a: int, b: int) -> bool:
    """Whether thing i looks the same in sampled frames a and b, to a thirtieth of the short side."""
    before, after = truth["boxes"][a][i], truth["boxes"][b][i]
    if len(before) != len(after) or not before:
        return False
    return float(np.abs(np.subtract(before, after)).max()) <= min(truth["width"], truth["height"]) / 30


def named_at(truth: dict, shown: list[int]) -> str:
    """Line by line for these sampled frames: when it is, and everything plain to see by what it is, what it does, and
    whether it is where it is in that frame alone."""
    half, lines = 0.5 / truth["fps"], []
    for k in shown:
        t = truth["times"][k]
        names = [acting(truth, i, k, shown) for i in range(len(truth["things"]))]
        span = f"<|clip_time_start|>[{max(t - half, 0.0):.2f},{t + half:.2f}]<|clip_time_end|>"
        lines.append(span + "".join(stills.regions_in(truth, k, names)))
    return "\n".join(lines)


def named_clip(truth: dict, frames: int = 3) -> dict:
    """Some frames of a brief clip, evenly spread, with everything plain to see in each, called by what it is, what
    it does, and whether it is where it is in that frame alone."""
    shown = np.linspace(0, len(truth["times"]) - 1, frames).round().astype(int).tolist()
    turn = stills.regions_turn(named_at(truth, shown))
    return stills.conversation(video_part(shown), [turn], "tracks", {"lang": "en"})


def named_frames(seed: int, name: str, frames: list[np.ndarray], truth: dict) -> list[tuple[str, dict, bytes]]:
    """(key, sample, jpg) of one or two sampled frames of a training clip as pictures with named regions."""
    random, out = rng(seed, "regions", name), []
    for k in sorted(random.choice(len(truth["sampled"]), 2, replace=False).tolist()):
        still = {key: truth[key] for key in ("width", "height", "things", "signs")}
        still |= {"boxes": [truth["boxes"][k]], "seen": [truth["seen"][k]], "events": []}
        if sample := stills.regions_sample(still, random):
            out.append((f"{name}-{k}", sample, encode.jpeg(frames[truth["sampled"][k]])))
    return out


def eval_row(task: str, split: str, number: int, media: str, turn: text.Turn, choices, meta: dict) -> dict[str, Any]:
    kind = "video" if media.endswith(".mp4") else "image"
    content = [{"type": kind, kind: media}, {"type": "text", "text": turn["q"]}]
    return {"id": f"{task}-{split}-{number:04d}", "task": task, "type": turn["type"], "split": split,
            "messages": [{"role": "user", "content": content}], "answer": turn["a"], "choices": choices,
            "meta": meta}  # fmt: skip


def clip_rows(seed: int, split: str, media: str, truth: dict, number: int) -> list[dict]:
    """The caption rows and (where two act) the order row of one clip, in English."""
    hero, motion = truth["things"][truth["events"][0]["thing"]], truth["events"][0]["motion"]
    random = rng(seed, "eval", media)
    held = [n for n, hit in (("colour_shape", (hero["colour"], hero["shape"]) in HELD_COLOUR_SHAPE),
                             ("shape_motion", (hero["shape"], motion) in HELD_SHAPE_MOTION)) if hit]  # fmt: skip
    assert held_out(hero["colour"], hero["shape"], motion) == bool(held)
    meta = {"hero": {**hero, "motion": motion}, "held": held, "caption": text.caption(truth, "en"), "lang": "en"}
    rows = []
    for task, answer, choices in (
        ("caption_colour", hero["colour"], COLOURS), ("caption_shape", hero["shape"], SHAPES),
        ("caption_motion", motion, MOTIONS),
    ):  # fmt: skip
        turn = {"type": "caption", "q": text.REQUESTS["video", "en"][0], "a": answer}
        rows.append(eval_row(task, split, number, media, turn, list(choices), meta))
    if len(truth["events"]) > 1:
        turn = text.order(truth, "en", random)
        names = [text.short(truth["things"][e["thing"]], "en") for e in truth["events"]]
        rows.append(eval_row("order", split, number, media, turn, sorted(names, key=turn["q"].index), meta))
    return rows


def clip_count_row(split: str, media: str, truth: dict, number: int) -> dict | None:
    turn = text.count(truth, "en", *((0, "start") if number % 2 else (-1, "end")))
    if turn is None:
        return None
    return eval_row("counting", split, number, media, turn, list("12345"), {"media": "video", "lang": "en"})


def eval_still(seed: int, task: str, split: str, index: int, pair: tuple[str, str], k: int) -> dict[str, Any]:
    """A test still about `pair` for counting (answer k), ocr or grounding: {"file", "jpg", "row", "truth"}."""
    random = rng(seed, "eval_still", task, split, index)
    file = f"stills/test/{task}-{split}-{index:04d}.jpg"
    if task == "counting":
        kind = stills.KINDS[index % 4]
        jpg, truth = stills.counting_picture(stills.picture, random, kind, k, pair)
        turn = {"type": "count", "q": stills.count_question(kind, pair, "en"), "a": str(k)}
    else:
        signs = [draw_sign_text(random)] if task == "ocr" or random.random() < 0.3 else []
        n = int(random.integers(1, 4)) if task == "ocr" else int(random.integers(2, 5))
        while True:
            jpg, truth = stills.picture(random, stills.distinct_pairs(random, n, pair), signs=signs)
            if truth["seen"][0][0] > 0.6:
                break
        if task == "ocr":
            turn = {"type": "ocr", "q": text.SIGN_REQUESTS["en"][0], "a": signs[0]}
        else:
            box = stills.thousand(truth["boxes"][0][0][0], truth)
            answer = "[[" + ",".join(map(str, box)) + "]]"
            turn = {"type": "box", "q": stills.box_question(truth["things"][0], "en"), "a": answer}
    row = still_row(task, split, index, file, turn, truth)
    return {"file": file, "jpg": jpg, "row": row, "truth": truth}


def still_row(task: str, split: str, number: int, file: str, turn: text.Turn, truth: dict) -> dict[str, Any]:
    hero = truth["things"][0]
    held = ["colour_shape"] if (hero["colour"], hero["shape"]) in HELD_COLOUR_SHAPE else []
    meta = {
        "media": "image",
        "lang": "en",
        "hero": hero,
        "held": held,
        "width": truth["width"],
        "height": truth["height"],
    }
    return eval_row(task, split, number, file, turn, list("12345") if task == "counting" else None, meta)


_PROBE = {"counting": "count", "ocr": "ocr", "grounding": "box"}


def probe_row(family: str, sample: dict, truth: dict, number: int) -> tuple[str, dict] | None:
    """(file, row) of split "train" from an English training still of `family`; None where no turn fits."""
    task = family
    if sample["meta"]["lang"] != "en":
        return None
    messages = sample["messages"]
    for i, kind in enumerate(sample["meta"]["types"]):
        answer = messages[2 * i + 1]["content"]
        if kind != _PROBE[task] or answer == "0":
            continue
        content = messages[2 * i]["content"]
        q = content if isinstance(content, str) else content[-1]["text"]
        if task == "grounding":
            answer = answer.split("<|box_start|>")[1].split("<|box_end|>")[0]
        file = f"stills/train/{task}-{number:04d}.jpg"
        return file, still_row(task, "train", number, file, {"type": kind, "q": q, "a": answer}, truth)
    return None
