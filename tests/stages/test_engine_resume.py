"""A run that is stopped, killed or damaged goes on as if nothing had been: every draw once, the same weights."""

import io
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from PIL import Image

from data_mix.shards import ShardWriter
from mm.common.files import read_jsonl
from mm.tokenizer import Tokenizer
from stages.engine.log import lineage
from tests.stages import engine_launch as launch
from tests.stages import engine_toy as toy


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def worst(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def check_draws(folder, steps, per_step=4):
    """On the surviving lineage each step drew its packs, each exactly once."""
    rows = lineage(folder)
    for step in range(1, steps + 1):
        drawn = [name for row in rows if row["step"] == step for name in row["draws"]]
        asked = [name for p in range((step - 1) * per_step, step * per_step) for name in toy.pack(p).draws]
        assert sorted(drawn) == sorted(asked), step
    assert {row["step"] for row in rows} == set(range(1, steps + 1))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run of 24 steps on one rank."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    launch.run("run", folder, steps=24, every=3)
    return folder


@pytest.mark.parametrize(("ranks", "when", "asked"), [(1, "at", "term"), (1, "at", "int"), (2, "within", "term")])
def test_asked_to_stop_it_ends_its_step_and_goes_on_bit_for_bit(tmp_path, ranks, when, asked):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch.run("run", whole, ranks=ranks, steps=9)
    out = launch.run("run", parts, ranks=ranks, steps=9, **{when: {"6": asked}})
    assert "STOPPED toy stopped at step 6 of 9" in out and "the same command goes on" in out
    assert not (parts / "model").exists()
    launch.run("run", parts, ranks=ranks, steps=9)
    assert same(launch.weights(whole), launch.weights(parts))
    assert launch.losses(whole) == launch.losses(parts)
    check_draws(parts, 9)
    assert [row["from_step"] for row in read_jsonl(parts / "attempts.jsonl")] == [0, 6]


def test_a_second_interrupt_quits_at_once(tmp_path):
    group = launch.Group("run", tmp_path, 1, {"steps": 50, "slow": 60})
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    for _ in range(2):
        os.kill(group.processes[0].pid, signal.SIGINT)
        time.sleep(0.3)
    group.processes[0].join(5)
    assert group.processes[0].exitcode == -signal.SIGINT


def killed(folder, plan, seed, steps, job="run", workers=(1,), **settings):
    """Kill a run once per entry of `plan` (its ranks), each time at a random moment; then let it end."""
    rng = random.Random(seed)
    for turn, ranks in enumerate(plan):
        given = {"steps": steps, "every": 3, **settings}
        if job == "real":
            given = {"steps": steps, "workers": workers[turn % len(workers)], **settings}
        attempts = len(read_jsonl(folder / "attempts.jsonl")) if (folder / "attempts.jsonl").exists() else 0
        last = turn == len(plan) - 1
        group = launch.Group(job, folder, ranks, given if last else {**given, "slow": 0.1})
        if last:
            group.wait()
            break
        while group.processes[0].is_alive():  # the moment is random from the start of its first step on
            if (folder / "attempts.jsonl").exists() and len(read_jsonl(folder / "attempts.jsonl")) > attempts:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.0))
        group.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A source folder of 90 conversations, two of three about a picture, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("source")
    words = ["red", "green", "blue", "square", "ball", "moves", "left", "right", "红色", "方块"]
    Tokenizer.train([" ".join(words)] * 5, 400).save(folder / "tokenizer")
    rng = random.Random(0)
    with ShardWriter(folder / "toy", "toy", max_samples=25) as writer:
        for i in range(90):
            text = " ".join(rng.choices(words, k=rng.randint(3, 12)))
            question: list[dict] = [{"type": "text", "text": "what is it"}]
            media = {}
            if i % 3:
                picture = io.BytesIO()
                size = (rng.randint(28, 90), rng.randint(28, 90))
                Image.new("RGB", size, (i, 100, 200)).save(picture, "JPEG")
                media = {"0.jpg": picture.getvalue()}
                question.insert(0, {"type": "image", "image": "0.jpg"})
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            writer.write(f"s{i:03d}", {"messages": messages, "family": "vqa"}, media)
    return folder / "toy"


def drawn(folder):
    steps = {}
    for row in lineage(folder):
        steps.setdefault(row["step"], []).extend(row["draws"])
    return {step: sorted(names) for step, names in steps.items()}


def test_killed_while_ranks_and_workers_change_with_the_real_loader(tmp_path, source):
    """Every draw of the uninterrupted run at its step, exactly once, through kills, ranks and workers."""
    steps = 12
    launch.run("real", tmp_path / "straight", source=str(source), steps=steps, workers=0)
    killed(tmp_path / "run", [1, 2, 4, 1], 5, steps, job="real", workers=(1, 0, 1, 2), source=str(source))
    straight = drawn(tmp_path / "straight")
    assert drawn(tmp_path / "run") == straight and set(straight) == set(range(1, steps + 1))
    names = [name for step in straight.values() for name in step]
    assert len(names) == len(set(names)) > 80  # a name holds the epoch: none came twice
    assert worst(launch.weights(tmp_path / "run"), launch.weights(tmp_path / "straight")) < 1e-4


def test_killed_three_times_while_ranks_change(tmp_path, straight):
    killed(tmp_path / "run", [1, 2, 4, 1], seed=1, steps=24)
    check_draws(tmp_path / "run", 24)
    assert launch.losses(tmp_path / "run") == pytest.approx(launch.losses(straight), abs=1e-5)
    assert worst(launch.weights(tmp_path / "run"), launch.weights(straight)) < 1e-4


def test_killed_on_one_rank_the_weights_are_bit_identical(tmp_path, straight):
    killed(tmp_path / "run", [1, 1, 1, 1], seed=2, steps=24)
    check_draws(tmp_path / "run", 24)
    assert same(launch.weights(tmp_path / "run"), launch.weights(straight))


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    steps = 80
    launch.run("run", tmp_path / "straight", steps=steps)
    killed(tmp_path / "changing", [1, 2, 4, 1, 2, 4, 1, 2, 4, 1, 1], seed=3, steps=steps)
    check_draws(tmp_path / "changing", steps)
    assert worst(launch.weights(tmp_path / "changing"), launch.weights(tmp_path / "straight")) < 1e-3
    killed(tmp_path / "same", [1] * 11, seed=4, steps=steps)
    check_draws(tmp_path / "same", steps)
    assert same(launch.weights(tmp_path / "same"), launch.weights(tmp_path / "straight"))


def test_only_the_newest_stay_and_frozen_weights_are_written_once(tmp_path):
    settings = {"steps": 10, "every": 2, "train": {"*": 1.0, "visual.*": 0.0}, "at": {"7": "term"}}
    launch.run("run", tmp_path, **settings)
    before = (tmp_path / "checkpoints" / "frozen" / "__0_0.distcp").stat().st_mtime_ns
    launch.run("run", tmp_path, **{**settings, "at": {}})
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["frozen", "step-10", "step-8"]
    assert (tmp_path / "checkpoints" / "frozen" / "__0_0.distcp").stat().st_mtime_ns == before
    from torch.distributed.checkpoint import FileSystemReader

    trained = FileSystemReader(tmp_path / "checkpoints" / "step-10").read_metadata().state_dict_metadata
    frozen = FileSystemReader(tmp_path / "checkpoints" / "frozen").read_metadata().state_dict_metadata
    assert not any("visual." in key for key in trained) and any("lm_head" in key for key in trained)
    assert all(key.startswith("model.visual.") for key in frozen)
    assert torch.equal(  # what was frozen went through save, kill and hand-on unchanged
        launch.weights(tmp_path)["visual.vision_model.post_layernorm.weight"],
        toy.keye().visual.vision_model.post_layernorm.weight,
    )


def damage(path, how):
    file = next(path.glob("*.distcp"))
    if how == "short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "gone":
        file.unlink()
    elif how == "garbled":
        (path / ".metadata").write_bytes(b"x" * (path / ".metadata").stat().st_size)
    else:
        (path / "COMPLETE.json").write_text("{")


@pytest.mark.parametrize("how", ["short", "gone", "garbled", "json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, how):
    launch.run("run", tmp_path / "whole", steps=9)
    launch.run("run", tmp_path / "run", steps=9, every=2, at={"7": "term"})
    damage(tmp_path / "run" / "checkpoints" / "step-7", how)
    out = launch.run("run", tmp_path / "run", steps=9, every=2)
    assert "step-7 cannot be read" in out and "going on from step 6" in out
    assert (tmp_path / "run" / "checkpoints" / "step-7.bad").exists()
    assert same(launch.weights(tmp_path / "whole"), launch.weights(tmp_path / "run"))
    check_draws(tmp_path / "run", 9)


def test_no_readable_checkpoint_stops_the_run(tmp_path):
    launch.run("run", tmp_path, steps=9, at={"6": "term"}, ranks=2)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        damage(path, "short")
    out = launch.run("run", tmp_path, steps=9, ranks=2)
    assert "USER ERROR none of the checkpoints" in out and not (tmp_path / "model").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, ranks):
    """The system refuses to let files grow while step 4 is saved: the run says so and goes on."""
    out = launch.run("run", tmp_path, ranks=ranks, steps=8, every=2, at={"4": "full", "6": "room"})
    assert "step-4 could not be written" in out and "untouched: step-2" in out
    assert (tmp_path / "model" / "weights.pt").exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-6", "step-8"]


def test_a_disk_that_stays_full_stops_the_run_with_what_to_do(tmp_path):
    out = launch.run("run", tmp_path, steps=6, every=2, at={"4": "full"})
    assert "USER ERROR checkpoint" in out and "Free some space" in out
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    out = launch.run("run", tmp_path, steps=6, every=2)
    assert "going on from step 2" in out
    check_draws(tmp_path, 6)


def test_a_changed_stage_or_changed_data_are_refused(tmp_path):
    launch.run("run", tmp_path, steps=6, at={"3": "term"})
    out = launch.run("run", tmp_path, steps=6, lr=1e-3)
    assert "other settings (optim.lr: 0.01 -> 0.001)" in out
    out = launch.run("run", tmp_path, steps=6, fingerprint="other")
    assert "USER ERROR the data have changed" in out
    launch.run("run", tmp_path, steps=6, every=1)  # how often it saves may change
    assert (tmp_path / "model").exists()


def test_damaged_frozen_weights_are_named_and_can_be_made_again(tmp_path):
    settings = {"steps": 6, "train": {"*": 1.0, "visual.*": 0.0}}
    launch.run("run", tmp_path, **settings, at={"4": "term"})
    damage(tmp_path / "checkpoints" / "frozen", "short")
    out = launch.run("run", tmp_path, **settings)
    assert "USER ERROR the frozen weights in" in out and "remove that folder" in out
    shutil.rmtree(tmp_path / "checkpoints" / "frozen")
    out = launch.run("run", tmp_path, **settings)
    assert "going on from step 4" in out and (tmp_path / "checkpoints" / "frozen" / "COMPLETE.json").exists()


def test_killed_before_it_handed_on_it_hands_on(tmp_path):
    launch.run("run", tmp_path, steps=4, ranks=2)
    before = launch.weights(tmp_path)
    shutil.rmtree(tmp_path / "model")
    launch.run("run", tmp_path, steps=4)
    assert same(before, launch.weights(tmp_path))


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    launch.run("run", tmp_path, steps=6, at={"3": "term"})
    for name in ("draws-rank0.jsonl", "log.jsonl", "attempts.jsonl"):
        with open(tmp_path / name, "a") as f:
            f.write('{"step": 4, "att')
    launch.run("run", tmp_path, steps=6)
    check_draws(tmp_path, 6)
    assert all(json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines())
