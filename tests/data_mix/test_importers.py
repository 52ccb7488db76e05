"""Other people's data becomes a source folder; what cannot be used is named."""

import importlib
import io
import json
import sys
import tarfile
import zipfile

import pytest

from data_mix.importers import import_data
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.shards import Source
from mm.common.errors import UserError
from tests.data_mix.made import clip, picture
from tests.data_mix.test_index import WANTED, hostile


def run(kind, src, out, **kwargs):
    report = import_data(kind, src, out, quiet=True, **kwargs)
    assert len(Source(out)) == report.samples
    return report, Source(out)


@pytest.fixture
def media(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.png").write_bytes(picture(1))
    (tmp_path / "in/sub/b.png").write_bytes(picture(2))
    (tmp_path / "in/c.mp4").write_bytes(clip(3))
    (tmp_path / "in/text.png").write_bytes(b"I am text")
    (tmp_path / "in/cut.mp4").write_bytes(clip(3)[:-200])
    (tmp_path / "in/empty.mp4").write_bytes(b"")
    return tmp_path / "in"


def shown(source):
    return [[(m["role"], m["content"]) for m in row["sample"]["messages"]] for row in source.rows()]


def talk(user, answer="yes", **lists):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **lists}


def test_llava_forms(media, tmp_path):
    rows = [
        talk("<image>\nwhat?<video>", images=["a.png"], videos=["c.mp4"]),
        {"id": "x", "image": "sub/b.png", "system": "be brief", "conversations": [
            {"from": "human", "value": "what?<image>"}, {"from": "gpt", "value": "b"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]},
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "elsewhere/b.png"}}]},
            {"role": "assistant", "content": "ok"}]},
        talk("only text"),
        talk("<image><image>", images=["a.png", "a.png"]),
    ]  # fmt: skip
    (media / "data.json").write_text(json.dumps(rows))
    report, source = run("llava", media / "data.json", tmp_path / "out")
    assert not report.skipped and dict(report.families) == {"video_qa": 1, "vqa": 3, "text": 1}
    image, video = {"type": "image", "image": "0.png"}, {"type": "video", "video": "1.mp4"}
    talks = shown(source)
    assert talks[0][0] == ("user", [image, {"type": "text", "text": "\nwhat?"}, video])
    assert talks[1][0] == ("system", "be brief") and len(talks[1]) == 5
    assert talks[1][1] == ("user", [{"type": "text", "text": "what?"}, image])
    assert talks[2][0] == ("user", [{"type": "text", "text": "see"}, image])
    assert talks[3][0] == ("user", "only text") and talks[4][0] == ("user", [image, image])
    assert source.member(1, "0.png") == picture(2) and source.sample(0)["media"]["1.mp4"]["frames"] == 12


def test_what_llava_rows_do_wrong_is_named(media, tmp_path):
    rows = {
        '{"messages": [': "broken JSON",
        b'{"messages": "\xe9"}': "text is not UTF-8",
        "[1]": "sample is not a JSON object",
        "{}": "no messages",
        json.dumps(talk("<image>", images=["gone.png"])): "media file is missing",
        json.dumps(talk("<image>", images=["../../etc/x.png"])):
            "media path leads out of the media folder (media_root)",
        json.dumps(talk("<image>", images=["https://x/a.png"])): "media is a URL; download it first",
        json.dumps(talk("<image><image>", images=["a.png"])): "more <image> marks than images",
        json.dumps(talk("what?", images=["a.png"])): "fewer <image> marks than images",
        json.dumps(talk("<image>", images=[7])): "a media list holds something other than paths",
        json.dumps(talk("what?", "<image>", images=["a.png"])): "an assistant turn holds media",
        json.dumps(talk("<audio>what?", audios=["a.wav"])): "audio is not supported yet",
        json.dumps(talk("<audio>what?")): "audio is not supported yet",
        json.dumps(talk("<image>", images=["text.png"])): "not an image",
        json.dumps(talk("<video>", videos=["cut.mp4"])): "0 frames",
        json.dumps(talk("<video>", videos=["empty.mp4"])): "empty file",
        json.dumps({"messages": [{"role": "tool", "content": "x"}]}): "a role other than system, user and assistant",
        json.dumps({"messages": [{"role": "user", "content": "x"}]}): "no assistant turn to learn from",
        json.dumps(talk("\ud800")): "text is not UTF-8",
        json.dumps(talk([{"type": "image"}])): "more <image> marks than images",
        json.dumps(talk([{"type": "box"}])): "unknown kind of part",
    }  # fmt: skip
    lines = [k if isinstance(k, bytes) else k.encode() for k in rows]
    (media / "data.jsonl").write_bytes(b"\n".join([*lines, json.dumps(talk("fine")).encode()]))
    report, source = run("llava", media / "data.jsonl", tmp_path / "out")
    assert [b.reason for b in report.skipped] == list(rows.values())
    assert len(source) == 1 and report.skipped[4].key == "data-0000004" and report.skipped[4].shard == "data.jsonl"
    listed = json.loads((tmp_path / "out/skipped.json").read_text())
    assert len(listed) == len(rows) and "skipped 3 x text is not UTF-8" not in str(report)


def test_folder_with_texts_tables_zips_and_names(media, tmp_path):
    (media / "a.txt").write_text("a 红 circle\n")
    (media / "c.txt").write_text("a clip")
    report, source = run("folder", media, tmp_path / "beside")
    assert [t[1][1] for t in shown(source)] == ["a 红 circle", "a clip"]
    assert report.reasons() == {"no caption": 4}
    table = [{"file": "x/b.png", "captions": ["one", "two"]}, {"file": "text.png", "caption": "t"}, {"file": "q"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, table)))
    report, source = run("folder", media / "sub", tmp_path / "jsonl", captions=tmp_path / "t.jsonl")
    assert source.sample(0)["meta"] == {"file": "b.png", "captions": ["one", "two"]}
    assert report.reasons() == {"row has no caption": 1}
    (tmp_path / "t.tsv").write_text("image\tcaption\nb.png\thello, you\n")
    _, source = run("folder", media / "sub", tmp_path / "tsv", captions=tmp_path / "t.tsv")
    assert shown(source)[0][1][1] == "hello, you"
    (tmp_path / "t.csv").write_text('b.png,"no, header"\n')
    _, source = run("folder", media / "sub", tmp_path / "csv", captions=tmp_path / "t.csv")
    assert shown(source)[0][1][1] == "no, header"
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip/x.zip", "w") as z:
        z.writestr("../../red_circle.png", picture(5))
    _, source = run("folder", tmp_path / "zip", tmp_path / "names", captions="name")
    assert shown(source)[0][1][1] == "red circle" and source.member(0, "0.png") == picture(5)


def test_datasets_folder_and_parquet(tmp_path):
    datasets = importlib.import_module("datasets")
    images = [{"bytes": picture(i), "path": None} for i in range(2)] + [{"bytes": b"text", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "caption": ["one", "two", "bad"]}, features=features)
    table.save_to_disk(tmp_path / "disk")
    report, source = run("datasets", tmp_path / "disk", tmp_path / "out1")
    assert report.samples == 2 and report.reasons() == {"not an image": 1}
    assert source.member(1, "0.jpg") == picture(1) and shown(source)[1][1] == ("assistant", "two")
    (tmp_path / "pq").mkdir()
    talks = datasets.Dataset.from_list([
        {"messages": talk("<image>what?")["messages"], "images": [images[0]]},
        {"messages": talk("plain")["messages"], "images": []},
    ])  # fmt: skip
    talks.to_parquet(tmp_path / "pq/x.parquet")
    report, source = run("datasets", tmp_path / "pq", tmp_path / "out2")
    assert report.samples == 2 and source.member(0, "0.jpg") == picture(0)
    vqa = datasets.Dataset.from_list([{"image": images[0], "question": "q?", "answer": "a"}])
    vqa.to_parquet(tmp_path / "vqa.parquet")
    assert shown(run("datasets", tmp_path / "vqa.parquet", tmp_path / "out3")[1])[0][1] == ("assistant", "a")
    with pytest.raises(UserError, match="save_to_disk"):
        import_data("datasets", tmp_path / "out1", tmp_path / "x", quiet=True)


def test_without_the_datasets_package(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        import_data("datasets", tmp_path, tmp_path / "out", quiet=True)


def test_webdataset_with_captions_and_with_traps(tmp_path):
    (tmp_path / "in").mkdir()
    hostile(tmp_path / "in/a.tar")
    with tarfile.open(tmp_path / "in/b.tar", "w") as tar:
        for name, data in (("p.png", picture(1)), ("p.txt", b"a caption"), ("q.txt", b"alone")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report, source = run("webdataset", tmp_path / "in", tmp_path / "out")
    assert source.keys == ["good1", "good2", "p"] and source.sample(2)["messages"][1]["content"] == "a caption"
    named = {b.key: b.reason for b in report.skipped}
    assert named.pop("q") == "no caption" and named == WANTED


def test_webdataset_can_be_indexed_in_place(tmp_path):
    before = hostile(tmp_path / "a.tar").read_bytes()
    report, source = run("webdataset", tmp_path, tmp_path)
    assert source.keys == ["good1", "good2"] and (tmp_path / "a.tar").read_bytes() == before
    assert {b.key: b.reason for b in report.skipped} == WANTED and dict(report.families) == {"unnamed": 2}


def test_mistakes(tmp_path, media):
    (media / "x.json").write_text("not json")
    for kind, src, said, kwargs in (
        ("lava", media, "did you mean 'llava'", {}), ("llava", tmp_path / "no", "does not exist", {}),
        ("llava", media / "x.json", "is not JSON", {}), ("llava", media / "sub", r"no \.json", {}),
        ("folder", media, "has no captions", {}), ("folder", media, "not a file", {"captions": "nowhere"}),
        ("webdataset", media, r"no \.tar", {}), ("webdataset", media, "takes no captions", {"captions": "name"}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            import_data(kind, src, tmp_path / "out", quiet=True, **kwargs)
        assert not (tmp_path / "out").exists()


# ---- real data of others


@pytest.mark.parametrize("kind, src, samples, skipped, kwargs", [
    ("llava", "videos/llm_demo/mllm_video_demo.json", 3, {}, {}),
    ("llava", "videos/llm_demo", 33, {"audio is not supported yet": 6}, {}),
    ("folder", "videos/lite", 29, {}, {"captions": "videos/clips_dev.jsonl"}),
    ("folder", "videos/codec", 10, {"damaged video": 1}, {"captions": "name"}),
    ("folder", "images/flickr8k_1000", 900, {}, {}),
])  # fmt: skip
def test_real_data_goes_through_importer_and_packer(
    shared_data, tmp_path, processor, tokenizer, kind, src, samples, skipped, kwargs
):
    if kwargs.get("captions", "name") != "name":
        kwargs = {"captions": shared_data / kwargs["captions"]}
    report, _ = run(kind, shared_data / src, tmp_path / "out", **kwargs)
    assert report.samples == samples and report.reasons() == skipped
    plan = PackPlan(Mix([SourceSpec(tmp_path / "out")]), processor, tokenizer, 2048, 512)
    assert not plan.refused and plan.pack(0)
