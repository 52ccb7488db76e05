"""Told pictures as data: what the world tells, how packs carry it, and that shown and told are never mixed up."""

import itertools
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.regions import in_patches, regions_of
from data_mix.shards import ShardWriter
from data_mix.stats import stats
from data_mix.view import CELL, view, written
from data_mix.world import kc
from data_mix.world.told import SHARES, told, told_ask, told_compare, told_shop, told_task
from data_mix.world.words import COLOUR_SHAPE, MOTIONS
from mm.common.errors import BadSample, UserError
from mm.sizes import PROCESSORS, SIZES
from mm.told import Told, spell, spelt
from tests.data_mix.made import picture, turn

PROCESSOR = PROCESSORS["tiny"]


def regions_in(sample):
    return [r for told in sample["told"].values() for r in regions_of(told)]


def names_of(sample):
    """Colour, material and shape of each thing: without what is done, and without the letters of signs."""
    return {" ".join(r.phrase.split(" ")[:3]) for r in regions_in(sample) if len(r.phrase) > 1}


def written_in(sample):
    """What the letters of each told picture spell, from left to right; the same in all frames of a clip."""
    letters = [sorted({(r.box[0], r.phrase) for r in regions_of(told) if len(r.phrase) == 1})
               for told in sample["told"].values()]  # fmt: skip
    return ["".join(letter for _, letter in found) for found in letters if found]


def listed(sample):
    """The words of each thing on the list, without what it does."""
    items = sample["messages"][0]["content"][1]["text"].split(", ")
    return [item.split(" ") for item in items]


def test_the_list_says_everything_once_in_any_order():
    samples = [s for s in (told(3, i) for i in range(150)) if s["meta"]["lang"] == "en"]
    starts, near = Counter(), 0
    for sample in samples:
        items, names = listed(sample), names_of(sample)
        moving = "mp4" in sample["media"]
        absent = []
        for pair in (set(i[:2]) for i in items if i[-1] == "none"):  # half of it is there, but not together
            there = [pair & {n.split(" ")[0], n.split(" ")[2]} for n in names]
            assert max(map(len, there)) == 1 and any(pair == set(p) for p in COLOUR_SHAPE)
            absent.append(frozenset(pair))
        assert len(set(absent)) == len(absent)
        near += len(absent)
        things = [i for i in items if len(i) > 1 and i[-1] != "none"]
        assert sorted(sorted(i[:3]) for i in things) == sorted(sorted(n.split(" ")) for n in names)
        assert [i[0] for i in items if len(i) == 1] == written_in(sample)
        acts = [" ".join(i[3:]) for i in things]
        acting = {(*sorted(w[:3]), " ".join(w[3:])) for w in (r.phrase.replace(" passing", "").split(" ") for r in
                regions_in(sample)) if len(w) > 1}  # fmt: skip
        assert {(*sorted(i[:3]), act) for i, act in zip(things, acts, strict=True)} == acting
        assert set(acts) <= ({*MOTIONS, "still"} if moving else {""})
        assert "still" not in acts[: sum(a != "still" for a in acts)]  # what moves comes first
        starts.update(tuple(n.split(" ").index(word) for word in i[:3])
                      for i in things for n in names if sorted(i[:3]) == sorted(n.split(" ")))  # fmt: skip
    assert min(starts.values()) > 50 and len(starts) == 6 and near > 100
    said = {(n.split(" ")[0], n.split(" ")[2]) for s in samples for n in names_of(s)}
    assert said == set(COLOUR_SHAPE)


def test_the_order_of_moving_is_the_scenes():
    """A clip's boxes tell it: what is listed first leaves its place first."""
    checked = 0
    for i in range(2, 150, 3):
        sample = told(4, i)
        movers = [" ".join(w) for w in listed(sample) if len(w) > 3 and w[3] in ("slides", "rises", "falls")]
        if sample["meta"]["lang"] != "en" or len(movers) != 2:
            continue
        regions, first = regions_of(sample["told"]["mp4"]), []
        for mover in movers:
            places = [r.box for r in regions if sorted(r.phrase.split(" ")[:3]) == sorted(mover.split(" ")[:3])]
            away = [max(abs(a - b) for a, b in zip(box, places[0], strict=True)) > 30 for box in places]
            first.append(away.index(True))
        assert first[0] < first[1]
        checked += 1
    assert checked > 5


def test_tasks_of_every_kind_are_told_whole():
    """Each picture has its words and its size, and nothing else is needed to make tensors of it."""
    kinds = Counter()
    for make, i in itertools.product((told_task, told_shop), range(150)):
        sample = make(3, i)
        kinds[sample["family"] if make is told_task else sample["meta"]["types"][0]] += 1
        named = [p[p["type"]] for m in sample["messages"] if isinstance(m["content"], list) for p in m["content"]
                 if p["type"] != "text"]  # fmt: skip
        assert set(named) == sample["told"].keys() == sample["media"].keys() and names_of(sample)
        assert make(3, i) == sample
    assert kinds.keys() == {*SHARES, *kc.TASKS}


def test_what_is_asked_can_be_read_off_what_is_told_and_not_off_what_was_said():
    kinds = Counter()
    for sample in (s for s in (told_ask(3, i) for i in range(60)) if s["meta"]["lang"] == "en"):
        things = [n.split(" ") for n in names_of(sample)]
        turns = [m["content"] for m in sample["messages"]]
        turns[0] = turns[0][-1]["text"]
        for i, (kind, q, a) in enumerate(zip(sample["meta"]["types"], turns[::2], turns[1::2], strict=True)):
            assert kind == "present" or a not in " ".join(turns[: 2 * i + 1])
            words, enough = set(q.rstrip("?").split(" ")), 1 if kind in ("colour", "shape") else 2
            asked = [t for t in things if len(words & {t[0], t[2]}) >= enough]
            if kind in ("colour", "material", "shape"):
                assert [t[("colour", "material", "shape").index(kind)] for t in asked] == [a]
            elif kind == "present":
                assert a == ("yes" if asked else "no")
            else:
                assert kind == "ocr" and [a] == written_in(sample)
            kinds[kind, a if kind == "present" else ""] += 1
    assert min(kinds.values()) > 15 and len(kinds) == 6, kinds


def test_what_two_pictures_have_in_common_can_be_read_off_what_is_told():
    """What is named as common stands in both pictures, what differs in one each; no pair that training holds out is
    told, and an attribute is the same in about two of three."""
    same = Counter()
    for sample in (told_compare(3, i) for i in range(200)):
        first, second = (set(n.split(" ")) for told in sample["told"].values() for n in [regions_of(told)[0].phrase])
        assert {(n.split(" ")[0], n.split(" ")[2]) for n in names_of(sample)} <= set(COLOUR_SHAPE)
        if sample["meta"]["lang"] != "en":
            continue
        turns = [m["content"] for m in sample["messages"]]
        turns[0] = turns[0][-1]["text"]
        asked = dict(zip(turns[::2], turns[1::2], strict=True))
        assert set(asked["What do the two pictures have in common?"].split(", ")) == (first & second or {"none"})
        assert set(re.split(", | ", asked["What differs between the two pictures?"])) == (first ^ second or {"none"})
        assert (asked["Are the two pictures of the same product?"] == "yes") == (first == second)
        said = [asked[f"Have the two pictures the same {key}?"] == "yes" for key in ("colour", "shape", "material")]
        assert sum(said) == len(first & second) and len(asked) == 6
        same.update(said)
    assert 0.55 < same[True] / same.total() < 0.75


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told") / "told"
    with ShardWriter(folder, "told") as w:
        for i in range(12):
            w.write(f"told{i}", told(3, i), {})
    with ShardWriter(folder.with_name("task"), "task") as w:
        for i in range(12):
            w.write(f"task{i}", told_task(3, i), {})
            w.write(f"shop{i}", told_shop(3, i), {})
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "shown"
    with ShardWriter(folder, "shown") as w:
        w.write("a", {"messages": turn("a red circle", "0.png")}, {"0.png": picture(1)})
    return folder


def test_packs_carry_the_words_to_their_places(source, tokenizer):
    model = Told(SIZES["tiny"].bound(tokenizer))
    for folder in (source.with_name("task"), source):
        plan = PackPlan(Mix([SourceSpec(folder)]), PROCESSOR, tokenizer, 1536, 1152, kind="told")
        assert not plan.refused
        with Loader(plan, packs_per_step=1, workers=0) as loader:
            (batch,) = next(loader)
        model.embed(batch)  # placeholders, grids and patches agree
    patch, seen = PROCESSOR.patch_size, 0
    starts = [0, *batch.grid_thw.prod(1).cumsum(0).tolist()]
    for name, grid, start in zip(batch.draws, batch.grid_thw.tolist(), starts, strict=False):
        sample = told(3, int(name.split("/told")[-1].split("#")[0]))
        said = spelt(batch.pixel_values[start : start + grid[0] * grid[1] * grid[2]], patch).view(*grid, -1)
        here = torch.zeros(grid, dtype=torch.bool)
        for region in regions_of(next(iter(sample["told"].values()))):
            frame = 0
            if region.span is not None:  # half a second around i / 2
                frame = sample["messages"][0]["content"][0]["frames"].index(round(sum(region.span)))
            top, left, bottom, right = in_patches(region.box, *grid[1:])
            ids = tokenizer.encode(" " * (len(region.phrase) > 1) + region.phrase)
            for place in said[frame, top:bottom, left:right].reshape(-1, patch).tolist():
                assert any(place[k : k + len(ids)] == ids for k in range(patch)) or place[-1] >= 0
            here[frame, top:bottom, left:right] = True
            seen += 1
        assert (said[~here] == -1).all() and (said[here][:, 0] >= 0).all()
    assert seen > 10


def test_shown_and_told_are_not_mixed_up(source, shown, tokenizer):
    for folder, kind, reason in ((source, "packs", "told and not shown"), (shown, "told", "shown and not told")):
        with pytest.raises(UserError, match=f"its pictures are {reason}"):
            PackPlan(Mix([SourceSpec(folder)]), PROCESSOR, tokenizer, 1024, 512, kind=kind)


@pytest.mark.parametrize(("change", "reason"), [
    ({"told": {}}, "not in the shard"), ({"told": {"0.jpg": 3}}, "told is not a text"),
    ({"told": ["0.jpg"]}, "told is not a text"),
])  # fmt: skip
def test_what_is_not_told_right_is_not_written(tmp_path, change, reason):
    with ShardWriter(tmp_path / "t", "t") as w, pytest.raises(BadSample, match=reason):
        w.write("bad", {**told(3, 0), **change}, {})


def test_a_picture_of_which_nothing_is_told_is_refused(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "t", "t") as w:
        w.write("bad", {**told(3, 0), "told": {"0.jpg": "nothing"}}, {})
        w.write("good", told(3, 0), {})
    plan = PackPlan(Mix([SourceSpec(tmp_path / "t")]), PROCESSOR, tokenizer, 1024, 512, kind="told")
    assert [(b.key, b.reason) for b in plan.refused] == [("bad", "the caption names no region")]


def test_pages_and_counts_keep_shown_and_told_apart(source, shown, tmp_path, tokenizer):
    both = tmp_path / "both"
    for folder in (source, shown):
        shutil.copytree(folder, both / folder.name)
    made = stats(both, PROCESSOR, tokenizer, token_budget=512, visual_budget=256, quiet=True)
    assert made.samples == 13 and not made.unusable and made.packing["refused"] == 0
    page = view(both, tmp_path / "both.html", n=1, processor=PROCESSOR, tokenizer=tokenizer).read_text()
    assert "kind: packs" in page and "sources: shown" in page
    page = view(source, tmp_path / "told.html", n=1, processor=PROCESSOR, tokenizer=tokenizer).read_text()
    assert "kind: told" in page and "<span class='badge'>" not in page


def test_told_words_are_written_where_they_lie(tokenizer):
    """A patch without words is grey; one with words is not, and what is written differs with the words."""
    ids = [tokenizer.encode(" red"), tokenizer.encode(" blue")]
    frames = spell((1, 28, 56), [((0, 0, 0, 1, 1), ids[0]), ((0, 1, 2, 2, 3), ids[1])], 14)
    (image,) = written(torch.from_numpy(PROCESSOR.patchify(frames)), (1, 2, 4), 14, tokenizer)
    cells = image.reshape(2, CELL, 4, CELL, 3).transpose(0, 2, 1, 3, 4)
    plain = [(r, c) for r in range(2) for c in range(4) if len(np.unique(cells[r, c].reshape(-1, 3), axis=0)) == 1]
    assert plain == [(r, c) for r in range(2) for c in range(4) if (r, c) not in ((0, 0), (1, 2))]
    assert (cells[0, 0] != cells[1, 2]).any()
