"""Tars that others wrote, some of them hostile: the good samples are used, the rest is named."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_mix.index import build_index
from data_mix.shards import Source
from mm.common.errors import UserError


def jpeg(size=(32, 24), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def good(text="a"):
    part = {"type": "image", "image": "jpg"}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": text}]
    return json.dumps({"messages": turns, "media": {"jpg": {"kind": "image", "width": 9, "height": 9}}}).encode()


def add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def pair(tar, key, text="a"):
    add(tar, f"{key}.json", good(text))
    add(tar, f"{key}.jpg", jpeg())


def hostile(path):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        pair(tar, "good1")
        add(tar, "../evil.json", good())
        add(tar, "/etc/passwd.json", good())
        add(tar, "link.json", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.json", type=tarfile.LNKTYPE, linkname="good1.json")
        add(tar, "dev.json", type=tarfile.CHRTYPE)
        add(tar, "fifo.json", type=tarfile.FIFOTYPE)
        add(tar, "nojson.jpg", jpeg())
        add(tar, "broken.json", b"{")
        add(tar, "latin.json", '{"messages": "\xe9"}'.encode("latin-1"))
        add(tar, "surrogate.json", b'{"messages": [{"role": "text", "content": "\\ud800"}]}')
        add(tar, "nan.json", b'{"messages": NaN}')
        add(tar, "array.json", b"[1]")
        add(tar, "deep.json", b"[" * 100_000)
        add(tar, "noimage.json", good())
        add(tar, "textjpg.json", good())
        add(tar, "textjpg.jpg", b"hello, I am text")
        add(tar, "twice.json", good())
        add(tar, "twice.json", good("b"))
        add(tar, "nodot", b"x")
        add(tar, "bad key.json", good())
        pair(tar, "good1", "again")
        pair(tar, "good2")
    return path


WANTED = {
    "../evil.json": "member name leaves the shard", "/etc/passwd.json": "member name leaves the shard",
    "link.json": "member is a link", "hard.json": "member is a link",
    "dev.json": "member is not a regular file", "fifo.json": "member is not a regular file",
    "nojson": "no JSON for this key", "broken": "broken JSON", "latin": "text is not UTF-8",
    "surrogate": "text is not UTF-8", "nan": "broken JSON", "array": "sample is not a JSON object",
    "deep": "broken JSON", "noimage": "a part names media that is not in the shard",
    "textjpg": "not an image", "twice": "a member comes twice",
    "nodot": "member name has no key and suffix",
    "bad key.json": "key is empty or has dots, spaces or odd slashes", "good1": "duplicate key",
}  # fmt: skip


def test_every_bad_member_is_named_and_the_good_ones_are_used(tmp_path):
    hostile(tmp_path / "a.tar")
    _, bad = build_index(tmp_path, "foreign")
    assert {b.key: b.reason for b in bad} == WANTED and {b.shard for b in bad} == {"a.tar"}
    source = Source(tmp_path)
    assert source.keys == ["good1", "good2"]
    assert source.sample(0)["media"]["jpg"] == {"kind": "image", "width": 32, "height": 24}
    assert source.member(1, "jpg") == jpeg()
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "a.idx.jsonl", "source.json", ".verified.json"}


@pytest.mark.parametrize("share", [0.35, 0.5, 0.9, 0.999])
def test_a_shard_that_ends_early_keeps_what_is_whole(tmp_path, share):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(10):
            pair(tar, f"k{i}")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: int(len(data.rstrip(b"\0")) * share)])
    _, bad = build_index(tmp_path, "foreign")
    n = len(Source(tmp_path))
    assert 0 < n <= 10 and any(b.reason == "the shard ends early" for b in bad)
    assert n >= int(10 * share) - 1


def test_garbage_after_a_good_sample_and_headers_of_absurd_size(tmp_path):
    for name, tail in (("a", b"\xff" * 4096), ("b", _header_of_size(1 << 40))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            pair(tar, f"{name}1")
        whole = (tmp_path / f"{name}.tar").read_bytes().rstrip(b"\0")
        whole += b"\0" * (-len(whole) % 512)
        (tmp_path / f"{name}.tar").write_bytes(whole + tail)
    _, bad = build_index(tmp_path, "foreign")
    assert Source(tmp_path).keys == ["a1", "b1"]
    assert {b.shard for b in bad} == {"a.tar", "b.tar"}


def _header_of_size(size):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    return info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024


def test_non_utf8_member_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        pair(tar, "good")
        add(tar, "caf\xe9.json", good())
    _, bad = build_index(tmp_path, "foreign")
    assert [b.reason for b in bad] == ["member name is not UTF-8"] and len(Source(tmp_path)) == 1


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar"):
        build_index(tmp_path, "x")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no sample"):
        build_index(tmp_path, "x")
