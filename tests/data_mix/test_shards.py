"""Sources: WebDataset itself reads them, bytes are exact, and what has changed is refused."""

import importlib
import json
import os

import pytest

from data_mix.shards import ShardWriter, Source, read_at
from mm.common.errors import BadSample, UserError

FACTS = {"kind": "image", "width": 4, "height": 4}


def sample(text="hello", suffix=None):
    parts = [{"type": "text", "text": "what?"}]
    if suffix:
        parts.insert(0, {"type": "image", "image": suffix})
    out = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": text}]}
    return {**out, "media": {suffix: FACTS} if suffix else {}, "family": "vqa"}


def make(folder, n=7, **kwargs):
    with ShardWriter(folder, "demo", **kwargs) as w:
        for i in range(n):
            w.write(f"k{i:03d}", sample(f"答 {i}", "0.jpg"), {"0.jpg": bytes([i]) * (100 + i)})
    return folder


def test_round_trip_and_random_access(tmp_path):
    source = Source(make(tmp_path / "s", max_samples=3))
    assert len(source) == 7 and [s["samples"] for s in source.shards] == [3, 3, 1]
    assert source.keys == [f"k{i:03d}" for i in range(7)]
    for i in (6, 0, 3):
        assert source.member(i, "0.jpg") == bytes([i]) * (100 + i)
        assert read_at(source.locate(i, "0.jpg")) == source.member(i, "0.jpg")
        assert source.sample(i)["messages"][1]["content"] == f"答 {i}"
        assert json.loads(source.member(i, "json")) == source.sample(i)


def test_webdataset_reads_it(tmp_path):
    wds = importlib.import_module("webdataset")
    make(tmp_path / "s", max_samples=4)
    urls = [str(p) for p in sorted((tmp_path / "s").glob("*.tar"))]
    rows = list(wds.WebDataset(urls, shardshuffle=False))
    assert [r["__key__"] for r in rows] == [f"k{i:03d}" for i in range(7)]
    assert rows[5]["0.jpg"] == bytes([5]) * 105
    assert json.loads(rows[5]["json"])["family"] == "vqa"


def test_same_input_same_bytes(tmp_path):
    a, b = Source(make(tmp_path / "a")), Source(make(tmp_path / "b"))
    assert a.fingerprint == b.fingerprint
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (tmp_path / "b/shard-00000.tar").read_bytes()


@pytest.mark.parametrize("how", ["size", "content", "index", "missing", "source"])
def test_a_changed_shard_is_refused_with_its_fingerprint(tmp_path, how):
    folder = make(tmp_path / "s")
    tar, fingerprint = folder / "shard-00000.tar", Source(folder).fingerprint
    data = bytearray(tar.read_bytes())
    if how == "size":
        tar.write_bytes(data + b"x")
    elif how == "content":
        data[700] ^= 1
        tar.write_bytes(data)
    elif how == "index":
        path = folder / "shard-00000.idx.jsonl"
        path.write_text(path.read_text().replace("答 3", "答 4"))
    elif how == "missing":
        tar.unlink()
    else:
        facts = json.loads((folder / "source.json").read_text())
        facts["shards"][0]["sha256"] = "0" * 64
        (folder / "source.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=fingerprint):
        Source(folder)


def test_deep_check_finds_a_change_behind_an_old_time(tmp_path):
    folder = make(tmp_path / "s")
    tar = folder / "shard-00000.tar"
    before = tar.stat()
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="content"):
        Source(folder, deep=True)


@pytest.mark.parametrize("key", ["", "a.b", "../a", "/a", "a//b", "a/..", "__x", "a b", "a\n"])
def test_bad_keys(tmp_path, key):
    with ShardWriter(tmp_path / "s", "demo") as w:
        with pytest.raises(BadSample):
            w.write(key, sample(), {})
        w.write("fine/key", sample(), {})
    assert Source(tmp_path / "s").keys == ["fine/key"]


def test_writer_refuses_twice_the_same_key_and_a_full_folder(tmp_path):
    with ShardWriter(tmp_path / "s", "demo") as w:
        w.write("a", sample(), {})
        with pytest.raises(UserError, match="unique"):
            w.write("a", sample(), {})
    with pytest.raises(UserError, match="not empty"):
        ShardWriter(tmp_path / "s", "demo")


@pytest.mark.parametrize("bad, reason", [
    ({}, "no messages"), ({"messages": []}, "no messages"), ({"messages": [3]}, "lacks role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "assistant", "content": 3}]}, "neither text"),
    ({"messages": [{"role": "assistant", "content": [{"type": "audio"}]}]}, "unknown kind"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}]},
                   {"role": "assistant", "content": "x"}]}, "not in the shard"),
    ({"messages": [{"role": "assistant", "content": "\ud800"}], "media": {}}, "UTF-8"),
])  # fmt: skip
def test_bad_samples_are_refused_by_the_writer(tmp_path, bad, reason):
    with ShardWriter(tmp_path / "s", "demo") as w, pytest.raises(BadSample, match=reason):
        w.write("a", bad, {})


def test_nothing_appears_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "s", "demo") as w:
        w.write("a", sample(), {})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    with ShardWriter(tmp_path / "s", "demo") as w:
        w.write("a", sample(), {})

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(w, "_put", full)
        with pytest.raises(UserError, match="No space left"):
            w.write("b", sample(), {})
        monkeypatch.undo()


def test_no_source_json(tmp_path):
    with pytest.raises(UserError, match=r"source\.json"):
        Source(tmp_path)
