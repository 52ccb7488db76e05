"""The loader: every draw exactly once on any ranks and workers, holes that shift nothing, no hangs."""

import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.shards import ShardWriter, Source
from mm.common.errors import UserError
from mm.prompt import prepare
from tests.data_mix.made import CRASHES, FAILS, HANGS, TrickyProcessor, picture, planned_source, turn

ROOT = Path(__file__).resolve().parents[2]


def make_plan(folder, processor, tokenizer, *, tokens=400, visual=200, seed=1, **kwargs):
    return PackPlan(Mix([SourceSpec(folder)], seed), processor, tokenizer, tokens, visual, seed, **kwargs)


def take(loader, n):
    return list(itertools.islice(loader, n))


def test_batches_are_those_of_the_prompt_in_pack_order(real_source, processor, tokenizer, tmp_path):
    plan, source = make_plan(real_source, processor, tokenizer), Source(real_source)

    def load_of(i):
        def load(part):
            data = source.member(i, part[part["type"]])
            return processor.load_video(data) if part["type"] == "video" else (processor.load_image(data), None)

        return load

    with Loader(plan, packs_per_step=2, workers=0, cache_dir=tmp_path) as loader:
        steps = take(loader, 6)
    for p, batch in enumerate(b for step in steps for b in step):
        examples = [
            prepare(source.sample(d.sample)["messages"], processor, tokenizer, load_of(d.sample))
            for d in plan.pack(p)
        ]
        for name in ("input_ids", "loss_mask", "pixel_values", "grid_thw"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(e, name) for e in examples]))
        assert torch.equal(batch.position_ids, torch.cat([e.position_ids for e in examples], 1))
        assert batch.cu_seqlens.diff().tolist() == [len(e) for e in examples]
        assert batch.draws == [plan.mix.name(d) for d in plan.pack(p)]
        assert len(batch.input_ids) <= plan.token_budget


def test_workers_ranks_and_a_warm_cache_change_nothing(real_source, processor, tokenizer, tmp_path):
    plan = make_plan(real_source, processor, tokenizer)
    with Loader(plan, packs_per_step=2, workers=0) as loader:
        wanted = [b for step in take(loader, 4) for b in step]
    with Loader(plan, packs_per_step=2, workers=2, cache_dir=tmp_path) as loader:
        cold = [b for step in take(loader, 4) for b in step]
        assert loader.stats.cache_misses > 0
    ranks = []
    for rank in range(2):
        with Loader(plan, packs_per_step=2, rank=rank, ranks=2, workers=0, cache_dir=tmp_path) as loader:
            ranks.append([step[0] for step in take(loader, 4)])
            assert loader.stats.cache_misses == 0 or loader._pool.misses > 0
    warm = [b for pair in zip(*ranks, strict=True) for b in pair]
    for a, b, c in zip(wanted, cold, warm, strict=True):
        for name in ("input_ids", "pixel_values", "grid_thw", "position_ids", "cu_seqlens"):
            assert torch.equal(getattr(a, name), getattr(b, name))
            assert torch.equal(getattr(a, name), getattr(c, name))


@pytest.fixture(scope="module")
def text_plan(tmp_path_factory, processor, tokenizer):
    folder = tmp_path_factory.mktemp("text") / "text"
    planned_source(folder, np.random.default_rng(0).integers(1, 60, 333), images=(0,))
    return lambda: make_plan(folder, processor, tokenizer, tokens=512)


def test_draws_of_a_resumed_lineage_are_those_of_an_uninterrupted_run(text_plan):
    with Loader(text_plan(), packs_per_step=4, workers=0) as loader:
        wanted = Counter(d for step in take(loader, 40) for b in step for d in b.draws)
    got, state = Counter(), None
    for ranks, steps, workers in ((1, 7, 0), (2, 9, 1), (4, 13, 0), (1, 11, 0)):
        states = []
        for rank in range(ranks):
            with Loader(text_plan(), packs_per_step=4, rank=rank, ranks=ranks, workers=workers) as loader:
                if state:
                    loader.load(state)
                for step in take(loader, steps):
                    assert len(step) == 4 // ranks
                    got.update(d for b in step for d in b.draws)
                states.append(loader.state())
        assert all(s == states[0] for s in states)
        state = states[0]
    assert got == wanted and max(wanted.values()) == 1


def test_state_is_of_what_was_handed_out_and_can_be_loaded_back(text_plan):
    with Loader(text_plan(), packs_per_step=2, workers=0, prefetch=4) as loader:
        take(loader, 5)
        state = loader.state()
        after = [b.draws for step in take(loader, 3) for b in step]
        loader.load(state)
        assert [b.draws for step in take(loader, 3) for b in step] == after
    assert state["position"] == 10


def test_another_plan_is_refused(text_plan):
    loader = Loader(text_plan(), packs_per_step=2, workers=0)
    with pytest.raises(UserError, match=loader.plan.fingerprint), loader:
        loader.load({"position": 0, "fingerprint": "f" * 16, "anchor": [0, 0]})


def test_packs_per_step_must_divide(text_plan):
    with pytest.raises(UserError, match="use 8"):
        Loader(text_plan(), packs_per_step=6, ranks=4)


# ---- what goes wrong


def faulty_source(folder, sizes):
    """30 pictures, some of sizes that make trouble."""
    with ShardWriter(folder, "faulty") as w:
        for i in range(30):
            media = {"png": picture(i, sizes.get(i, (56, 56)))}
            w.write(f"k{i:02d}", {"messages": turn(f"number {i}", "png")}, media)
    return folder


def faulty_plan(folder, tokenizer, **kwargs):
    return make_plan(folder, TrickyProcessor(image_max_tokens=25), tokenizer, tokens=200, visual=100, **kwargs)


def test_a_bad_sample_leaves_a_hole_and_shifts_nothing(tmp_path, tokenizer):
    plan = faulty_plan(faulty_source(tmp_path / "s", {7: FAILS, 13: CRASHES}), tokenizer)
    first = {s: min(i for i in range(60) for d in plan.pack(i) if d.sample == s) for s in (7, 13)}
    with Loader(plan, packs_per_step=max(first.values()) + 1, workers=1) as loader:
        batches = take(loader, 1)[0]
        stats = loader.stats
    assert set(stats.bad) == {"damaged image", "the decoder crashed"}
    assert stats.examples["damaged image"][0].startswith("faulty/shard-00000.tar/k07#")
    for p, batch in enumerate(batches):
        sizes = [plan.size(d)[0] for d in plan.pack(p)]
        assert batch.cu_seqlens.diff().tolist() == sizes and len(batch.grid_thw) == len(sizes)
        patches = batch.pixel_values.split((batch.grid_thw.prod(1)).tolist())
        for k, draw in enumerate(plan.pack(p)):
            bad = draw.sample in (7, 13)
            mask = batch.loss_mask[batch.cu_seqlens[k] : batch.cu_seqlens[k + 1]]
            assert bool(mask.any()) != bad and bool((patches[k] == 128).all()) == bad


def test_bad_pairs_are_left_out(tmp_path, tokenizer):
    folder = faulty_source(tmp_path / "s", {7: FAILS, 21: FAILS})
    plan = faulty_plan(folder, tokenizer, kind="pairs", max_text=8)
    with Loader(plan, packs_per_step=8, workers=0) as loader:
        batches = take(loader, 1)[0]
        bad = sum(loader.stats.bad.values())
    assert bad > 0
    rows = [plan.pack(p) for p in range(8)]
    assert sum(len(b.draws) for b in batches) == sum(map(len, rows)) - bad
    for batch in batches:
        assert len(batch.grid_thw) == len(batch.draws) == len(batch.cu_seqlens) - 1
        assert batch.pixel_values.shape == (int(batch.grid_thw.prod(1).sum()), 588)
        first = batch.input_ids[: batch.cu_seqlens[1]].tolist()
        number = int(batch.draws[0].split("/k")[1][:2])
        assert first == [*tokenizer.encode(f"number {number}")[:7], tokenizer.id("<|im_end|>")]


def test_too_many_bad_samples_stop_the_run_with_reasons(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "s", "s") as w:
        for i in range(60):
            w.write(f"k{i}", {"messages": turn("x", "png")}, {"png": picture(i, FAILS)})
    loader = Loader(faulty_plan(tmp_path / "s", tokenizer), packs_per_step=4, workers=0)
    with pytest.raises(UserError, match=r"of the last \d\d samples") as e, loader:
        take(loader, 40)
    assert "damaged image" in str(e.value) and "s/shard-00000.tar/k" in str(e.value)


def test_an_error_in_the_thread_reaches_the_consumer(text_plan):
    loader = Loader(text_plan(), packs_per_step=2, workers=0)
    loader._assembler.finish = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError), loader:
        next(loader)
    with pytest.raises(UserError, match="closed"):
        next(loader)


def test_close_is_quick_even_when_a_decoder_hangs(tmp_path, tokenizer, left_over):
    with ShardWriter(tmp_path / "s", "s") as w:
        w.write("k", {"messages": turn("x", "png")}, {"png": picture(0, HANGS)})
    loader = Loader(faulty_plan(tmp_path / "s", tokenizer), packs_per_step=1, workers=1, deadline=1000)
    loader._start_thread()
    thread = loader._thread
    time.sleep(0.5)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5 and not thread.is_alive() and not left_over()


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from mm.tokenizer import Tokenizer
from tests.data_mix.made import TrickyProcessor
processor = TrickyProcessor(image_max_tokens=25)
plan = PackPlan(Mix([SourceSpec(sys.argv[1])]), processor, Tokenizer.train(["a"], 300), 999, 9)
loader = Loader(plan, packs_per_step=2, workers=1, deadline=1000)
for step in loader:
    print("step", flush=True)
"""  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_leaves_no_worker(tmp_path, how):
    """Not closed at all, and its worker hangs in a picture: both must go, Ctrl-C with a KeyboardInterrupt."""
    with ShardWriter(tmp_path / "s", "s") as w:
        for i in range(200):
            size = HANGS if i % 40 == 39 else (56, 56)
            w.write(f"k{i}", {"messages": turn("x", "png")}, {"png": picture(0, size)})
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "s")], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "no step in a minute: has one of the first packs a picture that hangs?"
        assert process.stdout.readline() == b"step\n"
        workers = psutil.Process(process.pid).children()
        process.send_signal(how)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert workers and (how == signal.SIGKILL or b"KeyboardInterrupt" in said)
    assert not psutil.wait_procs(workers, timeout=10)[1]
