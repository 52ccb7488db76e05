"""What the world asks: training conversations, eval rows and KC-shaped tables are well formed and fair."""

import csv
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_mix.regions import regions_of
from data_mix.shards import Source
from data_mix.world import documents, kc, make_world, shop, stills, tasks, text
from data_mix.world.stills import picture
from data_mix.world.truth import make_brief, make_clip, truth_of
from data_mix.world.words import COLOUR_SHAPE, COLOURS, HELD_COLOUR_SHAPE, MOTIONS, SHAPES, ZH
from eval import kc_mmbench
from eval.task import Item
from mm.common.seeds import rng
from mm.sizes import PROCESSORS
from mm.tokenizer import Tokenizer
from stages.keye.run import VOCABULARY, texts_of
from vision.media import video_info

_BOX = re.compile(
    r"<\|object_ref_start\|>(.+)<\|object_ref_end\|>"
    r"<\|box_start\|>\[\[(\d+,\d+,\d+,\d+)\]\]<\|box_end\|>"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world") / "w"
    make_world(root, size="micro", seed=5, workers=2, quiet=True)
    return root


def test_every_source_opens_and_names_its_media(world):
    facts = json.loads((world / "world.json").read_text())
    for name, n in facts["counts"]["sources"].items():
        source = Source(world / "sources" / name)
        assert len(source.keys) == n > 0
        for i in range(n):
            sample = source.sample(i)
            for suffix, fact in sample["media"].items():
                if suffix in sample.get("told", {}):
                    assert regions_of(sample["told"][suffix]) and name.startswith("told")
                elif fact["kind"] == "image":
                    assert Image.open(io.BytesIO(source.member(i, suffix))).size == (fact["width"], fact["height"])
            roles = [m["role"] for m in sample["messages"]]
            bare = ("text", "vit_pairs", "caption", "video_caption", "told", "told_task", "verdicts")
            documents = name in bare and roles == ["text"]
            assert documents or (roles and roles == ["user", "assistant"] * (len(roles) // 2))
            assert name != "text" or documents


def test_grounding_tags_hold_boxes_inside_the_frame():
    for i in range(30):
        made = stills.still_sample(0, "grounding", i)
        truth = made["truths"][0]
        for m in made["sample"]["messages"][1::2]:
            for digits in re.findall(r"\[\[(.*?)\]\]", m["content"]):
                box = [int(v) for v in digits.split(",")]
                assert all(0 <= v < 1000 for v in box)
                if len(box) == 4:
                    assert box[0] < box[2] and box[1] < box[3]
        for k, name in enumerate(made["sample"]["meta"]["types"]):
            answer = made["sample"]["messages"][2 * k + 1]["content"]
            if name == "box":
                found = _BOX.fullmatch(answer)
                assert found
                names = [text.short(t, made["sample"]["meta"]["lang"]) for t in truth["things"]]
                true = stills.thousand(truth["boxes"][0][names.index(found[1])][0], truth)
                assert [int(v) for v in found[2].split(",")] == true


def test_counts_are_what_is_there():
    for i in range(24):
        kind, k = stills.KINDS[i % 4], i % 5 + 1
        pair = COLOUR_SHAPE[i % len(COLOUR_SHAPE)]
        _, truth = stills.counting_picture(stills.picture, rng(0, "count", i), kind, k, pair)
        assert stills.how_many(truth, kind, pair) == k
        assert min(truth["seen"][0]) >= 0.55


def test_shuffled_frames_come_back_in_order(world):
    source = Source(world / "sources" / "reorder")
    for i in range(len(source.keys)):
        m = source.sample(i)["messages"]
        frames = m[0]["content"][0]["frames"]
        answer = [int(v) - 1 for v in m[1]["content"].split()]
        assert [frames[k] for k in answer] == sorted(frames) and 4 <= len(frames) <= 6


def test_no_answer_was_just_told():
    for i in range(40):
        truth = documents.imagined(rng(0, "t", i), moving=True)
        turns = text.clip_questions(truth, "en", rng(0, "q", i))
        said = ""
        for t in turns:
            if t["type"] in ("colour", "shape", "material", "motion", "actor"):
                assert t["a"] not in said
            said += " " + t["a"] if t["type"] == "order" else f" {t['q']} {t['a']}"


def test_practice_of_motion_asks_what_only_time_tells():
    asked: Counter[str] = Counter()
    for i, motion in enumerate(3 * MOTIONS):
        _, _, truth = make_brief(4, f"clip-{i}", ("blue", "ring", motion), second=i % 2 == 0)
        moves = [e for e in truth["events"] if e["motion"] not in ("splits", "vanishes")]
        sample = tasks.motion(truth, "en")
        if not moves:
            assert sample is None
            continue
        assert [p["type"] for p in sample["messages"][0]["content"]] == ["video", "text"]
        said = [m["content"] for m in sample["messages"]]
        said[0] = said[0][-1]["text"]
        for event, q, answer in zip(moves, said[::2], said[1::2], strict=True):
            thing, asked[answer] = truth["things"][event["thing"]], asked[answer] + 1
            assert q == f"What does the {thing['colour']} {thing['shape']} do?"
            boxes = [b[event["thing"]][0] for b in truth["boxes"] if b[event["thing"]]]
            right, down = boxes[-1][0] - boxes[0][0], boxes[-1][1] - boxes[0][1]
            if answer.startswith("slides"):
                assert (right > 0) == (answer == "slides right") and abs(right) > abs(down)
            elif answer != "bounces":
                assert (down > 0) == (answer == "falls") and abs(down) > abs(right)
    assert set(asked) == {"slides left", "slides right", "rises", "falls", "bounces"}


def test_practice_of_the_shops_questions_is_their_first_exchange_alone(world):
    whole = Source(world / "sources" / "shop")
    numbers = {key: i for i, key in enumerate(whole.keys)}
    for task in set(kc.TASKS) - {"CPV"}:
        source = Source(world / "sources" / f"shop_{task.lower()}")
        assert source.keys == [key for key in whole.keys if key.startswith(task.lower() + "-")] != []
        for i, key in enumerate(source.keys):
            alone, there = source.sample(i), whole.sample(numbers[key])
            assert alone["messages"] == there["messages"][:2] and len(there["messages"]) > 2
            assert alone["media"] == there["media"]
            for name in alone["media"]:
                assert source.member(i, name) == whole.member(numbers[key], name)


def test_eval_rows_point_at_files_and_hold_their_answer(world):
    for task in tasks.EVAL_TASKS:
        rows = [json.loads(line) for line in (world / "eval" / f"{task}.jsonl").read_text().splitlines()]
        assert {r["split"] for r in rows} == {"seen", "unseen", "train"}
        assert len({r["id"] for r in rows}) == len(rows)
        for r in rows:
            parts = r["messages"][0]["content"]
            assert all((world / p[p["type"]]).is_file() for p in parts if p["type"] != "text")
            if r["choices"]:
                assert r["answer"] in r["choices"]
            if task == "order":
                q = parts[-1]["text"]
                assert q.index(r["choices"][0]) < q.index(r["choices"][1])
            if task != "counting" or r["meta"]["media"] == "image":
                held = r["meta"]["held"]
                assert bool(held) == (r["split"] == "unseen")
    counts = Counter((r["split"], r["answer"]) for r in map(json.loads, (world / "eval/counting.jsonl").open()))
    assert {counts[s, str(k)] for s in ("seen", "unseen") for k in range(1, 6)} <= {1, 2}


def test_kc_tables_parse_like_the_official_ones(world):
    for task in kc.TASKS:
        with open(world / "kc" / "subsets" / f"{task}.tsv", encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
        assert list(rows[0]) == ["index", "question", "answer", "image_path", "category"]
        assert [int(r["index"]) for r in rows] == list(range(len(rows)))
        for r in rows:
            assert all((world / "kc" / "images" / p).is_file() for p in json.loads(r["image_path"]))
            split, lang = r["category"].split("-")
            assert split in ("seen", "unseen", "train") and lang in ("en", "zh")
            if task in ("PornComment", "High_like", "SPU"):
                assert r["answer"] in {"zh": "是否", "en": ("yes", "no")}[lang]
                assert r["question"].endswith(kc.SUFFIX[lang])
            if task == "CPV":
                assert len(json.loads(r["answer"])) == 2


@pytest.mark.parametrize("task", kc.TASKS)
def test_kc_answers_do_not_lean(task):
    rows = [kc.MAKERS[task](picture, rng(1, task, i), "en", COLOUR_SHAPE, i) for i in range(12)]
    answers = Counter(r["answer"] for r in rows)
    assert max(answers.values()) <= {"CPV": 3, "Video_Topic": 3, "Video_Order": 2}.get(task, 6)


def test_same_product_differs_in_one_attribute_or_none():
    for i in range(16):
        row = kc.spu(picture, rng(2, "spu", i), "en", COLOUR_SHAPE, i)
        a, b = (t["things"][0] for t in row["meta"]["truths"])
        differ = [k for k in ("colour", "shape", "material") if a[k] != b[k]]
        assert (row["answer"] == "yes") == (not differ) and len(differ) <= 1


def test_the_like_ceiling_is_what_an_oracle_scores():
    hits = []
    for i in range(3000):
        random, wanted = rng(4, "like", i), bool(i % 2)
        while True:
            pair, sign = stills.any_pair(random), random.random() < 0.5
            points = shop.like_points(*pair, sign)
            if (shop.likes(points, random) > 1000) == wanted:
                break
        hits.append((shop.like_chance(points) > 0.5) == wanted)
    assert np.mean(hits) == pytest.approx(kc.ceilings()["High_like"], abs=0.02)
    assert 0.8 < kc.ceilings(HELD_COLOUR_SHAPE)["High_like"] < 1


def test_users_follow_their_taste(world):
    users = [json.loads(line) for line in (world / "users.jsonl").read_text().splitlines()]
    assert all(u["history"] == sorted(u["history"], key=lambda h: h["t"]) for u in users)
    rows = [
        {"id": str(i), "thing": {"colour": c, "shape": s, "material": "wood"}}
        for i, (c, s) in enumerate(COLOUR_SHAPE)
    ]
    gains = []
    for u in shop.make_users(0, 40, rows, rows):
        score = {r["id"]: u["taste"][r["thing"]["colour"]] + u["taste"][r["thing"]["shape"]] for r in rows}
        bought = [score[h["id"]] for h in u["history"] if h["kind"] == "buy"]
        gains.append(np.mean(bought) - np.mean(list(score.values())))
    assert np.mean(gains) > 0.5


def test_truth_is_plain_json():
    from data_mix.world.render import Stage
    from data_mix.world.truth import still_scene

    scene = still_scene(rng(0, "x"), [(COLOUR_SHAPE[0], {}), (COLOUR_SHAPE[7], {})], signs=["SALE"])
    truth = truth_of(Stage(scene, rng(0, "y")), [])
    assert json.loads(json.dumps(truth)) == truth and truth["signs"][0]["text"] == "SALE"


def test_a_brief_clip_is_what_a_model_would_sample_of_the_whole_one():
    """The same frames, boxes and events; the processor takes every frame of the file; no sound."""
    hero = ("red", "ring", "slides left")
    frames, _, whole = make_clip(3, "x", hero, second=True)
    kept, mp4, truth = make_brief(3, "x", hero, second=True)
    assert len(kept) == len(whole["sampled"]) == truth["frames"]
    assert all(np.array_equal(frames[i], f) for i, f in zip(whole["sampled"], kept, strict=True))
    assert all(truth[k] == whole[k] for k in ("things", "boxes", "seen", "signs"))
    for a, b in zip(truth["events"], whole["events"], strict=True):
        assert (a["thing"], a["motion"]) == (b["thing"], b["motion"])
        # an event lies between the same sampled frames in both files
        for k in ("t0", "t1"):
            assert np.searchsorted(truth["times"], a[k]) == np.searchsorted(whole["times"], b[k])
    sample = tasks.clip_samples(3, "x", truth, "video_caption")["video_caption"]
    facts = sample["media"]["mp4"]
    info = video_info(mp4)
    assert (info.frames, info.fps) == (facts["frames"], facts["fps"]) and not facts["audio"]
    assert len(PROCESSORS["tiny"].video_plan(info).indices) == len(kept)


def test_shop_questions_in_words_tell_what_they_ask():
    """Where pictures are told, the answer follows from what is said: read here by other means than it was made."""
    seen = Counter()
    for i in range(2, 1200, 3):
        sample = documents.chat(5, i)
        ask, answer = (m["content"] for m in sample["messages"][:2])
        task = sample["meta"]["task"]
        if sample["meta"]["lang"] == "zh":
            assert not re.search(r"Picture|\bred\b|\blarge\b", ask)
            continue
        told = re.findall(r"Picture \d: (.*)", ask)
        if task == "SPU":
            assert (told[0] == told[1]) == (answer == "yes")
        elif task == "Video_Topic":
            topics = [re.search(r"large \w+ \w+ (\w+)", t)[1] for t in told]
            verdicts = ["yes" if t == topics[0] else "no" for t in topics[1:]]
            said = [f"{topics[0]} {t} {v}" for t, v in zip(topics[1:], verdicts, strict=True)]
            assert answer == f"{', '.join(said)}. [{'_'.join(verdicts)}]"
        elif task == "Video_Order":
            kind = "sign" if "EP" in told[0] else "walk" if "on the left" in ask else "number"
            steps = [step_of(t, kind) for t in told]
            least_first = sorted(steps, key=("left", "middle", "right").index if kind == "walk" else int)
            said = ", ".join(f"{step}: Video {i}" for i, step in enumerate(steps, start=1))
            order = ", ".join(f"Video {steps.index(step) + 1}" for step in least_first)
            assert answer == f"{said}. [{order}]"
            seen[kind] += 1
        elif task == "PornComment":
            said = re.search(r"Comment: (.*)", ask)[1]
            there = re.findall(r"(?:small|large) (\w+) \w+ (\w+)", ask.split("\nTitle")[0])
            ugly = re.fullmatch(r"(\w+) (\w+) is ugly", said)
            assert (answer == "yes") == (ugly.groups() in there if ugly else said.startswith("you "))
        elif task == "CPV":
            colour, material, shape = re.match(r"a large (\w+) (\w+) (\w+)\.", ask).groups()
            facts = {"colour": colour, "material": material, "shape": shape}
            assert all(facts[k] == v for k, v in json.loads(answer).items())
        seen[task, answer if task in ("SPU", "High_like") else ""] += 1
    assert len(seen) == 3 + 4 + 4 and min(seen.values()) >= 4


def test_a_reply_ends_with_the_answer_that_is_scored():
    """What training says before the answer changes nothing of what the official rule reads; most rows say nothing."""
    rules = {s.file: kc_mmbench.RULES[s.kind] for s in kc_mmbench.SUBSETS}
    longest = Counter()
    for i, lang in itertools.product(range(12), ("en", "zh")):
        for task, make in kc.MAKERS.items():
            row = make(documents.told(lang), rng(8, task, i), lang, COLOUR_SHAPE, i)
            item = Item("0", task, task, "test", [], row["answer"])
            assert rules[task].score(item, rules[task].parse(row["reply"], item)) == 1
            assert (row["reply"] != row["answer"]) == (task in ("Video_Topic", "Video_Order"))
            longest[task] = max(longest[task], len(row["reply"]))
    assert longest["Video_Topic"] > 20 and longest["Video_Order"] > 60


def test_verdicts_are_true():
    """Every line of a document of verdicts, read again: two words are the same or not, steps stand in order."""
    seen = Counter()
    for i in range(40):
        for line in documents.verdicts(4, i)["messages"][0]["content"].split("\n"):
            said, answer = re.fullmatch(r"(.+)\. \[(.+)\]", line).groups()
            if "Video" in answer:
                steps = [s.split(": ")[0] for s in said.split(", ")]
                sides = [w for w in ("left", "middle", "right", "左边", "中间", "右边") if w in steps]
                order = [f"Video {steps.index(s) + 1}" for s in sides or sorted(steps, key=int)]
                assert answer == ", ".join(order) and said.endswith(": Video 3")
                seen[tuple(order)] += 1
            else:
                triples = [part.split(" ") for part in said.split(", ")]
                assert answer.split("_") == [v for _, _, v in triples]
                assert all((a == b) == (v in ("yes", "是")) for a, b, v in triples)
                seen[answer] += 1
    assert len(seen) == 6 + 4 + 4 and min(seen.values()) > 5, seen


def test_what_is_asked_after_a_shop_question_is_true():
    """Every kind of follow-up against the truths of its pictures, and no kind leans to one answer of two."""
    seen: Counter = Counter()
    for i in range(480):
        task = kc.TASKS[i % 6]
        row = kc.MAKERS[task](documents.told("en"), rng(6, i), "en", COLOUR_SHAPE, i)
        things = [t["things"][0] for t in row["meta"]["truths"]]
        signs = [bool(t["signs"]) for t in row["meta"]["truths"]]
        turns = kc.follow_ups(row, "en", rng(7, i))
        assert 3 <= len(turns) <= (7 if len(things) > 1 else 5)
        assert len({t["q"] for t in turns}) == len(turns)
        for t in turns:
            at = [int(n) - 1 for n in re.findall(r"\d+", t["q"].replace("1000", ""))] or [0]
            thing, kind = things[at[0]], t["type"]
            if kind == "what":
                right = f"{thing['colour']} {thing['material']} {thing['shape']}"
            elif kind == "is":
                right = "yes" if t["q"].endswith(f" a {thing['colour']} {thing['shape']}?") else "no"
                named = tuple(t["q"].strip("?").split()[-2:])
                assert named in COLOUR_SHAPE and (named[0] == thing["colour"] or named[1] == thing["shape"])
            elif kind == "sign":
                right = "yes" if signs[at[0]] else "no"
            elif kind == "ugly":
                right = re.search(r"Comment: (\w+ \w+) is ugly", row["question"])[1]
            elif kind == "likes" and task == "High_like":
                right = "yes" if row["meta"]["likes"] > 1000 else "no"
            elif kind == "likes":  # near to 0, noise may have turned it
                points = shop.like_points(thing["colour"], thing["shape"], signs[at[0]])
                right = ("yes" if points > 0 else "no") if abs(points) > 1.5 else t["a"]
            else:
                right = compared(kind, t["q"], things, at)
                assert len(things) == 2 or "largest thing" in t["q"]  # there are small ones beside it
            assert t["a"] == right, (t, things)
            seen[kind, t["a"]] += 1
    assert min(seen["sign", "yes"], seen["sign", "no"]) > 5  # few covers have one
    for kind in ("same", "is", "likes"):
        assert min(seen[kind, "yes"], seen[kind, "no"]) > 0.15 * (seen[kind, "yes"] + seen[kind, "no"]) > 5
    comparing = {"each", "like the first", "common", "apart", "same"}
    assert {k for k, _ in seen} == {"what", "sign", "is", "likes", "ugly"} | comparing


def step_of(said, kind):
    """What puts a told episode in order, read off its words."""
    if kind == "sign":
        return re.search(r"EP (\d+)", said)[1]
    if kind == "walk":
        return re.search(r"(\w+)\.$", said)[1]
    return str(len(re.findall(r"\ba ", said)))


def compared(kind, question, things, at):
    """The answer to a question that compares things, from their attributes."""
    keys = ("colour", "shape", "material")
    asked = [k for k in keys if k in question]
    if kind == "each":
        return ", ".join(t[asked[0]] for t in things)
    if kind == "like the first":
        return (
            ", ".join(str(i + 1) for i, t in enumerate(things) if i and t[asked[0]] == things[0][asked[0]]) or "none"
        )
    a, b = things if len(things) == 2 else (things[i] for i in at)
    if kind == "same":
        return "yes" if all(a[k] == b[k] for k in asked or keys) else "no"
    if kind == "common":
        return ", ".join(a[k] for k in keys if a[k] == b[k]) or "none"
    assert kind == "apart"
    return ", ".join(f"{a[k]} {b[k]}" for k in keys if a[k] != b[k]) or "none"


def test_the_worlds_tokenizer_has_a_piece_for_each_word_of_a_name(world):
    """In both languages: a piece for a whole name would hold a pair that is told apart in no part."""
    tokenizer = Tokenizer.train(texts_of(sorted((world / "sources").iterdir())), VOCABULARY)
    for colour, shape in itertools.product(COLOURS, SHAPES):
        for lang, blank in (("en", " "), ("zh", "")):
            names = [colour, "wood", shape] if lang == "en" else [ZH[colour], ZH["wood"], ZH[shape]]
            pieces = [tokenizer.decode([i]) for i in tokenizer.encode(f"{blank}{blank.join(names)}")]
            assert pieces == [blank + name for name in names]


def test_things_named_twice_come_back_in_another_order():
    orders, languages = set(), Counter()
    for i in range(120):
        (message,) = documents.document(8, i)["messages"]
        lines = message["content"].split("\n")
        if i % 3:
            zh = "、" in lines[0] or not lines[0].isascii()
            first, second = (line.split("、" if zh else ", ") for line in lines)
            assert sorted(first) == sorted(second) and 2 <= len(first) <= 6
            orders.add(tuple(first.index(t) for t in second))
            languages[zh] += 1
    assert len(orders) > 20 and min(languages.values()) > 10
