"""lint finds what would go wrong in a run; stats count what is there."""

import io
import json
import tarfile

import pytest

from data_mix import shards
from data_mix.lint import lint
from data_mix.shards import ShardWriter, Source
from data_mix.stats import stats
from mm.common.errors import UserError
from mm.prompt import sample_tokens
from tests.data_mix.made import image_facts, picture, turn
from tests.data_mix.test_index import WANTED, hostile


def test_a_good_source_is_clean(real_source):
    report = lint(real_source, decode=True, quiet=True)
    assert (report.sources, report.samples, report.exit_code) == (1, 24, 0) and "no bad" in str(report)


def test_what_is_wrong_is_named(tmp_path):
    with ShardWriter(tmp_path / "s", "s") as w:
        w.write("good", {"messages": turn("ok", "png")}, {"png": picture()})
        w.write("facts", {"messages": turn("ok", "png"), "media": {"png": image_facts(9, 9)}}, {"png": picture()})
        w.write("text", {"messages": turn("ok", "png"), "media": {"png": image_facts()}}, {"png": b"text"})
        w.write("spare", {"messages": turn("ok")}, {"png": picture()})
    report = lint(tmp_path / "s", quiet=True)
    assert {b.key: b.reason for b in report.bad} == {
        "facts": "the media facts on record are not those of the file", "text": "not an image",
        "spare": "media that no part names",
    }  # fmt: skip
    assert report.exit_code == 1 and "s/shard" not in str(report) and "shard-00000.tar/text" in str(report)


def test_an_index_that_lies_about_its_tar(tmp_path):
    """Consistent hashes, but the index says other words than the tar."""
    with ShardWriter(tmp_path / "s", "s") as w:
        w.write("a", {"messages": turn("truth", "png")}, {"png": picture()})
    path = tmp_path / "s/shard-00000.idx.jsonl"
    path.write_text(path.read_text().replace("truth", "lies!"))
    facts = json.loads((tmp_path / "s/source.json").read_text())
    facts["shards"][0]["index_sha256"] = shards.sha256_of(path)
    facts["fingerprint"] = shards.fingerprint_of(facts["shards"])
    (tmp_path / "s/source.json").write_text(json.dumps(facts))
    assert lint(tmp_path / "s", quiet=True).reasons() == {"the JSON in the tar is not the one in the index": 1}


def test_many_sources_and_a_broken_one(tmp_path, real_source):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / "sources" / name, name) as w:
            w.write("k", {"messages": turn("ok")}, {})
    (tmp_path / "sources/b/shard-00000.tar").write_bytes(b"short")
    report = lint(tmp_path, quiet=True)
    assert (report.sources, report.samples, len(report.broken), report.exit_code) == (2, 1, 1, 1)
    assert "fingerprint" in report.broken[0]


def test_foreign_tars_are_checked_without_an_index(tmp_path):
    hostile(tmp_path / "a.tar")
    report = lint(tmp_path, quiet=True)
    assert report.samples == 3 and {b.reason for b in report.bad} == set(WANTED.values())
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x"), io.BytesIO())
    assert lint(tmp_path, quiet=True).exit_code == 1


def test_nothing_there(tmp_path):
    for command in (lint, lambda f, quiet: stats(f, None, None)):
        with pytest.raises(UserError, match=r"source\.json"):
            command(tmp_path, quiet=True)


def test_stats_add_up(real_source, processor, tokenizer):
    found = stats(real_source, processor, tokenizer, token_budget=2000, visual_budget=600, quiet=True)
    source = Source(real_source)
    sizes = [sample_tokens(source.sample(i), processor, tokenizer) for i in range(len(source))]
    assert (found.samples, found.tokens, found.visual) == (24, sum(s[0] for s in sizes), sum(s[1] for s in sizes))
    assert sum(found.histogram.values()) == 24 and found.families["video_caption"]["samples"] == 6
    assert sum(f["tokens"] for f in found.families.values()) == found.tokens
    assert 0.9 < found.packing["tokens"] <= 1 and "packing" in str(found)
