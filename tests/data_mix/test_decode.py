"""The decode pool: nothing hangs, nothing is left behind, and frames are cached whole or not at all."""

import functools
import hashlib
import time

import numpy as np
import pytest

from data_mix.decode import Apart, DecodePool, Job, decode_file
from data_mix.frame_cache import FrameCache
from data_mix.shards import Location
from mm.common.errors import BadSample, UserError
from tests.data_mix.made import BREAKS, CRASHES, FAILS, HANGS, TrickyProcessor, clip, picture


@pytest.fixture
def tricky(processor):
    return TrickyProcessor(image_max_tokens=processor.image_max_tokens, video_max_frames=8, frame_min_tokens=4,
                           frame_max_tokens=16, video_max_tokens=128)  # fmt: skip


@pytest.fixture
def job(tmp_path, tricky):
    def make(data, kind="image", shape=None):
        frames = None if shape else (tricky.load_video(data)[0] if kind == "video" else None)
        if shape is None:
            shape = frames.shape[:3] if frames is not None else (1, 56, 56)
        sha1 = hashlib.sha1(data).hexdigest()
        path = tmp_path / sha1
        path.write_bytes(b"before" + data)
        return Job(Location(str(path), 6, len(data), sha1), kind, tuple(shape))

    return make


def fine(seed=0):
    return picture(seed, (56, 56))


def test_a_hang_and_a_crash_cost_one_sample_each(tricky, job, left_over):
    jobs = [fine(1), picture(0, HANGS), fine(2), picture(0, CRASHES), picture(0, FAILS), picture(0, BREAKS), fine(3)]
    with DecodePool(tricky, workers=1, deadline=1.5) as pool:
        futures = [pool.submit(job(data)) for data in jobs]
        reasons = [e.reason if (e := f.exception(timeout=100)) else "" for f in futures]
    assert reasons == ["", "decoding took longer than 1.5 s", "", "the decoder crashed", "damaged image",
                       "decoder error: ZeroDivisionError", ""]  # fmt: skip
    assert np.array_equal(futures[6].result(), tricky.load_image(fine(3)))
    assert not left_over()


def test_calls_apart(tricky, tmp_path, left_over):
    """What evaluation and chat open: a hang, a crash and a file that is no picture are a BadSample each; nothing is
    left afterwards."""
    files = {
        "hangs": picture(0, HANGS), "fine": fine(1), "crashes": picture(0, CRASHES), "breaks": picture(0, BREAKS),
        "text": b"no picture", "clip": clip(),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    decode, reasons = Apart(functools.partial(decode_file, tricky), deadline=1.5), {}
    frames, plan = decode(str(tmp_path / "clip"), "video")
    want, same = tricky.load_video(files["clip"])
    assert np.array_equal(frames, want) and np.array_equal(plan.times, same.times)
    for name in ("hangs", "crashes", "breaks", "text"):
        with pytest.raises(BadSample) as e:
            decode(str(tmp_path / name), "image")
        reasons[name] = e.value.reason
    assert reasons["hangs"] == "decoding took longer than 1.5 s" and reasons["crashes"] == "the decoder crashed"
    assert reasons["breaks"] == "decoder error: ZeroDivisionError" and "image" in reasons["text"]
    assert np.array_equal(decode(str(tmp_path / "fine"), "image")[0], tricky.load_image(files["fine"]))
    decode.close()
    assert not left_over()


def test_close_ends_a_hanging_worker_at_once(tricky, job, left_over):
    pool = DecodePool(tricky, workers=1, deadline=1000)
    pool.submit(job(fine())).result(timeout=100)
    hanging, waiting = pool.submit(job(picture(0, HANGS))), pool.submit(job(fine(2)))
    time.sleep(0.3)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5 and not left_over()
    assert hanging.exception(timeout=1) and waiting.cancelled()
    assert pool.submit(job(fine(3))).cancelled()


def test_cache_is_filled_by_workers_and_read_by_the_parent(tricky, job, tmp_path):
    video = job(clip(1), "video")
    with DecodePool(tricky, workers=1, cache=FrameCache(tmp_path / "cache")) as pool:
        first = pool.submit(video).result(timeout=100)
        assert not first.flags.writeable and (pool.hits, pool.misses) == (0, 1)
        assert np.array_equal(pool.submit(video).result(), first) and pool.hits == 1
    assert np.array_equal(first, tricky.load_video(clip(1))[0])
    with DecodePool(tricky, workers=0, cache=FrameCache(tmp_path / "cache")) as pool:
        pool.submit(video).result()
        pool.submit(job(fine(9))).result()
        assert (pool.hits, pool.misses) == (1, 1)


def test_what_is_not_as_planned_is_bad(tricky, job):
    with DecodePool(tricky, workers=0) as pool:
        assert "differ" in pool.submit(job(fine(), shape=(1, 28, 28))).exception().reason
        changed = job(fine())
        with open(changed.location.path, "r+b") as f:
            f.seek(40)
            f.write(b"????")
        assert "changed" in pool.submit(changed).exception().reason
        short = Job(changed.location._replace(offset=50), "image", (1, 56, 56))
        assert pool.submit(short).exception().reason == "the shard ends early"
        gone = Job(changed.location._replace(path="/nowhere"), "image", (1, 56, 56))
        assert "cannot read" in pool.submit(gone).exception().reason


def test_a_worker_that_cannot_start_says_why(tricky, job, monkeypatch):
    monkeypatch.setattr("data_mix.decode.sys.executable", "/bin/false")
    with DecodePool(tricky, workers=1) as pool, pytest.raises(UserError, match="did not start"):
        pool.submit(job(fine())).result(timeout=60)


# ---- the cache


def frames(i, n=1):
    return np.full((n, 28, 28, 3), i, np.uint8)


def test_cache_round_trip_and_damage(tmp_path):
    cache = FrameCache(tmp_path)
    assert cache.get("ab12", "p") is None
    assert cache.put("ab12", "p", frames(7)) and np.array_equal(cache.get("ab12", "p"), frames(7))
    assert cache.get("ab12", "q") is None
    for damage in (b"", b"garbage", cache.path("ab12", "p").read_bytes()[:-5]):
        cache.path("ab12", "p").write_bytes(damage)
        assert cache.get("ab12", "p") is None and not cache.path("ab12", "p").exists()


def test_the_oldest_frames_go_first(tmp_path):
    cache = FrameCache(tmp_path, max_bytes=100_000)  # about 40 of them
    for i in range(100):
        cache.put(f"{i:04d}", "p", frames(i))
    size = sum(p.stat().st_size for p in tmp_path.glob("*/*"))
    assert 60_000 < size <= 110_000
    assert cache.get("0099", "p") is not None and cache.get("0000", "p") is None


def test_a_full_disk_stops_caching_and_says_so_once(tmp_path, tricky, job, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_mix.frame_cache.np.save", full)
    with DecodePool(tricky, workers=0, cache=FrameCache(tmp_path / "cache")) as pool:
        for i in range(3):
            assert pool.submit(job(fine(i))).result().shape == (1, 56, 56, 3)
    assert capsys.readouterr().err.count("the disk is full") == 1
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_worker_without_a_place_to_cache_sends_its_frames(tricky, job, capsys):
    with DecodePool(tricky, workers=1, cache=FrameCache("/proc/nowhere")) as pool:
        got = [pool.submit(job(fine(i))).result(timeout=100) for i in range(2)]
    assert np.array_equal(got[1], tricky.load_image(fine(1)))
    assert capsys.readouterr().err.count("going on without caching") == 1


def test_bad_samples_keep_their_reason_through_a_pipe():
    import pickle

    again = pickle.loads(pickle.dumps(BadSample("x", shard="s", key="k")))
    assert (again.reason, again.shard, again.key) == ("x", "s", "k")
