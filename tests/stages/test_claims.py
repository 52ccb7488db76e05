"""Claims: verdict maths against known numbers, same seed same row, resumption, and that only RoPE differs."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_mix.world.words import SHAPES
from mm.common.errors import UserError
from mm.common.files import read_json, read_jsonl
from stages import claims
from stages.claims import merge, rope2d
from stages.claims.claim import Contrast, decide, effect, interval, verdict_of
from stages.claims.rope2d import ARMS, GROUPS, PLAIN, ROPE, UNSEEN, Reader, items_of
from stages.claims.scenes import PATCH, RELATIONS, cover, pictures, relation_of, squared
from stages.claims.seeds import cores, run

MICRO = rope2d.Config(steps=2, batch=4, train=8, test=8)


# --- verdicts


def test_the_interval_is_students():
    """Gosset's own sleep data (1908): ten paired differences, mean 1.58, published interval 0.70 to 2.46."""
    low, high = interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert low == pytest.approx(0.7001142, abs=1e-6) and high == pytest.approx(2.4598858, abs=1e-6)
    assert interval([0.3]) is None


def test_five_seeds_use_four_degrees_of_freedom():
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (high - low) / 2 == pytest.approx(2.7764451 * np.sqrt(2.5 / 5), rel=1e-6)


@pytest.mark.parametrize(("bounds", "verdict"), [
    ((0.01, 0.3), "holds"), ((0.0, 0.1), "holds"), ((-0.1, 0.1), "undecided"), ((-0.2, -0.1), "does not hold"),
    (None, "undecided"),
])  # fmt: skip
def test_a_verdict_comes_from_the_interval(bounds, verdict):
    assert verdict_of(bounds) == verdict


def test_every_deciding_effect_must_hold_and_others_do_not_count():
    rows = [{"a": 1.0 + d, "b": -1.0 - d, "c": d - 0.1} for d in (0.0, 0.1, 0.2)]
    a, b, c = (effect(Contrast(k, "", lambda r, k=k: r[k], decides=True), rows) for k in "abc")
    assert (a.verdict, b.verdict, c.verdict) == ("holds", "does not hold", "undecided")
    assert a.values == [1.0, 1.1, 1.2] and a.mean == pytest.approx(1.1)
    assert decide([a, replace(b, decides=False)]) == "holds"
    assert decide([a, b]) == "does not hold" and decide([a, c]) == "undecided"


def test_contrasts_of_rope2d_have_the_right_sign():
    """RoPE 0.9 seen and 0.8 unseen, interpolation 0.85 and 0.6, the square 0.7 everywhere."""
    level = {ARMS[0]: (0.7, 0.7), PLAIN: (0.85, 0.6), ROPE: (0.9, 0.8)}
    row = {"accuracy": {
        arm: {g: {"relation": low if g in UNSEEN else high, "shape": 0.5} for g in GROUPS}
        for arm, (high, low) in level.items()
    }}  # fmt: skip
    found = [c.of(row) for c in rope2d.CONTRASTS]
    assert found == pytest.approx([0.2, 0.15, 0.05, 0.1, 0.0])


def test_contrasts_of_merge_have_the_right_sign():
    def everywhere(sees: float, reads: float) -> dict:
        return dict.fromkeys(merge.SEES, sees) | dict.fromkeys(merge.READS, reads)

    loss = {"describing": everywhere(1.0, 3.0), "reading": everywhere(2.0, 2.4), "average": everywhere(1.1, 2.5)}
    accuracy = {"describing": everywhere(0.8, 0.4), "reading": everywhere(0.6, 0.5), "average": everywhere(0.7, 0.6)}
    found = [c.of({"loss": loss, "accuracy": accuracy}) for c in merge.CONTRASTS]
    assert found == pytest.approx([2.0 - 1.8, 0.65 - 0.6, 2.1 - 1.8, (1.0 + 0.6) / 2])


# --- keye.rope2d


def test_answers_are_the_geometry_and_come_equally_often():
    for group, grids in GROUPS.items():
        made = pictures(0, "t", len(grids) * len(RELATIONS), grids)
        assert {p.pixels.shape[:2] for p in made} == {(h * PATCH, w * PATCH) for h, w in grids}, group
        assert np.bincount([p.relation for p in made]).tolist() == [len(grids)] * len(RELATIONS)
        for p in made:
            dx, dy = ((p.boxes[0] - p.boxes[1])[[i, i + 2]].mean() for i in (0, 1))
            if abs(abs(dx) - abs(dy)) > 4:  # drawn boxes are tight, centres may lie a px or two off
                assert relation_of(dx, dy) == p.relation
            assert all(0 <= s < len(SHAPES) for s in p.shapes)


def test_squaring_moves_boxes_with_the_pixels_and_cover_is_a_share():
    p = pictures(0, "t", 1, ((4, 12),))[0]
    q = squared(p, 7)
    assert q.pixels.shape == (98, 98, 3)
    assert np.allclose(q.boxes, p.boxes * np.array([98 / 168, 98 / 56] * 2))
    w = cover(np.array([14.0, 0.0, 35.0, 28.0]), (2, 3)).reshape(2, 3)
    assert np.allclose(w, [[0, 1 / 3, 1 / 6], [0, 1 / 3, 1 / 6]])


def test_the_arms_differ_in_rope_alone():
    """Same names, same initial weights, same order; outputs differ by the rotation, which one patch cannot show."""
    plain, rope = Reader(rope=False), Reader(rope=True)
    for model in (plain, rope):
        model.init_weights(3)
    a, b = plain.state_dict(), rope.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert replace(plain.tower.config, rope=True) == rope.tower.config
    items = items_of(pictures(0, "t", 2, ((6, 6),)), None)
    with torch.no_grad():
        assert not torch.allclose(plain(items)[0], rope(items)[0])
        pixels, grid = torch.rand(1, 588), torch.tensor([[1, 1, 1]])
        assert torch.allclose(plain.tower(pixels, grid), rope.tower(pixels, grid), atol=1e-6)


def test_a_tower_with_rope_turned_off_learns_the_same_as_one_without(monkeypatch):
    """Replace the rotation by none: the whole training is then bit-identical to the arm without it."""
    items = items_of(pictures(0, "t", 8, GROUPS["seen"]), None)
    plain, _ = rope2d.learn(PLAIN, items, MICRO, 0, lambda: None)
    rope, _ = rope2d.learn(ROPE, items, MICRO, 0, lambda: None)
    same = [torch.equal(a, b) for a, b in zip(plain.parameters(), rope.parameters(), strict=True)]
    assert not all(same)
    monkeypatch.setattr("vision.vit.rotate", lambda x, cos, sin: x)
    still, _ = rope2d.learn(ROPE, items, MICRO, 0, lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), still.parameters(), strict=True))


# --- the machinery


def micro(monkeypatch) -> claims.Claim:
    claim = replace(claims.CLAIMS["keye.rope2d"], config=MICRO, quiet=True)
    monkeypatch.setitem(claims.CLAIMS, "keye.rope2d", claim)
    return claim


def test_a_seed_is_a_pure_function_and_finished_seeds_are_kept(tmp_path, monkeypatch):
    claim = micro(monkeypatch)
    first = run(claim, 1, tmp_path / "a", workers=1)
    with open(tmp_path / "a" / "seeds.jsonl", "a") as f:
        f.write('{"seed": 1, "accur')  # killed while writing
    ran = []
    watched = replace(claim, seed=lambda c, s, f, t: ran.append(s) or claim.seed(c, s, f, t))
    rows = run(watched, 2, tmp_path / "a", workers=1)
    assert ran == [1] and rows[0] == first[0]
    assert [r["seed"] for r in read_jsonl(tmp_path / "a" / "seeds.jsonl")] == [0, 1]
    again = run(claim, 2, tmp_path / "b", workers=1)
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in rows]
    assert again[0]["accuracy"] != again[1]["accuracy"] or again[0]["loss"] != again[1]["loss"]


def test_an_interrupt_keeps_what_is_finished(tmp_path, monkeypatch):
    claim = micro(monkeypatch)

    def seed(c, number, folder, tick):
        if number == 1:
            raise KeyboardInterrupt
        return {"accuracy": {}, "squeezed": {}}

    with pytest.raises(KeyboardInterrupt):
        run(replace(claim, seed=seed), 3, tmp_path, workers=1)
    assert [r["seed"] for r in read_jsonl(tmp_path / "seeds.jsonl")] == [0]


def test_other_numbers_need_another_folder(tmp_path, monkeypatch):
    claim = replace(micro(monkeypatch), seed=lambda c, s, f, t: {})
    run(claim, 1, tmp_path, workers=1)
    with pytest.raises(UserError, match=r"config.steps: 2 -> 3"):
        run(replace(claim, config=replace(MICRO, steps=3)), 1, tmp_path, workers=1)


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    micro(monkeypatch)
    monkeypatch.setattr("stages.claims.seeds.cores", lambda: 1)
    args = argparse.Namespace(name="keye.rope2d", seeds=2, out=tmp_path)
    claims.main(args)
    said = capsys.readouterr().out
    assert "Verdict over 2 seeds" in said and "95 % interval" in said
    result = read_json(tmp_path / "result.json")
    assert result["verdict"] in ("holds", "does not hold", "undecided") and len(result["seeds"]) == 2
    assert json.loads((tmp_path / "config.json").read_text())["claim"] == "keye.rope2d"
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml") and (tmp_path / "plot.png").exists()


def test_the_list_and_an_unknown_name(capsys):
    claims.main(argparse.Namespace(name=None, seeds=5, out=None))
    said = capsys.readouterr().out
    assert "keye.rope2d" in said and "keye.merge" in said
    with pytest.raises(UserError, match=r"did you mean 'keye.merge'"):
        claims.main(argparse.Namespace(name="keye.merg", seeds=5, out=None))
    with pytest.raises(UserError, match="--seeds 0"):
        claims.main(argparse.Namespace(name="keye.merge", seeds=0, out=None))
    assert cores() >= 1


# --- keye.merge


def test_mixtures_share_families_and_sum_to_one():
    mixes = [{str(s.path): s.weight for s in merge.mixture(own, 0.8)} for own in (merge.SEES, merge.READS)]
    for mix in mixes:
        assert set(mix) == set(merge.FAMILIES) and sum(mix.values()) == pytest.approx(1.0)
    assert sum(mixes[0][f] for f in merge.SEES) == pytest.approx(0.8)


def test_merge_runs_end_to_end_and_its_models_differ(tmp_path):
    config = merge.Config(samples=4, held_out=1, base_steps=1, anneal_steps=1, tokens=512)
    claim = replace(merge.CLAIM, config=config, quiet=True)
    row = run(claim, 1, tmp_path, workers=1)[0]
    assert set(row["loss"]) == set(merge.MODELS) and all(set(v) == set(merge.FAMILIES) for v in row["loss"].values())
    assert all(np.isfinite(v) for m in row["loss"].values() for v in m.values())
    assert all(v > 1e-5 for v in row["distance"].values())
    assert not (tmp_path / "seed-0").exists()  # what a seed worked on goes when it is done
    base = sorted((tmp_path / "shared" / "base" / "model").iterdir())[0].stat().st_mtime_ns
    again = run(claim, 2, tmp_path, workers=1)
    assert again[0] == row and again[1]["loss"] != row["loss"]
    assert sorted((tmp_path / "shared" / "base" / "model").iterdir())[0].stat().st_mtime_ns == base
