"""Every benchmark runs at a micro setting and writes its figures; how good they are is for docs/benchmarks.md."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from data_mix.world import kc
from mm import formats
from mm.common.errors import UserError
from mm.common.files import read_json
from mm.keye import Keye
from mm.sizes import PROCESSORS, SIZES
from mm.tokenizer import Tokenizer
from mm.told import Told, spelt
from stages.keye import s0_vit
from vision.text_tower import ContrastiveModel, TextTower
from vision.vit import VisionTower

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import blame
import data_wait
import decode
import gpu_step
import harness
import optimizer
import packing
import projector
import tower
import train_speed


def figures(benchmark, tmp_path, *options):
    """What `benchmark` returns, which must be what it wrote."""
    path = tmp_path / "out" / "figures.json"
    returned = benchmark.main([*map(str, options), "--threads", "1", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(returned))
    assert written["machine"].keys() >= {"date", "cpu", "cores", "threads", "torch", "load_before", "load_after"}
    return written


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(harness, "VOCABULARY", 700)  # the tokenizer's training is half of a micro run


def test_packs_are_full(micro_world, tmp_path, small_vocabulary):
    got = figures(packing, tmp_path, "--world", micro_world, "--tokens", 1024, "--packs", 10, "--seeds", 1)
    assert len(got["cases"]) == 4
    for case in got["cases"].values():
        assert case["padded"]["median"] < case["ours"]["median"] <= 1
        assert case["in_order"]["median"] < case["ours"]["median"]


def test_waiting_is_measured_in_real_steps(micro_world, tmp_path, small_vocabulary):
    got = figures(data_wait, tmp_path, "--world", micro_world, "--stage", "keye.s1_align", "--workers", 0,
                  "--steps", 1, "--warmup", 0, "--rounds", 1)  # fmt: skip
    cases = got["cases"]
    assert cases["warm cache"]["cache_hits"]["median"] == 1
    assert cases["no cache"]["cache_hits"]["median"] == 0
    assert all(0 <= c["wait_share"]["median"] <= 1 and c["bad"]["max"] == 0 for c in cases.values())
    assert cases["held in memory"]["wait_share"]["median"] == 0


def test_decoders_return_the_same_frames(micro_world, tmp_path):
    got = figures(decode, tmp_path, "--videos", micro_world / "clips" / "train", "--clips", 2, "--rounds", 1)
    assert got["agreement"]["ours"] == got["agreement"]["PyAV"] == 1
    assert all(min(speeds) > 0 for kind in got["speeds"].values() for speeds in kind.values())


def test_peers_train_the_same_model_on_the_same_text(tmp_path):
    importlib.import_module("transformers")
    got = figures(train_speed, tmp_path, "--tokens", 128, "--steps", 1, "--warmup", 1, "--rounds", 1)
    assert set(got["facts"]["loss_differences"]) == {"padded", "padding-free", "+ our attention"}
    assert max(got["facts"]["loss_differences"].values()) < 1e-5
    assert all(min(speeds) > 0 for kind in got["speeds"].values() for speeds in kind.values())


@pytest.mark.parametrize("stage", ["keye.text", "keye.s0_vit"])
def test_optimizers_are_compared(stage, micro_world, tmp_path, small_vocabulary):
    got = figures(optimizer, tmp_path, "--world", micro_world, "--stage", stage, "--steps", 1, "--seeds", 1,
                  "--lrs", "1e-3", "--shares", "1", "--eval-packs", 1)  # fmt: skip
    assert got["adamw_lr"] == 1e-3 and len(got["muon"]["1.0"]) == 1 and 0 < got["adamw"][0] < 100


@pytest.fixture(scope="module")
def untaught(micro_world, tmp_path_factory):
    """A run whose decoder and tower know nothing, and that has made no world yet."""
    made = tmp_path_factory.mktemp("untaught") / "run"
    texts = [line for p in sorted((micro_world / "text").glob("*.jsonl")) for line in p.read_text().splitlines()]
    tokenizer = Tokenizer.train(texts, 512)
    towers = s0_vit.stage("tiny").model
    keye = Keye(SIZES["tiny"].bound(tokenizer))
    models = {"told_tasks": keye, "s0_vit": ContrastiveModel(VisionTower(towers.vision), TextTower(towers.text))}
    for name, model in models.items():
        model.init_weights(0)
        formats.save(made / name / "model", model, PROCESSORS["tiny"], tokenizer)
    for main in (projector.main, blame.main):
        with pytest.raises(UserError, match="has not made 'world'"):
            main(["--run", str(made)])
    (made / "world").mkdir()
    (made / "world" / "world").symlink_to(micro_world)
    return made


def test_projectors_are_taught_and_asked_alike(untaught, tmp_path, monkeypatch):
    """Of all that they are asked, one thing."""
    monkeypatch.setattr(projector, "TASKS", ("ocr",))
    arms = projector.ARMS[1:]  # the first is s1_align as it is
    got = figures(projector, tmp_path, "--run", untaught, "--steps", 1, "--seeds", 1, "--limit", 1, "--arms", *arms)
    assert [r["arm"] for r in got["runs"]] == list(arms)
    assert all(r["n"] == {"ocr/seen": 1, "ocr/unseen": 1} for r in got["runs"])
    assert all(0 <= v <= 1 for r in got["runs"] for v in r["values"].values())


def test_who_is_to_blame_is_asked_of_what_is_told_whole(untaught, tmp_path, monkeypatch):
    monkeypatch.setattr(blame, "TASKS", ("caption_shape", "SPU"))
    got = figures(blame, tmp_path, "--run", untaught, "--limit", 1)
    assert [(r["model"], r["shown"]) for r in got["runs"]] == [("told_tasks", "told")]
    assert all({v["n"] for v in r["values"].values()} == {1} for r in got["runs"])
    with pytest.raises(UserError, match="no model of s2_multitask"):
        blame.main(["--run", str(untaught), "--models", "s2_multitask"])
    listener, root = blame.Listener(untaught / "told_tasks" / "model"), untaught / "world" / "world"
    path = sorted((root / "clips" / "test").glob("*.mp4"))[0]
    frames, plan = listener.media.load(root, {"type": "video", "video": str(path.relative_to(root))})
    truth = json.loads(path.with_suffix(".json").read_text())
    spelt_at = spelt(torch.from_numpy(listener.processor.patchify(frames)), listener.processor.patch_size)
    assert len(frames) == len(plan.times) and listener.model.visual_features.__func__ is Told.visual_features
    said = {i for i in spelt_at.unique().tolist() if i >= 0}
    for thing in truth["things"]:
        for word in (thing["colour"], thing["material"], thing["shape"]):
            assert set(listener.tokenizer.encode(f" {word}")) - set(listener.tokenizer.encode(" ")) <= said
    seed, checked = read_json(root / "world.json")["seed"], 0
    with open(root / "kc" / "subsets" / "SPU.tsv", encoding="utf-8", newline="") as f:
        rows = [r for r in csv.DictReader(f, delimiter="\t") if not r["category"].startswith("train")]
    for row in rows:  # the truths told are those of the pictures drawn
        paths = [root / "kc" / "images" / p for p in json.loads(row["image_path"])]
        split, number, _ = paths[0].stem.split("-")
        assert kc.kc_row(seed, "SPU", split, int(number))["question"] == row["question"]
        first, second = (blame.truth_of(p)["things"][0] for p in paths)
        same = all(first[k] == second[k] for k in ("colour", "shape", "material"))
        assert row["answer"] in (("yes", "是") if same else ("no", "否"))
        checked += 1
    assert checked == 2 * read_json(root / "world.json")["plan"]["kc_rows"]


def test_towers_are_taught_and_asked_alike(micro_world, tmp_path, small_vocabulary):
    got = figures(tower, tmp_path, "--world", micro_world, "--steps", 1, "--seeds", 2, "--lrs", "1e-3,2e-3",
                  "--arms", "keye.words")  # fmt: skip
    assert [r["seed"] for r in got["runs"]] == [0, 0, 1] and {r["n"] for r in got["runs"]} != {0}
    assert all(0 <= r[key] <= 1 for r in got["runs"] for key in (*tower.ASKED, *tower.TOLD))
    assert sum(r["best"] for r in got["runs"]) == 2


def test_every_way_to_teach_a_tower_runs_and_is_another(micro_world, tmp_path, small_vocabulary):
    got = figures(tower, tmp_path, "--world", micro_world, "--steps", 1, "--seeds", 1, "--lrs", "1e-3")
    assert [r["arm"] for r in got["runs"]] == list(tower.ARMS) and len(tower.ARMS) == 8
    assert all(0 <= r[key] <= 1 for r in got["runs"] for key in (*tower.ASKED, *tower.TOLD))
    place = {r["arm"]: r["place"] for r in got["runs"]}
    assert place["keye.words"] != place["keye.words, no places"]


def test_the_gpu_benchmark_says_that_there_is_no_gpu():
    assert gpu_step.parity(torch.device("cpu"))["sdpa"]["out"] < 0.05
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA GPU"):
            gpu_step.main([])


def test_a_missing_world_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="mm data make-world"):
        packing.main(["--world", str(tmp_path)])
