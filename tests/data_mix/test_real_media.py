"""Media nobody made for us, from file to batch: all is packed and decoded; what is skipped has a right reason.

The importer's own counts and reasons on these folders are in test_importers.py.
"""

import pytest

from data_mix.loader import Loader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from data_mix.shards import Source
from tests.data_mix.test_importers import run


def all_through_the_packer(folder, processor, tokenizer):
    """Draw packs until every sample was in one: none refused, none bad, and each batch has something to learn."""
    plan = PackPlan(Mix([SourceSpec(folder, 1.0, "samples")]), processor, tokenizer, 2048, 1536)
    assert not plan.refused and not plan.turns
    left = set(Source(folder).keys)
    with Loader(plan, packs_per_step=1, workers=1) as loader:
        for _ in range(10 * len(left)):
            (batch,) = next(loader)
            assert batch.loss_mask.any() and len(batch.input_ids) <= 2048
            left -= {name.rsplit("#", 1)[0].split("/", 2)[2] for name in batch.draws}
            if not left:
                break
        assert not left and not loader.stats.bad


def test_clips(shared_data, tmp_path, processor, tokenizer):
    captions = shared_data / "videos/clips_dev.jsonl"
    report, _ = run("folder", shared_data / "videos/lite", tmp_path / "out", captions=captions)
    assert report.samples == 29 and not report.skipped
    all_through_the_packer(tmp_path / "out", processor, tokenizer)


def test_conversations(shared_data, tmp_path, processor, tokenizer):
    """39 conversations; the 6 about sound wait for the audio stages."""
    report, _ = run("llava", shared_data / "videos/llm_demo", tmp_path / "out")
    assert report.samples == 33 and report.reasons() == {"audio is not supported yet": 6}
    assert {b.shard for b in report.skipped} == {"mllm_audio_demo.json", "mllm_video_audio_demo.json"}
    all_through_the_packer(tmp_path / "out", processor, tokenizer)


def test_photos(shared_data, tmp_path, processor, tokenizer):
    rows = (shared_data / "images/flickr8k_1000/captions_val.jsonl").read_text().splitlines()[:40]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    report, _ = run("folder", shared_data / "images/flickr8k_1000", tmp_path / "out",
                    captions=tmp_path / "captions.jsonl", check=False)  # fmt: skip
    assert report.samples == 40 and report.reasons() == {"no caption": 860}
    all_through_the_packer(tmp_path / "out", processor, tokenizer)


@pytest.mark.slow
def test_all_photos(shared_data, tmp_path, processor, tokenizer):
    report, _ = run("folder", shared_data / "images/flickr8k_1000", tmp_path / "out")
    assert report.samples == 900 and not report.skipped
    all_through_the_packer(tmp_path / "out", processor, tokenizer)
