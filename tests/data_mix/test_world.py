"""The bundled world: same seed, same bytes; truth is what the files show; nothing held out is trained on."""

import colorsys
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_mix.world import make_world, tasks, view_world
from data_mix.world.encode import read_mp4
from data_mix.world.motion import clip_scene
from data_mix.world.render import Stage
from data_mix.world.sound import RATE
from data_mix.world.words import (
    COLOURS,
    HELD_COLOUR_SHAPE,
    HELD_SHAPE_MOTION,
    MATERIALS,
    MOTIONS,
    RGB,
    SHAPES,
    ZH,
)
from mm.common.errors import UserError
from mm.common.seeds import rng
from vision.media import video_info


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world") / "w"
    make_world(root, size="micro", seed=3, workers=2, quiet=True)
    return root


def clips(world: Path, split: str = "*") -> list[tuple[dict, bytes]]:
    paths = sorted(world.glob(f"clips/{split}/*.mp4"))
    return [(json.loads(p.with_suffix(".json").read_text()), p.read_bytes()) for p in paths]


def stage_of(seed: int, truth: dict) -> Stage:
    """The scene drawn again from its seed."""
    hero, event = truth["things"][0], truth["events"][0]
    s = clip_scene((hero["colour"], hero["shape"], event["motion"]), rng(seed, "motion", truth["id"]),
                   second=len(truth["events"]) > 1)  # fmt: skip
    return Stage(s, rng(seed, "look", truth["id"]))


def silhouette(stage: Stage, i: int, frame: int) -> np.ndarray:
    """bool [h, w]: where thing i would be drawn, hidden or not."""
    mask = np.zeros((stage.scene.height, stage.scene.width), bool)
    for (_, opacity, _), x, y, fade in stage._parts(i, frame):
        if fade >= 0.5:
            n = opacity.shape[0]
            mask[y : y + n, x : x + n] |= opacity[..., 0] > 150
    return mask


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*"))
            if p.is_file() and not p.name.startswith(".")}  # fmt: skip


def test_same_seed_gives_the_same_bytes_with_one_worker(world, tmp_path):
    make_world(tmp_path / "w", size="micro", seed=3, workers=1, quiet=True)
    assert tree(tmp_path / "w") == tree(world)


def test_an_equal_world_is_kept_and_another_is_refused(world, tmp_path):
    before = (world / "world.json").stat().st_mtime_ns
    make_world(world, size="micro", seed=3, quiet=True)
    assert (world / "world.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="seed 3"):
        make_world(world, size="micro", seed=4)
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not a world"):
        make_world(tmp_path, size="micro")
    with pytest.raises(UserError, match="not known"):
        make_world(tmp_path / "x", size="huge")


def test_every_clip_opens_with_its_frames_and_sound(world):
    for truth, data in clips(world):
        info = video_info(data)
        assert (info.width, info.height, info.frames) == (truth["width"], truth["height"], truth["frames"])
        assert info.fps == pytest.approx(12) and info.audio
        frames, sound = read_mp4(data)
        assert len(frames) == truth["frames"]
        assert sound.shape[0] == 2 and abs(sound.shape[1] / RATE - truth["seconds"]) < 0.1


def test_sampled_frames_are_those_that_the_model_takes(world):
    from vision.resize import sample_frames

    for truth, _ in clips(world):
        indices, _ = sample_frames(truth["frames"], 12.0, target_fps=2, min_frames=4, max_frames=768)
        assert truth["sampled"] == indices.tolist()


def colour_name(pixels: np.ndarray) -> str:
    """The nearest of the six colours by saturation, then hue; pixels float [n, 3]."""
    mean = pixels.mean(0)
    if np.ptp(mean) < 0.3 * mean.max():
        return "white"
    hue = colorsys.rgb_to_hsv(*(mean / 255))[0]

    def far(c: str) -> float:
        d = abs(colorsys.rgb_to_hsv(*(v / 255 for v in RGB[c]))[0] - hue)
        return min(d, 1 - d)

    return min((c for c in RGB if c != "white"), key=far)


def test_things_have_their_colour_in_the_decoded_frames(world):
    right = total = 0
    for truth, data in clips(world):
        frames, _ = read_mp4(data)
        stage = stage_of(3, truth)
        for k, f in enumerate(truth["sampled"]):
            for i, thing in enumerate(truth["things"]):
                if truth["seen"][k][i] < 0.95 or thing["material"] == "glass":
                    continue
                mask = silhouette(stage, i, f)
                total += 1
                right += colour_name(frames[f][mask].astype(float)) == thing["colour"]
    assert total > 300 and right / total > 0.97


def test_things_stand_where_the_boxes_are_and_count_as_the_truth_says(world):
    for truth, _ in clips(world, "train")[:6]:
        stage = stage_of(3, truth)
        for k in (0, len(truth["sampled"]) // 2, -1):
            f = truth["sampled"][k]
            whole = stage.frame(f).astype(int)
            for i in range(len(truth["things"])):
                mask = silhouette(stage, i, f)
                parts = truth["boxes"][k][i]
                assert bool(parts) == bool(mask.any())
                if not parts:
                    continue
                ys, xs = np.nonzero(mask)
                union = [
                    min(b[0] for b in parts),
                    min(b[1] for b in parts),
                    max(b[2] for b in parts),
                    max(b[3] for b in parts),
                ]
                assert np.abs(np.array(union) - [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).max() <= 2
                bare = Stage.__new__(Stage)
                bare.__dict__ = {**stage.__dict__, "live": [j for j in stage.live if j != i]}
                if i not in stage.live:
                    continue
                changed = (np.abs(bare.frame(f).astype(int) - whole).sum(-1) > 20) & mask
                assert changed.sum() / mask.sum() == pytest.approx(truth["seen"][k][i], abs=0.2)


def test_sampled_frames_alone_show_every_motion(world):
    for truth, _ in clips(world):
        for event in truth["events"]:
            boxes = [b[event["thing"]] for b in truth["boxes"]]
            x = [(b[0][0] + b[0][2]) / 2 for b in boxes if b]
            y = [(b[0][1] + b[0][3]) / 2 for b in boxes if b]
            clear, m = 0.25 * min(truth["width"], truth["height"]), event["motion"]
            there = len(boxes[0]), len(boxes[-1])
            shown = {
                "slides left": x[0] - x[-1] > clear, "slides right": x[-1] - x[0] > clear,
                "rises": y[0] - y[-1] > clear, "falls": y[-1] - y[0] > clear,
                "bounces": min(np.diff(y)) < -0.1 * clear and max(np.diff(y)) > 0.1 * clear,
                "splits": there == (1, 2), "vanishes": there == (1, 0),
            }  # fmt: skip
            assert shown[m]


def test_sound_rises_at_each_onset_on_the_true_side(world):
    rises, sides = [], []
    for truth, data in clips(world):
        _, sound = read_mp4(data)
        for row in truth["sounds"]:
            i = int(row["t"] * RATE)
            after, before = sound[:, i : i + RATE // 10], sound[:, max(0, i - RATE // 10) : i - RATE // 100]
            rises.append((after**2).mean() > 1.5 * (before**2).mean())
            if abs(row["pan"]) > 0.25 and row["kind"] in ("impact", "split", "vanish"):
                sides.append(np.sign((after[1] ** 2).sum() - (after[0] ** 2).sum()) == np.sign(row["pan"]))
    assert len(rises) > 40 and np.mean(rises) > 0.95
    assert len(sides) > 8 and np.mean(sides) > 0.95


def words_of(sample: dict) -> str:
    texts = []
    for m in sample["messages"]:
        texts += [m["content"]] if isinstance(m["content"], str) else [p.get("text", "") for p in m["content"]]
    return "\n".join(texts)


def forbidden() -> list[str]:
    out = []
    for c, s in HELD_COLOUR_SHAPE:
        out += [f"{c} {s}", ZH[c] + ZH[s]]
        out += [f"{c} {m} {s}" for m in MATERIALS] + [ZH[c] + ZH[m] + ZH[s] for m in MATERIALS]
    for s, m in HELD_SHAPE_MOTION:
        base = {"rises": "rise", "slides left": "slide left", "falls": "fall", "bounces": "bounce",
                "splits": "split", "vanishes": "vanish"}[m]  # fmt: skip
        out += [f"{s} {m}", f"{s} {base}", ZH[s] + ZH[m]]
    return out


def test_training_never_shows_or_tells_a_held_out_pair(world):
    bad = forbidden()
    for index in sorted(world.glob("sources/*/*.idx.jsonl")):
        if index.parent.name in ("text", "text_chat", "verdicts"):
            continue
        for line in index.read_text().splitlines():
            sample = json.loads(line)["sample"]
            said = words_of(sample)
            assert not [b for b in bad if b in said], said
            for asked, answer in itertools.pairwise(sample["messages"] if sample["family"] == "motion" else []):
                thing = next((s for s in SHAPES if f"{s} do?" in words_of({"messages": [asked]})), None)
                assert (thing, answer["content"]) not in HELD_SHAPE_MOTION
            for truth in sample["meta"].get("truths", []):
                assert not any((t["colour"], t["shape"]) in HELD_COLOUR_SHAPE for t in truth["things"])
    for truth, _ in clips(world, "train"):
        assert not any((t["colour"], t["shape"]) in HELD_COLOUR_SHAPE for t in truth["things"])
        assert not any(
            (truth["things"][e["thing"]]["shape"], e["motion"]) in HELD_SHAPE_MOTION for e in truth["events"]
        )
    for path in world.glob("items/*.json"):
        thing = json.loads(path.read_text())["attributes"]
        assert (thing["colour"], thing["shape"]) not in HELD_COLOUR_SHAPE


@pytest.mark.parametrize(("split", "n"), [("train", 1600), ("seen", 130), ("unseen", 130)])
def test_each_single_factor_is_balanced(split, n):
    heroes = [hero for _, hero, _ in tasks.clip_specs(0, split, n, [True])]
    for i, values in enumerate((COLOURS, SHAPES, MOTIONS)):
        counts = Counter(h[i] for h in heroes)
        assert max(counts.values()) - min(counts[v] for v in values) <= max(3, 0.05 * n / len(values))
    held = [(h[0], h[1]) in HELD_COLOUR_SHAPE or (h[1], h[2]) in HELD_SHAPE_MOTION for h in heroes]
    assert all(held) if split == "unseen" else not any(held)


def test_the_page_shows_the_world_in_one_file(world, tmp_path):
    page = view_world(world, tmp_path / "world.html", clips=4).read_text()
    assert "data:video/mp4" in page and "test only" in page and "http" not in page.replace("http://www.w3", "")
