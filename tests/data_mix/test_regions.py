"""Named regions: read from the published grounding format, laid on the patch grid, packed and loaded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.regions import Names, Region, in_patches, named_regions, regions_of, said
from data_mix.shards import ShardWriter
from data_mix.world.render import FONT, _plate, _size, letters
from data_mix.world.stills import regions_sample, still_sample, thousand
from data_mix.world.tasks import named_clip
from data_mix.world.truth import make_brief, still_scene
from data_mix.world.words import COLOUR_SHAPE, COLOURS, MATERIALS, SHAPES
from mm.common.errors import BadSample
from mm.processor import Processor
from mm.tokenizer import Tokenizer
from tests.data_mix.made import clip, image_facts, picture
from vision.media import VideoInfo


def ref(name, *boxes):
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>{json.dumps(boxes)}<|box_end|>"


def document(text, *media):
    parts = [{"type": "image", "image": m} for m in media]
    return {"messages": [{"role": "text", "content": [*parts, {"type": "text", "text": text}]}]}


def test_phrases_and_boxes_are_read_in_order():
    sign = "<|ocr_text_start|>SALE<|ocr_text_end|> <|box_start|>[[1,2,30,40]]<|box_end|>"
    text = f"here: {ref('red ball', [0, 10, 500, 1000])} and {sign}{ref('cube', [1, 1, 2, 2], [5, 5, 9, 9])}."
    assert named_regions(document(text)) == [
        Region("red ball", (0, 10, 500, 1000)), Region("SALE", (1, 2, 30, 40)),
        Region("cube", (1, 1, 2, 2)), Region("cube", (5, 5, 9, 9)),
    ]  # fmt: skip


def span(start, end):
    return f"<|clip_time_start|>[{start},{end}]<|clip_time_end|>"


def test_a_span_of_time_goes_with_the_boxes_after_it():
    text = ref("sign", [0, 0, 9, 9]) + span(0, "0.75") + ref("ball", [1, 1, 5, 5]) + span(" 0.5", "2 ") + "\n"
    found = named_regions(document(text + ref("ball", [2, 2, 6, 6])))
    assert [(r.phrase, r.span) for r in found] == [("sign", None), ("ball", (0.0, 0.75)), ("ball", (0.5, 2.0))]
    shown = Processor(video_fps=2).video_plan(VideoInfo(
        width=112, height=112, frames=6, fps=2.0, seconds=3.0, rotation=0, audio=False))  # fmt: skip
    assert shown.times.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert [r.frames(shown) for r in found] == [[0, 1, 2, 3, 4, 5], [0, 1], [1, 2, 3]]
    turned = shown.reordered([4, 1, 0])
    assert [r.frames(turned) for r in found] == [[0, 1, 2], [1, 2], [1]]
    assert [r.frames(None) for r in found] == [[0]] * 3


@pytest.mark.parametrize(("text", "reason"), [
    ("a red ball.", "names no region"),
    (ref("ball"), "names no region"),
    (ref("ball", [10, 10, 10, 20]), "no box"),
    (ref("ball", [20, 10, 10, 20]), "no box"),
    (ref("ball", [0, 0, 1001, 20]), "no box"),
    (ref("ball", [0, 0, 20]), "no box"),
    (span(1, 1) + ref("ball", [0, 0, 9, 9]), "no .start,end. in seconds"),
    (span(-1, 1) + ref("ball", [0, 0, 9, 9]), "no .start,end. in seconds"),
    (span("", 1) + ref("ball", [0, 0, 9, 9]), "no .start,end. in seconds"),
    (span("9" * 400, 1) + ref("ball", [0, 0, 9, 9]), "no .start,end. in seconds"),
    ("", "no caption"),
])  # fmt: skip
def test_what_is_no_region_is_a_bad_sample(text, reason):
    with pytest.raises(BadSample, match=reason):
        named_regions(document(text))


def test_a_box_covers_the_patches_it_touches():
    random = np.random.default_rng(0)
    for _ in range(300):
        rows, columns = map(int, random.integers(1, 12, 2))
        (x1, x2), (y1, y2) = (sorted(random.choice(1001, 2, replace=False).tolist()) for _ in "xy")
        top, left, bottom, right = in_patches((x1, y1, x2, y2), rows, columns)
        # a patch is touched when its open interval meets the box's
        touched = [r for r in range(rows) if r * 1000 < y2 * rows and (r + 1) * 1000 > y1 * rows]
        assert list(range(top, bottom)) == touched
        touched = [c for c in range(columns) if c * 1000 < x2 * columns and (c + 1) * 1000 > x1 * columns]
        assert list(range(left, right)) == touched


def test_rivals_are_what_names_go_on_with_after_the_same_beginning():
    """Every word of every name against a search through all names; held-out pairs never stand against each other."""
    ids = {word: i for i, word in enumerate((*MATERIALS, *COLOURS, *SHAPES, "end", "still", "slides", "left", "up"))}
    all_names = [[ids[w] for w in (c, m, s, *rest, "end")] for c, s in COLOUR_SHAPE for m in MATERIALS
                 for rest in ([], ["still"], ["slides", "left"], ["slides", "up"])]  # fmt: skip
    names = Names(all_names)
    assert names.words.tolist() == sorted(ids.values())
    for name in all_names[::7]:
        for i, row in enumerate(names.rivals(name)):
            assert set(np.flatnonzero(row)) == {other[i] for other in all_names if other[:i] == name[:i]}
    for colour, shape in COLOUR_SHAPE:
        rows = names.rivals([ids[w] for w in (colour, "wood", shape, "slides", "left", "end")])
        told = [{word for word, i in ids.items() if row[i]} for row in rows]
        assert told == [set(COLOURS), set(MATERIALS), {s for c, s in COLOUR_SHAPE if c == colour},
                        {"end", "still", "slides"}, {"left", "up"}, {"end"}]  # fmt: skip
        assert len(told[2]) == len(SHAPES) - 1
    assert Names([]).words.tolist() == []


def test_what_was_only_not_drawn_is_a_rival():
    """Red wood with a cone was never drawn, but red stands with cones of glass: that is no held-out pair. Red with
    a cube is."""
    words = ("red", "blue", "wood", "glass", "ball", "cube", "cone")
    ids = {word: i for i, word in enumerate(words)}
    drawn = ("red wood ball", "red glass cone", "blue wood ball", "blue wood cube", "blue wood cone")
    names = Names([ids[w] for w in name.split()] for name in drawn)
    name = [ids[w] for w in ("red", "wood", "ball")]
    assert [words[i] for i in np.flatnonzero(names.rivals(name)[2])] == ["ball", "cone"]


@pytest.fixture
def source(tmp_path):
    """Nine pictures of two regions; one that cannot be decoded, one without regions, one with two pictures."""
    def facts(media):
        return {name: image_facts(112, 84) for name in media}

    with ShardWriter(tmp_path / "regions", "regions") as w:
        for i in range(9):
            text = ref(f"ball {i}", [0, 0, 500, 500]) + ref("large cube", [250, 400, 999, 999])
            media = {"0.jpg": picture(i, (112, 84))}
            w.write(f"good{i}", {**document(text, *media), "media": facts(media)}, media)
        for key, text, media in (
            ("broken", ref("ball", [0, 0, 500, 500]), {"0.jpg": b"not a picture"}),
            ("plain", "a ball", {"0.jpg": picture(0, (112, 84))}),
            ("twice", ref("ball", [0, 0, 500, 500]), {f"{k}.jpg": picture(k, (112, 84)) for k in range(2)}),
        ):
            w.write(key, {**document(text, *media), "media": facts(media)}, media)
    return tmp_path / "regions"


def test_regions_of_a_clip_lie_in_the_frames_of_their_time(tmp_path, processor, tokenizer):
    """Boxes named for a span are asked of just those frames; a span that no frame falls into refuses the sample."""
    facts = {"kind": "video", "width": 64, "height": 48, "frames": 12, "fps": 6.0, "seconds": 2.0, "rotation": 0,
             "audio": False}  # fmt: skip
    part = {"type": "video", "video": "mp4"}
    plan = processor.video_plan(VideoInfo(**{k: v for k, v in facts.items() if k != "kind"}))
    cut = float(plan.times[1] + plan.times[2]) / 2
    text = span(0, f"{cut:.3f}") + ref("ball", [0, 0, 999, 999]) + span(f"{cut:.3f}", 9) + ref("cube", [0, 0, 1, 1])
    with ShardWriter(tmp_path / "tracks", "tracks") as w:
        for key, said in (("good", text), ("late", span(50, 60) + ref("ball", [0, 0, 9, 9]))):
            message = {"role": "text", "content": [part, {"type": "text", "text": said}]}
            w.write(key, {"messages": [message], "media": {"mp4": facts}}, {"mp4": clip()})
    mix = Mix([SourceSpec(tmp_path / "tracks", 1, "samples")])
    packs = PackPlan(mix, processor, tokenizer, 512, 60, kind="regions")
    assert packs.refused_by_reason() == {"no frame shown of this clip is within the times of its named regions": 1}
    with Loader(packs, packs_per_step=1, workers=0) as loader:
        (batch,) = next(loader)
    (frames, h, w), whole = batch.grid_thw[0].tolist(), len(plan.times)
    mine = batch.regions[batch.regions[:, 0] == 0].tolist()
    names = [tokenizer.decode(t.tolist()[:-1]) for t in batch.input_ids.split(batch.cu_seqlens.diff().tolist())]
    assert frames == whole > 2
    assert mine == [[0, f, 0, 0, h, w] for f in (0, 1)] + [[0, f, 0, 0, 1, 1] for f in range(2, whole)]
    assert [n.strip() for n in names[:whole]] == ["ball", "ball"] + ["cube"] * (whole - 2)




def test_names_are_said_as_in_a_sentence_and_letters_as_in_a_word():
    tokenizer = Tokenizer.train(["a large cube and a large ball"] * 9, 320)
    assert said("large cube", tokenizer) == tokenizer.encode("a large cube")[1:]
    blank = tokenizer.encode(" ")[0]
    for whole in ("Q", "SALE", "红色方块"):  # before capitals and Chinese a blank is a token of its own
        assert said(whole, tokenizer) == tokenizer.encode(whole) and blank not in said(whole, tokenizer)
    with pytest.raises(BadSample, match="empty name"):
        regions_of(ref(" ", [0, 0, 9, 9]))


def test_regions_arrive_with_the_patches_they_name(source, processor, tokenizer):
    plan = PackPlan(Mix([SourceSpec(source, 1, "samples")]), processor, tokenizer, 512, 60, kind="regions")
    assert plan.refused_by_reason() == {
        "the caption names no region": 1, "regions are named in one picture or clip; this sample has other media": 1,
    }  # fmt: skip
    seen, p = set(), processor.patch_size
    with Loader(plan, packs_per_step=2, workers=0) as loader:
        for _ in range(6):
            for batch in next(loader):
                names = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
                texts = [tokenizer.decode(t.tolist()[:-1]).strip() for t in names]
                assert {t.tolist()[-1] for t in names} == {tokenizer.id("<|im_end|>")}
                rows = batch.grid_thw.prod(1).tolist()
                pixels = batch.pixel_values.split(rows)
                assert len(texts) == len(batch.regions) == 2 * len(rows) and len(batch.draws) == len(rows)
                for k, (row, frame, top, left, bottom, right) in enumerate(batch.regions.tolist()):
                    _, h, w = batch.grid_thw[row].tolist()
                    assert (row, frame) == (k // 2, 0) and pixels[row].shape == (h * w, 3 * p * p)
                    if k % 2:
                        assert texts[k] == "large cube" and (bottom, right) == (h, w)
                    else:
                        assert texts[k].startswith("ball ") and (top, left) == (0, 0)
                        assert (bottom, right) == (-(-h // 2), -(-w // 2))
                        seen.add(texts[k])
                assert not any("broken" in d for d in batch.draws)
                assert batch.rivals.shape == (len(batch.input_ids), len(batch.words))
                itself = batch.rivals.gather(1, torch.searchsorted(batch.words, batch.input_ids)[:, None])
                names = ["large cube", *(f"ball {k}" for k in range(9))]
                ids = {i for name in names for i in said(name, tokenizer)} | {tokenizer.id("<|im_end|>")}
                assert itself.all() and set(batch.words.tolist()) == ids
        assert set(loader.stats.bad) == {"not an image"}
    assert seen == {f"ball {i}" for i in range(9)}


def spelt(regions, truth):
    """What the letters among the regions spell from left to right; each lies on the sign's plate."""
    letters = sorted((r for r in regions if len(r.phrase) == 1), key=lambda r: r.box[0])
    for x1, y1, x2, y2 in (r.box for r in letters):
        left, top, right, bottom = thousand(truth["signs"][0]["box"], truth)
        assert left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
    return [r.phrase for r in letters]


def test_the_world_names_what_is_plain_to_see():
    """Every region's phrase is a thing's name, its box that thing's; or a letter of a sign."""
    named = 0
    for family in ("caption", "counting", "ocr", "vit_pairs"):
        for i in range(8):
            made = still_sample(3, family, i)
            truth = made["truths"][0]
            regions = named_regions(regions_sample(truth, np.random.default_rng(i)))
            assert spelt(regions, truth) == list("".join(s["text"] for s in truth["signs"]))
            things = [(r.phrase, r.box) for r in regions if len(r.phrase) > 1]
            assert len(things) == sum(s >= 0.5 for s in truth["seen"][0])
            for phrase, box in things:
                boxes = [b[0] for b in truth["boxes"][0] if b]
                scale = np.array([truth["width"], truth["height"]] * 2) / 1000
                near = [np.abs(np.array(box) * scale - b).max() for b in boxes]
                at = int(np.argmin(near))
                assert near[at] < 1.0
                t = truth["things"][at]
                assert phrase == f"{t['colour']} {t['material']} {t['shape']}"
                named += 1
    assert named > 30


def test_the_world_says_what_a_thing_does_and_where_it_passes():
    """Each region is a thing's box in just that frame; 'passing' where no other frame shown has it there."""
    said, processor = set(), Processor(video_fps=2)
    for i, (shape, motion) in enumerate((("ring", "falls"), ("ball", "splits"), ("ring", "slides left"))):
        _, _, truth = make_brief(0, f"clip-{i}", ("blue", shape, motion), second=i != 2)
        sample = named_clip(truth)
        order = sample["messages"][0]["content"][0]["frames"]
        plan = processor.video_plan(VideoInfo(
            width=truth["width"], height=truth["height"], frames=truth["frames"], fps=2.0,
            seconds=truth["seconds"], rotation=0, audio=False)).reordered(order)  # fmt: skip
        motions, at = {e["thing"]: e["motion"] for e in truth["events"]}, [[] for _ in order]
        for r in named_regions(sample):
            (shown,) = r.frames(plan)
            at[shown].append(r)
        for k, found in zip(order, at, strict=True):
            assert spelt(found, truth) == list("".join(s["text"] for s in truth["signs"]))
            want = []
            for j, t in enumerate(truth["things"]):
                if truth["seen"][k][j] < 0.5:
                    continue
                does, here = motions.get(j, "still"), truth["boxes"][k][j]
                for other in (truth["boxes"][o][j] for o in order if o != k):
                    far = len(other) != len(here) or np.abs(np.subtract(other, here)).max() > 144 / 30
                    if not far or j not in motions:
                        break
                else:
                    does += " passing"
                name = f"{t['colour']} {t['material']} {t['shape']} {does}"
                want += [(name, tuple(thousand(b, truth))) for b in here]
                said.add(does)
            assert sorted((r.phrase, r.box) for r in found if len(r.phrase) > 1) == sorted(want)
    assert {"falls", "falls passing", "splits", "splits passing", "slides left passing", "still"} <= said


@pytest.mark.parametrize("size", [(140, 112), (192, 256)])
@pytest.mark.parametrize("words", ["COFFEE", "$11", "秒杀", "PARK", "EP 3"])
def test_a_letters_box_holds_its_ink_and_no_others(words, size):
    """The plate is what its letters look like, each drawn alone from the left of its box."""
    scene = still_scene(np.random.default_rng(5), [(COLOUR_SHAPE[0], {})], signs=[words], size=size)
    (sign,) = scene.signs
    boxes = letters(words, sign.box, scene.short)
    assert "".join(letter for letter, _ in boxes) == words.replace(" ", "")
    x0, y0 = sign.box[:2]
    image = np.asarray(_plate(sign, scene.short), int)
    ink = np.abs(image - image[2, 2]).sum(-1) / np.abs(image - image[2, 2]).sum(-1).max()
    ink[:2] = ink[-2:] = ink[:, :2] = ink[:, -2:] = 0  # the frame around the plate
    font = ImageFont.truetype(str(FONT), _size(words, sign.box[2] - sign.box[0], scene.short))
    for letter, (x1, y1, x2, y2) in boxes:
        inside, alike = np.s_[y1 - y0 : y2 - y0, x1 - x0 : x2 - x0], []
        for rounding in (-1, 0, 1):
            alone = Image.new("L", image.shape[1::-1])
            at = (x1 - x0 + rounding, image.shape[0] / 2)
            ImageDraw.Draw(alone).text(at, letter, font=font, fill=255, anchor="lm")
            alike.append(np.corrcoef(np.asarray(alone)[inside].ravel(), ink[inside].ravel())[0, 1])
        assert max(alike) > 0.95


def test_batches_move_whole(source, processor, tokenizer):
    plan = PackPlan(Mix([SourceSpec(source, 1, "samples")]), processor, tokenizer, 512, 60, kind="regions")
    with Loader(plan, packs_per_step=1, workers=0) as loader:
        batch = next(loader)[0]
    moved = batch.to("meta")
    assert moved.regions.device.type == "meta" and moved.draws == batch.draws
    assert batch.regions.dtype == torch.int64
