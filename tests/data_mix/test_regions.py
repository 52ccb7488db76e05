"""Named regions: read from the published grounding format, laid on the patch grid, packed and loaded."""

import json

import numpy as np
import pytest
import torch

from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.regions import in_patches, named_boxes
from data_mix.shards import ShardWriter
from data_mix.world.stills import regions_sample, still_sample
from mm.common.errors import BadSample
from tests.data_mix.made import image_facts, picture


def ref(name, *boxes):
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>{json.dumps(boxes)}<|box_end|>"


def document(text, *media):
    parts = [{"type": "image", "image": m} for m in media]
    return {"messages": [{"role": "text", "content": [*parts, {"type": "text", "text": text}]}]}


def test_phrases_and_boxes_are_read_in_order():
    sign = "<|ocr_text_start|>SALE<|ocr_text_end|> <|box_start|>[[1,2,30,40]]<|box_end|>"
    text = f"here: {ref('red ball', [0, 10, 500, 1000])} and {sign}{ref('cube', [1, 1, 2, 2], [5, 5, 9, 9])}."
    assert named_boxes(document(text)) == [
        ("red ball", (0, 10, 500, 1000)), ("SALE", (1, 2, 30, 40)), ("cube", (1, 1, 2, 2)), ("cube", (5, 5, 9, 9)),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), [
    ("a red ball.", "names no region"),
    (ref("ball"), "names no region"),
    (ref("ball", [10, 10, 10, 20]), "no box"),
    (ref("ball", [20, 10, 10, 20]), "no box"),
    (ref("ball", [0, 0, 1001, 20]), "no box"),
    (ref("ball", [0, 0, 20]), "no box"),
    ("", "no caption"),
])  # fmt: skip
def test_what_is_no_region_is_a_bad_sample(text, reason):
    with pytest.raises(BadSample, match=reason):
        named_boxes(document(text))


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


def test_regions_arrive_with_the_patches_they_name(source, processor, tokenizer):
    plan = PackPlan(Mix([SourceSpec(source, 1, "samples")]), processor, tokenizer, 512, 60, kind="regions")
    assert plan.refused_by_reason() == {
        "the caption names no region": 1, "regions are named in one picture; this sample has other media": 1,
    }  # fmt: skip
    seen, p = set(), processor.patch_size
    with Loader(plan, packs_per_step=2, workers=0) as loader:
        for _ in range(6):
            for batch in next(loader):
                names = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
                texts = [tokenizer.decode(t.tolist()) for t in names]
                rows = batch.grid_thw.prod(1).tolist()
                pixels = batch.pixel_values.split(rows)
                assert len(texts) == len(batch.regions) == 2 * len(rows) and len(batch.draws) == len(rows)
                for k, (row, top, left, bottom, right) in enumerate(batch.regions.tolist()):
                    _, h, w = batch.grid_thw[row].tolist()
                    assert row == k // 2 and pixels[row].shape == (h * w, 3 * p * p)
                    if k % 2:
                        assert texts[k] == "large cube" and (bottom, right) == (h, w)
                    else:
                        assert texts[k].startswith("ball ") and (top, left) == (0, 0)
                        assert (bottom, right) == (-(-h // 2), -(-w // 2))
                        seen.add(texts[k])
                assert not any("broken" in d for d in batch.draws)
        assert set(loader.stats.bad) == {"not an image"}
    assert seen == {f"ball {i}" for i in range(9)}


def test_the_world_names_what_is_plain_to_see():
    """Every region's phrase is a thing's name (or a sign's text), its box that thing's."""
    named = 0
    for family in ("caption", "counting", "ocr", "vit_pairs"):
        for i in range(8):
            made = still_sample(3, family, i)
            truth, lang = made["truths"][0], made["sample"]["meta"]["lang"]
            regions = named_boxes(regions_sample(truth, lang, np.random.default_rng(i)))
            assert len(regions) == sum(s >= 0.5 for s in truth["seen"][0]) + len(truth["signs"])
            for phrase, box in regions:
                boxes = [b[0] for b in truth["boxes"][0] if b] + [s["box"] for s in truth["signs"]]
                scale = np.array([truth["width"], truth["height"]] * 2) / 1000
                near = [np.abs(np.array(box) * scale - b).max() for b in boxes]
                at = int(np.argmin(near))
                assert near[at] < 1.0
                if at < len(truth["things"]) and lang == "en":
                    t = truth["things"][at]
                    assert phrase == f"{t['colour']} {t['material']} {t['shape']}"
                    named += 1
    assert named > 30


def test_batches_move_whole(source, processor, tokenizer):
    plan = PackPlan(Mix([SourceSpec(source, 1, "samples")]), processor, tokenizer, 512, 60, kind="regions")
    with Loader(plan, packs_per_step=1, workers=0) as loader:
        batch = next(loader)[0]
    moved = batch.to("meta")
    assert moved.regions.device.type == "meta" and moved.draws == batch.draws
    assert batch.regions.dtype == torch.int64
