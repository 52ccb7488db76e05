"""The page shows the tensors themselves."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.shards import ShardWriter, Source
from data_mix.view import unpatchify, view
from mm.common.errors import UserError
from tests.data_mix.made import FAILS, TrickyProcessor, picture, turn


def test_unpatchify_undoes_patchify(processor):
    frames = np.random.default_rng(0).integers(0, 255, (3, 56, 84, 3), dtype=np.uint8)
    patches = torch.from_numpy(processor.patchify(frames))
    assert np.array_equal(unpatchify(patches, processor.frames_grid(frames), 14), frames)


def pictures_of(page):
    return [np.array(Image.open(io.BytesIO(base64.b64decode(d)))) for d in re.findall(r"base64,([\w+/=]+)'", page)]


def test_frames_tokens_and_boundaries_are_on_the_page(real_source, processor, tokenizer, tmp_path):
    plan = PackPlan(Mix([SourceSpec(real_source)]), processor, tokenizer, 600, 300)
    page = view(plan, tmp_path / "x.html", n=3).read_text()
    draws = [d for i in range(3) for d in plan.pack(i)]
    assert page.count("<article") == len(draws) and page.count("<section") == 3
    assert all(plan.mix.name(d) in page for d in draws) and "$" not in page.split("</style>")[1]
    assert not re.search(r"https?://", page) and "<script" not in page
    source, shown = Source(real_source), pictures_of(page)
    for d in draws:
        sample = plan.sample(d)
        for suffix, facts in sample["media"].items():
            load = processor.load_image if facts["kind"] == "image" else lambda b: processor.load_video(b)[0]
            for frame in load(source.member(d.sample, suffix)):
                assert any(p.shape == frame.shape and np.array_equal(p, frame) for p in shown)
    assert page.count("trained'>") == page.count(", trained'>") + page.count("not trained'>")


def test_times_follow_the_order_shown(real_source, processor, tokenizer, tmp_path):
    plan = PackPlan(Mix([SourceSpec(real_source)]), processor, tokenizer, 600, 300)
    source = Source(real_source)
    at = next(i for i in range(60) if any(source.keys[d.sample] == "v02" for d in plan.pack(i)))
    page = view(plan, tmp_path / "x.html", n=1, start=at).read_text()
    article = next(a for a in page.split("<article")[1:] if "/v02#" in a)
    times = [float(t) for t in re.findall(r"<figcaption>([\d.]+) s", article)]
    assert len(times) == 4 and np.argsort(np.argsort(times)).tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("kind", ["packs", "pairs"])
def test_holes_pairs_and_hostile_text(tmp_path, tokenizer, kind):
    with ShardWriter(tmp_path / "s", "s") as w:
        w.write("bad", {"messages": turn("<script>alert(1)</script>", "png")}, {"png": picture(0, FAILS)})
        w.write("ok", {"messages": turn("<b>'\"&", "png")}, {"png": picture(1)})
    processor = TrickyProcessor(image_max_tokens=25)
    plan = PackPlan(Mix([SourceSpec(tmp_path / "s")]), processor, tokenizer, 400, 60, kind=kind)
    page = view(plan, tmp_path / "x.html", n=2).read_text()
    assert "<script" not in page and "<b>'" not in page
    assert ("hole: damaged image" in page) == (kind == "packs")


def test_a_folder_can_be_viewed_directly(real_source, processor, tokenizer, tmp_path):
    page = view(real_source, tmp_path / "x.html", n=1, processor=processor, tokenizer=tokenizer)
    assert "segment 0" in page.read_text()
    with pytest.raises(UserError, match="tokenizer"):
        view(real_source, tmp_path / "x.html")
